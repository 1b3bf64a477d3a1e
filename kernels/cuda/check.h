// The one check of CUDA runtime calls and of kernel launches.
#ifndef KRAIT_KERNELS_CUDA_CHECK_H_
#define KRAIT_KERNELS_CUDA_CHECK_H_

#include <cuda_runtime_api.h>

#include <string>

#include "kernels/base/check.h"

namespace krait::cuda {

// Fatal when `error` is one, with its name, its text and `what` failed.
inline void Check(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) [[likely]] {
    return;
  }
  const ExitCode code =
      error == cudaErrorMemoryAllocation ? ExitCode::kOutOfMemory : ExitCode::kInternal;
  Fatal(code, file, line,
        std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

}  // namespace krait::cuda

#define KRAIT_CUDA_CHECK(call) ::krait::cuda::Check((call), #call, __FILE__, __LINE__)

#endif  // KRAIT_KERNELS_CUDA_CHECK_H_
