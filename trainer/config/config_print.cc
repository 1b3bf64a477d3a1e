#include "trainer/config/config_print.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/number.h"
#include "trainer/config/config_keys.h"

namespace krait {
namespace {

// As a double-quoted scalar.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

// "path: FILE" or "synthetic: {task: NAME, ...}".
std::string SourceText(const SourceSpec& source) {
  if (!source.synthetic.has_value()) return absl::StrCat("path: ", Quoted(source.path));
  const SyntheticSpec& task = *source.synthetic;
  return absl::StrCat("synthetic: {task: ", kSyntheticTaskNames[static_cast<size_t>(task.task)],
                      task.items > 0 ? absl::StrCat(", items: ", task.items) : "",
                      ", sequences: ", task.sequences, ", seed: ", task.seed, "}");
}

// Collects each key with its value as YAML and the type of that value.
class KeyPrinter : public ConfigVisitor {
 public:
  struct Item {
    ConfigKey key;
    std::string type, value;
  };
  const std::vector<Item>& items() const { return items_; }

  void Whole(const ConfigKey& key, int64_t* value, const WholeRange& range) override {
    const bool is_word = range.word != nullptr && *value == range.word_value;
    Add(key, absl::StrCat("integer", Or(range.word)),
        is_word ? range.word : std::to_string(*value));
  }
  void Number(const ConfigKey& key, double* value, const Range& range) override {
    const bool is_word = range.word != nullptr && *value == 0;
    const bool is_count = range.count && *value >= 1;
    Add(key, absl::StrCat("number", Or(range.word)),
        is_word    ? range.word
        : is_count ? std::to_string(std::llround(*value))
                   : PrintNumber(*value));
  }
  void Bool(const ConfigKey& key, bool* value) override {
    Add(key, "true | false", *value ? "true" : "false");
  }
  void String(const ConfigKey& key, std::string* value) override {
    Add(key, "text", Quoted(*value));
  }
  void Choice(const ConfigKey& key, const std::vector<const char*>& names, size_t* index) override {
    Add(key, absl::StrJoin(names, " | "), names[*index]);
  }
  void Numbers(const ConfigKey& key, const std::vector<double*>& values, const Range&) override {
    std::string text;
    for (const double* value : values) {
      absl::StrAppend(&text, text.empty() ? "" : ", ", PrintNumber(*value));
    }
    Add(key, absl::StrCat("list of ", values.size(), " numbers"), absl::StrCat("[", text, "]"));
  }
  void Sources(const ConfigKey& key, std::vector<SourceSpec>* value) override {
    std::string text;
    for (const SourceSpec& source : *value) {
      absl::StrAppend(&text, text.empty() ? "" : ", ", "{", SourceText(source),
                      ", weight: ", PrintNumber(source.weight), "}");
    }
    Add(key, "list of {path: FILE, weight: number} or {synthetic: {task: NAME, items: N}}",
        absl::StrCat("[", text, "]"));
  }

  void Ramp(const ConfigKey& key, BatchRamp* value) override {
    Add(key, "integer | \"SIZE:FROM SIZE:FROM ...\"",
        value->constant() ? value->Text() : Quoted(value->Text()));
  }

 private:
  static std::string Or(const char* word) {
    return word == nullptr ? "" : absl::StrCat(" | ", word);
  }
  void Add(const ConfigKey& key, std::string type, std::string value) {
    items_.push_back({key, std::move(type), std::move(value)});
  }

