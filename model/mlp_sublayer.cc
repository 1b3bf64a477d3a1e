#include "model/mlp_sublayer.h"

#include <string>

#include "kernels/gemm.h"
#include "kernels/swiglu.h"
#include "model/names.h"
#include "model/sequence_parallel.h"

namespace krait {
namespace {

// The product silu(gate) * up is not kept: its backward reads gate and up anyway and yields it
// again.
struct MlpSaved : Saved {
  Tensor gate_up;  // [M,2F]
};

}  // namespace

MlpSublayer::MlpSublayer(const ParamTable& table, int layer) {
  const std::string prefix = SublayerPrefix(SublayerKind::kMlp, layer);
  gate_up_ = table.FindStorage(prefix + "gate_up");
  down_ = table.FindStorage(prefix + "down_proj.weight");
}

std::unique_ptr<Saved> MlpSublayer::NewSaved() const { return std::make_unique<MlpSaved>(); }

void MlpSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                          MixerState* /*state*/, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t m = pass.shape.tokens();
  const Tensor w_gate_up = weights.Get(gate_up_);
  Tensor gate_up = keep->Alloc(x.dtype(), {m, w_gate_up.dim(0)});
  if (saved != nullptr) static_cast<MlpSaved*>(saved)->gate_up = gate_up;

  const ArenaScope scope(ctx.scratch);
  const Tensor rows = GatherRows("mlp: input", x, pass);
  const Tensor product =
      y.defined() ? ctx.scratch->Alloc(x.dtype(), {m, w_gate_up.dim(0) / 2}) : Tensor();
  LinearSwiGluForward(product, gate_up, rows, w_gate_up, ctx);
  weights.Release(gate_up_);
  if (!y.defined()) return;
  const Tensor partial = PartialRows(y, pass);
  LinearForward(partial, product, weights.Get(down_), Tensor(), ctx);
  weights.Release(down_);
  SumRows("mlp: output", y, partial, pass);
}

void MlpSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                           MixerState* /*state*/, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  const Tensor gate_up = static_cast<MlpSaved*>(saved)->gate_up;
  const Tensor d_gate_up = gate_up;  // in place
  const Tensor product = ctx.scratch->Alloc(x.dtype(), {gate_up.dim(0), gate_up.dim(1) / 2});
  const Tensor dy_rows = GatherRows("mlp: gradient of the output", dy, pass);
  const Tensor rows = GatherRowsBeside("mlp: input again", x, pass);
  SwiGluLinearBackward(d_gate_up, product, dy_rows, weights.Get(down_), gate_up, ctx);
  weights.Release(down_);
  const Tensor partial = PartialRows(dx, pass);
  LinearBackwardInput(partial, d_gate_up, weights.Get(gate_up_), /*accumulate=*/false, ctx);
  weights.Release(gate_up_);
  JoinTraffic(pass);
  SumRowsBeside("mlp: gradient of the input", dx, partial, pass);

  Wgrad(weights, down_, dy_rows, product, ctx);
  weights.GradReady(down_);
  Wgrad(weights, gate_up_, d_gate_up, rows, ctx);
  weights.GradReady(gate_up_);
  JoinTraffic(pass);
}

}  // namespace krait
