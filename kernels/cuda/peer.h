// Device memory of other processes of this machine, over NVLink or PCIe, without a multiprocessor's
// help. Plain C++; in a build without CUDA the same functions exist and are fatal.
#ifndef KRAIT_KERNELS_CUDA_PEER_H_
#define KRAIT_KERNELS_CUDA_PEER_H_

#include <cstdint>
#include <string>
#include <vector>

namespace krait::cuda {

// Names the allocation that begins at `memory` to processes beside this one; "": it cannot be
// named.
std::string ExportMemory(void* memory);
// That allocation, of another process, as this one's device reaches it, until CloseMemory; null
// where it does not.
void* OpenMemory(const std::string& name);
void CloseMemory(void* memory);

// Enqueued on `stream`: *flag = value for each of `writes`, also in other processes' memory, once
// all earlier work of the stream is done; then a wait until *flag of each of `waits`, in this
// process's memory, is its value or up to 2^31 beyond it. Takes no part of the GPU.
struct Flag {
  uint32_t* flag;
  uint32_t value;
};
void WriteAndWait(const std::vector<Flag>& writes, const std::vector<Flag>& waits, void* stream);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_PEER_H_