  std::vector<Item> items_;
};

// Keys in whose place the resolved config has another.
std::vector<const char*> SourcesOf(const std::string& key) {
  if (key == "model.pattern") {
    return {"model.mixer.ratio", "model.mixer.offset", "model.moe.every", "model.moe.offset"};
  }
  return {};
}

bool StartsWith(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// The kind of a difference, or false when the key is free to change.
bool Classify(const std::string& key, ConfigDifference::Kind* kind) {
  if (key == "model.activation_loss") {  // added late in a run, too (arXiv:2408.12570)
    *kind = ConfigDifference::Kind::kApplies;
  } else if (StartsWith(key, "model.")) {
    *kind = ConfigDifference::Kind::kRefused;
  } else if (StartsWith(key, "data.") || key == "train.batch_tokens" || key == "train.seed") {
    *kind = ConfigDifference::Kind::kNeedsAllow;
  } else if (StartsWith(key, "optimizer.") || StartsWith(key, "schedule.") ||
             key == "train.steps" || key == "train.tokens" || key == "train.device" ||
             key == "train.precision" || key == "train.deterministic") {
    *kind = ConfigDifference::Kind::kApplies;
  } else {
    return false;
  }
  return true;
}

const std::string* FindValue(const std::vector<ConfigEntry>& entries, const std::string& key) {
  const auto it = std::find_if(entries.begin(), entries.end(),
                               [&key](const ConfigEntry& entry) { return entry.key == key; });
  return it == entries.end() ? nullptr : &it->value;
}

}  // namespace

std::vector<ConfigEntry> Flatten(const RunConfig& config) {
  RunConfig copy = config;
  ConfigDraft draft;
  draft.pattern = LayoutPattern(config.model);
  draft.decay_steps = static_cast<double>(config.schedule.decay_steps);
  KeyPrinter printer;
  VisitKeys(&copy, &draft, &printer);
  std::vector<ConfigEntry> entries;
  for (const KeyPrinter::Item& item : printer.items()) {
    if (item.key.shown) entries.push_back({item.key.path, item.value, ""});
  }
  return entries;
}

std::vector<ConfigKeyInfo> ListConfigKeys() {
  RunConfig defaults;
  ConfigDraft draft;
  KeyPrinter printer;
  VisitKeys(&defaults, &draft, &printer);
  std::vector<ConfigKeyInfo> keys;
  for (const auto& [key, type, value] : printer.items()) {
    keys.push_back({key.path, type, key.default_text == nullptr ? value : key.default_text,
                    key.unit, key.meaning});
  }
  return keys;
}

std::string OriginOf(const ConfigNode& root, const ConfigEntry& entry) {
  const ConfigNode* node = FindNode(root, entry.key);
  if (node != nullptr) return node->place.ToString();
  for (const char* source : SourcesOf(entry.key)) {
    node = FindNode(root, source);
    if (node != nullptr) return absl::StrCat(source, " at ", node->place.ToString());
  }
  for (const ConfigKeyInfo& info : ListConfigKeys()) {
    if (info.key == entry.key && info.default_value != entry.value) {
      return absl::StrCat("default: ", info.default_value);
    }
  }
  return "default";
}

std::string LayoutPattern(const ModelSpec& model) {
  std::vector<std::string> words;
  for (size_t i = 0; i + 1 < model.sublayers.size(); i += 2) {
    words.push_back(absl::StrCat(model.sublayers[i].kind == SublayerKind::kAttention ? "a" : "m",
                                 model.sublayers[i + 1].kind == SublayerKind::kMoe ? "E" : ""));
  }
  // The shortest period that divides them.
  size_t period = 1;
  while (period < words.size() &&
         (words.size() % period != 0 ||
          !std::equal(words.begin() + static_cast<int64_t>(period), words.end(), words.begin()))) {
    ++period;
  }
  std::string pattern;
  for (size_t i = 0; i < std::min(period, words.size()); ++i) {
    absl::StrAppend(&pattern, i > 0 ? " " : "", words[i]);
  }
  return pattern;
}

std::string YamlText(const std::vector<ConfigEntry>& entries) {
  std::string text;
  std::vector<std::string> open;  // sections around the last key
  for (const ConfigEntry& entry : entries) {
    std::vector<std::string> parts;
    for (size_t begin = 0; begin <= entry.key.size();) {
      const size_t end = std::min(entry.key.find('.', begin), entry.key.size());
      parts.push_back(entry.key.substr(begin, end - begin));
      begin = end + 1;
    }
    const std::string name = parts.back();
    parts.pop_back();
    size_t common = 0;
    while (common < std::min(open.size(), parts.size()) && open[common] == parts[common]) ++common;
    for (size_t i = common; i < parts.size(); ++i) {
      absl::StrAppend(&text, std::string(2 * i, ' '), parts[i], ":\n");
    }
    absl::StrAppend(&text, std::string(2 * parts.size(), ' '), name, ": ", entry.value,
                    entry.comment.empty() ? "" : "  # ", entry.comment, "\n");
    open = std::move(parts);
  }
  return text;
}

std::string RunConfig::ToYaml() const { return YamlText(Flatten(*this)); }

std::vector<ConfigDifference> CompareForResume(const RunConfig& saved, const RunConfig& now) {
  const std::vector<ConfigEntry> before = Flatten(saved);
  const std::vector<ConfigEntry> after = Flatten(now);
  std::vector<ConfigDifference> differences;
  const auto compare = [&differences](const std::string& key, const std::string* a,
                                      const std::string* b) {
    ConfigDifference difference;
    if (!Classify(key, &difference.kind) || (a != nullptr && b != nullptr && *a == *b)) return;
    difference.key = key;
    difference.before = a == nullptr ? "none" : *a;
    difference.after = b == nullptr ? "none" : *b;
    differences.push_back(std::move(difference));
  };
  for (const ConfigEntry& entry : before)
    compare(entry.key, &entry.value, FindValue(after, entry.key));
  for (const ConfigEntry& entry : after) {
    if (FindValue(before, entry.key) == nullptr) compare(entry.key, nullptr, &entry.value);
  }
  return differences;
}

bool AllowsChange(const std::string& word, const std::string& key) {
  const size_t dot = key.rfind('.');
  return word == key || (dot != std::string::npos && word == key.substr(dot + 1)) ||
         (word == "data" && StartsWith(key, "data."));
}

}  // namespace krait
