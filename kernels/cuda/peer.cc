// kernels/cuda/peer.h by CUDA's inter-process handles and stream memory operations. The latter are
// the driver's alone; the runtime, which is linked statically, looks them up.
#include "kernels/cuda/peer.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "kernels/cuda/check.h"

namespace krait::cuda {
namespace {

template <typename Function>
Function DriverFunction(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  KRAIT_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) {
    KRAIT_FATAL(std::string("this driver has no ") + name);
  }
  return reinterpret_cast<Function>(function);
}

using FlagFunction = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

void Call(FlagFunction function, const char* name, uint32_t* flag, uint32_t value, unsigned flags,
          void* stream) {
  const CUresult result =
      function(static_cast<CUstream>(stream), reinterpret_cast<CUdeviceptr>(flag), value, flags);
  if (result != CUDA_SUCCESS) {
    KRAIT_FATAL(std::string(name) + ": CUDA driver error " +
                std::to_string(static_cast<int>(result)));
  }
}

}  // namespace

std::string ExportMemory(void* memory) {
  cudaIpcMemHandle_t handle;
  if (cudaIpcGetMemHandle(&handle, memory) != cudaSuccess) {
    cudaGetLastError();  // so that no later check reports it
    return "";
  }
  return std::string(handle.reserved, sizeof handle.reserved);
}

void* OpenMemory(const std::string& name) {
  cudaIpcMemHandle_t handle;
  if (name.size() != sizeof handle.reserved) return nullptr;
  std::memcpy(handle.reserved, name.data(), name.size());
  void* memory = nullptr;
  if (cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return memory;
}

void CloseMemory(void* memory) { KRAIT_CUDA_CHECK(cudaIpcCloseMemHandle(memory)); }

void WriteFlag(uint32_t* flag, uint32_t value, void* stream) {
  static const auto write = DriverFunction<FlagFunction>("cuStreamWriteValue32");
  Call(write, "cuStreamWriteValue32", flag, value, CU_STREAM_WRITE_VALUE_DEFAULT, stream);
}

void WaitForFlag(uint32_t* flag, uint32_t value, void* stream) {
  static const auto wait = DriverFunction<FlagFunction>("cuStreamWaitValue32");
  Call(wait, "cuStreamWaitValue32", flag, value, CU_STREAM_WAIT_VALUE_GEQ, stream);
}

}  // namespace krait::cuda
