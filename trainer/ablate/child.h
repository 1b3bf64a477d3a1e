// A child process: a command with its share of the machine, its output in a file.
#ifndef KRAIT_TRAINER_ABLATE_CHILD_H_
#define KRAIT_TRAINER_ABLATE_CHILD_H_

#include <sys/types.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

struct ChildOptions {
  std::vector<std::string> words;  // the first one is looked up in PATH
  std::vector<std::pair<std::string, std::string>> environment;  // over this process's own
  std::vector<int> cores;                                        // that it may use; none: all
  std::string log;          // standard output and error are appended to it
  bool holds_stop = false;  // SIGUSR1 waits until the program takes it (HoldStopSignal), from its
                            // first moment on
};

// In a process group of its own, so that a Ctrl-C of the terminal does not reach it; where this
// process dies, however that happens, the kernel sends it SIGUSR1 (save and stop). Movable; waits
// for nothing when it is destroyed.
class Child {
 public:
  static absl::StatusOr<Child> Start(const ChildOptions& options);  // kCannotSave, kInternal

  // Once it has ended: its exit code, 128 + n where signal n ended it. Does not wait.
  std::optional<int> Poll();
  void Signal(int signal) const;

 private:
  pid_t pid_ = 0;
};

// The path of the program that this process runs.
absl::StatusOr<std::string> OwnProgram();

// The cores that this process may use, ascending.
std::vector<int> OwnCores();

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_CHILD_H_
