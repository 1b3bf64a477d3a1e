#include "model/moe_sublayer.h"

#include <string>

#include "kernels/gemm.h"
#include "kernels/moe.h"
#include "kernels/swiglu.h"
#include "model/names.h"

namespace krait {
namespace {

// The permuted inputs, the products silu(gate) * up and the experts' outputs are not kept: the
// first are a copy of x, the others come out of the backward or are not needed there.
struct MoeSaved : Saved {
  Tensor logits, probs;            // [M,E]
  Tensor choice, weight;           // [M,k]
  Tensor row_of, source, offsets;  // [M,k], [R], [E+1]
  Tensor gate_up;                  // [R,2F]
};

}  // namespace

MoeSublayer::MoeSublayer(const ModelSpec& spec, const ParamTable& table, int layer, int moe_index)
    : experts_(spec.moe.experts),
      top_k_(spec.moe.top_k),
      renormalize_(spec.moe.renormalize),
      moe_index_(moe_index) {
  const std::string prefix = SublayerPrefix(SublayerKind::kMoe, layer);
  router_ = table.FindStorage(prefix + "router.weight");
  gate_up_ = table.FindStorage(prefix + "experts.gate_up");
  down_ = table.FindStorage(prefix + "experts.down");
}

std::unique_ptr<Saved> MoeSublayer::NewSaved() const { return std::make_unique<MoeSaved>(); }

void MoeSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                          MixerState* /*state*/, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t m = x.dim(0);
  const int64_t rows = ExpertRows(m, top_k_, experts_, ctx.device);
  const DType wide = Wide(x.dtype());
  const Tensor w_gate_up = weights.Get(gate_up_);
  const int64_t width = w_gate_up.dim(1);

  MoeSaved unsaved;
  MoeSaved& s = saved != nullptr ? *static_cast<MoeSaved*>(saved) : unsaved;
  s.logits = keep->Alloc(wide, {m, experts_});
  s.probs = keep->Alloc(wide, {m, experts_});
  s.choice = keep->Alloc(DType::kI32, {m, top_k_});
  s.weight = keep->Alloc(wide, {m, top_k_});
  s.row_of = keep->Alloc(DType::kI32, {m, top_k_});
  s.source = keep->Alloc(DType::kI32, {rows});
  s.offsets = keep->Alloc(DType::kI64, {experts_ + 1});
  s.gate_up = keep->Alloc(x.dtype(), {rows, width});

  RouterForward(s.logits, x, weights.Get(router_), ctx);
  weights.Release(router_);
  MoeRouteForward(s.probs, s.choice, s.weight, s.logits, renormalize_, ctx);
  if (pass.router_logits != nullptr) *pass.router_logits = s.logits;
  if (pass.router != nullptr && !pass.recomputing) {
    const int64_t groups = pass.router->groups;
    MoeStatistics(pass.router->prob_sum.Slice(0, moe_index_ * groups, groups),
                  pass.router->choice_count.Slice(0, moe_index_ * groups, groups),
                  pass.router->z_sum.Slice(0, moe_index_, 1), s.probs, s.choice, s.logits, ctx);
  }
  MoeSort(s.row_of, s.source, s.offsets, s.choice, ctx);

  const ArenaScope scope(ctx.scratch);
  const Tensor inputs = ctx.scratch->Alloc(x.dtype(), {rows, x.dim(1)});
  MoePermute(inputs, x, s.source, top_k_, ctx);
  const Tensor product = y.defined() ? ctx.scratch->Alloc(x.dtype(), {rows, width / 2}) : Tensor();
  GroupedLinearSwiGluForward(product, s.gate_up, inputs, w_gate_up, s.offsets, ctx);
  weights.Release(gate_up_);
  if (!y.defined()) return;
  const Tensor outputs = inputs;  // in place: the inputs have served
  GroupedLinearForward(outputs, product, weights.Get(down_), s.offsets, ctx);
  weights.Release(down_);
  MoeCombine(y, outputs, s.weight, s.row_of, ctx);
}

void MoeSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                           MixerState* /*state*/, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  const int64_t m = x.dim(0);
  const MoeSaved& s = *static_cast<MoeSaved*>(saved);
  const int64_t rows = s.gate_up.dim(0), width = s.gate_up.dim(1);

  // Experts. dy of each row, not yet times its routing weight.
  const Tensor d_outputs = ctx.scratch->Alloc(x.dtype(), {rows, x.dim(1)});
  MoePermute(d_outputs, dy, s.source, top_k_, ctx);
  const Tensor d_weight = ctx.scratch->Alloc(s.weight.dtype(), {m, top_k_});
  const Tensor product = ctx.scratch->Alloc(x.dtype(), {rows, width / 2});
  const Tensor d_gate_up = s.gate_up;  // in place
  GroupedSwiGluLinearBackward(d_gate_up, product, {s.weight, d_weight, s.source}, d_outputs,
                              weights.Get(down_), s.gate_up, s.offsets, ctx);
  weights.Release(down_);
  GroupedWgrad(weights, down_, d_outputs, product, s.offsets, ctx);
  weights.GradReady(down_);
  const Tensor inputs = d_outputs;  // in place: dy of the rows has served
  MoePermute(inputs, x, s.source, top_k_, ctx);
  GroupedWgrad(weights, gate_up_, d_gate_up, inputs, s.offsets, ctx);
  weights.GradReady(gate_up_);
  const Tensor d_inputs = inputs;  // likewise
  GroupedLinearBackwardInput(d_inputs, d_gate_up, weights.Get(gate_up_), s.offsets, ctx);
  weights.Release(gate_up_);

  // Router: through the combine weights, the aux loss and the z-loss.
  Tensor d_prob = pass.router->d_prob;
  const int64_t groups = pass.router->groups;
  if (d_prob.defined()) d_prob = d_prob.Slice(0, moe_index_ * groups, groups);
  const Tensor d_logits = ctx.scratch->Alloc(s.logits.dtype(), {m, experts_});
  MoeRouteBackward(d_logits, d_weight, d_prob, pass.router->z_scale, s.probs, s.choice, s.weight,
                   s.logits, renormalize_, ctx);
  RouterBackwardInput(dx, d_logits, weights.Get(router_), /*accumulate=*/false, ctx);
  weights.Release(router_);
  RouterBackwardWeight(weights.Grad(router_), d_logits, x, weights.Accumulate(router_), ctx);
  weights.GradReady(router_);
  MoePermuteBackward(dx, d_inputs, s.row_of, /*accumulate=*/true, ctx);
}

}  // namespace krait
