#include "trainer/train/signals.h"

#include <csignal>

#include "kernels/base/check.h"

namespace krait {
namespace {

volatile std::sig_atomic_t g_received = 0;

struct Handled {
  int signal;
  bool stops;  // asks for save-and-stop; else ignored
  struct sigaction before;
};
Handled g_handled[] = {{SIGUSR1, true, {}}, {SIGTERM, true, {}},
                       {SIGHUP, true, {}},  // the terminal or the connection is gone
                       {SIGINT, true, {}},  {SIGPIPE, false, {}},
                       {SIGXFSZ, false, {}}};

void OnStop(int signal) {
  if (g_received == 0) g_received = signal;
}

}  // namespace

StopSignals::StopSignals() {
  g_received = 0;
  for (Handled& handled : g_handled) {
    KRAIT_CHECK(sigaction(handled.signal, nullptr, &handled.before) == 0);
    // A shell's background job starts with SIGINT ignored and keeps it so; nohup's with SIGHUP.
    const bool may_be_ignored = handled.signal == SIGINT || handled.signal == SIGHUP;
    if (may_be_ignored && handled.before.sa_handler == SIG_IGN) continue;
    struct sigaction action = {};
    action.sa_handler = handled.stops ? OnStop : SIG_IGN;
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_RESTART;
    if (handled.signal == SIGINT) action.sa_flags |= SA_RESETHAND;  // the second one kills
    KRAIT_CHECK(sigaction(handled.signal, &action, nullptr) == 0);
  }
}

StopSignals::~StopSignals() {
  for (const Handled& handled : g_handled) sigaction(handled.signal, &handled.before, nullptr);
}

int StopSignals::received() const { return g_received; }

}  // namespace krait
