#include "kernels/inner_norms.h"

#include <array>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/inner_norms.h"
#include "kernels/rms_norm.h"

namespace krait {
namespace {

// Calls fn(part, first column, columns) for dt, B and C.
template <typename Fn>
void ForEachPart(const InnerNormWeights& w, const Fn& fn) {
  int64_t begin = 0, part = 0;
  for (const Tensor& weight : {w.dt, w.b, w.c}) {
    fn(part++, begin, weight.dim(0));
    begin += weight.dim(0);
  }
}

}  // namespace

void InnerNormsForward(Tensor normed, Tensor rstd, Tensor projected, const InnerNormWeights& w,
                       double eps, const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm, "InnerNormsForward",
             {{"normed", normed},
              {"rstd", rstd},
              {"projected", projected},
              {"w.dt", w.dt},
              {"w.b", w.b},
              {"w.c", w.c}});
  if (!w.dt.defined()) return Copy(normed, projected, ctx);
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(InnerNormsForward(normed, rstd, projected, w, eps, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  normed = wide.Out(normed);
  if (op.planning()) return;
  KRAIT_CHECK(w.dt.dim(0) + w.b.dim(0) + w.c.dim(0) == projected.dim(1));
  const std::array<Tensor, 3> weights = {w.dt, w.b, w.c};
  ForEachPart(w, [&](int64_t part, int64_t begin, int64_t columns) {
    RmsNormForward(normed.Slice(1, begin, columns), rstd.Slice(0, part, 1).View({projected.dim(0)}),
                   projected.Slice(1, begin, columns), weights[static_cast<size_t>(part)], eps,
                   ctx);
  });
}

void InnerNormsBackward(Tensor d_projected, const InnerNormWeights& dw, Tensor d_normed,
                        Tensor projected, Tensor rstd, const InnerNormWeights& w,
                        const Context& ctx) {
  OpScope op(ctx, OpFamily::kNorm, "InnerNormsBackward",
             {{"d_projected", d_projected},
              {"dw.dt", dw.dt},
              {"dw.b", dw.b},
              {"dw.c", dw.c},
              {"d_normed", d_normed},
              {"projected", projected},
              {"rstd", rstd},
              {"w.dt", w.dt},
              {"w.b", w.b},
              {"w.c", w.c}});
  if (!w.dt.defined()) return Copy(d_projected, d_normed, ctx);
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor partial = ctx.scratch->Alloc(
        DType::kF32, {cuda::InnerNormPartials(projected.dim(0)), projected.dim(1)});
    if (op.planning()) return;
    KRAIT_CUDA(InnerNormsBackward(d_projected, dw, d_normed, projected, rstd, w, partial, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  d_projected = wide.Out(d_projected);
  const std::array<Tensor, 3> weights = {w.dt, w.b, w.c}, gradients = {dw.dt, dw.b, dw.c};
  ForEachPart(w, [&](int64_t part, int64_t begin, int64_t columns) {
    RmsNormBackward(d_projected.Slice(1, begin, columns), gradients[static_cast<size_t>(part)],
                    d_normed.Slice(1, begin, columns), projected.Slice(1, begin, columns),
                    rstd.Slice(0, part, 1).View({projected.dim(0)}),
                    weights[static_cast<size_t>(part)], /*accumulate=*/false, ctx);
  });
}

}  // namespace krait
