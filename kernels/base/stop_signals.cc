#include "kernels/base/stop_signals.h"

#include <unistd.h>

#include <csignal>
#include <cstring>

#include "kernels/base/check.h"

namespace krait {
namespace {

volatile std::sig_atomic_t g_received = 0;
const char* volatile g_acknowledgement = "";

struct Handled {
  int signal;
  bool stops;  // asks to stop; else ignored
  struct sigaction before;
};
Handled g_handled[] = {{SIGUSR1, true, {}}, {SIGTERM, true, {}},
                       {SIGHUP, true, {}},  // the terminal or the connection is gone
                       {SIGINT, true, {}},  {SIGPIPE, false, {}},
                       {SIGXFSZ, false, {}}};

void OnStop(int signal) {
  if (g_received == 0) g_received = signal;
  if (signal != SIGINT) return;
  // What a handler may call: no formatting, no streams. Whether it arrives does not matter.
  const char* parts[] = {"\nkrait: ", g_acknowledgement, "\n"};
  for (const char* part : parts) {
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) return;
  }
}

// Blocks SIGUSR1 in this thread, or lets it through; whether it was blocked before.
bool Block(bool block) {
  sigset_t signal, before;
  sigemptyset(&signal);
  sigaddset(&signal, SIGUSR1);
  KRAIT_CHECK(pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &signal, &before) == 0);
  return sigismember(&before, SIGUSR1) == 1;
}

}  // namespace

void HoldStopSignal() { Block(true); }
void LetStopSignalThrough() { Block(false); }

StopSignals::StopSignals(const char* acknowledgement, bool of_a_rank) {
  g_received = 0;
  g_acknowledgement = acknowledgement;
  for (Handled& handled : g_handled) {
    KRAIT_CHECK(sigaction(handled.signal, nullptr, &handled.before) == 0);
    // A shell's background job starts with SIGINT ignored and keeps it so; nohup's with SIGHUP.
    const bool may_be_ignored = handled.signal == SIGINT || handled.signal == SIGHUP;
    if (may_be_ignored && handled.before.sa_handler == SIG_IGN) continue;
    if (of_a_rank && handled.stops && handled.signal != SIGUSR1) continue;
    struct sigaction action = {};
    action.sa_handler = handled.stops ? OnStop : SIG_IGN;
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_RESTART;
    if (handled.signal == SIGINT) action.sa_flags |= SA_RESETHAND;  // the second one kills
    KRAIT_CHECK(sigaction(handled.signal, &action, nullptr) == 0);
  }
  was_held_ = Block(false);  // one that waits arrives here
}

StopSignals::~StopSignals() {
  // What comes when all is done is nobody's death either.
  if (was_held_) Block(true);
  for (const Handled& handled : g_handled) sigaction(handled.signal, &handled.before, nullptr);
  g_received = 0;
}

bool StopRequested() { return g_received != 0; }

}  // namespace krait
