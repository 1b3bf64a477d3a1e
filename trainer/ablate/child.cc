#include "trainer/ablate/child.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

extern char** environ;

namespace krait {
namespace {

constexpr int kCannotStart = 127;  // as a shell has it

std::vector<char*> Pointers(std::vector<std::string>* words) {
  std::vector<char*> pointers;
  for (std::string& word : *words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  return pointers;
}

std::vector<std::string> Environment(
    const std::vector<std::pair<std::string, std::string>>& changes) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const bool changed = [&] {
      for (const auto& [name, value] : changes) {
        if (text.starts_with(name) && text.substr(name.size()).starts_with('=')) return true;
      }
      return false;
    }();
    if (!changed) all.emplace_back(text);
  }
  for (const auto& [name, value] : changes) all.push_back(absl::StrCat(name, "=", value));
  return all;
}

}  // namespace

absl::StatusOr<Child> Child::Start(const ChildOptions& options) {
  KRAIT_CHECK(!options.words.empty());
  // All that allocates comes before fork(): the child may only call what is safe in a handler.
  std::vector<std::string> words = options.words;
  std::vector<std::string> environment = Environment(options.environment);
  const std::vector<char*> argv = Pointers(&words), envp = Pointers(&environment);
  cpu_set_t cores;
  CPU_ZERO(&cores);
  for (const int core : options.cores) CPU_SET(static_cast<size_t>(core), &cores);
  const int log = open(options.log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log < 0) {
    return Error(ExitCode::kCannotSave,
                 absl::StrCat("cannot write ", options.log, ": ", std::strerror(errno)));
  }
  sigset_t stop;
  sigemptyset(&stop);
  sigaddset(&stop, SIGUSR1);
  const int held = options.holds_stop ? SIG_BLOCK : SIG_UNBLOCK;
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) {
    const int reason = errno;
    close(log);
    return Error(ExitCode::kInternal,
                 absl::StrCat("cannot start ", options.words.front(), ": ", std::strerror(reason)));
  }
  if (pid == 0) {
    const int null = open("/dev/null", O_RDONLY);
    const bool ready = null >= 0 && setpgid(0, 0) == 0 && prctl(PR_SET_PDEATHSIG, SIGUSR1) == 0 &&
                       getppid() == parent && dup2(null, STDIN_FILENO) >= 0 &&
                       dup2(log, STDOUT_FILENO) >= 0 && dup2(log, STDERR_FILENO) >= 0;
    if (ready && !options.cores.empty()) {
      // Where it may not be set, the threads share what there is.
      (void)sched_setaffinity(0, sizeof(cores), &cores);
    }
    // What this process ignores its children would, too.
    for (const int signal : {SIGPIPE, SIGINT, SIGXFSZ, SIGUSR1, SIGTERM, SIGHUP}) {
      (void)std::signal(signal, SIG_DFL);
    }
    (void)sigprocmask(held, &stop, nullptr);
    if (ready) execvpe(argv[0], argv.data(), envp.data());
    _exit(kCannotStart);
  }
  close(log);
  Child child;
  child.pid_ = pid;
  return child;
}

std::optional<int> Child::Poll() {
  int status = 0;
  pid_t ended = 0;
  do {
    ended = waitpid(pid_, &status, WNOHANG);
  } while (ended < 0 && errno == EINTR);
  KRAIT_CHECK(ended >= 0);
  if (ended == 0) return std::nullopt;
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

void Child::Signal(int signal) const { (void)kill(pid_, signal); }

absl::StatusOr<std::string> OwnProgram() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) {
    return Error(ExitCode::kInternal, "cannot find this program's file: " + error.message());
  }
  return self.string();
}

std::vector<int> OwnCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {0};
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(static_cast<size_t>(i), &set)) cores.push_back(i);
  }
  return cores;
}

}  // namespace krait
