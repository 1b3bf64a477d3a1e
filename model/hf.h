// Hugging Face Jamba (transformers' JambaConfig and JambaForCausalLM): config.json to ModelSpec and
// back, and the names under which its weights are stored.
#ifndef KRAIT_MODEL_HF_H_
#define KRAIT_MODEL_HF_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "model/params.h"
#include "model/spec.h"

namespace krait {

struct HfConfig {
  ModelSpec spec;
  // The members that say something beyond the model, as one JSON object (in Python's dialect):
  // token ids, max_position_embeddings, output_router_logits and whatever else is neither part of
  // `spec` nor untrue of another folder (auto_map, dtype, transformers_version).
  std::string kept;
  std::vector<std::string> notes;  // a sentence each about what has no effect here
};

// From the text of config.json (`path` for messages). Missing keys have JambaConfig's defaults;
// num_experts 0 or 1 = dense; spec.pad_token is the embedding's padding_idx. Keys that change
// nothing in the mathematics are passed over. Errors (kConfig), all at once, each "path: key: ...":
// values out of range or of the wrong type, and what Krait does not compute (another model_type or
// architecture, hidden_act other than silu, attention_dropout, lists of layers that contradict the
// periods). Of quantised weights nothing else is said. The initialisation scheme is left at its
// default.
absl::StatusOr<HfConfig> ReadHfConfig(const std::string& json, const std::string& path);

// The text of config.json, or all the reasons why transformers' Jamba cannot express the layout or
// an option (kConfig): layers that no period and offset yield, RoPE, renormalised routing, no inner
// norms, experts of another width than the MLPs. Aux-loss pooling, z-loss and initialisation only
// matter to training and are no obstacle. `kept` as ReadHfConfig gives it, "" for none; where it
// says nothing, there are no special tokens but spec.pad_token, and use_mamba_kernels is false
// (with its default transformers 4.x does not run on a CPU).
absl::StatusOr<std::string> WriteHfConfig(const ModelSpec& spec, const std::string& kept);

// The name that a tensor has in folders of today's transformers: of the base model alone
// ("layers.0...."), and from before 4.40 ("moe." for "feed_forward.", "pre_moe_layernorm",
// "mamba.B_layernorm", dense layers as expert 0). Other names are returned as they are.
std::string PublishedName(const std::string& stored, const ModelSpec& spec);

// One place in a Hugging Face folder that may hold a published parameter: elements
// [begin, begin + param.numel()) of the tensor `name`, which has `shape`.
struct HfSource {
  std::string name;
  std::vector<int64_t> shape;
  int64_t begin;
};

// The places to look for `param`, the usual one first: its own name and shape; for an expert's
// matrix also the fused tensors of transformers 5, "....experts.gate_up_proj" [E,2F,D] (gate rows,
// then up rows) and "....experts.down_proj" [E,D,F]; for the embedding of a tied model the head.
std::vector<HfSource> HfSources(const Param& param, const ModelSpec& spec);

}  // namespace krait

#endif  // KRAIT_MODEL_HF_H_
