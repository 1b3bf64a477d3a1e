#include "kernels/tensor.h"

namespace krait {

const char* Name(Device device) { return device == Device::kCpu ? "cpu" : "cuda"; }

Tensor::Tensor(void* data, DType dtype, Device device, std::initializer_list<int64_t> shape)
    : data_(data), dtype_(dtype), device_(device), rank_(static_cast<int>(shape.size())) {
  KRAIT_CHECK(rank_ >= 1 && rank_ <= kMaxRank);
  int i = 0;
  for (int64_t extent : shape) {
    KRAIT_CHECK(extent >= 0);
    shape_[i++] = extent;
  }
  int64_t stride = 1;
  for (int d = rank_ - 1; d >= 0; --d) {
    stride_[d] = stride;
    stride *= shape_[d];
  }
}

int64_t Tensor::numel() const {
  int64_t n = rank_ > 0 ? 1 : 0;
  for (int d = 0; d < rank_; ++d) n *= shape_[d];
  return n;
}

bool Tensor::contiguous() const {
  int64_t expected = 1;
  for (int d = rank_ - 1; d >= 0; --d) {
    if (shape_[d] != 1 && stride_[d] != expected) return false;
    expected *= shape_[d];
  }
  return true;
}

Tensor Tensor::View(std::initializer_list<int64_t> shape) const {
  KRAIT_CHECK(contiguous());
  Tensor view(data_, dtype_, device_, shape);
  KRAIT_CHECK(view.numel() == numel());
  return view;
}

Tensor Tensor::Slice(int dim, int64_t begin, int64_t count) const {
  if (dim < 0) dim += rank_;
  KRAIT_CHECK(dim >= 0 && dim < rank_ && begin >= 0 && count >= 0 && begin + count <= shape_[dim]);
  Tensor slice = *this;
  slice.data_ = static_cast<char*>(data_) + begin * stride_[dim] * SizeOf(dtype_);
  slice.shape_[dim] = count;
  return slice;
}

}  // namespace krait
