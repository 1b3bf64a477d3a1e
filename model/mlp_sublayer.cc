#include "model/mlp_sublayer.h"

#include <string>

#include "kernels/activation.h"
#include "kernels/gemm.h"

namespace krait {
namespace {

// The product silu(gate) * up is not kept: its backward reads gate and up anyway and yields it
// again.
struct MlpSaved : Saved {
  Tensor gate_up;  // [M,2F]
};

}  // namespace

MlpSublayer::MlpSublayer(const ParamTable& table, int layer) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".feed_forward.";
  gate_up_ = table.FindStorage(prefix + "gate_up");
  down_ = table.FindStorage(prefix + "down_proj.weight");
}

std::unique_ptr<Saved> MlpSublayer::NewSaved() const { return std::make_unique<MlpSaved>(); }

void MlpSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                          const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t m = x.dim(0);
  const Tensor w_gate_up = weights.Get(gate_up_);
  const Tensor w_down = weights.Get(down_);

  Tensor gate_up = keep->Alloc(x.dtype(), {m, w_gate_up.dim(0)});
  if (saved != nullptr) static_cast<MlpSaved*>(saved)->gate_up = gate_up;
  LinearForward(gate_up, x, w_gate_up, Tensor(), ctx);
  if (y.defined()) {
    ArenaScope scope(ctx.scratch);
    Tensor product = ctx.scratch->Alloc(x.dtype(), {m, w_down.dim(1)});
    SwiGluForward(product, gate_up, ctx);
    LinearForward(y, product, w_down, Tensor(), ctx);
  }
  weights.Release(gate_up_);
  weights.Release(down_);
}

void MlpSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                           const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  ArenaScope scope(ctx.scratch);
  const int64_t m = x.dim(0);
  const Tensor gate_up = static_cast<MlpSaved*>(saved)->gate_up;
  const Tensor w_gate_up = weights.Get(gate_up_);
  const Tensor w_down = weights.Get(down_);

  Tensor d_product = ctx.scratch->Alloc(x.dtype(), {m, w_down.dim(1)});
  LinearBackwardInput(d_product, dy, w_down, /*accumulate=*/false, ctx);
  Tensor product = ctx.scratch->Alloc(x.dtype(), {m, w_down.dim(1)});
  const Tensor d_gate_up = gate_up;  // in place
  SwiGluBackward(d_gate_up, product, d_product, gate_up, ctx);
  LinearBackwardInput(dx, d_gate_up, w_gate_up, /*accumulate=*/false, ctx);
  weights.Release(gate_up_);
  weights.Release(down_);

  LinearBackwardWeight(weights.Grad(down_), dy, product, ctx);
  weights.GradReady(down_);
  LinearBackwardWeight(weights.Grad(gate_up_), d_gate_up, x, ctx);
  weights.GradReady(gate_up_);
}

void MlpSublayer::Decode(Tensor y, Tensor x, const Weights& weights, MixerState* /*state*/,
                         const PassContext& pass) const {
  ArenaScope scope(pass.ctx->scratch);
  Forward(y, x, weights, pass.ctx->scratch, nullptr, pass);
}

}  // namespace krait
