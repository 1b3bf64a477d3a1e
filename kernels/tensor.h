// A non-owning view of an array on the CPU or a GPU. Plain C++: also included by .cu files.
//
// Shape letters used in all comments: B batch, T time, D d_model, E experts, I d_inner, N d_state,
// R dt_rank, K d_conv, F d_ff, V vocab, H heads, G kv_heads, P head_dim; M = B*T tokens.
#ifndef KRAIT_KERNELS_TENSOR_H_
#define KRAIT_KERNELS_TENSOR_H_

#include <array>
#include <cstdint>
#include <initializer_list>

#include "kernels/base/check.h"
#include "kernels/base/dtype.h"

namespace krait {

enum class Device : uint8_t { kCpu, kCuda };
const char* Name(Device device);  // "cpu", "cuda"

// Up to four dimensions with element strides; the innermost stride is 1. All element offsets are
// 64-bit. Copying a Tensor copies the view, not the data.
class Tensor {
 public:
  static constexpr int kMaxRank = 4;

  Tensor() = default;
  // A contiguous tensor.
  Tensor(void* data, DType dtype, Device device, std::initializer_list<int64_t> shape);

  bool defined() const { return rank_ > 0; }  // optional operands are passed as Tensor()
  int rank() const { return rank_; }
  int64_t dim(int i) const { return shape_[i < 0 ? i + rank_ : i]; }
  int64_t stride(int i) const { return stride_[i < 0 ? i + rank_ : i]; }
  int64_t numel() const;
  int64_t bytes() const { return numel() * SizeOf(dtype_); }
  bool contiguous() const;
  // Rows when all dimensions but the last are flattened (they must be flattenable), and their
  // stride in elements.
  int64_t rows() const { return numel() / dim(-1); }
  int64_t row_stride() const { return rank_ == 1 ? dim(0) : stride_[rank_ - 2]; }

  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  void* raw() const { return data_; }
  // The data of a CPU tensor as T, which must match the dtype. Host code reads tensors through this
  // alone, so that reading one in device memory is fatal.
  template <typename T>
  T* data() const {
    KRAIT_CHECK(kDTypeOf<T> == dtype_ && device_ == Device::kCpu);
    return static_cast<T*>(data_);
  }
  // The address in device memory of a CUDA tensor, for kernels/cuda alone.
  template <typename T>
  T* device_data() const {
    KRAIT_CHECK(kDTypeOf<T> == dtype_ && device_ == Device::kCuda);
    return static_cast<T*>(data_);
  }

  // The same elements under another shape; the tensor must be contiguous.
  Tensor View(std::initializer_list<int64_t> shape) const;
  // Elements [begin, begin + count) of dimension `dim`.
  Tensor Slice(int dim, int64_t begin, int64_t count) const;

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  Device device_ = Device::kCpu;
  int rank_ = 0;
  std::array<int64_t, kMaxRank> shape_{};
  std::array<int64_t, kMaxRank> stride_{};
};

}  // namespace krait

#endif  // KRAIT_KERNELS_TENSOR_H_
