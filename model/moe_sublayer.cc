#include "model/moe_sublayer.h"

#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/gemm.h"
#include "kernels/moe.h"

namespace krait {
namespace {

// The permuted inputs and the products silu(gate) * up are not kept: one is a copy of x, the other
// comes out of SwiGLU's backward.
struct MoeSaved : Saved {
  Tensor logits, probs;          // [M,E]
  Tensor choice, weight;         // [M,k]
  Tensor row_of, source;         // [M,k], [M*k]
  Tensor gate_up, outputs;       // [M*k,2F], [M*k,D]
  std::vector<int64_t> offsets;  // [E+1] rows of each expert, host
};

}  // namespace

MoeSublayer::MoeSublayer(const ModelSpec& spec, const ParamTable& table, int layer, int moe_index)
    : experts_(spec.moe.experts),
      top_k_(spec.moe.top_k),
      renormalize_(spec.moe.renormalize),
      moe_index_(moe_index) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".feed_forward.";
  router_ = table.FindStorage(prefix + "router.weight");
  gate_up_ = table.FindStorage(prefix + "experts.gate_up");
  down_ = table.FindStorage(prefix + "experts.down");
}

std::unique_ptr<Saved> MoeSublayer::NewSaved() const { return std::make_unique<MoeSaved>(); }

void MoeSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                          const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t m = x.dim(0);
  const int64_t rows = m * top_k_;
  const DType wide = WideDType(x.dtype());
  const Tensor w_router = weights.Get(router_);
  const Tensor w_gate_up = weights.Get(gate_up_);
  const Tensor w_down = weights.Get(down_);

  MoeSaved unsaved;
  MoeSaved& s = saved != nullptr ? *static_cast<MoeSaved*>(saved) : unsaved;
  s.logits = keep->Alloc(wide, {m, experts_});
  s.probs = keep->Alloc(wide, {m, experts_});
  s.choice = keep->Alloc(DType::kI32, {m, top_k_});
  s.weight = keep->Alloc(wide, {m, top_k_});
  s.row_of = keep->Alloc(DType::kI32, {m, top_k_});
  s.source = keep->Alloc(DType::kI32, {rows});
  s.gate_up = keep->Alloc(x.dtype(), {rows, w_gate_up.dim(1)});
  s.outputs = keep->Alloc(x.dtype(), {rows, x.dim(1)});
  s.offsets.resize(static_cast<size_t>(experts_) + 1);

  LinearForward(s.logits, x, w_router, Tensor(), ctx);
  MoeRouteForward(s.probs, s.choice, s.weight, s.logits, renormalize_, ctx);
  if (pass.router_logits != nullptr) *pass.router_logits = s.logits;
  if (pass.add_router_stats) {
    MoeStatistics(pass.router->prob_sum.Slice(0, moe_index_, 1).View({experts_}),
                  pass.router->choice_count.Slice(0, moe_index_, 1).View({experts_}),
                  pass.router->z_sum.Slice(0, moe_index_, 1), s.probs, s.choice, s.logits, ctx);
  }
  MoeSort(s.row_of, s.source, s.offsets.data(), s.choice, experts_, ctx);
  if (ctx.planning) {  // no choices to sort: plan for balanced experts
    for (int64_t e = 0; e <= experts_; ++e) {
      s.offsets[static_cast<size_t>(e)] = rows * e / experts_;
    }
  }

  ArenaScope scope(ctx.scratch);
  Tensor inputs = ctx.scratch->Alloc(x.dtype(), {rows, x.dim(1)});
  MoePermute(inputs, x, s.source, top_k_, ctx);
  GroupedLinearForward(s.gate_up, inputs, w_gate_up, s.offsets.data(), ctx);
  Tensor product = ctx.scratch->Alloc(x.dtype(), {rows, w_down.dim(2)});
  SwiGluForward(product, s.gate_up, ctx);
  GroupedLinearForward(s.outputs, product, w_down, s.offsets.data(), ctx);
  if (y.defined()) MoeCombine(y, s.outputs, s.weight, s.row_of, ctx);
  weights.Release(router_);
  weights.Release(gate_up_);
  weights.Release(down_);
}

void MoeSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                           const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  ArenaScope scope(ctx.scratch);
  const int64_t m = x.dim(0);
  const int64_t rows = m * top_k_;
  const MoeSaved& s = *static_cast<MoeSaved*>(saved);
  const int64_t* offsets = s.offsets.data();
  const Tensor w_router = weights.Get(router_);
  const Tensor w_gate_up = weights.Get(gate_up_);
  const Tensor w_down = weights.Get(down_);

  Tensor d_weight = ctx.scratch->Alloc(s.weight.dtype(), {m, top_k_});
  const Tensor d_outputs = s.outputs;  // in place
  MoeCombineBackward(d_outputs, d_weight, dy, s.outputs, s.weight, s.row_of, ctx);

  // Experts.
  Tensor d_product = ctx.scratch->Alloc(x.dtype(), {rows, w_down.dim(2)});
  GroupedLinearBackwardInput(d_product, d_outputs, w_down, offsets, ctx);
  Tensor product = ctx.scratch->Alloc(x.dtype(), {rows, w_down.dim(2)});
  const Tensor d_gate_up = s.gate_up;  // in place
  SwiGluBackward(d_gate_up, product, d_product, s.gate_up, ctx);
  GroupedLinearBackwardWeight(weights.Grad(down_), d_outputs, product, offsets, ctx);
  weights.GradReady(down_);
  Tensor inputs = ctx.scratch->Alloc(x.dtype(), {rows, x.dim(1)});
  MoePermute(inputs, x, s.source, top_k_, ctx);
  GroupedLinearBackwardWeight(weights.Grad(gate_up_), d_gate_up, inputs, offsets, ctx);
  weights.GradReady(gate_up_);
  const Tensor d_inputs = inputs;  // in place: the inputs have served
  GroupedLinearBackwardInput(d_inputs, d_gate_up, w_gate_up, offsets, ctx);

  // Router: through the combine weights, the aux loss and the z-loss.
  Tensor d_prob = pass.router->d_prob;
  if (d_prob.defined()) d_prob = d_prob.Slice(0, moe_index_, 1).View({experts_});
  Tensor d_logits = ctx.scratch->Alloc(s.logits.dtype(), {m, experts_});
  MoeRouteBackward(d_logits, d_weight, d_prob, pass.router->z_scale, s.probs, s.choice, s.weight,
                   s.logits, renormalize_, ctx);
  LinearBackwardInput(dx, d_logits, w_router, /*accumulate=*/false, ctx);
  LinearBackwardWeight(weights.Grad(router_), d_logits, x, ctx);
  weights.GradReady(router_);
  MoePermuteBackward(dx, d_inputs, s.row_of, /*accumulate=*/true, ctx);
  weights.Release(router_);
  weights.Release(gate_up_);
  weights.Release(down_);
}

void MoeSublayer::Decode(Tensor y, Tensor x, const Weights& weights, MixerState* /*state*/,
                         const PassContext& pass) const {
  ArenaScope scope(pass.ctx->scratch);
  Forward(y, x, weights, pass.ctx->scratch, nullptr, pass);
}

}  // namespace krait
