// The little of the CUDA runtime that code outside kernels/cuda needs. In a build without CUDA the
// same functions exist: Available() is false and the others are fatal. Streams and events are
// cudaStream_t and cudaEvent_t as void*; the null stream is CUDA's default one.
#ifndef KRAIT_KERNELS_CUDA_RUNTIME_H_
#define KRAIT_KERNELS_CUDA_RUNTIME_H_

#include <cstdint>
#include <string>

namespace krait::cuda {

// Whether this build has CUDA and a usable device is present. `reason`, when given, says why not.
bool Available(std::string* reason = nullptr);

// The current device.
struct DeviceInfo {
  std::string name;  // "NVIDIA H100 80GB HBM3"
  int64_t free_bytes = 0, total_bytes = 0;
  // Dense bf16 products of its datasheet, FLOP/s; 0 where none is known here.
  double peak_flops = 0;
};
DeviceInfo Info();

// The device that was current at the first call, at this moment. Zeros where the driver does not
// tell. Takes about a millisecond; any thread.
struct DeviceLoad {
  double clock_mhz = 0;  // of the multiprocessors
  double watts = 0;      // averaged by the driver over about a second
};
DeviceLoad Load();

// Device memory of the current device, zero-filled; fatal with kOutOfMemory naming `segment`.
// Waits for the device.
void* Allocate(int64_t bytes, const std::string& segment);
void Free(void* memory);

// Copies between host and device in the order of `stream` (Context::stream); they return when the
// copy is done, with all work that was enqueued on the stream before it.
void CopyToDevice(void* device, const void* host, int64_t bytes, void* stream = nullptr);
void CopyToHost(void* host, const void* device, int64_t bytes, void* stream = nullptr);
// Enqueued on `stream` and not waited for: a copy within the device, and bytes set to zero.
void CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream);
void Zero(void* device, int64_t bytes, void* stream);
// Waits for all work of the device, or of one stream, and reports errors of earlier launches.
void Synchronize();
void SynchronizeStream(void* stream);

// A stream that runs beside the default one.
void* CreateStream();
void DestroyStream(void* stream);

// Events; timed ones can be asked for the seconds between two of them that have happened.
void* CreateEvent(bool timed);
void DestroyEvent(void* event);
void RecordEvent(void* event, void* stream);
// Work enqueued on `stream` from here on waits for the event, as last recorded.
void WaitForEvent(void* event, void* stream);
double SecondsBetween(void* begin, void* end);

// Named spans of host time for NVIDIA's profilers (NVTX); nothing without a profiler.
void PushRange(const char* name);
void PopRange();

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RUNTIME_H_
