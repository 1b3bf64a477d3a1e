// ModelSpec to config.json (hf.h).
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/json.h"
#include "model/hf.h"
#include "model/hf_members.h"

namespace krait {
namespace {

struct Cycle {
  int64_t period = 1, offset = 0;
};

// The smallest period, with its offset, that hits exactly the layers for which `in` is true;
// period 0: there is none.
Cycle FindCycle(const std::vector<bool>& in) {
  const auto n = static_cast<int64_t>(in.size());
  const int64_t offset = std::find(in.begin(), in.end(), true) - in.begin();
  // A period beyond the last layer with the offset behind it hits nothing.
  for (int64_t period = offset + 1; period <= n + 1; ++period) {
    bool same = true;
    for (int64_t i = 0; i < n && same; ++i) {
      same = (i % period == offset) == in[static_cast<size_t>(i)];
    }
    if (same) return {period, offset};
  }
  return {0, 0};
}

// Reasons why transformers' Jamba cannot express a spec.
class Refusals {
 public:
  void Add(const std::string& reason) {
    errors_.Add(ExitCode::kConfig, "not expressible as a Hugging Face Jamba model: " + reason);
  }
  absl::Status ToStatus() const { return errors_.ToStatus(); }

 private:
  ErrorList errors_;
};

void CheckOptions(const ModelSpec& spec, Refusals* refusals) {
  if (spec.Has(SublayerKind::kAttention)) {
    const AttentionSpec& attention = spec.attention;
    if (attention.rope_theta != 0) refusals->Add("attention.rope_theta: Jamba has no positions");
  }
  if (spec.Has(SublayerKind::kMamba)) {
    if (!spec.mamba.inner_norms) {
      refusals->Add("mamba.inner_norms is false; Jamba always norms dt, B and C");
    }
    KRAIT_CHECK(spec.mamba.d_inner == spec.mamba.expand * spec.d_model);
  }
  if (spec.Has(SublayerKind::kMoe)) {
    if (spec.moe.renormalize) {
      refusals->Add("moe.renormalize is true; Jamba takes the softmax weights as they are");
    }
    if (spec.moe.experts < 2) {
      refusals->Add("moe.experts is " + std::to_string(spec.moe.experts) +
                    "; Jamba takes num_experts 1 as dense layers without a router");
    }
    if (spec.Has(SublayerKind::kMlp) && spec.moe.d_ff != spec.mlp_d_ff) {
      refusals->Add("moe.d_ff is " + std::to_string(spec.moe.d_ff) + " and mlp.d_ff is " +
                    std::to_string(spec.mlp_d_ff) + "; Jamba has one intermediate_size");
    }
  }
}

// period 0: no cycle yields the layers of `kind`; `listed` names them.
Cycle CycleOf(const ModelSpec& spec, SublayerKind kind, std::string* listed) {
  std::vector<bool> in(static_cast<size_t>(spec.n_layers));
  for (const Sublayer& sublayer : spec.sublayers) {
    if (sublayer.kind != kind) continue;
    in[static_cast<size_t>(sublayer.layer)] = true;
    *listed += (listed->empty() ? "" : ", ") + std::to_string(sublayer.layer);
  }
  return FindCycle(in);
}

void CheckLayout(const ModelSpec& spec, SublayerKind kind, Refusals* refusals) {
  std::string listed;
  if (CycleOf(spec, kind, &listed).period > 0) return;
  refusals->Add("no period and offset give the " + std::string(Name(kind)) + " layers " + listed +
                " of " + std::to_string(spec.n_layers));
}

// The padding row's id: the model's own where the folder's members name another one.
void WritePadToken(const ModelSpec& spec, nlohmann::ordered_json* config) {
  const nlohmann::ordered_json id = config->value(kPadTokenKey, nlohmann::ordered_json());
  const bool integer = id.is_number_integer();
  const int64_t row = integer ? id.get<int64_t>() + (id < 0 ? spec.vocab_size : 0) : -1;
  if (spec.pad_token >= 0 && row != spec.pad_token) (*config)[kPadTokenKey] = spec.pad_token;
}

}  // namespace

nlohmann::ordered_json HfShapeMembers(const ModelSpec& spec) {
  const bool has_attention = spec.Has(SublayerKind::kAttention);
  const bool has_moe = spec.Has(SublayerKind::kMoe);
  std::string listed;
  const Cycle attention = CycleOf(spec, SublayerKind::kAttention, &listed);
  const Cycle moe =
      has_moe ? CycleOf(spec, SublayerKind::kMoe, &listed) : Cycle{.period = 2, .offset = 1};
  nlohmann::ordered_json config;
  config["model_type"] = "jamba";
  config["vocab_size"] = spec.vocab_size;
  config["tie_word_embeddings"] = spec.tie_embeddings;
  config["hidden_size"] = spec.d_model;
  config["intermediate_size"] = spec.Has(SublayerKind::kMlp) ? spec.mlp_d_ff : spec.moe.d_ff;
  config["num_hidden_layers"] = spec.n_layers;
  config["num_attention_heads"] = has_attention ? spec.attention.heads : 1;
  config["num_key_value_heads"] = has_attention ? spec.attention.kv_heads : 1;
  // Read from transformers 5 on.
  if (has_attention && spec.attention.head_dim * spec.attention.heads != spec.d_model) {
    config["head_dim"] = spec.attention.head_dim;
  }
  config["hidden_act"] = "silu";
  config["initializer_range"] = spec.init_std;
  config["rms_norm_eps"] = spec.norm_eps;
  config["attention_dropout"] = 0.0;
  config["attn_layer_period"] = attention.period;
  config["attn_layer_offset"] = attention.offset;
  config["num_experts"] = has_moe ? spec.moe.experts : 1;
  config["num_experts_per_tok"] = has_moe ? spec.moe.top_k : 1;
  config["expert_layer_period"] = moe.period;
  config["expert_layer_offset"] = moe.offset;
  config["router_aux_loss_coef"] = spec.moe.aux_loss;
  config["mamba_d_state"] = spec.mamba.d_state;
  config["mamba_d_conv"] = spec.mamba.d_conv;
  config["mamba_expand"] = spec.mamba.expand;
  // A model without Mamba has none, but the format wants one.
  config["mamba_dt_rank"] = spec.mamba.dt_rank > 0 ? spec.mamba.dt_rank : (spec.d_model + 15) / 16;
  config["mamba_conv_bias"] = spec.mamba.conv_bias;
  config["mamba_proj_bias"] = spec.mamba.proj_bias;
  return config;
}

absl::StatusOr<std::string> WriteHfConfig(const ModelSpec& spec, const std::string& kept) {
  Refusals refusals;
  CheckOptions(spec, &refusals);
  CheckLayout(spec, SublayerKind::kAttention, &refusals);
  CheckLayout(spec, SublayerKind::kMoe, &refusals);
  KRAIT_RETURN_IF_ERROR(refusals.ToStatus());

  nlohmann::ordered_json config;
  config["architectures"] = {"JambaForCausalLM"};
  config.update(HfShapeMembers(spec));
  if (!kept.empty()) {
    nlohmann::json members;
    KRAIT_ASSIGN_OR_RETURN(
        members, ParsePythonJson(kept, "the kept part of config.json", ExitCode::kNoCheckpoint));
    for (const auto& [key, value] : members.items()) {
      if (!config.contains(key)) config[key] = value;
    }
  }
  const auto by_default = [&config](const char* key, const nlohmann::ordered_json& value) {
    if (!config.contains(key)) config[key] = value;
  };
  // JambaConfig's own defaults name tokens that no tokenizer here has.
  for (const char* key : {kPadTokenKey, kBosTokenKey, kEosTokenKey}) by_default(key, nullptr);
  WritePadToken(spec, &config);
  by_default("output_router_logits", false);
  by_default("use_mamba_kernels", false);
  return DumpPythonJson(config, 2) + "\n";
}

}  // namespace krait
