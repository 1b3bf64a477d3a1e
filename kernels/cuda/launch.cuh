// The one place where kernels are launched.
#ifndef KRAIT_KERNELS_CUDA_LAUNCH_CUH_
#define KRAIT_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/context.h"
#include "kernels/cuda/check.h"

namespace krait::cuda {

// Enqueues `kernel` on the context's stream with `blocks` blocks of `threads`; no blocks, no
// launch. A launch that CUDA refuses is fatal here; a fault inside the kernel surfaces at the next
// Synchronize(). The arguments must have the parameters' exact types.
template <typename... Params>
void Launch(const char* name, void (*kernel)(Params...), int64_t blocks, dim3 threads,
            int64_t shared_bytes, const Context& ctx, Params... args) {
  if (blocks == 0) return;
  KRAIT_CHECK(blocks > 0 && blocks <= INT32_MAX);
  // A kernel gets more than 48 KiB, its static shared memory included, only when asked for.
  if (shared_bytes > 0) {
    Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name, __FILE__, __LINE__);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(ctx.stream);
  Check(cudaLaunchKernelEx(&config, kernel, args...), name, __FILE__, __LINE__);
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_LAUNCH_CUH_
