#include "kernels/rms_norm.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/rms_norm.h"

namespace krait {
namespace {

using cpu::Rows;
using cpu::RowsOf;

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

void Backward(const char* op, Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd,
              Tensor w, Tensor partial) {
  DispatchNorm(x, op, [&](auto element, auto statistic) {
    using T = decltype(element);
    using S = decltype(statistic);
    cpu::NormBackwardArgs<T, S> args{};
    args.dx = RowsOf<T>(dx);
    args.dy = RowsOf<T>(dy);
    args.x = RowsOf<T>(x);
    CheckShape(args.dx, args.x);
    CheckShape(args.dy, args.x);
    if (dx_in.defined()) {
      args.dx_in = RowsOf<T>(dx_in);
      CheckShape(args.dx_in, args.x);
    }
    args.rstd = Vector<S>(rstd, args.x.rows);
    args.w = Vector<S>(w, args.x.columns);
    args.dw = Vector<S>(dw, args.x.columns);
    args.partial = partial.data<S>();
    cpu::NormBackward(args);
  });
}

// dx = dx_in (undefined: zero) + the norm's gradient, on either device.
void BackwardOn(const OpScope& op, Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x,
                Tensor rstd, Tensor w, const Context& ctx) {
  const bool cuda = ctx.device == Device::kCuda;
  const ArenaScope scope(ctx.scratch);
  // The partial sums of the weight gradient.
  const Tensor partial = ctx.scratch->Alloc(
      Wide(x.dtype()),
      {cuda ? cuda::RmsNormPartials(x.rows()) : cpu::NormPieces(x.rows()), x.dim(-1)});
  if (op.planning()) return;
  if (cuda) {
    KRAIT_CUDA(RmsNormBackward(dx, dw, dy, dx_in, x, rstd, w, partial, ctx));
    return;
  }
  Backward(op.name(), dx, dw, dy, dx_in, x, rstd, w, partial);
}

}  // namespace

void RmsNormForward(Tensor y, Tensor rstd, Tensor x, Tensor w, double eps, const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm, "RmsNormForward",
             {{"y", y}, {"rstd", rstd}, {"x", x}, {"w", w}});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(RmsNormForward(x, y, rstd, x, Tensor(), w, eps, ctx));
    return;
  }
  Forward(op.name(), Tensor(), y, rstd, x, Tensor(), w, eps);
}

void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor rstd, Tensor w,
                     bool accumulate, const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm, "RmsNormBackward",
             {{"dx", dx}, {"dw", dw}, {"dy", dy}, {"x", x}, {"rstd", rstd}, {"w", w}});
  BackwardOn(op, dx, dw, dy, accumulate ? dx : Tensor(), x, rstd, w, ctx);
}

void ResidualRmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta,
                            Tensor w, double eps, const Context& ctx) {
  OpScope op(
      ctx, OpFamily::kNorm, "ResidualRmsNormForward",
      {{"h", h}, {"y", y}, {"rstd", rstd}, {"residual", residual}, {"delta", delta}, {"w", w}});
  if (op.planning()) return;
  KRAIT_CHECK(delta.defined() || h.raw() == residual.raw());
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(RmsNormForward(h, y, rstd, residual, delta, w, eps, ctx));
    return;
  }
  Forward(op.name(), h, y, rstd, residual, delta, w, eps);
}

void ResidualRmsNormBackward(Tensor dh, Tensor dw, Tensor dy, Tensor dh_in, Tensor h, Tensor rstd,
                             Tensor w, const Context& ctx) {
  OpScope op(
      ctx, OpFamily::kNorm, "ResidualRmsNormBackward",
      {{"dh", dh}, {"dw", dw}, {"dy", dy}, {"dh_in", dh_in}, {"h", h}, {"rstd", rstd}, {"w", w}});
  BackwardOn(op, dh, dw, dy, dh_in, h, rstd, w, ctx);
}

}  // namespace krait
