// Hugging Face Jamba (transformers' JambaConfig and JambaForCausalLM): config.json to ModelSpec and
// back, and where a published tensor lies in a folder of safetensors.
#ifndef KRAIT_MODEL_HF_H_
#define KRAIT_MODEL_HF_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "model/params.h"
#include "model/spec.h"

namespace krait {

// From the text of config.json (`path` for messages). Missing keys have JambaConfig's defaults;
// num_experts 1 = dense. Keys that change nothing in the mathematics are passed over. Errors
// (kConfig), all at once, each "path: key: ...": values out of range or of the wrong type, and what
// Krait does not compute (another model_type, hidden_act other than silu, attention_dropout,
// layer_types that contradict the periods). The initialisation scheme is left at its default.
absl::StatusOr<ModelSpec> SpecFromHfConfig(const std::string& json, const std::string& path);

// The text of config.json, or all the reasons why transformers' Jamba cannot express the layout or
// an option (kConfig): layers that no period and offset yield, RoPE, renormalised routing, no inner
// norms, experts of another width than the MLPs, head_dim other than d_model / heads. Aux-loss
// pooling, z-loss and initialisation only matter to training and are no obstacle.
absl::StatusOr<std::string> HfConfigFromSpec(const ModelSpec& spec);

// One place in a Hugging Face folder that may hold a published parameter: elements
// [begin, begin + param.numel()) of the tensor `name`, which has `shape`.
struct HfSource {
  std::string name;
  std::vector<int64_t> shape;
  int64_t begin;
};

// The places to look for `param`, the usual one first: its own name and shape; for an expert's
// matrix also the fused tensors of transformers 5, "....experts.gate_up_proj" [E,2F,D] (gate rows,
// then up rows) and "....experts.down_proj" [E,D,F].
std::vector<HfSource> HfSources(const Param& param, const ModelSpec& spec);

}  // namespace krait

#endif  // KRAIT_MODEL_HF_H_
