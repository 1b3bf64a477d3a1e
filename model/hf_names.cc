// Names of a folder's tensors (hf.h).
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "model/hf.h"
#include "model/names.h"

namespace krait {
namespace {

bool TakePrefix(std::string* text, const std::string& prefix) {
  if (!text->starts_with(prefix)) return false;
  text->erase(0, prefix.size());
  return true;
}

bool IsDense(const ModelSpec& spec, size_t layer) {
  const size_t feed_forward = 2 * layer + 1;
  return feed_forward < spec.sublayers.size() &&
         spec.sublayers[feed_forward].kind == SublayerKind::kMlp;
}

}  // namespace

std::string PublishedName(const std::string& stored, const ModelSpec& spec) {
  constexpr char kModel[] = "model.", kLayers[] = "layers.";
  std::string rest = stored;
  const bool whole_model = TakePrefix(&rest, kModel);
  if (!TakePrefix(&rest, kLayers)) {
    const bool of_base = rest.starts_with("embed_tokens.") || rest.starts_with("final_layernorm.");
    return !whole_model && of_base ? kModel + stored : stored;
  }
  const size_t dot = rest.find('.');
  const std::string layer = rest.substr(0, dot);
  if (dot == std::string::npos || layer.empty() || layer.size() > 9 ||
      layer.find_first_not_of("0123456789") != std::string::npos) {
    return stored;
  }
  rest.erase(0, dot + 1);
  constexpr std::array<std::pair<const char*, const char*>, 4> kRenamed = {{
      {"pre_moe_layernorm.", "pre_ff_layernorm."},
      {"mamba.B_layernorm.", "mamba.b_layernorm."},
      {"mamba.C_layernorm.", "mamba.c_layernorm."},
      {"moe.", "feed_forward."},
  }};
  for (const auto& [before, now] : kRenamed) {
    if (TakePrefix(&rest, before)) rest = now + rest;
  }
  if (IsDense(spec, std::stoul(layer)) && TakePrefix(&rest, "feed_forward.experts.0.")) {
    rest = "feed_forward." + rest;
  }
  return std::string(kModel) + kLayers + layer + "." + rest;
}

std::vector<HfSource> HfSources(const Param& param, const ModelSpec& spec) {
  std::vector<HfSource> sources = {{param.name, param.shape, 0}};
  if (spec.tie_embeddings && param.name == kEmbeddingName) {
    sources.push_back({kHeadName, param.shape, 0});
  }
  if (param.shard.axis != MeshAxis::kExpert) return sources;
  // "PREFIX.experts.E.MATRIX.weight"
  const std::string marker = ".experts.";
  const size_t experts = param.name.find(marker) + marker.size();
  const size_t dot = param.name.find('.', experts);
  KRAIT_CHECK(dot != std::string::npos);
  const int64_t e = std::stoll(param.name.substr(experts, dot - experts));
  const std::string matrix = param.name.substr(dot + 1);
  const std::string prefix = param.name.substr(0, experts);
  const int64_t d = spec.d_model;
  const int64_t f = spec.moe.d_ff;
  if (matrix.starts_with("down_proj")) {
    sources.push_back({prefix + "down_proj", {spec.moe.experts, d, f}, e * d * f});
  } else {
    const int64_t half = matrix.starts_with("up_proj") ? 1 : 0;
    sources.push_back(
        {prefix + "gate_up_proj", {spec.moe.experts, 2 * f, d}, (2 * e + half) * f * d});
  }
  return sources;
}

}  // namespace krait
