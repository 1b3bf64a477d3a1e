#include "kernels/activation.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/call.h"

namespace krait {
namespace {

// Elements per piece of work: enough to outweigh handing a piece to a thread.
constexpr int64_t kPieceElements = 16384;

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
  const auto bytes = [](Tensor t, int64_t row) {
    return static_cast<char*>(t.raw()) + cpu::RowOffset(t, row) * SizeOf(t.dtype());
  };
  ParallelFor(y.rows(), std::max<int64_t>(1, kPieceElements / columns),
              [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row) {
                  fn(bytes(y, row), bytes(x, row), columns);
                }
              });
}

template <typename T>
void FillWith(Tensor y, T value) {
  ForEachSpan(y, y, [value](char* span, char*, int64_t n) {
    std::fill_n(reinterpret_cast<T*>(span), n, value);
  });
}

void Add(const char* name, Tensor y, Tensor x, double scale, const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation, name, {{"y", y}, {"x", x}});
  op.CountBytes(y.bytes());
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(AddScaled(y, x, scale, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  const Tensor sum = wide.InOut(y), added = wide.In(x);
  if (op.planning()) return;
  cpu::DispatchFloat(sum, name, [&](auto zero) {
    using T = decltype(zero);
    const T factor = static_cast<T>(scale);
    ForEachSpan(sum, added, [factor](char* to, char* from, int64_t n) {
      T* const y_span = reinterpret_cast<T*>(to);
      const T* const x_span = reinterpret_cast<const T*>(from);
      for (int64_t i = 0; i < n; ++i) y_span[i] += factor * x_span[i];
    });
  });
}

}  // namespace

void AddInPlace(Tensor y, Tensor x, const Context& ctx) { Add("AddInPlace", y, x, 1, ctx); }

void AddScaled(Tensor y, Tensor x, double scale, const Context& ctx) {
  Add("AddScaled", y, x, scale, ctx);
}

void Fill(Tensor y, double value, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOther, "Fill", {{"y", y}});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(Fill(y, value, ctx));
    return;
  }
  switch (y.dtype()) {
    case DType::kF32:
      return FillWith(y, static_cast<float>(value));
    case DType::kF64:
      return FillWith(y, value);
    case DType::kBF16: {
      BF16 rounded;
      cpu::Store(static_cast<float>(value), &rounded);
      return FillWith(y, rounded);
    }
    case DType::kI32:
      return FillWith(y, static_cast<int32_t>(value));
    case DType::kI64:
      return FillWith(y, static_cast<int64_t>(value));
    default:
      KRAIT_FATAL(std::string("Fill does not take ") + Name(y.dtype()));
  }
}

void Copy(Tensor y, Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOther, "Copy", {{"y", y}, {"x", x}});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(Copy(y, x, ctx));
    return;
  }
  if (y.dtype() != x.dtype()) return cpu::Convert(y, x);
  const int64_t size = SizeOf(y.dtype());
  ForEachSpan(y, x, [size](char* to, char* from, int64_t n) {
    std::memcpy(to, from, static_cast<size_t>(n * size));
  });
}

}  // namespace krait
