// The one fatal path: broken invariants and failed library calls. Plain C++: also for .cu files.
#ifndef KRAIT_KERNELS_BASE_CHECK_H_
#define KRAIT_KERNELS_BASE_CHECK_H_

#include <string>

#include "kernels/base/exit_code.h"

namespace krait {

// Prints "krait: fatal: MESSAGE (FILE:LINE)" to stderr and ends the process, and through the hook
// all ranks, with `code`. Runs no destructors. Safe from any thread.
[[noreturn]] void Fatal(ExitCode code, const char* file, int line, const std::string& message);

// What else ends before the process does: the job's other ranks, which this folder knows nothing
// of. `hook` is called by Fatal after the line is printed, from its thread; it may end the process
// itself. Set before there are threads; null: none.
void SetFatalHook(void (*hook)(ExitCode code));

}  // namespace krait

// An invariant of the program, never a check of user input. Always on.
#define KRAIT_CHECK(condition)                                         \
  do {                                                                 \
    if (!(condition)) [[unlikely]] {                                   \
      ::krait::Fatal(::krait::ExitCode::kInternal, __FILE__, __LINE__, \
                     "check failed: " #condition);                     \
    }                                                                  \
  } while (false)

#define KRAIT_FATAL(message) \
  ::krait::Fatal(::krait::ExitCode::kInternal, __FILE__, __LINE__, (message))

#endif  // KRAIT_KERNELS_BASE_CHECK_H_
