#include "model/hf.h"

#include <cmath>
#include <limits>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/json.h"

namespace krait {
namespace {

// Bounds on what a config.json may ask for: far above any model, low enough that no product of
// sizes overflows and that a parameter table fits in memory.
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxWidth = 1 << 18;  // hidden_size, and other sizes of its order
constexpr int64_t kMaxFeedForward = 1 << 20;
constexpr int64_t kMaxExperts = 4096;
constexpr int64_t kMaxExpertsOfAllLayers = 1 << 18;

// Typed access to the keys of a config.json that collects errors.
class ConfigReader {
 public:
  ConfigReader(const nlohmann::json& object, std::string path, ErrorList* errors)
      : object_(object), path_(std::move(path)), errors_(errors) {}

  bool IsNull(const char* key) const { return object_.contains(key) && object_.at(key).is_null(); }
  // Null counts as missing.
  bool Has(const char* key) const { return object_.contains(key) && !IsNull(key); }

  int64_t Int(const char* key, int64_t missing, int64_t low, int64_t high) const {
    if (!Has(key)) return missing;
    const auto& value = object_.at(key);
    const std::string range = std::to_string(low) + " to " + std::to_string(high);
    if (!value.is_number_integer()) {
      Add(key, "is " + Shown(value) + ", expected a whole number from " + range);
      return missing;
    }
    // Values above 2^63 are unsigned.
    const bool huge = value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{1} << 62;
    if (huge || value.get<int64_t>() < low || value.get<int64_t>() > high) {
      Add(key, "is " + Shown(value) + ", expected a whole number from " + range);
      return missing;
    }
    return value.get<int64_t>();
  }

  double Double(const char* key, double missing, double low, double high) const {
    if (!Has(key)) return missing;
    const auto& value = object_.at(key);
    const double number = value.is_number() ? value.get<double>() : std::nan("");
    if (!(number >= low && number <= high)) {
      Add(key,
          "is " + Shown(value) + ", expected a number from " + Shown(low) + " to " + Shown(high));
      return missing;
    }
    return number;
  }

  bool Bool(const char* key, bool missing) const {
    if (!Has(key)) return missing;
    const auto& value = object_.at(key);
    if (!value.is_boolean()) {
      Add(key, "is " + Shown(value) + ", expected true or false");
      return missing;
    }
    return value.get<bool>();
  }

  // A key that must have one of the given texts where it is present.
  void Require(const char* key, const std::string& text, const std::string& why) const {
    if (Has(key) && object_.at(key) != text) {
      Add(key, "is " + Shown(object_.at(key)) + ", expected \"" + text + "\": " + why);
    }
  }

  const nlohmann::json& At(const char* key) const { return object_.at(key); }
  void Add(const char* key, const std::string& what) const {
    errors_->Add(ExitCode::kConfig, path_ + ": " + key + " " + what);
  }
  static std::string Shown(const nlohmann::json& value) {
    const std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
    return text.size() <= 60 ? text : text.substr(0, 57) + "...";
  }

