#include "trainer/tools/hf_folder.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "model/names.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;
constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr int64_t kPiece = 1 << 20;  // elements compared at a time

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrFormat("[%s]", absl::StrJoin(shape, ","));
}

// The first few items of a list.
std::string Some(const std::vector<std::string>& items, const char* separator = ", ") {
  constexpr size_t kShown = 5;
  std::vector<std::string> shown(items.begin(), items.begin() + std::min(kShown, items.size()));
  return absl::StrJoin(shown, separator) +
         (items.size() > kShown ? absl::StrFormat(" and %d more", items.size() - kShown) : "");
}

std::string LastPart(const std::string& name) { return name.substr(name.rfind('.') + 1); }

template <size_t N>
bool IsOneOf(const std::string& text, const std::array<const char*, N>& list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// What modules keep in a state dict beside their weights.
bool IsBuffer(const std::string& name) {
  constexpr std::array kNames = {"inv_freq",    "original_inv_freq", "cos_cached",
                                 "sin_cached",  "position_ids",      "masked_bias",
                                 "causal_mask", "attn_mask",         "num_batches_tracked"};
  return IsOneOf(LastPart(name), kNames);
}

// What quantisers store beside or in place of a weight.
bool IsQuantiser(const std::string& name) {
  constexpr std::array kNames = {
      "qweight",      "qzeros",           "scales",        "g_idx",
      "absmax",       "quant_map",        "nested_absmax", "SCB",
      "weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point",
      "input_scale",  "scale_inv",        "weight_format"};
  return IsOneOf(LastPart(name), kNames) || name.find(".quant_state.") != std::string::npos;
}

// Modules around a model that show in the names of its state dict.
struct Wrapper {
  const char* part;
  const char* who;
};
constexpr char kPeft[] = "PEFT (merge_and_unload takes it away)";
constexpr Wrapper kWrappers[] = {
    {"_orig_mod.", "torch.compile"},
    {"_fsdp_wrapped_module.", "FSDP"},
    {"_checkpoint_wrapped_module.", "activation checkpointing"},
    {"module.", "DistributedDataParallel"},
    {"base_model.model.", kPeft},
    {"base_layer.", kPeft},
    {"lora_A.", kPeft},
};

// What stands before the names that Krait knows, in all of `names`; "" when that is not so.
std::string ForeignPrefix(const std::vector<std::string>& names) {
  if (names.size() < 2) return "";
  std::string common = names.front();
  for (const std::string& name : names) {
    const auto differ = std::mismatch(common.begin(), common.end(), name.begin(), name.end());
    common.erase(differ.first, common.end());
  }
  size_t wrapped = 0;  // of the parts that wrappers are known to put there
  for (bool more = true; more;) {
    more = false;
    for (const Wrapper& wrapper : kWrappers) {
      const std::string_view part = wrapper.part;
      if (common.compare(wrapped, part.size(), part) != 0) continue;
      wrapped += part.size();
      more = true;
    }
  }
  if (wrapped > 0) return common.substr(0, wrapped);
  for (size_t dot = common.find('.'); dot != std::string::npos; dot = common.find('.', dot + 1)) {
    const size_t size = dot + 1;
    for (const std::string& name : names) {
      const std::string rest = name.substr(size);
      for (const char* known : {"embed_tokens.weight", kEmbeddingName, kHeadName}) {
        if (rest == known && name != kEmbeddingName) return common.substr(0, size);
      }
    }
  }
  return "";
}

// Says who put something around the model, where the names show it; else OK.
absl::Status CheckWrappers(const std::string& path, const std::vector<std::string>& names) {
  const std::string prefix = ForeignPrefix(names);
  std::vector<std::string> who;
  std::string part, example;
  for (const Wrapper& wrapper : kWrappers) {
    const auto found = std::find_if(names.begin(), names.end(), [&](const std::string& name) {
      return name.starts_with(wrapper.part) ||
             name.find(std::string(".") + wrapper.part) != std::string::npos;
    });
    if (found == names.end()) continue;
    if (example.empty()) part = wrapper.part, example = *found;
    if (std::find(who.begin(), who.end(), wrapper.who) == who.end()) who.push_back(wrapper.who);
  }
  if (prefix.empty() && who.empty()) return absl::OkStatus();
  const std::string what = prefix.empty() ? absl::StrFormat("`%s` in the names (%s)", part, example)
                                          : absl::StrFormat("`%s` before all names", prefix);
  return Error(kCode,
               absl::StrFormat("%s: %s%s: save the state dict of the model inside", path, what,
                               who.empty() ? "" : ", put there by " + absl::StrJoin(who, " and ")));
}

}  // namespace

