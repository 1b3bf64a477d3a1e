#include "kernels/rms_norm.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cuda/rms_norm.h"

namespace krait {
namespace {

using cpu::Rows;
using cpu::RowsOf;

DType StatisticsType(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// Calls fn(T{}, S{}) with the types of rows and statistics.
template <typename Fn>
void DispatchNorm(Tensor x, const char* op, const Fn& fn) {
  switch (x.dtype()) {
    case DType::kF32:
      return fn(float{}, float{});
    case DType::kF64:
      return fn(double{}, double{});
    case DType::kBF16:
      return fn(BF16{}, float{});
    default:
      KRAIT_FATAL(std::string(op) + " does not take " + Name(x.dtype()));
  }
}

template <typename T>
void CheckShape(const Rows<T>& rows, const Rows<T>& like) {
  KRAIT_CHECK(rows.rows == like.rows && rows.columns == like.columns);
}

template <typename S>
S* Vector(Tensor t, int64_t size) {
  KRAIT_CHECK(t.numel() == size);
  return cpu::DenseData<S>(t);
}

void Forward(const char* op, Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta,
             Tensor w, double eps) {
  DispatchNorm(residual, op, [&](auto element, auto statistic) {
    using T = decltype(element);
    using S = decltype(statistic);
    cpu::NormForwardArgs<T, S> args{};
    args.residual = RowsOf<T>(residual);
    args.y = RowsOf<T>(y);
    CheckShape(args.y, args.residual);
    if (delta.defined()) {
      args.delta = RowsOf<T>(delta);
      args.h = RowsOf<T>(h);
      CheckShape(args.delta, args.residual);
      CheckShape(args.h, args.residual);
    }
    args.rstd = Vector<S>(rstd, args.residual.rows);
    args.w = Vector<S>(w, args.residual.columns);
    args.eps = static_cast<S>(eps);
    cpu::NormForward(args);
  });
}

void Backward(const char* op, Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor rstd, Tensor w,
              bool accumulate, Tensor partial) {
  DispatchNorm(x, op, [&](auto element, auto statistic) {
    using T = decltype(element);
    using S = decltype(statistic);
    cpu::NormBackwardArgs<T, S> args{};
    args.dx = RowsOf<T>(dx);
    args.dy = RowsOf<T>(dy);
    args.x = RowsOf<T>(x);
    CheckShape(args.dx, args.x);
    CheckShape(args.dy, args.x);
    args.rstd = Vector<S>(rstd, args.x.rows);
    args.w = Vector<S>(w, args.x.columns);
    args.dw = Vector<S>(dw, args.x.columns);
    args.accumulate = accumulate;
    args.partial = partial.data<S>();
    cpu::NormBackward(args);
  });
}

// Scratch for the partial sums of the weight gradient.
Tensor Partial(Tensor x, const Context& ctx) {
  return ctx.scratch->Alloc(StatisticsType(x.dtype()), {cpu::NormPieces(x.rows()), x.dim(-1)});
}

}  // namespace

void RmsNormForward(Tensor y, Tensor rstd, Tensor x, Tensor w, double eps, const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm);
  if (op.planning()) return;
  if (x.device() == Device::kCuda) {
    return cuda::RmsNormForward(x, y, rstd, x, Tensor(), w, eps, ctx);
  }
  Forward("RmsNormForward", Tensor(), y, rstd, x, Tensor(), w, eps);
}

void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor rstd, Tensor w,
                     bool accumulate, const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm);
  if (x.device() == Device::kCuda) {
    return cuda::RmsNormBackward(dx, dw, dy, x, rstd, w, accumulate, ctx);
  }
  const ArenaScope scope(ctx.scratch);
  const Tensor partial = Partial(x, ctx);
  if (op.planning()) return;
  Backward("RmsNormBackward", dx, dw, dy, x, rstd, w, accumulate, partial);
}

void ResidualRmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta,
                            Tensor w, double eps, const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm);
  if (op.planning()) return;
  KRAIT_CHECK(delta.defined() || h.raw() == residual.raw());
  if (residual.device() == Device::kCuda) {
    return cuda::RmsNormForward(h, y, rstd, residual, delta, w, eps, ctx);
  }
  Forward("ResidualRmsNormForward", h, y, rstd, residual, delta, w, eps);
}

void ResidualRmsNormBackward(Tensor dh, Tensor dw, Tensor dy, Tensor h, Tensor rstd, Tensor w,
                             const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm);
  if (h.device() == Device::kCuda) {
    return cuda::RmsNormBackward(dh, dw, dy, h, rstd, w, true, ctx);
  }
  const ArenaScope scope(ctx.scratch);
  const Tensor partial = Partial(h, ctx);
  if (op.planning()) return;
  Backward("ResidualRmsNormBackward", dh, dw, dy, h, rstd, w, true, partial);
}

}  // namespace krait
