// The process exit codes scripts rely on. Plain C++: also included by .cu files.
#ifndef KRAIT_KERNELS_BASE_EXIT_CODE_H_
#define KRAIT_KERNELS_BASE_EXIT_CODE_H_

namespace krait {

enum class ExitCode : int {
  kOk = 0,
  kNo = 1,             // the answer is no: plan does not fit, verify or diff found a difference
  kStopped = 10,       // saved and stopped on request
  kConfig = 20,        // configuration or misuse
  kData = 21,          // token files and texts
  kNoCheckpoint = 30,  // no usable checkpoint; a weight file that cannot be read
  kCannotSave = 31,
  kNumerics = 40,
  kCollective = 50,  // hang or collective failure
  kInternal = 70,
  kOutOfMemory = 71,
};

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_EXIT_CODE_H_