absl::StatusOr<HfFolder> HfFolder::Open(const std::string& path) {
  KRAIT_RETURN_IF_ERROR(CheckHfContents(path));
  HfFolder folder;
  folder.path_ = path;
  const std::string config = path + "/config.json";
  const std::string generation = path + "/generation_config.json";
  std::string text;
  KRAIT_ASSIGN_OR_RETURN(text, ReadFile(config, kMaxConfigBytes, kCode));
  KRAIT_ASSIGN_OR_RETURN(folder.config_, ReadHfConfig(text, config));
  if (Exists(generation)) {
    KRAIT_ASSIGN_OR_RETURN(text, ReadFile(generation, kMaxConfigBytes, kCode));
    nlohmann::json members;
    KRAIT_ASSIGN_OR_RETURN(members, ParsePythonJson(text, generation, kCode));
    folder.generation_config_ = DumpPythonJson(members);
  }
  if (Exists(path + "/adapter_config.json")) {
    folder.config_.notes.push_back(path + ": adapter_config.json: the adapter is not applied");
  }
  KRAIT_ASSIGN_OR_RETURN(folder.reader_, SafetensorsReader::OpenFolder(path));
  KRAIT_RETURN_IF_ERROR(folder.ReadNames());
  KRAIT_RETURN_IF_ERROR(folder.Locate(folder.spec(), ParamTable(folder.spec())));
  KRAIT_RETURN_IF_ERROR(folder.ReadTied());
  return folder;
}

std::string HfFolder::tokenizer() const {
  const auto found = reader_.metadata().find(kTokenizerKey);
  return found == reader_.metadata().end() ? "" : found->second;
}

const SafetensorsEntry* HfFolder::Find(const std::string& published) const {
  const auto found = stored_.find(published);
  return found == stored_.end() ? nullptr : &reader_.entries().at(found->second);
}

absl::Status HfFolder::ReadNames() {
  std::vector<std::string> names, buffers;
  for (const auto& [name, entry] : reader_.entries()) {
    if (IsBuffer(name)) {
      buffers.push_back(name);
      continue;
    }
    names.push_back(name);
    const auto [place, added] = stored_.emplace(PublishedName(name, spec()), name);
    if (!added) {
      return Error(kCode, absl::StrFormat("%s: %s and %s are the same weight under two names",
                                          path_, place->second, name));
    }
  }
  if (!buffers.empty()) {
    config_.notes.push_back(absl::StrFormat("%s: passed over %d buffer%s that %s no weights: %s",
                                            path_, buffers.size(), buffers.size() == 1 ? "" : "s",
                                            buffers.size() == 1 ? "is" : "are", Some(buffers)));
  }
  return CheckWrappers(path_, names);
}

// Quantised weights whose config does not say so.
absl::Status HfFolder::CheckDTypes() const {
  std::vector<std::string> foreign;
  for (const auto& [published, name] : stored_) {
    const SafetensorsEntry& entry = reader_.entries().at(name);
    if (!entry.IsFloat() || IsQuantiser(name)) foreign.push_back(name + " (" + entry.stored + ")");
  }
  if (foreign.empty()) return absl::OkStatus();
  return Error(kCode,
               path_ + ": the weights are quantised: " + Some(foreign) +
                   "; Krait reads F32, BF16, F16 and F64: take the model that they were made "
                   "from");
}

