// kernels/cuda/runtime.h in a build without CUDA: no device is available, so that no CUDA tensor
// exists, and the others are fatal.
#include "kernels/base/check.h"
#include "kernels/cuda/runtime.h"

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

}  // namespace krait::cuda
