// config.json to ModelSpec (hf.h).
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/json.h"
#include "model/hf.h"
#include "model/hf_members.h"

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

  // A key that must have the given text where it is present.
  void Require(const char* key, const std::string& text, const std::string& why) const {
    if (Has(key) && object_.at(key) != text) Expected(key, "\"" + text + "\": " + why);
  }
  void Expected(const char* key, const std::string& what) const {
    Add(key, "is " + Shown(object_.at(key)) + ", expected " + what);
  }

  const nlohmann::json& At(const char* key) const { return object_.at(key); }
  void Add(const char* key, const std::string& what) const {
    errors_->Add(ExitCode::kConfig, path_ + ": " + key + " " + what);
  }
  static std::string Shown(const nlohmann::json& value) {
    const std::string text = DumpPythonJson(value);
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
    config.Add(offset_key,
               "is " + std::to_string(cycle.offset) + ", expected less than " + period_key + " " +
                   std::to_string(cycle.period) +
                   " (where transformers before 4.57 saw no such layer: to say that, give both of "
                   "them above num_hidden_layers)");
    return {};
  }
  return cycle;
}

// Lists of the layers, which some versions write as well, must say what the periods say. `says`
// tells what an item means: true, false, or nullopt for neither.
template <typename Says>
void CheckLayerList(const ConfigReader& config, const char* key, const std::vector<bool>& layers,
                    const std::string& by, const Says& says) {
  if (!config.Has(key)) return;
  const auto& list = config.At(key);
  if (!list.is_array() || list.size() != layers.size()) {
    config.Add(key, "is no list of " + std::to_string(layers.size()) + " items, one per layer");
    return;
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    if (says(list[i]) == std::optional<bool>(layers[i])) continue;
    config.Add(key, "has " + ConfigReader::Shown(list[i]) + " for layer " + std::to_string(i) +
                        ", which contradicts " + by);
    return;
  }
}

void CheckLayerLists(const ConfigReader& config, const std::vector<LayerKinds>& layers) {
  std::vector<bool> attention, moe;
  for (const LayerKinds& layer : layers) {
    attention.push_back(layer.attention);
    moe.push_back(layer.moe);
  }
  for (const char* key : {"layer_types", "layers_block_type"}) {
    CheckLayerList(config, key, attention, "attn_layer_period and attn_layer_offset",
                   [](const nlohmann::json& type) -> std::optional<bool> {
                     if (type == "full_attention" || type == "attention") return true;
                     if (type == "mamba" || type == "linear_attention") return false;
                     return std::nullopt;
                   });
  }
  CheckLayerList(config, "layers_num_experts", moe,
                 "num_experts, expert_layer_period and expert_layer_offset",
                 [](const nlohmann::json& experts) -> std::optional<bool> {
                   if (!experts.is_number_integer()) return std::nullopt;
                   return experts.get<double>() > 1;
                 });
}

// "bitsandbytes, 4 bit": how the weights are quantised; "" where they are not.
std::string Quantisation(const nlohmann::json& object) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    const auto found = object.find(key);
    if (found == object.end() || found->is_null() || found->empty()) continue;
    const auto text = [&](const char* member) -> std::string {
      const auto value = found->is_object() ? found->find(member) : found->end();
      return value != found->end() && value->is_string() ? value->get<std::string>() : "";
    };
    const auto is = [&](const char* member) {
      return found->is_object() && found->value(member, nlohmann::json()) == true;
    };
    std::string how = text("quant_method");
    if (is("load_in_4bit") || is("_load_in_4bit")) how = "bitsandbytes, 4 bit";
    if (is("load_in_8bit") || is("_load_in_8bit")) how = "bitsandbytes, 8 bit";
    if (how.empty()) how = "by a method that it does not name";
    if (const std::string format = text("format"); !format.empty()) how += ", " + format;
    const auto bits = found->is_object() ? found->find("bits") : found->end();
    if (bits != found->end() && bits->is_number_integer()) {
      how += ", " + std::to_string(bits->get<int64_t>()) + " bit";
    }
    return std::string(key) + ": the weights are quantised (" + how.substr(0, 100) + ")";
  }
  return "";
}

void CheckArchitectures(const ConfigReader& config) {
  constexpr const char* kKey = "architectures";
  if (!config.Has(kKey)) return;
  const auto& names = config.At(kKey);
  const auto known = [](const nlohmann::json& name) {
    return name == "JambaForCausalLM" || name == "JambaModel";
  };
  const bool listed =
      names.is_array() && (names.empty() || std::any_of(names.begin(), names.end(), known));
  if (listed || known(names)) return;
  config.Expected(kKey, "JambaForCausalLM, or its base model JambaModel: Krait has no other heads");
}

void CheckActivation(const ConfigReader& config) {
  constexpr const char* kKey = "hidden_act";
  if (!config.Has(kKey)) return;
  std::string name = config.At(kKey).is_string() ? config.At(kKey).get<std::string>() : "";
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (name != "silu" && name != "swish") {
    config.Expected(kKey, "\"silu\" (or its other name \"swish\"): Krait has no other activation");
  }
}

// pad_token_id as transformers' nn.Embedding takes it: -1 is the last row.
int64_t ReadPadToken(const ConfigReader& config, int64_t vocab_size) {
  if (config.IsNull(kPadTokenKey)) return -1;
  const int64_t id = config.Int(kPadTokenKey, kDefaultPadToken, -vocab_size, vocab_size - 1);
  return id < 0 ? vocab_size + id : id;
}

