#include "parallel/thread_stacks.h"

#include <dirent.h>
#include <execinfo.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/base/check.h"

namespace krait {
namespace {

constexpr int kMaxThreads = 512, kMaxFrames = 64;
constexpr int kAnswerMilliseconds = 1000;

struct Stack {
  std::atomic<pid_t> thread = 0;
  std::atomic<int> frames = -1;  // how many; -1: no answer yet
  std::array<void*, kMaxFrames> addresses{};
};
std::array<Stack, kMaxThreads> g_stacks;
std::atomic<int> g_asked = 0;

// Of no meaning to anybody else: the C library and MPI take the first ones.
int Signal() { return SIGRTMIN + 9; }

pid_t ThisThread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// In the thread that is asked. Each has a place of its own: a late answer disturbs no other.
void Answer(int) {
  const int saved = errno;
  const pid_t self = ThisThread();
  for (int i = 0; i < g_asked; ++i) {
    Stack& stack = g_stacks[static_cast<size_t>(i)];
    if (stack.thread != self || stack.frames >= 0) continue;
    stack.frames = backtrace(stack.addresses.data(), kMaxFrames);
  }
  errno = saved;
}

void Write(int fd, const char* text) {
  for (size_t left = std::strlen(text); left > 0;) {
    const ssize_t n = write(fd, text, left);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nobody is left to be told
    text += n;
    left -= static_cast<size_t>(n);
  }
}

// The first line of a file of a thread; "" when it is gone.
void ReadThreadFile(pid_t thread, const char* name, char* text, size_t size) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/task/%d/%s", thread, name);
  text[0] = 0;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  const ssize_t n = read(fd, text, size - 1);
  close(fd);
  text[n > 0 ? n : 0] = 0;
  text[std::strcspn(text, "\n")] = 0;
}

// The letter after the name in parentheses: R running, S sleeping, D waiting for a disk.
char StateOf(pid_t thread) {
  char text[256];
  ReadThreadFile(thread, "stat", text, sizeof text);
  const char* end = std::strrchr(text, ')');
  return end != nullptr && end[1] == ' ' ? end[2] : '?';
}

}  // namespace

void PrepareThreadStacks() {
  void* frame[1];
  (void)backtrace(frame, 1);  // the first call loads a library
  struct sigaction action = {};
  action.sa_handler = Answer;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  KRAIT_CHECK(sigaction(Signal(), &action, nullptr) == 0);
}

void WriteThreadStacks(int fd) {
  DIR* const threads = opendir("/proc/self/task");
  if (threads == nullptr) return Write(fd, "/proc/self/task cannot be read\n");
  int count = 0;
  bool more = false;
  while (const dirent* entry = readdir(threads)) {
    const pid_t thread = std::atoi(entry->d_name);
    if (thread <= 0 || thread == ThisThread()) continue;
    if (count == kMaxThreads) {
      more = true;
      break;
    }
    g_stacks[static_cast<size_t>(count)].frames = -1;
    g_stacks[static_cast<size_t>(count++)].thread = thread;
  }
  closedir(threads);
  g_asked = count;
  for (int i = 0; i < count; ++i) {
    // A thread that has ended meanwhile is no error.
    (void)syscall(SYS_tgkill, getpid(), g_stacks[static_cast<size_t>(i)].thread.load(), Signal());
  }
  const auto all_answered = [&] {
    for (int i = 0; i < count; ++i) {
      if (g_stacks[static_cast<size_t>(i)].frames < 0) return false;
    }
    return true;
  };
  for (int ms = 0; ms < kAnswerMilliseconds && !all_answered(); ms += 10) usleep(10'000);
  for (int i = 0; i < count; ++i) {
    const Stack& stack = g_stacks[static_cast<size_t>(i)];
    const int frames = stack.frames;
    char name[64], line[160];
    ReadThreadFile(stack.thread, "comm", name, sizeof name);
    std::snprintf(line, sizeof line, "\nthread %d (%s)%s", stack.thread.load(), name,
                  frames >= 0 ? "\n" : "");
    Write(fd, line);
    if (frames >= 0) {
      // The first two are the question itself.
      const int skipped = frames > 2 ? 2 : 0;
      backtrace_symbols_fd(stack.addresses.data() + skipped, frames - skipped, fd);
      continue;
    }
    std::snprintf(line, sizeof line, " does not answer, state %c\n", StateOf(stack.thread));
    Write(fd, line);
  }
  if (more) Write(fd, "\nand further threads\n");
}

}  // namespace krait
