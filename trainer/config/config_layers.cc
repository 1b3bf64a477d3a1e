// Layers of a config: base files, the file, words of the command line; merged into one tree.
#include <algorithm>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "model/spec.h"
#include "trainer/config/config_keys.h"
#include "trainer/config/config_tree.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxFileBytes = 1 << 20;
constexpr int kMaxFiles = 100;  // a chain of lists of bases can multiply

// `moe: none` is shorthand for `moe: {every: none}`.
void ExpandShorthand(ConfigNode* layer) {
  ConfigNode* model = layer->Find("model");
  ConfigNode* moe = model == nullptr ? nullptr : model->Find("moe");
  if (moe == nullptr || moe->kind != ConfigNode::Kind::kScalar || moe->text != "none") return;
  ConfigNode every = *moe;
  every.key = "every";
  moe->kind = ConfigNode::Kind::kMap;
  moe->text.clear();
  moe->children.push_back(std::move(every));
}

// The keys that model.pattern stands in for.
std::vector<const ConfigNode*> RatioKeys(const ConfigNode& layer) {
  std::vector<const ConfigNode*> keys;
  for (const char* path :
       {"model.mixer.ratio", "model.mixer.offset", "model.moe.every", "model.moe.offset"}) {
    const ConfigNode* node = FindNode(layer, path);
    if (node != nullptr) keys.push_back(node);
  }
  return keys;
}

ConfigNode Scalar(const char* key, int64_t value, const Place& place) {
  ConfigNode node;
  node.kind = ConfigNode::Kind::kScalar;
  node.text = std::to_string(value);
  node.key = key;
  node.place = node.key_place = place;
  return node;
}

// The every and offset of MoeLayers that yield the experts of `layers`, which have some.
std::optional<std::pair<int64_t, int64_t>> RuleOfExperts(const std::vector<LayerKinds>& layers) {
  std::vector<int64_t> experts;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].moe) experts.push_back(static_cast<int64_t>(i));
  }
  const auto n_layers = static_cast<int64_t>(layers.size());
  const int64_t offset = experts.front();
  const int64_t every = experts.size() > 1 ? experts[1] - offset : n_layers;
  const auto moe = MoeLayers(every, offset, n_layers);
  if (!moe.ok()) return std::nullopt;
  for (size_t i = 0; i < layers.size(); ++i) {
    if ((*moe)[i] != layers[i].moe) return std::nullopt;
  }
  return std::pair(every, offset);
}

// A ratio (at `ratio`) takes the place of a pattern's mixers. Its experts stay: as moe.every and
// moe.offset, or where these cannot say it, as an error.
void KeepExperts(const ConfigNode& ratio, const ConfigNode& pattern, ConfigNode* model,
                 ConfigErrors* errors) {
  if (pattern.kind != ConfigNode::Kind::kScalar) return;  // without words it has no experts
  const ConfigNode* n_layers = model->Find("n_layers");
  int64_t n = n_layers != nullptr ? ParseInteger(n_layers->text).value_or(0) : 0;
  // The pattern's own length where there is no good number, of which the reader speaks.
  if (n < 1 || n > kMaxLayers) n = PatternWords(pattern.text);
  const auto layers = ParsePattern(pattern.text, n);
  if (!layers.ok()) {
    errors->Add(pattern.place, absl::StrCat("model.pattern: ", MessageOf(layers.status())));
    return;
  }
  const auto has_experts = [](const LayerKinds& layer) { return layer.moe; };
  if (std::none_of(layers->begin(), layers->end(), has_experts)) return;
  const auto rule = RuleOfExperts(*layers);
  if (!rule.has_value()) {
    errors->Add(ratio.key_place,
                absl::StrCat("model.mixer.ratio takes the place of model.pattern (",
                             pattern.key_place.ToString(),
                             "), whose experts no moe.every and moe.offset yield: change the "
                             "pattern instead, or give model.moe.every too (none: no experts)"));
    return;
  }
  ConfigNode* moe = model->Find("moe");
  if (moe == nullptr) {
    model->children.emplace_back();
    moe = &model->children.back();
    moe->key = "moe";
    moe->place = moe->key_place = pattern.place;
  }
  if (!moe->is_map() && moe->kind != ConfigNode::Kind::kNull) return;  // reported by the reader
  moe->kind = ConfigNode::Kind::kMap;
  moe->children.push_back(Scalar("every", rule->first, pattern.place));
  moe->children.push_back(Scalar("offset", rule->second, pattern.place));
}

// A pattern takes the place of the ratio's keys in `model`.
void ReplaceByPattern(const ConfigNode& pattern, ConfigNode* model, ConfigErrors* errors) {
  if (ConfigNode* mixer = model->Find("mixer"); mixer != nullptr) {
    mixer->Erase("ratio");
    mixer->Erase("offset");
  }
  ConfigNode* moe = model->Find("moe");
  if (moe == nullptr) return;
  const ConfigNode* every = moe->Find("every");
  if (every != nullptr && every->kind == ConfigNode::Kind::kScalar && every->text != "none" &&
      pattern.text.find('E') == std::string::npos) {
    errors->Note(pattern.key_place,
                 absl::StrCat("model.pattern has no E, so no layer has experts: model.moe.every ",
                              every->text, " (", every->place.ToString(), ") is replaced"));
  }
  moe->Erase("every");
  moe->Erase("offset");
}

