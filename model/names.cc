#include "model/names.h"

namespace krait {
namespace {

std::string LayerPrefix(int layer) { return "model.layers." + std::to_string(layer) + "."; }

}  // namespace

std::string SublayerPrefix(SublayerKind kind, int layer) {
  switch (kind) {
    case SublayerKind::kAttention:
      return LayerPrefix(layer) + "self_attn.";
    case SublayerKind::kMamba:
      return LayerPrefix(layer) + "mamba.";
    case SublayerKind::kMlp:
    case SublayerKind::kMoe:
      return LayerPrefix(layer) + "feed_forward.";
  }
  return "";
}

std::string NormName(SublayerKind kind, int layer) {
  return LayerPrefix(layer) +
         (IsMixer(kind) ? "input_layernorm.weight" : "pre_ff_layernorm.weight");
}

}  // namespace krait
