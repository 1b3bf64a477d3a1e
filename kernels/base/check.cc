#include "kernels/base/check.h"

#include <unistd.h>

#include <cstdio>

namespace krait {

void Fatal(ExitCode code, const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "krait: fatal: %s (%s:%d)\n", message.c_str(), file, line);
  std::fflush(stderr);
  _exit(static_cast<int>(code));
}

}  // namespace krait
