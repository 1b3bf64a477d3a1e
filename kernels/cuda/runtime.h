// The little of the CUDA runtime that code outside kernels/cuda needs. In a build without CUDA the
// same functions exist: available() is false and the others are fatal.
#ifndef KRAIT_KERNELS_CUDA_RUNTIME_H_
#define KRAIT_KERNELS_CUDA_RUNTIME_H_

#include <cstdint>
#include <string>

namespace krait::cuda {

// Whether this build has CUDA and a usable device is present. `reason`, when given, says why not.
bool Available(std::string* reason = nullptr);

// Device memory of the current device, zero-filled; fatal with kOutOfMemory naming `segment`.
void* Allocate(int64_t bytes, const std::string& segment);
void Free(void* memory);

// Blocking copies between host and device.
void CopyToDevice(void* device, const void* host, int64_t bytes);
void CopyToHost(void* host, const void* device, int64_t bytes);
// A copy within the device, enqueued on `stream` (Context::stream) and not waited for.
void CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream);
// Waits for all work of the device and reports errors of earlier launches.
void Synchronize();

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RUNTIME_H_
