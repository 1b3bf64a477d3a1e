#include "kernels/cpu/widened.h"

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/dispatch.h"

namespace krait::cpu {
namespace {

constexpr int64_t kPieceElements = 16384;

bool IsNarrow(Tensor t, const Context& ctx) {
  return t.defined() && t.dtype() == DType::kBF16 && ctx.device == Device::kCpu;
}

// A contiguous tensor of the same shape.
Tensor AllocLike(Tensor t, DType dtype, Arena* arena) {
  switch (t.rank()) {
    case 1:
      return arena->Alloc(dtype, {t.dim(0)});
    case 2:
      return arena->Alloc(dtype, {t.dim(0), t.dim(1)});
    case 3:
      return arena->Alloc(dtype, {t.dim(0), t.dim(1), t.dim(2)});
    default:
      return arena->Alloc(dtype, {t.dim(0), t.dim(1), t.dim(2), t.dim(3)});
  }
}

void ConvertSpan(int64_t n, const float* from, float* to) { std::copy_n(from, n, to); }
void ConvertSpan(int64_t n, const double* from, double* to) { std::copy_n(from, n, to); }
void ConvertSpan(int64_t n, const BF16* from, BF16* to) { std::copy_n(from, n, to); }
KRAIT_CLONES void ConvertSpan(int64_t n, const BF16* from, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Load(from[i]);
}
KRAIT_CLONES void ConvertSpan(int64_t n, const float* from, BF16* to) {
  for (int64_t i = 0; i < n; ++i) Store(from[i], &to[i]);
}
void ConvertSpan(int64_t n, const double* from, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}
void ConvertSpan(int64_t n, const float* from, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
void ConvertSpan(int64_t n, const BF16* from, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Load(from[i]);
}
// Through f32: the two roundings are those of a value that was computed in f32.
void ConvertSpan(int64_t n, const double* from, BF16* to) {
  for (int64_t i = 0; i < n; ++i) Store(static_cast<float>(from[i]), &to[i]);
}

// Calls fn(T{}) with the element type.
template <typename Fn>
void WithType(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(float{});
    case DType::kF64:
      return fn(double{});
    case DType::kBF16:
      return fn(BF16{});
    default:
      KRAIT_FATAL(std::string("no conversion of ") + Name(dtype));
  }
}

}  // namespace

void Convert(Tensor to, Tensor from) {
  KRAIT_CHECK(to.rank() == from.rank());
  for (int d = 0; d < to.rank(); ++d) KRAIT_CHECK(to.dim(d) == from.dim(d));
  if (to.numel() == 0) return;
  WithType(to.dtype(), [&](auto to_zero) {
    using To = decltype(to_zero);
    WithType(from.dtype(), [&](auto from_zero) {
      using From = decltype(from_zero);
      To* const out = to.data<To>();
      const From* const in = from.data<From>();
      if (to.contiguous() && from.contiguous()) {
        ParallelFor(to.numel(), kPieceElements, [&](int64_t begin, int64_t end) {
          ConvertSpan(end - begin, in + begin, out + begin);
        });
        return;
      }
      KRAIT_CHECK(to.stride(-1) == 1 && from.stride(-1) == 1);
      const int64_t columns = to.dim(-1);
      ParallelFor(to.rows(), std::max<int64_t>(1, kPieceElements / columns),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t row = begin; row < end; ++row) {
                      ConvertSpan(columns, in + RowOffset(from, row), out + RowOffset(to, row));
                    }
                  });
    });
  });
}

Tensor Widened::Copy(Tensor t) {
  if (mark_ < 0) mark_ = ctx_.scratch->mark();
  return AllocLike(t, DType::kF32, ctx_.scratch);
}

Tensor Widened::In(Tensor t) {
  if (!IsNarrow(t, ctx_)) return t;
  const Tensor copy = Copy(t);
  if (!ctx_.planning) Convert(copy, t);
  return copy;
}

Tensor Widened::Out(Tensor t) {
  if (!IsNarrow(t, ctx_)) return t;
  KRAIT_CHECK(count_ < static_cast<int>(outputs_.size()));
  const Tensor copy = Copy(t);
  outputs_[static_cast<size_t>(count_++)] = {t, copy};
  return copy;
}

Tensor Widened::InOut(Tensor t) {
  const Tensor copy = Out(t);
  if (IsNarrow(t, ctx_) && !ctx_.planning) Convert(copy, t);
  return copy;
}

Widened::~Widened() {
  if (!ctx_.planning) {
    for (int i = 0; i < count_; ++i) {
      Convert(outputs_[static_cast<size_t>(i)].to, outputs_[static_cast<size_t>(i)].from);
    }
  }
  if (mark_ >= 0) ctx_.scratch->Release(mark_);
}

}  // namespace krait::cpu
