// kernels/cuda/runtime.h and peer.h in a build without CUDA: no device is available, so that no
// CUDA tensor exists, and the others are fatal.
#include "kernels/base/check.h"
#include "kernels/cuda/peer.h"
#include "kernels/cuda/runtime.h"

namespace krait::cuda {
namespace {

[[noreturn]] void NoCuda() { KRAIT_FATAL("this build has no CUDA"); }

}  // namespace

bool Available(std::string* reason) {
  if (reason != nullptr) *reason = "this build has no CUDA";
  return false;
}

int DeviceCount() { return 0; }
void UseDevice(int) { NoCuda(); }
void UseSameDevice() { NoCuda(); }
std::string DeviceId() { NoCuda(); }
DeviceInfo Info() { NoCuda(); }
DeviceLoad Load() { NoCuda(); }
void* Allocate(int64_t /*bytes*/, const std::string& /*segment*/) { NoCuda(); }
void Free(void* /*memory*/) { NoCuda(); }
PinnedHost::PinnedHost(void* /*memory*/, int64_t /*bytes*/) { NoCuda(); }
PinnedHost::~PinnedHost() = default;
void CopyToDevice(void*, const void*, int64_t, void*) { NoCuda(); }
void CopyToHost(void*, const void*, int64_t, void*) { NoCuda(); }
void CopyOnDevice(void*, const void*, int64_t, void*) { NoCuda(); }
void Zero(void*, int64_t, void*) { NoCuda(); }
void Synchronize() { NoCuda(); }
void SynchronizeStream(void*) { NoCuda(); }
void StoreNumbers(int64_t*, const int64_t*, int64_t, void*) { NoCuda(); }
void* CreateStream(bool) { NoCuda(); }
void DestroyStream(void*) { NoCuda(); }
void* CreateEvent(bool) { NoCuda(); }
void DestroyEvent(void*) { NoCuda(); }
void RecordEvent(void*, void*) { NoCuda(); }
void WaitForEvent(void*, void*) { NoCuda(); }
double SecondsBetween(void*, void*) { NoCuda(); }
bool EventHappened(void*) { NoCuda(); }
std::string ExportMemory(void*) { NoCuda(); }
void* OpenMemory(const std::string&) { NoCuda(); }
void CloseMemory(void*) { NoCuda(); }
void WriteAndWait(const std::vector<Flag>&, const std::vector<Flag>&, void*) { NoCuda(); }
void PushRange(const char*) { NoCuda(); }
void PopRange() { NoCuda(); }

}  // namespace krait::cuda
