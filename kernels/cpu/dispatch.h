// What the CPU side of every op does first: refuse other devices, choose the element type, and view
// operands as rows.
#ifndef KRAIT_KERNELS_CPU_DISPATCH_H_
#define KRAIT_KERNELS_CPU_DISPATCH_H_

#include <cstdint>
#include <string>

#include "kernels/base/check.h"
#include "kernels/tensor.h"

namespace krait::cpu {

// Calls fn(T{}) with the float type of `t`, which is on the CPU.
template <typename Fn>
void DispatchFloat(Tensor t, const char* op, const Fn& fn) {
  if (t.device() == Device::kCuda) KRAIT_FATAL(std::string(op) + " has no CUDA version yet");
  switch (t.dtype()) {
    case DType::kF32:
      return fn(float{});
    case DType::kF64:
      return fn(double{});
    default:
      KRAIT_FATAL(std::string(op) + " does not take " + Name(t.dtype()));
  }
}

// A tensor as [rows, columns] with unit inner stride. All dimensions but the last must be
// flattenable.
template <typename T>
struct Rows {
  T* data;
  int64_t rows, columns, stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <typename T>
Rows<T> RowsOf(Tensor t) {
  KRAIT_CHECK(t.defined() && t.dim(-1) > 0 && t.stride(t.rank() - 1) == 1);
  for (int d = t.rank() - 3; d >= 0; --d) {
    KRAIT_CHECK(t.dim(d) <= 1 || t.stride(d) == t.dim(d + 1) * t.stride(d + 1));
  }
  return {t.data<T>(), t.rows(), t.dim(-1), t.row_stride()};
}

// Elements from the first to row `row` (of numel / dim(-1)) of any strided tensor.
inline int64_t RowOffset(const Tensor& t, int64_t row) {
  int64_t offset = 0;
  for (int d = t.rank() - 2; d >= 0; --d) {
    offset += row % t.dim(d) * t.stride(d);
    row /= t.dim(d);
  }
  return offset;
}

// The elements of a contiguous tensor.
template <typename T>
T* DenseData(Tensor t) {
  KRAIT_CHECK(t.contiguous());
  return t.data<T>();
}

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_DISPATCH_H_
