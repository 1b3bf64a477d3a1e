// The little of the CUDA runtime that code outside kernels/cuda needs. In a build without CUDA the
// same functions exist: Available() is false and the others are fatal. Streams and events are
// cudaStream_t and cudaEvent_t as void*; the null stream is CUDA's default one.
#ifndef KRAIT_KERNELS_CUDA_RUNTIME_H_
#define KRAIT_KERNELS_CUDA_RUNTIME_H_

#include <cstdint>
#include <string>

namespace krait::cuda {

// How many devices this process sees; 0 without one. Touches none.
int DeviceCount();
// All of this process's work is on this one, 0 unless said. Before the first other call; touches no
// device. A thread that is to enqueue work calls UseSameDevice() first, or Available(), which does.
void UseDevice(int device);
void UseSameDevice();
// Whether this build has CUDA and the device is usable. `reason`, when given, says why not.
bool Available(std::string* reason = nullptr);
// What tells the current device from all others, "GPU-8a3f..." (its UUID).
std::string DeviceId();

// The current device.
struct DeviceInfo {
  std::string name;  // "NVIDIA H100 80GB HBM3"
  int64_t free_bytes = 0, total_bytes = 0;
  // Dense bf16 products of its datasheet, FLOP/s; 0 where none is known here.
  double peak_flops = 0;
};
DeviceInfo Info();

// The device in use, at this moment. Zeros where the driver does not tell. Takes about a
// millisecond; any thread.
struct DeviceLoad {
  double clock_mhz = 0;  // of the multiprocessors
  double watts = 0;      // averaged by the driver over about a second
};
DeviceLoad Load();

// Device memory of the current device, zero-filled; fatal with kOutOfMemory naming `segment`.
// Waits for the device.
void* Allocate(int64_t bytes, const std::string& segment);
void Free(void* memory);

// Pins host memory, which is in use already, for the time of the object: copies between it and the
// device then run at the link's rate. Where that is refused, they stay slower; pinned() says.
class PinnedHost {
 public:
  PinnedHost(void* memory, int64_t bytes);
  ~PinnedHost();
  PinnedHost(const PinnedHost&) = delete;
  PinnedHost& operator=(const PinnedHost&) = delete;
  bool pinned() const { return memory_ != nullptr; }

 private:
  void* memory_ = nullptr;
};

// Copies between host and device in the order of `stream` (Context::stream); they return when the
// copy is done, with all work that was enqueued on the stream before it.
void CopyToDevice(void* device, const void* host, int64_t bytes, void* stream = nullptr);
void CopyToHost(void* host, const void* device, int64_t bytes, void* stream = nullptr);
// Enqueued on `stream` and not waited for: a copy within the device, bytes set to zero, and a few
// numbers of the host, which are the caller's again at once.
void CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream);
void Zero(void* device, int64_t bytes, void* stream);
void StoreNumbers(int64_t* device, const int64_t* numbers, int64_t count, void* stream);
// Waits for all work of the device, or of one stream, and reports errors of earlier launches.
void Synchronize();
void SynchronizeStream(void* stream);

// A stream that runs beside the default one; `urgent`: its blocks go before those of others.
void* CreateStream(bool urgent = false);
void DestroyStream(void* stream);

// Events; timed ones can be asked for the seconds between two of them that have happened.
void* CreateEvent(bool timed);
void DestroyEvent(void* event);
void RecordEvent(void* event, void* stream);
// Work enqueued on `stream` from here on waits for the event, as last recorded.
void WaitForEvent(void* event, void* stream);
double SecondsBetween(void* begin, void* end);
// Whether what was enqueued before the event's last record is done; waits for nothing.
bool EventHappened(void* event);

// Named spans of host time for NVIDIA's profilers (NVTX); nothing without a profiler.
void PushRange(const char* name);
void PopRange();

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RUNTIME_H_
