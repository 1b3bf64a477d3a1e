// Keeps two commands from making one folder at the same time.
#ifndef KRAIT_TRAINER_TOOLS_OUTPUT_LOCK_H_
#define KRAIT_TRAINER_TOOLS_OUTPUT_LOCK_H_

#include <string>

#include "kernels/base/status.h"

namespace krait {

// While it lives, the file PATH.lock exists and is locked. One that a killed process left is taken
// over. Where no such file can be made or locked nothing is held: what is written beside it says
// what is wrong.
class OutputLock {
 public:
  // kConfig where another process has it: "OPTION PATH is being written by another krait, ...".
  static absl::StatusOr<OutputLock> Acquire(const std::string& option, const std::string& path);
  // False where there are no locks: then another process may be writing there.
  bool held() const { return fd_ >= 0; }
  OutputLock() = default;
  OutputLock(OutputLock&& other) noexcept;
  OutputLock& operator=(OutputLock&& other) noexcept;
  ~OutputLock();

 private:
  int fd_ = -1;
  std::string file_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_OUTPUT_LOCK_H_
