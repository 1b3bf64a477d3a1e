#include "kernels/random_fill.h"

#include <algorithm>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/random_fill.h"

namespace krait {
namespace {

constexpr int64_t kPieceElements = 1 << 14;

template <typename T, typename Value>
void FillRows(Tensor y, int64_t first, int64_t row_step, const Value& value) {
  const cpu::Rows<T> out = cpu::RowsOf<T>(y);
  const int64_t n = out.rows * out.columns;
  ParallelFor(n, kPieceElements, [&](int64_t begin, int64_t end) {
    int64_t row = begin / out.columns, column = begin % out.columns;
    for (int64_t i = begin; i < end; ++i) {
      const double x = value(static_cast<uint64_t>(first + row * row_step + column));
      if constexpr (kDTypeOf<T> == DType::kF64) {
        out[row][column] = x;
      } else {
        cpu::Store(static_cast<float>(x), &out[row][column]);
      }
      if (++column == out.columns) ++row, column = 0;
    }
  });
}

template <typename Value>
void FillOn(const OpScope& op, Tensor y, int64_t first, int64_t row_step, const Value& value) {
  if (op.planning() || y.numel() == 0) return;
  switch (y.dtype()) {
    case DType::kF32:
      return FillRows<float>(y, first, row_step, value);
    case DType::kF64:
      return FillRows<double>(y, first, row_step, value);
    case DType::kBF16:
      return FillRows<BF16>(y, first, row_step, value);
    default:
      KRAIT_FATAL(std::string(op.name()) + " does not take " + Name(y.dtype()));
  }
}

}  // namespace

void FillNormal(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step, double scale,
                const Context& ctx) {
  OpScope op(ctx, OpFamily::kOther, "FillNormal", {{"y", y}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(FillNormal(y, stream, first, row_step, scale, ctx));
    return;
  }
  FillOn(op, y, first, row_step, [&](uint64_t i) { return scale * stream.Normal(i); });
}

void FillUniform(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step,
                 double bound, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOther, "FillUniform", {{"y", y}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(FillUniform(y, stream, first, row_step, bound, ctx));
    return;
  }
  FillOn(op, y, first, row_step, [&](uint64_t i) { return bound * (2 * stream.Uniform(i) - 1); });
}

}  // namespace krait
