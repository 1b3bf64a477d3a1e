#include "model/sublayer.h"

#include "kernels/base/check.h"
#include "model/attention_sublayer.h"
#include "model/mamba_sublayer.h"
#include "model/mlp_sublayer.h"
#include "model/moe_sublayer.h"

namespace krait {

std::unique_ptr<SublayerModule> MakeSublayer(const ModelSpec& spec, const ParamTable& table,
                                             int index, int moe_index) {
  const Sublayer& sublayer = spec.sublayers[static_cast<size_t>(index)];
  switch (sublayer.kind) {
    case SublayerKind::kAttention:
      return std::make_unique<AttentionSublayer>(spec, table, sublayer.layer);
    case SublayerKind::kMamba:
      return std::make_unique<MambaSublayer>(spec, table, sublayer.layer);
    case SublayerKind::kMlp:
      return std::make_unique<MlpSublayer>(table, sublayer.layer);
    case SublayerKind::kMoe:
      return std::make_unique<MoeSublayer>(spec, table, sublayer.layer, moe_index);
  }
  KRAIT_FATAL("unknown kind of sublayer");
}

}  // namespace krait