 private:
  const nlohmann::json& object_;
  std::string path_;
  ErrorList* errors_;
};

// period and offset of a config: offset < period.
struct Cycle {
  int64_t period = 1, offset = 0;
  bool Hits(int64_t layer) const { return layer % period == offset; }
};

Cycle ReadCycle(const ConfigReader& config, const char* period_key, const char* offset_key,
                Cycle missing) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  Cycle cycle;
  cycle.period = config.Int(period_key, missing.period, 1, kMax);
  cycle.offset = config.Int(offset_key, missing.offset, 0, kMax);
  if (cycle.offset >= cycle.period) {
    config.Add(offset_key, "is " + std::to_string(cycle.offset) + ", expected less than " +
                               period_key + " " + std::to_string(cycle.period));
    return {};
  }
  return cycle;
}

// transformers 5 may list the layers as well; the list must say what the periods say.
void CheckLayerTypes(const ConfigReader& config, const std::vector<LayerKinds>& layers) {
  constexpr const char* kKey = "layer_types";
  if (!config.Has(kKey)) return;
  const auto& types = config.At(kKey);
  if (!types.is_array() || types.size() != layers.size()) {
    config.Add(kKey, "is no list of " + std::to_string(layers.size()) + " names, one per layer");
    return;
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool attention = types[i] == "full_attention" || types[i] == "attention";
    const bool mamba = types[i] == "mamba" || types[i] == "linear_attention";
    if ((!attention && !mamba) || attention != layers[i].attention) {
      config.Add(kKey, "has " + ConfigReader::Shown(types[i]) + " for layer " + std::to_string(i) +
                           ", where attn_layer_period and attn_layer_offset give " +
                           (layers[i].attention ? "attention" : "Mamba"));
      return;
    }
  }
}

// The smallest period, with its offset, that hits exactly the layers for which `in` is true;
// period 0: there is none.
Cycle FindCycle(const std::vector<bool>& in) {
  const auto n = static_cast<int64_t>(in.size());
  // A period beyond the last layer with the offset behind it hits nothing.
  for (int64_t period = 1; period <= n + 1; ++period) {
    for (int64_t offset = 0; offset < period; ++offset) {
      const Cycle cycle{period, offset};
      bool same = true;
      for (int64_t i = 0; i < n && same; ++i) same = cycle.Hits(i) == in[static_cast<size_t>(i)];
      if (same) return cycle;
    }
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
    if (attention.head_dim * attention.heads != spec.d_model) {
      refusals->Add("attention.head_dim is " + std::to_string(attention.head_dim) +
                    "; Jamba has d_model / heads = " + std::to_string(spec.d_model) + " / " +
                    std::to_string(attention.heads));
    }
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

// The cycle that yields the layers of `kind`; a refusal naming them when there is none.
Cycle CycleOf(const ModelSpec& spec, SublayerKind kind, Refusals* refusals) {
  std::vector<bool> in(static_cast<size_t>(spec.n_layers));
  std::string listed;
  for (const Sublayer& sublayer : spec.sublayers) {
    if (sublayer.kind != kind) continue;
    in[static_cast<size_t>(sublayer.layer)] = true;
    listed += (listed.empty() ? "" : ", ") + std::to_string(sublayer.layer);
  }
  const Cycle cycle = FindCycle(in);
  if (cycle.period == 0) {
    refusals->Add("no period and offset give the " + std::string(Name(kind)) + " layers " + listed +
                  " of " + std::to_string(spec.n_layers));
  }
  return cycle;
}

bool StartsWith(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

}  // namespace

absl::StatusOr<ModelSpec> SpecFromHfConfig(const std::string& json, const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const nlohmann::json object, ParseJson(json, path, ExitCode::kConfig));
  if (!object.is_object()) {
    return Error(ExitCode::kConfig, path + ": expected a JSON object of configuration keys");
  }
  ErrorList errors;
  const ConfigReader config(object, path, &errors);
  config.Require("model_type", "jamba", "only Jamba models can be read");
  config.Require("hidden_act", "silu", "Krait has no other activation");
  if (config.Double("attention_dropout", 0, 0, 1) != 0) {
    config.Add("attention_dropout", "is above 0, expected 0: Krait trains without dropout");
  }

  ModelSpec spec;
  spec.vocab_size = config.Int("vocab_size", 65536, 1, std::numeric_limits<int32_t>::max());
  spec.d_model = config.Int("hidden_size", 4096, 1, kMaxWidth);
  spec.n_layers = config.Int("num_hidden_layers", 32, 1, kMaxLayers);
  spec.tie_embeddings = config.Bool("tie_word_embeddings", false);
  spec.norm_eps = config.Double("rms_norm_eps", 1e-6, 0, 1);
  spec.init_std = config.Double("initializer_range", 0.02, 0, 100);
  spec.mlp_d_ff = config.Int("intermediate_size", 14336, 1, kMaxFeedForward);

  spec.attention.heads = config.Int("num_attention_heads", 32, 1, kMaxWidth);
  const int64_t kv_missing = config.IsNull("num_key_value_heads") ? spec.attention.heads : 8;
  spec.attention.kv_heads = config.Int("num_key_value_heads", kv_missing, 1, kMaxWidth);
  spec.attention.head_dim = spec.d_model / spec.attention.heads;
  if (spec.d_model % spec.attention.heads != 0) {
    config.Add("num_attention_heads", "is " + std::to_string(spec.attention.heads) +
                                          ", expected a divisor of hidden_size " +
                                          std::to_string(spec.d_model));
  } else if (config.Has("head_dim") && config.Int("head_dim", spec.attention.head_dim, 1,
                                                  kMaxWidth) != spec.attention.head_dim) {
    config.Add("head_dim", "is " + ConfigReader::Shown(config.At("head_dim")) +
                               ", expected hidden_size / num_attention_heads = " +
                               std::to_string(spec.attention.head_dim));
  }
  if (spec.attention.heads % spec.attention.kv_heads != 0) {
    config.Add("num_key_value_heads", "is " + std::to_string(spec.attention.kv_heads) +
                                          ", expected a divisor of num_attention_heads " +
                                          std::to_string(spec.attention.heads));
  }

  spec.mamba.d_state = config.Int("mamba_d_state", 16, 1, 4096);
  spec.mamba.d_conv = config.Int("mamba_d_conv", 4, 1, 8);
  spec.mamba.expand = config.Int("mamba_expand", 2, 1, 64);
  spec.mamba.d_inner = spec.mamba.expand * spec.d_model;
  spec.mamba.conv_bias = config.Bool("mamba_conv_bias", true);
  spec.mamba.proj_bias = config.Bool("mamba_proj_bias", false);
  spec.mamba.dt_rank = (spec.d_model + 15) / 16;
  if (config.Has("mamba_dt_rank") && config.At("mamba_dt_rank") != "auto") {
    spec.mamba.dt_rank = config.Int("mamba_dt_rank", spec.mamba.dt_rank, 1, kMaxWidth);
  }

  const char* experts_key = config.Has("num_local_experts") && !config.Has("num_experts")
                                ? "num_local_experts"
                                : "num_experts";
  spec.moe.experts = config.Int(experts_key, 16, 1, kMaxExperts);
  spec.moe.d_ff = spec.mlp_d_ff;
  spec.moe.aux_loss = config.Double("router_aux_loss_coef", 0.001, 0, 1e6);
  const bool dense = spec.moe.experts == 1;
  spec.moe.top_k = config.Int("num_experts_per_tok", dense ? 1 : 2, 1, kMaxExperts);
  if (!dense && spec.moe.top_k > spec.moe.experts) {
    config.Add("num_experts_per_tok", "is " + std::to_string(spec.moe.top_k) +
                                          ", expected at most " + experts_key + " " +
                                          std::to_string(spec.moe.experts));
  }
  if (spec.n_layers * spec.moe.experts > kMaxExpertsOfAllLayers) {
    config.Add(experts_key, "times num_hidden_layers is above " +
                                std::to_string(kMaxExpertsOfAllLayers) + ": no such model");
  }

  const Cycle attention = ReadCycle(config, "attn_layer_period", "attn_layer_offset", {8, 4});
  const Cycle moe = ReadCycle(config, "expert_layer_period", "expert_layer_offset", {2, 1});
  std::vector<LayerKinds> layers;
  for (int64_t i = 0; i < spec.n_layers; ++i) {
    layers.push_back({attention.Hits(i), !dense && moe.Hits(i)});
  }
  if (errors.empty()) CheckLayerTypes(config, layers);
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  spec.sublayers = MakeSublayers(layers);
  return spec;
}

absl::StatusOr<std::string> HfConfigFromSpec(const ModelSpec& spec) {
  Refusals refusals;
  CheckOptions(spec, &refusals);
  const bool has_attention = spec.Has(SublayerKind::kAttention);
  const bool has_moe = spec.Has(SublayerKind::kMoe);
  const Cycle attention = CycleOf(spec, SublayerKind::kAttention, &refusals);
  const Cycle moe =
      has_moe ? CycleOf(spec, SublayerKind::kMoe, &refusals) : Cycle{.period = 2, .offset = 1};
  KRAIT_RETURN_IF_ERROR(refusals.ToStatus());

  nlohmann::ordered_json config;
  config["architectures"] = {"JambaForCausalLM"};
  config["model_type"] = "jamba";
  config["vocab_size"] = spec.vocab_size;
  config["tie_word_embeddings"] = spec.tie_embeddings;
  config["hidden_size"] = spec.d_model;
  config["intermediate_size"] = spec.Has(SublayerKind::kMlp) ? spec.mlp_d_ff : spec.moe.d_ff;
  config["num_hidden_layers"] = spec.n_layers;
  config["num_attention_heads"] = has_attention ? spec.attention.heads : 1;
  config["num_key_value_heads"] = has_attention ? spec.attention.kv_heads : 1;
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
  config["output_router_logits"] = false;
  config["mamba_d_state"] = spec.mamba.d_state;
  config["mamba_d_conv"] = spec.mamba.d_conv;
  config["mamba_expand"] = spec.mamba.expand;
  // A model without Mamba has none, but the format wants one.
  config["mamba_dt_rank"] = spec.mamba.dt_rank > 0 ? spec.mamba.dt_rank : (spec.d_model + 15) / 16;
  config["mamba_conv_bias"] = spec.mamba.conv_bias;
  config["mamba_proj_bias"] = spec.mamba.proj_bias;
  // JambaConfig's defaults name special tokens, and the padding token's embedding is never trained.
  config["pad_token_id"] = nullptr;
  config["bos_token_id"] = nullptr;
  config["eos_token_id"] = nullptr;
  return config.dump(2) + "\n";
}

std::vector<HfSource> HfSources(const Param& param, const ModelSpec& spec) {
  std::vector<HfSource> sources = {{param.name, param.shape, 0}};
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
  if (StartsWith(matrix, "down_proj")) {
    sources.push_back({prefix + "down_proj", {spec.moe.experts, d, f}, e * d * f});
  } else {
    const int64_t half = StartsWith(matrix, "up_proj") ? 1 : 0;
    sources.push_back(
        {prefix + "gate_up_proj", {spec.moe.experts, 2 * f, d}, (2 * e + half) * f * d});
  }
  return sources;
}

}  // namespace krait