// What the folder says beyond the model.
std::string Kept(const nlohmann::json& object, const ModelSpec& spec) {
  nlohmann::ordered_json kept = nlohmann::ordered_json::object();
  // JambaConfig's defaults, which a file need not name.
  kept[kPadTokenKey] = kDefaultPadToken;
  kept[kBosTokenKey] = kDefaultBosToken;
  kept[kEosTokenKey] = kDefaultEosToken;
  const nlohmann::ordered_json shape = HfShapeMembers(spec);
  for (const auto& [key, value] : object.items()) {
    const bool untrue =
        std::find(std::begin(kOfOneFolder), std::end(kOfOneFolder), key) != std::end(kOfOneFolder);
    if (!untrue && !shape.contains(key)) kept[key] = value;
  }
  return DumpPythonJson(kept);
}

}  // namespace

absl::StatusOr<HfConfig> ReadHfConfig(const std::string& json, const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const nlohmann::json object,
                         ParsePythonJson(json, path, ExitCode::kConfig));
  if (!object.is_object()) {
    return Error(ExitCode::kConfig, path + ": expected a JSON object of configuration keys");
  }
  if (const std::string how = Quantisation(object); !how.empty()) {
    return Error(ExitCode::kConfig,
                 path + ": " + how +
                     "; Krait reads weights that are not: take the model that they were made from, "
                     "or undo it with the method's own tool");
  }
  ErrorList errors;
  const ConfigReader config(object, path, &errors);
  config.Require("model_type", "jamba", "only Jamba models can be read");
  CheckArchitectures(config);
  // Of another kind of model nothing else is worth a word.
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  CheckActivation(config);
  if (config.Double("attention_dropout", 0, 0, 1) != 0) {
    config.Add("attention_dropout", "is above 0, expected 0: Krait trains without dropout");
  }

  HfConfig result;
  ModelSpec& spec = result.spec;
  spec.vocab_size = config.Int("vocab_size", 65536, 1, std::numeric_limits<int32_t>::max());
  spec.d_model = config.Int("hidden_size", 4096, 1, kMaxWidth);
  spec.n_layers = config.Int("num_hidden_layers", 32, 1, kMaxLayers);
  spec.tie_embeddings = config.Bool("tie_word_embeddings", false);
  spec.pad_token = ReadPadToken(config, spec.vocab_size);
  spec.norm_eps = config.Double("rms_norm_eps", 1e-6, 0, 1);
  spec.init_std = config.Double("initializer_range", 0.02, 0, 100);
  for (const auto& [key, value] :
       {std::pair{"rms_norm_eps", spec.norm_eps}, {"initializer_range", spec.init_std}}) {
    if (value == 0) config.Expected(key, "a number above 0");
  }
  spec.mlp_d_ff = config.Int("intermediate_size", 14336, 1, kMaxFeedForward);

  spec.attention.heads = config.Int("num_attention_heads", 32, 1, kMaxWidth);
  const int64_t kv_missing = config.IsNull("num_key_value_heads") ? spec.attention.heads : 8;
  spec.attention.kv_heads = config.Int("num_key_value_heads", kv_missing, 1, kMaxWidth);
  spec.attention.head_dim =
      config.Int("head_dim", spec.d_model / spec.attention.heads, 1, kMaxWidth);
  if (!config.Has("head_dim") && spec.d_model % spec.attention.heads != 0) {
    config.Add("num_attention_heads", "is " + std::to_string(spec.attention.heads) +
                                          ", expected a divisor of hidden_size " +
                                          std::to_string(spec.d_model) + ", or a head_dim");
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
  // Of the code before transformers 4.40; later ones always have them.
  spec.mamba.inner_norms = config.Bool("mamba_inner_layernorms", true);
  spec.mamba.dt_rank = (spec.d_model + 15) / 16;
  if (config.Has("mamba_dt_rank") && config.At("mamba_dt_rank") != "auto") {
    spec.mamba.dt_rank = config.Int("mamba_dt_rank", spec.mamba.dt_rank, 1, kMaxWidth);
  }

  const char* experts_key = config.Has("num_local_experts") && !config.Has("num_experts")
                                ? "num_local_experts"
                                : "num_experts";
  spec.moe.experts = config.Int(experts_key, 16, 0, kMaxExperts);
  if (config.Has("num_local_experts") && config.Has("num_experts") &&
      config.At("num_local_experts") != config.At("num_experts")) {
    config.Expected("num_local_experts", "the same as num_experts");
  }
  spec.moe.d_ff = spec.mlp_d_ff;
  spec.moe.aux_loss = config.Double("router_aux_loss_coef", 0.001, 0, 1e6);
  const bool dense = spec.moe.experts <= 1;
  spec.moe.experts = std::max<int64_t>(1, spec.moe.experts);
  const int64_t top_k = config.Int("num_experts_per_tok", 2, dense ? 0 : 1, kMaxExperts);
  spec.moe.top_k = dense ? 1 : top_k;
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
  if (errors.empty()) CheckLayerLists(config, layers);
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  spec.sublayers = MakeSublayers(layers);
  result.kept = Kept(object, spec);
  if (config.Has("sliding_window")) {
    result.notes.push_back(path + ": sliding_window " +
                           ConfigReader::Shown(config.At("sliding_window")) +
                           " has no effect: attention reaches back to the first token");
  }
  return result;
}

}  // namespace krait
