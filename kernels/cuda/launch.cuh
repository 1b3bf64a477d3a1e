// The one place where kernels are launched.
#ifndef KRAIT_KERNELS_CUDA_LAUNCH_CUH_
#define KRAIT_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/context.h"
#include "kernels/cuda/check.h"

namespace krait::cuda {

// The blocks of a launch; a plain number of blocks converts.
struct Grid {
  Grid(int64_t x_blocks, int64_t y_blocks = 1, int64_t z_blocks = 1)  // NOLINT: converts
      : x(x_blocks), y(y_blocks), z(z_blocks) {}

  int64_t x, y, z;
  int cluster = 1;  // neighbouring blocks in x that form a cluster; x is a multiple of it
  // The kernel may start while the one before it on the stream still runs, as soon as all blocks of
  // that have called AllowNextKernel() or ended. It must call WaitForPreviousKernel() before it
  // touches anything that another kernel writes or reads.
  bool dependent = false;
};

// The grid of a kernel that begins with StartDependent(): its launch and the start of its blocks
// overlap the end of the kernel before it.
inline Grid Dependent(int64_t x_blocks, int64_t y_blocks = 1, int64_t z_blocks = 1) {
  Grid grid(x_blocks, y_blocks, z_blocks);
  grid.dependent = true;
  return grid;
}

// See Grid::dependent. After the wait, all that the previous kernel wrote is visible. Every thread
// that does anything calls it: a kernel that ended without waiting would not stand for those before
// it.
__device__ inline void WaitForPreviousKernel() { cudaGridDependencySynchronize(); }
__device__ inline void AllowNextKernel() { cudaTriggerProgrammaticLaunchCompletion(); }
__device__ inline void StartDependent() {
  WaitForPreviousKernel();
  AllowNextKernel();
}

// Allows `kernel` all of the shared memory of a multiprocessor and clusters of more than 8 blocks.
// Does so at the first call for a kernel, and nothing later.
void SetAttributesOnce(const void* kernel, const char* name);

// Enqueues `kernel` on the context's stream with `grid` blocks of `threads`; no blocks, no launch.
// A launch that CUDA refuses is fatal here; a fault inside the kernel surfaces at the next
// Synchronize(). The arguments must have the parameters' exact types.
template <typename... Params>
void Launch(const char* name, void (*kernel)(Params...), Grid grid, dim3 threads,
            int64_t shared_bytes, const Context& ctx, Params... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  KRAIT_CHECK(grid.x > 0 && grid.x <= INT32_MAX && grid.x % grid.cluster == 0);
  KRAIT_CHECK(grid.y > 0 && grid.y < 65536 && grid.z > 0 && grid.z < 65536);
  if (shared_bytes > 0 || grid.cluster > 8) {
    SetAttributesOnce(reinterpret_cast<const void*>(kernel), name);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                        static_cast<unsigned>(grid.z));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(ctx.stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  Check(cudaLaunchKernelEx(&config, kernel, args...), name, __FILE__, __LINE__);
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_LAUNCH_CUH_
