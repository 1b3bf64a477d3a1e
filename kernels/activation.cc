#include "kernels/activation.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/activation.h"
#include "kernels/cpu/dispatch.h"

namespace krait {
namespace {

// Elements per piece of work: enough to outweigh handing a piece to a thread.
constexpr int64_t kPieceElements = 16384;

// The address of row `row` (of numel / dim(-1)) of any strided tensor.
char* RowAddress(Tensor t, int64_t row) {
  int64_t offset = 0;
  for (int d = t.rank() - 2; d >= 0; --d) {
    offset += row % t.dim(d) * t.stride(d);
    row /= t.dim(d);
  }
  return static_cast<char*>(t.raw()) + offset * SizeOf(t.dtype());
}

// Calls fn(addresses of y and x, element count) for contiguous spans that cover both tensors, which
// have the same shape and dtype.
template <typename Fn>
void ForEachSpan(Tensor y, Tensor x, const Fn& fn) {
  KRAIT_CHECK(y.rank() == x.rank() && y.dtype() == x.dtype());
  for (int d = 0; d < y.rank(); ++d) KRAIT_CHECK(y.dim(d) == x.dim(d));
  if (y.numel() == 0) return;
  if (y.contiguous() && x.contiguous()) {
    const int64_t size = SizeOf(y.dtype());
    ParallelFor(y.numel(), kPieceElements, [&](int64_t begin, int64_t end) {
      fn(static_cast<char*>(y.raw()) + begin * size, static_cast<char*>(x.raw()) + begin * size,
         end - begin);
    });
    return;
  }
  KRAIT_CHECK(y.stride(-1) == 1 && x.stride(-1) == 1);
  const int64_t columns = y.dim(-1);
  ParallelFor(y.rows(), std::max<int64_t>(1, kPieceElements / columns),
              [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row) {
                  fn(RowAddress(y, row), RowAddress(x, row), columns);
                }
              });
}

template <typename T>
void FillWith(Tensor y, T value) {
  ForEachSpan(y, y, [value](char* span, char*, int64_t n) {
    std::fill_n(reinterpret_cast<T*>(span), n, value);
  });
}

}  // namespace

void SwiGluForward(Tensor y, Tensor gate_up, const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation);
  if (op.planning()) return;
  cpu::DispatchFloat(y, "SwiGluForward", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(y), in = cpu::RowsOf<T>(gate_up);
    const int64_t f = out.columns;
    KRAIT_CHECK(in.columns == 2 * f && in.rows == out.rows);
    ParallelFor(out.rows, std::max<int64_t>(1, kPieceElements / f),
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) cpu::SwiGlu(f, in[i], in[i] + f, out[i]);
                });
  });
}

void SwiGluBackward(Tensor d_gate_up, Tensor y, Tensor dy, Tensor gate_up, const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation);
  if (op.planning()) return;
  cpu::DispatchFloat(dy, "SwiGluBackward", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> grad = cpu::RowsOf<T>(dy), in = cpu::RowsOf<T>(gate_up),
                       out = cpu::RowsOf<T>(d_gate_up);
    const cpu::Rows<T> value = y.defined() ? cpu::RowsOf<T>(y) : cpu::Rows<T>{};
    const int64_t f = grad.columns;
    KRAIT_CHECK(in.columns == 2 * f && in.rows == grad.rows);
    KRAIT_CHECK(out.columns == 2 * f && out.rows == grad.rows);
    KRAIT_CHECK(!y.defined() || (value.columns == f && value.rows == grad.rows));
    ParallelFor(grad.rows, std::max<int64_t>(1, kPieceElements / f),
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) {
                    cpu::SwiGluGradient(f, grad[i], in[i], in[i] + f, out[i], out[i] + f,
                                        y.defined() ? value[i] : nullptr);
                  }
                });
  });
}

void AddInPlace(Tensor y, Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation);
  if (op.planning()) return;
  cpu::DispatchFloat(y, "AddInPlace", [&](auto zero) {
    using T = decltype(zero);
    ForEachSpan(y, x, [](char* to, char* from, int64_t n) {
      cpu::Add(n, reinterpret_cast<const T*>(from), reinterpret_cast<T*>(to));
    });
  });
}

void Fill(Tensor y, double value, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOther);
  if (op.planning()) return;
  if (y.device() == Device::kCuda) KRAIT_FATAL("Fill has no CUDA version yet");
  switch (y.dtype()) {
    case DType::kF32:
      return FillWith(y, static_cast<float>(value));
    case DType::kF64:
      return FillWith(y, value);
    case DType::kI32:
      return FillWith(y, static_cast<int32_t>(value));
    case DType::kI64:
      return FillWith(y, static_cast<int64_t>(value));
    default:
      KRAIT_FATAL(std::string("Fill does not take ") + Name(y.dtype()));
  }
}

void Copy(Tensor y, Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOther);
  if (op.planning()) return;
  if (y.device() == Device::kCuda || x.device() == Device::kCuda) {
    KRAIT_FATAL("Copy has no CUDA version yet");
  }
  const int64_t size = SizeOf(y.dtype());
  ForEachSpan(y, x, [size](char* to, char* from, int64_t n) {
    std::memcpy(to, from, static_cast<size_t>(n * size));
  });
}

}  // namespace krait
