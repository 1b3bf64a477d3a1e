// The functions of kernels/cuda in a build without CUDA: no device is available, so that no CUDA
// tensor exists, and the others are fatal.
#include "kernels/base/check.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/selective_scan.h"

namespace krait::cuda {
namespace {

[[noreturn]] void NoCuda() { KRAIT_FATAL("this build has no CUDA"); }

}  // namespace

bool Available(std::string* reason) {
  if (reason != nullptr) *reason = "this build has no CUDA";
  return false;
}

void* Allocate(int64_t /*bytes*/, const std::string& /*segment*/) { NoCuda(); }
void Free(void* /*memory*/) { NoCuda(); }
void CopyToDevice(void* /*device*/, const void* /*host*/, int64_t /*bytes*/) { NoCuda(); }
void CopyToHost(void* /*host*/, const void* /*device*/, int64_t /*bytes*/) { NoCuda(); }
void CopyOnDevice(void* /*to*/, const void* /*from*/, int64_t /*bytes*/, void* /*stream*/) {
  NoCuda();
}
void Synchronize() { NoCuda(); }

void RmsNormForward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double, const Context&) {
  NoCuda();
}
void RmsNormBackward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, const Context&) {
  NoCuda();
}

void SelectiveScanForward(Tensor, Tensor, Tensor, const SelectiveScanInputs&, const Context&) {
  NoCuda();
}
void SelectiveScanBackward(const SelectiveScanGradients&, Tensor, Tensor, Tensor, Tensor,
                           const SelectiveScanInputs&, Tensor, const Context&) {
  NoCuda();
}

}  // namespace krait::cuda