void MergeMaps(ConfigNode* below, ConfigNode above) {
  // A key without a value leaves what is there.
  if (above.kind == ConfigNode::Kind::kNull && below->is_map()) return;
  if (!above.is_map() || !below->is_map()) {
    *below = std::move(above);
    return;
  }
  below->place = above.place;
  below->key_place = above.key_place;
  for (ConfigNode& child : above.children) {
    ConfigNode* existing = below->Find(child.key);
    if (existing == nullptr) {
      below->children.push_back(std::move(child));
    } else {
      MergeMaps(existing, std::move(child));
    }
  }
}

// Puts a layer over the tree. Among alternatives the last layer that names one wins.
void MergeLayer(ConfigNode* tree, ConfigNode layer, ConfigErrors* errors) {
  ExpandShorthand(&layer);
  const ConfigNode* steps = FindNode(layer, "train.steps");
  const ConfigNode* tokens = FindNode(layer, "train.tokens");
  if (steps != nullptr && tokens != nullptr) {
    errors->Add(tokens->key_place,
                absl::StrCat("train.tokens and train.steps (", steps->key_place.ToString(),
                             ") are alternatives: keep one of them"));
  }
  if (ConfigNode* train = tree->Find("train"); train != nullptr) {
    if (steps != nullptr) train->Erase("tokens");
    if (tokens != nullptr) train->Erase("steps");
  }

  const ConfigNode* pattern = FindNode(layer, "model.pattern");
  const std::vector<const ConfigNode*> ratio_keys = RatioKeys(layer);
  ConfigNode* model = tree->Find("model");
  if (pattern != nullptr && !ratio_keys.empty()) {
    const ConfigNode* other = ratio_keys.front();
    errors->Add(pattern->key_place,
                absl::StrCat("model.pattern stands instead of mixer.ratio, mixer.offset, moe.every "
                             "and moe.offset, but ",
                             other->key, " is given too (", other->key_place.ToString(),
                             "): keep one of them"));
  } else if (pattern != nullptr && model != nullptr) {
    ReplaceByPattern(*pattern, model, errors);
  } else if (!ratio_keys.empty() && model != nullptr && model->Find("pattern") != nullptr) {
    const ConfigNode* ratio = FindNode(layer, "model.mixer.ratio");
    if (ratio == nullptr) {
      const ConfigNode* other = ratio_keys.front();
      errors->Add(other->key_place,
                  absl::StrCat(other->key, " has no meaning beside model.pattern (",
                               model->Find("pattern")->key_place.ToString(),
                               "): change the pattern, or give model.mixer.ratio"));
    } else if (FindNode(layer, "model.moe.every") == nullptr) {
      const ConfigNode below = *model->Find("pattern");
      KeepExperts(*ratio, below, model, errors);
    }
    model->Erase("pattern");
  }
  MergeMaps(tree, std::move(layer));
}

class Loader {
 public:
  Loader(ConfigNode* root, ConfigErrors* errors, bool dotted_keys = false)
      : root_(root), errors_(errors), dotted_keys_(dotted_keys) {
    root_->kind = ConfigNode::Kind::kMap;
  }

  // `named_at` is the place of the `base` that names the file; none for the config itself.
  bool File(const std::string& path, const Place* named_at) {
    Place at = named_at != nullptr ? *named_at : NewOrigin(path);
    if (named_at == nullptr) at.line = -1;
    const auto fail = [&](const std::string& message) {
      errors_->Add(at, named_at != nullptr ? absl::StrCat("base ", path, ": ", message) : message);
      return false;
    };
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (status.type() == fs::file_type::not_found) return fail("there is no such file");
    if (status.type() == fs::file_type::none) {
      return fail(absl::StrCat("cannot be reached: ", error.message()));
    }
    if (fs::is_directory(status)) return fail("this is a directory; name a YAML file in it");
    if (!fs::is_regular_file(status)) return fail("this is no regular file");
    const std::string canonical = fs::canonical(path, error).string();
    if (error) return fail(absl::StrCat("cannot be reached: ", error.message()));
    if (std::find(open_.begin(), open_.end(), canonical) != open_.end()) {
      return fail("this file is its own base, directly or through others");
    }
    if (++files_ > kMaxFiles) {
      return fail(absl::StrCat("more than ", kMaxFiles, " base files"));
    }
    const absl::StatusOr<std::string> text = ReadFile(path, kMaxFileBytes, ExitCode::kConfig);
    if (!text.ok()) return fail(MessageOf(text.status()));

    const Place origin = NewOrigin(path);
    ConfigNode layer;
    if (!ParseYaml(*text, origin, /*any_root=*/false, &layer, errors_, dotted_keys_)) return false;
    open_.push_back(canonical);
    const bool bases_read = Bases(layer, fs::path(path).parent_path());
    open_.pop_back();
    layer.Erase("base");
    MergeLayer(root_, std::move(layer), errors_);
    root_->place = origin;
    return bases_read;
  }