absl::Status HfFolder::Locate(const ModelSpec& spec, const ParamTable& table) {
  KRAIT_RETURN_IF_ERROR(CheckDTypes());
  std::vector<std::string> missing, unknown, misshapen;
  std::set<std::string> used;
  places_.clear();
  // A place of `published` name; `stored` is its name in the files.
  const auto use = [&](const std::string& published, const std::vector<int64_t>& shape) {
    const std::string& stored = stored_.at(published);
    const std::vector<int64_t>& found = reader_.entries().at(stored).shape;
    if (used.insert(stored).second && found != shape) {
      misshapen.push_back(absl::StrFormat("%s has shape %s, but the config makes it %s", stored,
                                          ShapeText(found), ShapeText(shape)));
    }
    return stored;
  };
  for (const Param& param : table.params()) {
    const std::vector<HfSource> sources = HfSources(param, spec);
    const auto source =
        std::find_if(sources.begin(), sources.end(),
                     [&](const HfSource& candidate) { return stored_.contains(candidate.name); });
    if (source == sources.end()) {
      missing.push_back(param.name);
      continue;
    }
    places_.push_back({use(source->name, source->shape), source->shape, source->begin});
  }
  if (spec.tie_embeddings && stored_.contains(kHeadName)) {
    use(kHeadName, {spec.vocab_size, spec.d_model});
  }
  for (const auto& [published, stored] : stored_) {
    if (!used.contains(stored)) unknown.push_back(stored);
  }
  if (missing == std::vector<std::string>{kHeadName}) {
    return Error(kCode, path_ +
                            ": lacks lm_head.weight, as the base model alone does, and the "
                            "config's tie_word_embeddings is not true: there is no head");
  }
  ErrorList errors;
  if (!missing.empty()) errors.Add(kCode, path_ + ": lacks " + Some(missing));
  if (!misshapen.empty()) errors.Add(kCode, path_ + ": " + Some(misshapen, "; "));
  if (!unknown.empty()) {
    errors.Add(kCode, path_ + ": holds what the config does not: " + Some(unknown));
  }
  return errors.ToStatus();
}

absl::Status HfFolder::Read(int param, int64_t begin, int64_t count, float* out) const {
  const HfSource& place = places_[static_cast<size_t>(param)];
  return reader_.ReadF32(place.name, place.begin + begin, count, out);
}

DType HfFolder::dtype(int param) const {
  const HfSource& place = places_[static_cast<size_t>(param)];
  return reader_.entries().at(place.name).dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
}

absl::Status HfFolder::ReadStored(int param, int64_t begin, int64_t count, void* out) const {
  if (dtype(param) == DType::kF32) return Read(param, begin, count, static_cast<float*>(out));
  const HfSource& place = places_[static_cast<size_t>(param)];
  return reader_.ReadRaw(place.name, place.begin + begin, count, out);
}

absl::StatusOr<bool> HfFolder::Equal(const std::string& a, const std::string& b) const {
  const int64_t numel = reader_.entries().at(a).numel();
  std::vector<float> left(static_cast<size_t>(std::min(kPiece, numel))), right(left.size());
  for (int64_t at = 0; at < numel; at += kPiece) {
    const int64_t n = std::min(kPiece, numel - at);
    KRAIT_RETURN_IF_ERROR(reader_.ReadF32(a, at, n, left.data()));
    KRAIT_RETURN_IF_ERROR(reader_.ReadF32(b, at, n, right.data()));
    if (!std::equal(left.begin(), left.begin() + n, right.begin())) return false;
  }
  return true;
}

absl::Status HfFolder::ReadTied() {
  if (!spec().tie_embeddings || Find(kHeadName) == nullptr || Find(kEmbeddingName) == nullptr) {
    return absl::OkStatus();
  }
  bool equal = false;
  KRAIT_ASSIGN_OR_RETURN(equal, Equal(stored_.at(kEmbeddingName), stored_.at(kHeadName)));
  if (equal) return absl::OkStatus();
  config_.spec.tie_embeddings = false;
  config_.notes.push_back(path_ +
                          ": tie_word_embeddings is true, but lm_head.weight is stored with "
                          "other values than the embedding: read as an untied model");
  return Locate(spec(), ParamTable(spec()));
}

}  // namespace krait
