// Members of a config.json that hf_read.cc and hf_write.cc both know.
#ifndef KRAIT_MODEL_HF_MEMBERS_H_
#define KRAIT_MODEL_HF_MEMBERS_H_

#include <cstdint>

#include "kernels/base/json.h"
#include "model/spec.h"

namespace krait {

inline constexpr char kPadTokenKey[] = "pad_token_id";
inline constexpr char kBosTokenKey[] = "bos_token_id";
inline constexpr char kEosTokenKey[] = "eos_token_id";
// Where a config.json does not name them.
inline constexpr int64_t kDefaultPadToken = 0, kDefaultBosToken = 1, kDefaultEosToken = 2;

// What is true of one folder only, or another way to say what the model's own members say.
inline constexpr const char* kOfOneFolder[] = {
    "_name_or_path", "auto_map",          "transformers_version",   "dtype",
    "torch_dtype",   "architectures",     "quantization_config",    "compression_config",
    "layer_types",   "layers_block_type", "layers_num_experts",     "num_local_experts",
    "head_dim",      "_commit_hash",      "mamba_inner_layernorms",
};

// The members that describe the model.
nlohmann::ordered_json HfShapeMembers(const ModelSpec& spec);

}  // namespace krait

#endif  // KRAIT_MODEL_HF_MEMBERS_H_