  bool Text(const std::string& text, const std::string& name) {
    const Place origin = NewOrigin(name);
    ConfigNode layer;
    if (!ParseYaml(text, origin, /*any_root=*/false, &layer, errors_, dotted_keys_)) return false;
    if (const ConfigNode* base = layer.Find("base"); base != nullptr) {
      errors_->Add(base->key_place, "base is not possible here: this text stands alone");
      layer.Erase("base");
    }
    MergeLayer(root_, std::move(layer), errors_);
    root_->place = origin;
    return true;
  }

  // All words are one layer: a key or an alternative given twice is an error.
  bool Words(const std::vector<std::string>& words) {
    if (words.empty()) return true;
    const Place top = root_->place;
    ConfigNode layer;
    layer.kind = ConfigNode::Kind::kMap;
    layer.place = top;
    bool ok = true;
    for (const std::string& word : words) ok = Word(word, &layer) && ok;
    MergeLayer(root_, std::move(layer), errors_);
    root_->place = top;
    return ok;
  }

 private:
  Place NewOrigin(const std::string& source) {
    Place place;
    place.source = std::make_shared<const std::string>(source);
    place.layer = ++layers_;
    place.line = 1;
    place.column = 1;
    return place;
  }

  bool Bases(const ConfigNode& layer, const fs::path& folder) {
    const ConfigNode* base = layer.Find("base");
    if (base == nullptr || base->kind == ConfigNode::Kind::kBroken) return true;
    std::vector<const ConfigNode*> names;
    if (base->kind == ConfigNode::Kind::kList) {
      for (const ConfigNode& item : base->children) names.push_back(&item);
    } else {
      names.push_back(base);
    }
    bool ok = true;
    for (const ConfigNode* name : names) {
      if (name->kind != ConfigNode::Kind::kScalar || name->text.empty()) {
        errors_->Add(name->place, absl::StrCat("base must be the path of a YAML file or a list of "
                                               "paths, found ",
                                               Describe(*name)));
        ok = false;
      } else {
        ok = File((folder / name->text).string(), &name->place) && ok;
      }
    }
    return ok;
  }

  bool Word(const std::string& word, ConfigNode* layer) {
    Place place = NewOrigin(word);
    place.line = 0;
    place.column = 0;
    const auto fail = [&](const std::string& message) {
      errors_->Add(place, message);
      return false;
    };
    const size_t equals = word.find('=');
    if (equals == std::string::npos || equals == 0) {
      return fail("a setting on the command line is key.path=value");
    }
    ConfigNode value;
    if (!ParseYaml(word.substr(equals + 1), place, /*any_root=*/true, &value, errors_,
                   dotted_keys_)) {
      return false;
    }
    // A map for every part of the path but the last, which holds the value.
    std::vector<std::string> parts;
    for (size_t begin = 0; begin <= equals;) {
      const size_t end = std::min(word.find('.', begin), equals);
      parts.push_back(word.substr(begin, end - begin));
      if (parts.back().empty()) return fail("the key has an empty part");
      begin = end + 1;
    }
    if (parts.front() == "base") return fail("base can only be given in a file");
    if (parts.size() > 16) return fail("the key has too many parts");
    ConfigNode* node = layer;
    for (size_t i = 0; i < parts.size(); ++i) {
      const bool last = i + 1 == parts.size();
      ConfigNode* next = node->Find(parts[i]);
      if (next != nullptr && (last || !next->is_map())) {
        return fail(absl::StrCat("this key is given twice, also by ", next->key_place.ToString()));
      }
      if (next == nullptr) {
        ConfigNode fresh;
        fresh.kind = ConfigNode::Kind::kMap;
        fresh.place = place;
        if (last) fresh = std::move(value);  // NOLINT(bugprone-use-after-move): at most once
        fresh.key = parts[i];
        fresh.key_place = place;
        node->children.push_back(std::move(fresh));
        next = &node->children.back();
      }
      node = next;
    }
    return true;
  }

  ConfigNode* root_;
  ConfigErrors* errors_;
  bool dotted_keys_;
  std::vector<std::string> open_;  // canonical paths of the files being read, outermost first
  int files_ = 0;
  int layers_ = 0;
};

}  // namespace

bool LoadLayers(const std::string& path, const std::vector<std::string>& words, ConfigNode* root,
                ConfigErrors* errors, bool dotted_keys) {
  Loader loader(root, errors, dotted_keys);
  const bool file_read = loader.File(path, nullptr);
  return loader.Words(words) && file_read;
}

bool LoadText(const std::string& text, const std::string& name,
              const std::vector<std::string>& words, ConfigNode* root, ConfigErrors* errors) {
  Loader loader(root, errors);
  const bool text_read = loader.Text(text, name);
  return loader.Words(words) && text_read;
}

}  // namespace krait
