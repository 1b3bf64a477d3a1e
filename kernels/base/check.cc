#include "kernels/base/check.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>

namespace krait {
namespace {

std::atomic<void (*)(ExitCode)> fatal_hook = nullptr;

}  // namespace

void SetFatalHook(void (*hook)(ExitCode code)) { fatal_hook = hook; }

void Fatal(ExitCode code, const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "krait: fatal: %s (%s:%d)\n", message.c_str(), file, line);
  std::fflush(stderr);
  if (void (*const hook)(ExitCode) = fatal_hook; hook != nullptr) hook(code);
  _exit(static_cast<int>(code));
}

}  // namespace krait
