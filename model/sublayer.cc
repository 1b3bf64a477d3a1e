#include "model/sublayer.h"

#include "kernels/base/check.h"
#include "kernels/gemm.h"
#include "model/attention_sublayer.h"
#include "model/mamba_sublayer.h"
#include "model/mlp_sublayer.h"
#include "model/moe_sublayer.h"

namespace krait {

void Wgrad(const Weights& weights, int storage, Tensor dy, Tensor x, const Context& ctx) {
  LinearBackwardWeight(weights.Grad(storage), dy, x, weights.Accumulate(storage), ctx);
}

void GroupedWgrad(const Weights& weights, int storage, Tensor dy, Tensor x, Tensor offsets,
                  const Context& ctx) {
  GroupedLinearBackwardWeight(weights.Grad(storage), dy, x, offsets, weights.Accumulate(storage),
                              ctx);
}

std::unique_ptr<SublayerModule> MakeSublayer(const ModelSpec& spec, const LocalSizes& sizes,
                                             const ParamTable& table, int index, int moe_index) {
  const Sublayer& sublayer = spec.sublayers[static_cast<size_t>(index)];
  switch (sublayer.kind) {
    case SublayerKind::kAttention:
      return std::make_unique<AttentionSublayer>(spec, sizes, table, sublayer.layer);
    case SublayerKind::kMamba:
      return std::make_unique<MambaSublayer>(spec, sizes, table, sublayer.layer);
    case SublayerKind::kMlp:
      return std::make_unique<MlpSublayer>(table, sublayer.layer);
    case SublayerKind::kMoe:
      return std::make_unique<MoeSublayer>(spec, sizes, table, sublayer.layer, moe_index);
  }
  KRAIT_FATAL("unknown kind of sublayer");
}

}  // namespace krait
