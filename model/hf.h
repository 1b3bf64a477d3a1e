// Hugging Face Jamba: config.json to ModelSpec and back.
#ifndef KRAIT_MODEL_HF_H_
#define KRAIT_MODEL_HF_H_

#include <string>

#include "kernels/base/status.h"
#include "model/spec.h"

namespace krait {

// From the text of config.json (`path` for messages). num_experts 1 = dense. Refuses what Krait
// cannot compute (hidden_act other than silu, attention_dropout > 0 is ignored with training only).
absl::StatusOr<ModelSpec> SpecFromHfConfig(const std::string& json, const std::string& path);

// The text of config.json, or the reason why transformers' Jamba cannot express the layout or an
// option (free pattern, RoPE, renormalise, no inner norms, separate moe d_ff, z-loss is training
// only and fine, ...): kConfig.
absl::StatusOr<std::string> HfConfigFromSpec(const ModelSpec& spec);

}  // namespace krait

#endif  // KRAIT_MODEL_HF_H_
