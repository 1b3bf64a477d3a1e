#include "kernels/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "kernels/cuda/runtime.h"

namespace krait {
namespace {

constexpr int64_t kAlignment = 256;
// Tensors of a measuring arena start here: non-null, and never mapped.
char* const kMeasuringBase = reinterpret_cast<char*>(kAlignment);

int64_t RoundUp(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Arena::Arena(std::string name, Device device)
    : name_(std::move(name)), device_(device), base_(kMeasuringBase) {}

Arena::Arena(std::string name, Device device, int64_t bytes)
    : name_(std::move(name)), device_(device), capacity_(RoundUp(std::max<int64_t>(bytes, 1))) {
  if (device_ == Device::kCuda) {
    base_ = static_cast<char*>(cuda::Allocate(capacity_, name_));
    return;
  }
  // Anonymous memory: pages are taken on first touch, so an unused reserve costs nothing.
  void* memory = mmap(nullptr, static_cast<size_t>(capacity_), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    Fatal(ExitCode::kOutOfMemory, __FILE__, __LINE__,
          "cannot reserve " + std::to_string(capacity_) + " bytes for " + name_);
  }
  base_ = static_cast<char*>(memory);
}

Arena::~Arena() {
  if (capacity_ < 0) return;
  if (device_ == Device::kCuda) {
    cuda::Free(base_);
  } else {
    munmap(base_, static_cast<size_t>(capacity_));
  }
}

void Arena::Note(int64_t event) {
  if (capacity_ < 0) signature_ = (signature_ ^ static_cast<uint64_t>(event)) * 0x9e3779b97f4a7c15;
}

Tensor Arena::Alloc(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor(base_ + used_, dtype, device_, shape);
  used_ += RoundUp(tensor.bytes());
  Note(used_);
  if (capacity_ >= 0 && used_ > capacity_) {
    KRAIT_FATAL("segment " + name_ + " of " + std::to_string(capacity_) +
                " bytes is too small: " + std::to_string(used_) + " needed");
  }
  high_water_ = std::max(high_water_, used_);
  return tensor;
}

void Arena::Release(int64_t mark) {
  KRAIT_CHECK(mark >= 0 && mark <= used_);
  used_ = mark;
  Note(~used_);
}

}  // namespace krait
