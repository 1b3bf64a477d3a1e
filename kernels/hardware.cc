#include "kernels/hardware.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/parallel_for.h"
#include "kernels/cpu/blas.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/cuda/runtime.h"

namespace krait {
namespace {

// The clone of KRAIT_CLONES functions that runs here.
const char* Clones() {
#ifdef KRAIT_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "no clones";
}

}  // namespace

absl::Status PrepareDevice(Device device) {
  return device == Device::kCpu ? cpu::LoadBlas().status() : absl::OkStatus();
}

std::string HardwareName(Device device) {
  if (device == Device::kCuda) return cuda::Info().name;
  const auto blas = cpu::LoadBlas();
  return absl::StrCat("CPU, ", MaxThreads(), MaxThreads() == 1 ? " thread, " : " threads, ",
                      blas.ok() ? blas->core : "no BLAS", ", ", Clones());
}

}  // namespace krait
