#include "parallel/watchdog.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "parallel/collective_log.h"
#include "parallel/thread_stacks.h"

namespace krait {
namespace {

constexpr double kLongPhaseFactor = 10;
constexpr double kTickSeconds = 0.5;
// All ranks see a hang at about the same time; the first one to leave ends the others.
constexpr double kOthersSeconds = 3;
constexpr int kReportSeconds = 8;  // a disk may be what hangs

std::atomic<uint64_t> g_reported = 0;
std::atomic<int> g_long_phases = 0;
std::atomic<int> g_exit_code = 0;

uint64_t Progress() { return g_reported + CollectivesSoFar(); }

// Not by stdio: a thread that hangs may hold its lock.
void Write(int fd, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = write(fd, text.data() + at, text.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nobody is left to be told
    at += static_cast<size_t>(n);
  }
}

std::string Now() {
  const std::time_t now = std::time(nullptr);
  tm parts = {};
  char text[32] = "";
  if (gmtime_r(&now, &parts) != nullptr) {
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  }
  return text;
}

std::string Seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g s", seconds);
  return text;
}

}  // namespace

void ReportProgress() { ++g_reported; }

LongPhase::LongPhase() { ++g_long_phases; }
LongPhase::~LongPhase() {
  --g_long_phases;
  ReportProgress();
}

void ExitWithin(int seconds, ExitCode code) {
  g_exit_code = static_cast<int>(code);
  struct sigaction action = {};
  action.sa_handler = [](int) { _exit(g_exit_code); };
  sigemptyset(&action.sa_mask);
  KRAIT_CHECK(sigaction(SIGALRM, &action, nullptr) == 0);
  alarm(static_cast<unsigned>(seconds));
}

Watchdog::Watchdog(int rank, double seconds, std::string folder)
    : rank_(rank), seconds_(seconds), folder_(std::move(folder)) {
  PrepareThreadStacks();
  // Signals that ask to stop are for the other threads.
  sigset_t all, before;
  sigfillset(&all);
  KRAIT_CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
  thread_ = std::thread([this] { Watch(); });
  KRAIT_CHECK(pthread_sigmask(SIG_SETMASK, &before, nullptr) == 0);
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Watchdog::Set(double seconds, const std::string& folder) {
  const std::lock_guard lock(mutex_);
  seconds_ = seconds;
  folder_ = folder;
}

void Watchdog::Watch() {
  std::unique_lock lock(mutex_);
  uint64_t seen = Progress();
  double idle = 0, before = MonotonicSeconds();
  while (!ending_) {
    const double tick = std::min(kTickSeconds, seconds_ / 10);
    changed_.wait_for(lock, std::chrono::duration<double>(tick));
    const double now = MonotonicSeconds();
    // Whoever stopped this process (a scheduler that suspends the job, say) has stopped its clock.
    idle += std::min(now - before, 2 * tick);
    before = now;
    if (const uint64_t progress = Progress(); progress != seen) {
      seen = progress;
      idle = 0;
    }
    const double limit = seconds_ * (g_long_phases > 0 ? kLongPhaseFactor : 1);
    if (!ending_ && idle >= limit) End(limit, folder_);
  }
}

void Watchdog::End(double seconds, const std::string& folder) const {
  sigset_t alarm_only;
  sigemptyset(&alarm_only);
  sigaddset(&alarm_only, SIGALRM);
  (void)pthread_sigmask(SIG_UNBLOCK, &alarm_only, nullptr);
  ExitWithin(kReportSeconds, ExitCode::kCollective);
  const double begin = MonotonicSeconds();
  const CollectiveReport collectives = ReportCollectives();
  const std::string path = folder + "/hang-rank-" + std::to_string(rank_) + ".txt";
  const std::string what =
      "rank " + std::to_string(rank_) + ": no progress for " + Seconds(seconds) + ", " +
      (collectives.current.empty() ? "in no collective" : "in " + collectives.current);
  Write(STDERR_FILENO, "krait: " + what + "; stacks and last collectives: " + path + "\n");
  int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) {
    Write(STDERR_FILENO,
          "krait: cannot write " + path + " (" + std::strerror(errno) + "), so here it is\n");
    fd = STDERR_FILENO;
  }
  char host[256] = "?";
  (void)gethostname(host, sizeof host - 1);
  std::string text = Now() + " " + what + "; process " + std::to_string(getpid()) + " on " + host +
                     "\n\nlast collectives, the newest first:\n";
  for (const std::string& line : collectives.lines) text += line + "\n";
  Write(fd, text +
                "\nthreads (c++filt makes names of C++ readable, addr2line -Cfe PROGRAM +ADDRESS "
                "finds those that are missing):\n");
  WriteThreadStacks(fd);
  Write(fd, "\n");
  const double left = kOthersSeconds - (MonotonicSeconds() - begin);
  if (left > 0) usleep(static_cast<useconds_t>(left * 1e6));
  _exit(static_cast<int>(ExitCode::kCollective));
}

}  // namespace krait
