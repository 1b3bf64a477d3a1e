// Child processes of tests: start, signal, wait, and what they printed.
#ifndef KRAIT_TESTS_SUPPORT_PROCESS_H_
#define KRAIT_TESTS_SUPPORT_PROCESS_H_

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "kernels/base/check.h"

namespace krait {

struct ProcessResult {
  int code = -1;  // the exit code, or 128 + the signal that ended it
  std::string out, err;
  int64_t peak_bytes = 0;  // of resident memory
};

// A running child; its output goes to unnamed temporary files. Killed when the object goes first.
class Process {
 public:
  // argv[0] is a path. `variables` are added to the environment.
  explicit Process(const std::vector<std::string>& argv,
                   const std::map<std::string, std::string>& variables = {}) {
    out_ = TemporaryFile();
    err_ = TemporaryFile();
    std::vector<char*> words;
    for (const std::string& word : argv) words.push_back(const_cast<char*>(word.c_str()));
    words.push_back(nullptr);
    pid_ = fork();
    KRAIT_CHECK(pid_ >= 0);
    if (pid_ > 0) return;
    for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
    const int none = open("/dev/null", O_RDONLY);
    dup2(none, STDIN_FILENO);
    dup2(out_, STDOUT_FILENO);
    dup2(err_, STDERR_FILENO);
    execv(words[0], words.data());
    _exit(127);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (pid_ > 0) {
      Signal(SIGKILL);
      Wait();
    }
    close(out_);
    close(err_);
  }

  void Signal(int signal) const {
    if (pid_ > 0) kill(pid_, signal);
  }
  bool running() {
    if (pid_ <= 0) return false;
    if (wait4(pid_, &status_, WNOHANG, &usage_) == 0) return true;
    pid_ = -1;
    return false;
  }
  ProcessResult Wait() {
    if (pid_ > 0) {
      KRAIT_CHECK(wait4(pid_, &status_, 0, &usage_) == pid_);
      pid_ = -1;
    }
    return {WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_), Content(out_),
            Content(err_), int64_t{usage_.ru_maxrss} * 1024};
  }
  std::string out() const { return Content(out_); }  // so far
  pid_t pid() const { return pid_; }                 // -1: it has ended

 private:
  static int TemporaryFile() {
    std::string name = (std::filesystem::temp_directory_path() / "krait_out_XXXXXX").string();
    const int fd = mkstemp(name.data());
    KRAIT_CHECK(fd >= 0 && unlink(name.c_str()) == 0);
    return fd;
  }
  static std::string Content(int fd) {
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = pread(fd, buffer, sizeof(buffer), static_cast<off_t>(text.size()))) > 0;) {
      text.append(buffer, static_cast<size_t>(n));
    }
    return text;
  }

  pid_t pid_ = -1;
  int status_ = 0;
  rusage usage_{};
  int out_ = -1, err_ = -1;
};

inline ProcessResult RunProcess(const std::vector<std::string>& argv,
                                const std::map<std::string, std::string>& variables = {}) {
  return Process(argv, variables).Wait();
}

// What mpirun needs in tests: more ranks than cores, as root too, in a container too. Under the
// sanitizers: MPI leaks at its end, and deaths stay what they are.
inline std::map<std::string, std::string> MpiVariables() {
  return {{"ASAN_OPTIONS", "detect_leaks=0:handle_segv=0:handle_abort=0"},
          {"OMP_NUM_THREADS", "1"},
          {"OMPI_ALLOW_RUN_AS_ROOT", "1"},
          {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
          {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
          {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"}};
}

}  // namespace krait

#endif  // KRAIT_TESTS_SUPPORT_PROCESS_H_
