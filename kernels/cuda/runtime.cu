// kernels/cuda/runtime.h in a build with CUDA.
#include "kernels/cuda/check.h"
#include "kernels/cuda/runtime.h"

namespace krait::cuda {
namespace {

// Exists to be asked for: a device that cannot run it can run none of this build's kernels.
__global__ void Nothing() {}

}  // namespace

bool Available(std::string* reason) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, Nothing);
  if (error == cudaSuccess) return true;
  cudaGetLastError();  // so that no later check reports it
  if (reason != nullptr) *reason = cudaGetErrorString(error);
  return false;
}

void* Allocate(int64_t bytes, const std::string& segment) {
  KRAIT_CHECK(bytes > 0);
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    Fatal(ExitCode::kOutOfMemory, __FILE__, __LINE__,
          "cannot reserve " + std::to_string(bytes) + " bytes of device memory for " + segment +
              ": " + std::to_string(free) + " of " + std::to_string(total) + " are free");
  }
  KRAIT_CUDA_CHECK(error);
  KRAIT_CUDA_CHECK(cudaMemset(memory, 0, static_cast<size_t>(bytes)));
  return memory;
}

void Free(void* memory) { KRAIT_CUDA_CHECK(cudaFree(memory)); }

void CopyToDevice(void* device, const void* host, int64_t bytes) {
  KRAIT_CUDA_CHECK(cudaMemcpy(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
}

void CopyToHost(void* host, const void* device, int64_t bytes) {
  KRAIT_CUDA_CHECK(cudaMemcpy(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
}

void CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream) {
  KRAIT_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                                   static_cast<cudaStream_t>(stream)));
}

void Synchronize() { KRAIT_CUDA_CHECK(cudaDeviceSynchronize()); }

}  // namespace krait::cuda
