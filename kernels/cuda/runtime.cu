// kernels/cuda/runtime.h in a build with CUDA.
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <unordered_set>

#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/runtime.h"

namespace krait::cuda {
namespace {

// Exists to be asked for: a device that cannot run it can run none of this build's kernels.
__global__ void Nothing() {}

// Numbers that travel as a kernel's argument.
constexpr int kNumbers = 256;
struct Numbers {
  int64_t values[kNumbers];
};
__global__ void StoreNumbersKernel(int64_t* to, Numbers numbers, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = numbers.values[i];
}

std::atomic<int> g_device = 0;

}  // namespace

int DeviceCount() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return devices;
  cudaGetLastError();  // so that no later check reports it
  return 0;
}

void UseDevice(int device) { g_device = device; }

void UseSameDevice() { KRAIT_CUDA_CHECK(cudaSetDevice(g_device)); }

std::string DeviceId() {
  cudaDeviceProp properties;
  KRAIT_CUDA_CHECK(cudaGetDeviceProperties(&properties, g_device));
  std::string id = "GPU-";
  for (const char byte : properties.uuid.bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
    id += digits;
  }
  return id;
}

bool Available(std::string* reason) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
  if (error == cudaSuccess) error = cudaSetDevice(g_device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, Nothing);
  if (error == cudaSuccess) return true;
  cudaGetLastError();  // so that no later check reports it
  if (reason != nullptr) *reason = cudaGetErrorString(error);
  return false;
}

DeviceInfo Info() {
  DeviceInfo info;
  int device = 0;
  KRAIT_CUDA_CHECK(cudaGetDevice(&device));
  cudaDeviceProp properties;
  KRAIT_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  size_t free = 0, total = 0;
  KRAIT_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  info.name = properties.name;
  info.free_bytes = static_cast<int64_t>(free);
  info.total_bytes = static_cast<int64_t>(total);
  // The SXM parts of H100 and H200 with all of their multiprocessors.
  if (properties.major == 9 && properties.multiProcessorCount == 132) info.peak_flops = 989.4e12;
  return info;
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

PinnedHost::PinnedHost(void* memory, int64_t bytes) {
  const cudaError_t error =
      cudaHostRegister(memory, static_cast<size_t>(bytes), cudaHostRegisterDefault);
  if (error == cudaSuccess) memory_ = memory;
  if (error != cudaSuccess) cudaGetLastError();  // so that no later check reports it
}

PinnedHost::~PinnedHost() {
  if (memory_ != nullptr) KRAIT_CUDA_CHECK(cudaHostUnregister(memory_));
}

void CopyToDevice(void* device, const void* host, int64_t bytes, void* stream) {
  KRAIT_CUDA_CHECK(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                                   static_cast<cudaStream_t>(stream)));
  SynchronizeStream(stream);
}

void CopyToHost(void* host, const void* device, int64_t bytes, void* stream) {
  KRAIT_CUDA_CHECK(cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                                   static_cast<cudaStream_t>(stream)));
  SynchronizeStream(stream);
}

void CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream) {
  KRAIT_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                                   static_cast<cudaStream_t>(stream)));
}

void Zero(void* device, int64_t bytes, void* stream) {
  KRAIT_CUDA_CHECK(
      cudaMemsetAsync(device, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

void StoreNumbers(int64_t* device, const int64_t* numbers, int64_t count, void* stream) {
  Context ctx;
  ctx.stream = stream;
  for (int64_t begin = 0; begin < count; begin += kNumbers) {
    Numbers part = {};
    const auto n = static_cast<int>(std::min<int64_t>(kNumbers, count - begin));
    std::copy_n(numbers + begin, n, part.values);
    Launch("StoreNumbers", StoreNumbersKernel, 1, dim3(kNumbers), 0, ctx, device + begin, part, n);
  }
}

void Synchronize() { KRAIT_CUDA_CHECK(cudaDeviceSynchronize()); }

void SynchronizeStream(void* stream) {
  KRAIT_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

void* CreateStream(bool urgent) {
  cudaStream_t stream = nullptr;
  int least = 0, greatest = 0;
  KRAIT_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  KRAIT_CUDA_CHECK(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, urgent ? greatest : least));
  return stream;
}

void DestroyStream(void* stream) {
  KRAIT_CUDA_CHECK(cudaStreamDestroy(static_cast<cudaStream_t>(stream)));
}

void* CreateEvent(bool timed) {
  cudaEvent_t event = nullptr;
  KRAIT_CUDA_CHECK(
      cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming));
  return event;
}

void DestroyEvent(void* event) {
  KRAIT_CUDA_CHECK(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}

void RecordEvent(void* event, void* stream) {
  KRAIT_CUDA_CHECK(
      cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}

void WaitForEvent(void* event, void* stream) {
  KRAIT_CUDA_CHECK(
      cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}

double SecondsBetween(void* begin, void* end) {
  float milliseconds = 0;
  KRAIT_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(begin),
                                        static_cast<cudaEvent_t>(end)));
  return static_cast<double>(milliseconds) * 1e-3;
}

bool EventHappened(void* event) {
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
  if (error == cudaErrorNotReady) return false;
  KRAIT_CUDA_CHECK(error);
  return true;
}

void PushRange(const char* name) { nvtxRangePushA(name); }
void PopRange() { nvtxRangePop(); }

void SetAttributesOnce(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::unordered_set<const void*> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!done.insert(kernel).second) return;
  const auto check = [name](cudaError_t error) { Check(error, name, __FILE__, __LINE__); };
  int device = 0, limit = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limit - static_cast<int>(attributes.sharedSizeBytes)));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

}  // namespace krait::cuda
