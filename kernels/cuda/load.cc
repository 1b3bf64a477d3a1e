// What the driver's management library, NVML, says of the device in use. The library comes with
// the driver, its header does not come with every toolkit: the four functions are declared here
// (NVML API reference, stable since driver 319) and looked up at the first call.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/runtime.h"

namespace krait::cuda {
namespace {

class Nvml {
 public:
  Nvml() {
    void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    const auto find = [library](auto* function, const char* name) {
      *function =
          reinterpret_cast<std::remove_reference_t<decltype(*function)>>(dlsym(library, name));
      return *function != nullptr;
    };
    int (*init)() = nullptr;
    int (*handle)(const char*, void**) = nullptr;
    if (!find(&init, "nvmlInit_v2") || !find(&handle, "nvmlDeviceGetHandleByPciBusId_v2") ||
        !find(&clock_, "nvmlDeviceGetClockInfo") || !find(&power_, "nvmlDeviceGetPowerUsage")) {
      return;
    }
    UseSameDevice();
    int device = 0;
    KRAIT_CUDA_CHECK(cudaGetDevice(&device));
    std::array<char, 32> bus = {};
    KRAIT_CUDA_CHECK(cudaDeviceGetPCIBusId(bus.data(), static_cast<int>(bus.size()), device));
    ready_ = init() == 0 && handle(bus.data(), &device_) == 0;
  }
  DeviceLoad Read() const {
    constexpr int kMultiprocessors = 1;  // NVML_CLOCK_SM
    unsigned megahertz = 0, milliwatts = 0;
    if (!ready_ || clock_(device_, kMultiprocessors, &megahertz) != 0 ||
        power_(device_, &milliwatts) != 0) {
      return {};
    }
    return {static_cast<double>(megahertz), milliwatts * 1e-3};
  }

 private:
  int (*clock_)(void*, int, unsigned*) = nullptr;
  int (*power_)(void*, unsigned*) = nullptr;
  void* device_ = nullptr;
  bool ready_ = false;
};

}  // namespace

DeviceLoad Load() {
  static const Nvml nvml;
  return nvml.Read();
}

}  // namespace krait::cuda
