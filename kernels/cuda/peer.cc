// kernels/cuda/peer.h by CUDA's inter-process handles and stream memory operations. The latter are
// the driver's alone; the runtime, which is linked statically, looks them up.
#include "kernels/cuda/peer.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "kernels/cuda/check.h"

namespace krait::cuda {
namespace {

// What the driver takes in one call.
constexpr size_t kMaxOperations = 256;

using BatchFunction = CUresult (*)(CUstream, unsigned, CUstreamBatchMemOpParams*, unsigned);
BatchFunction StreamBatch() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  KRAIT_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuStreamBatchMemOp", &function, 12000,
                                                    cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) KRAIT_FATAL("this driver has no cuStreamBatchMemOp");
  return reinterpret_cast<BatchFunction>(function);
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

void WriteAndWait(const std::vector<Flag>& writes, const std::vector<Flag>& waits, void* stream) {
  static const BatchFunction batch = StreamBatch();
  std::vector<CUstreamBatchMemOpParams> operations;
  for (const auto& [flag, value] : writes) {
    auto& write = operations.emplace_back().writeValue;
    write.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
    write.address = reinterpret_cast<CUdeviceptr>(flag);
    write.value = value;
    write.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
  }
  for (const auto& [flag, value] : waits) {
    auto& wait = operations.emplace_back().waitValue;
    wait.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
    wait.address = reinterpret_cast<CUdeviceptr>(flag);
    wait.value = value;
    wait.flags = CU_STREAM_WAIT_VALUE_GEQ;
  }
  for (size_t first = 0; first < operations.size(); first += kMaxOperations) {
    const size_t count = std::min(kMaxOperations, operations.size() - first);
    const CUresult result =
        batch(static_cast<CUstream>(stream), static_cast<unsigned>(count), &operations[first], 0);
    if (result != CUDA_SUCCESS) {
      KRAIT_FATAL("cuStreamBatchMemOp: CUDA driver error " +
                  std::to_string(static_cast<int>(result)));
    }
  }
}

}  // namespace krait::cuda
