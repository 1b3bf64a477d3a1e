#include "trainer/config/config_reader.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/number.h"
#include "kernels/base/shell.h"

namespace krait {
namespace {

std::string LastPart(const std::string& path) { return path.substr(path.rfind('.') + 1); }

std::string Parent(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

// Edits (insert, delete, replace, swap of neighbours) from a to b: optimal string alignment.
size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min(
          {d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

// The candidate nearest to a misspelt key, or "". A third of the letters may differ.
std::string Nearest(const std::string& key, const std::vector<std::string>& candidates) {
  constexpr size_t kLongest = 64;  // of any key worth comparing
  std::string best;
  size_t best_distance = kLongest;
  if (key.size() > kLongest) return best;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(key, candidate);
    const size_t allowed = std::max<size_t>(1, std::max(key.size(), candidate.size()) / 3);
    if (distance <= allowed && distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

std::string Or(const char* word) { return word == nullptr ? "" : absl::StrCat(" or ", word); }

std::string Expected(const WholeRange& range) {
  if (range.max == std::numeric_limits<int64_t>::max()) {
    return absl::StrCat("a whole number of at least ", range.min, Or(range.word));
  }
  return absl::StrCat("a whole number from ", range.min, " to ", range.max, Or(range.word));
}

std::string Expected(const Range& range) {
  std::string text = absl::StrCat(range.min_open ? "a number above " : "a number of at least ",
                                  PrintNumber(range.min));
  if (range.max < std::numeric_limits<double>::max()) {
    absl::StrAppend(&text, range.max_open ? " and below " : " and at most ",
                    PrintNumber(range.max));
  }
  return absl::StrCat(text, Or(range.word));
}

bool Inside(double x, const Range& range) {
  return (range.min_open ? x > range.min : x >= range.min) &&
         (range.max_open ? x < range.max : x <= range.max);
}

// A number in float32, where it has another meaning than as it was written; else "".
std::string InFloat32(double x, const Range& range) {
  if (!range.float32 || (range.count && x >= 1)) return "";
  constexpr double kLeast = std::numeric_limits<float>::min(),
                   kMost = std::numeric_limits<float>::max();
  // Values that are not normal are flushed to 0 by some devices.
  if (x != 0 && std::abs(x) < kLeast) return "is 0 in float32";
  if (std::abs(x) > kMost) return "is infinite in float32";
  if (range.max_open && static_cast<double>(static_cast<float>(x)) >= range.max) {
    return absl::StrCat("is ", PrintNumber(range.max), " in float32");
  }
  return "";
}

bool HasControl(const std::string& text) {
  return std::any_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
}

}  // namespace

const ConfigNode* ConfigReader::Find(const std::string& path) {
  if (known_set_.insert(path).second) known_.push_back(path);
  const ConfigNode* node = FindNode(root_, path);
  if (node == nullptr) return nullptr;
  if (node->kind == ConfigNode::Kind::kBroken) {
    bad_.insert(path);
    return nullptr;
  }
  return node;
}

bool ConfigReader::Has(const std::string& path) const { return FindNode(root_, path) != nullptr; }

Place ConfigReader::PlaceOf(const std::string& path) const {
  for (std::string p = path; !p.empty(); p = Parent(p)) {
    if (const ConfigNode* node = FindNode(root_, p); node != nullptr) {
      return p == path ? node->place : node->key_place;
    }
  }
  return root_.place;
}

void ConfigReader::Fail(const std::string& path, const std::string& message) {
  bad_.insert(path);
  errors_->Add(PlaceOf(path), message);
}

void ConfigReader::Note(const std::string& path, const std::string& message) {
  errors_->Note(PlaceOf(path), message);
}

std::string ConfigReader::FirstGiven(const std::string& section,
                                     const std::vector<std::string>& but) const {
  const ConfigNode* map = FindNode(root_, section);
  if (map == nullptr || !map->is_map()) return "";
  for (const ConfigNode& child : map->children) {
    if (std::find(but.begin(), but.end(), child.key) == but.end()) {
      return absl::StrCat(section, ".", child.key);
    }
  }
  return "";
}

std::string ConfigReader::TextOf(const std::string& path) const {
  const ConfigNode* node = FindNode(root_, path);
  return node == nullptr ? "" : node->text;
}

void ConfigReader::Require(const std::string& path, const std::string& hint) {
  if (Has(path) || bad_.contains(path)) return;
  if (!complete_) {
    bad_.insert(path);
    return;
  }
  // A section that is no map is reported once, not for each of its keys.
  for (std::string p = Parent(path); !p.empty(); p = Parent(p)) {
    const ConfigNode* section = FindNode(root_, p);
    if (section != nullptr && !section->is_map() && section->kind != ConfigNode::Kind::kNull) {
      bad_.insert(path);
      return;
    }
  }
  Fail(path, absl::StrCat(path, " is missing", hint.empty() ? "" : "; ", hint));
}

bool ConfigReader::Good(std::initializer_list<const char*> paths) const {
  return std::none_of(paths.begin(), paths.end(),
                      [this](const char* path) { return bad_.contains(path); });
}

std::string ConfigReader::Show(const std::string& path, const std::string& value) const {
  return absl::StrCat(path, " ", value, Has(path) ? "" : " (the default)");
}

void ConfigReader::Wrong(const std::string& path, const ConfigNode& node,
                         const std::string& expected) {
  Fail(path, absl::StrCat(path, ": expected ", expected, ", found ", Describe(node)));
}

const std::string* ConfigReader::Plain(const std::string& path, const std::string& expected) {
  const ConfigNode* node = Find(path);
  if (node == nullptr) return nullptr;
  if (node->kind != ConfigNode::Kind::kScalar) {
    Wrong(path, *node, expected);
    return nullptr;
  }
  if (node->quoted) {
    Fail(path, absl::StrCat(path, ": expected ", expected, ", found the quoted string ",
                            Quote(node->text)));
    return nullptr;
  }
  return &node->text;
}

void ConfigReader::Whole(const std::string& path, int64_t* out, const WholeRange& range) {
  const std::string expected = Expected(range);
  const std::string* text = Plain(path, expected);
  if (text == nullptr) return;
  if (range.word != nullptr && *text == range.word) {
    *out = range.word_value;
    return;
  }
  std::string why = "is out of range";
  const std::optional<int64_t> number = ParseInteger(*text, &why);
  if (number.has_value() && *number >= range.min && *number <= range.max) {
    *out = *number;
    return;
  }
  Fail(path, absl::StrCat(path, ": ", Quote(*text), " ", why, "; expected ", expected));
}

void ConfigReader::Ramp(const std::string& path, BatchRamp* out) {
  const ConfigNode* node = Find(path);
  if (node == nullptr) return;
  if (node->kind != ConfigNode::Kind::kScalar || node->text.find(':') == std::string::npos) {
    int64_t tokens = 0;
    Whole(path, &tokens, {1, kMaxTokens});
    if (tokens > 0) *out = tokens;
    return;
  }
  auto ramp = BatchRamp::Parse(node->text);
  if (ramp.ok()) {
    *out = *std::move(ramp);
    return;
  }
  Fail(path, absl::StrCat(path, ": ", Quote(node->text), ": ", MessageOf(ramp.status()),
                          "; expected a whole number, or SIZE:FROM words with rising FROM, the "
                          "tokens seen from which SIZE holds, such as \"512Ki:0 2Mi:1B\""));
}

void ConfigReader::Number(const std::string& path, double* out, const Range& range) {
  const std::string expected = Expected(range);
  const std::string* text = Plain(path, expected);
  if (text == nullptr) return;
  if (range.word != nullptr && *text == range.word) {
    *out = 0;
    return;
  }
  std::string why = "is out of range";
  const std::optional<double> number = ParseNumber(*text, &why);
  if (number.has_value() && Inside(*number, range)) {
    const std::string rounded = InFloat32(*number, range);
    if (rounded.empty()) {
      *out = *number;
      return;
    }
    why = rounded;
  }
  Fail(path, absl::StrCat(path, ": ", Quote(*text), " ", why, "; expected ", expected));
}

void ConfigReader::Bool(const std::string& path, bool* out) {
  const std::string* text = Plain(path, "true or false");
  if (text == nullptr) return;
  if (*text == "true" || *text == "false") {
    *out = *text == "true";
    return;
  }
  Fail(path, absl::StrCat(path, ": expected true or false, found ", Quote(*text)));
}

void ConfigReader::String(const std::string& path, std::string* out) {
  const ConfigNode* node = Find(path);
  if (node == nullptr) return;
  if (node->kind != ConfigNode::Kind::kScalar || node->text.empty()) {
    Wrong(path, *node, "text");
  } else if (HasControl(node->text)) {
    Fail(path, absl::StrCat(path, ": control characters in ", Quote(node->text)));
  } else {
    *out = node->text;
  }
}

void ConfigReader::Choice(const std::string& path, const std::vector<const char*>& names,
                          size_t* index) {
  const ConfigNode* node = Find(path);
  if (node == nullptr) return;
  const auto it = std::find(names.begin(), names.end(), node->text);
  if (node->kind == ConfigNode::Kind::kScalar && it != names.end()) {
    *index = static_cast<size_t>(it - names.begin());
  } else {
    Wrong(path, *node, absl::StrJoin(names, " | "));
  }
}

void ConfigReader::Numbers(const std::string& path, const std::vector<double*>& out,
                           const Range& range) {
  const ConfigNode* node = Find(path);
  if (node == nullptr) return;
  const std::string expected =
      absl::StrCat("a list of ", out.size(), " numbers, each ", Expected(range));
  if (node->kind != ConfigNode::Kind::kList || node->children.size() != out.size()) {
    if (node->kind != ConfigNode::Kind::kList) return Wrong(path, *node, expected);
    return Fail(path,
                absl::StrCat(path, ": expected ", expected, ", found ", node->children.size()));
  }
  for (size_t i = 0; i < out.size(); ++i) {
    const ConfigNode& item = node->children[i];
    std::string why = "is out of range";
    std::optional<double> number;
    if (item.kind == ConfigNode::Kind::kBroken) return;
    if (item.kind == ConfigNode::Kind::kScalar && !item.quoted) {
      number = ParseNumber(item.text, &why);
    } else {
      why = "is no number";
    }
    if (number.has_value() && Inside(*number, range)) why = InFloat32(*number, range);
    if (!why.empty()) {
      bad_.insert(path);
      errors_->Add(item.place, absl::StrCat(path, "[", i, "]: ", Describe(item), " ", why,
                                            "; expected ", Expected(range)));
      return;
    }
    *out[i] = *number;
  }
}

void ConfigReader::Sources(const std::string& path, std::vector<SourceSpec>* out) {
  const ConfigNode* node = Find(path);
  if (node == nullptr) return;
  const std::string expected = "a list of sources such as [{path: data/train.h5, weight: 1.0}]";
  if (node->kind != ConfigNode::Kind::kList) return Wrong(path, *node, expected);
  out->clear();
  for (size_t i = 0; i < node->children.size(); ++i) {
    const ConfigNode& item = node->children[i];
    const std::string name = absl::StrCat(path, "[", i, "]");
    if (item.kind == ConfigNode::Kind::kBroken) {
      bad_.insert(path);
      continue;
    }
    if (!item.is_map()) {
      bad_.insert(path);
      errors_->Add(item.place,
                   absl::StrCat(name, ": expected {path: FILE}, found ", Describe(item)));
      continue;
    }
    // The item is read as a config of its own.
    ConfigReader reader(item, /*complete=*/true, errors_);
    SourceSpec source;
    reader.String("path", &source.path);
    if (reader.Has("synthetic")) reader.Synthetic(path, &source);
    reader.Number(
        "weight", &source.weight,
        {.min = 0, .max = std::numeric_limits<double>::max(), .min_open = true, .float32 = false});
    if (!reader.Has("synthetic")) {
      reader.Require("path", absl::StrCat("each entry of ", path,
                                          " names a token file (or a task: synthetic)"));
    }
    reader.Finish();
    if (!reader.bad_.empty()) bad_.insert(path);
    source.path = source.synthetic.has_value() ? source.synthetic->Name() : UserPath(source.path);
    source.named_at = absl::StrCat(item.place.ToString(), ": ", name);
    out->push_back(std::move(source));
  }
}

void ConfigReader::Synthetic(const std::string& list, SourceSpec* source) {
  if (Has("path")) {
    Fail("path", "path and synthetic are alternatives: keep one of them");
  }
  SyntheticSpec spec;
  // What is trained on is not what is held out.
  spec.seed = list == "data.validation" ? 2 : 1;
  size_t task = 0;
  Choice("synthetic.task", {std::begin(kSyntheticTaskNames), std::end(kSyntheticTaskNames)}, &task);
  Require("synthetic.task");
  spec.task = static_cast<SyntheticTask>(task);
  Whole("synthetic.items", &spec.items, {0, 1 << 24});
  Whole("synthetic.sequences", &spec.sequences, {1, 100'000'000});
  auto seed = static_cast<int64_t>(spec.seed);
  Whole("synthetic.seed", &seed, {0});
  spec.seed = static_cast<uint64_t>(seed);
  source->synthetic = spec;
}

void ConfigReader::Finish() { CheckKeys(root_, ""); }

void ConfigReader::CheckKeys(const ConfigNode& map, const std::string& prefix) {
  std::vector<std::string> siblings;
  for (const std::string& path : known_) {
    if (path.compare(0, prefix.size(), prefix) != 0) continue;
    const std::string key =
        path.substr(prefix.size(), path.find('.', prefix.size()) - prefix.size());
    if (std::find(siblings.begin(), siblings.end(), key) == siblings.end()) siblings.push_back(key);
  }
  for (const ConfigNode& child : map.children) {
    const std::string path = prefix + child.key;
    if (known_set_.contains(path)) continue;
    if (std::find(siblings.begin(), siblings.end(), child.key) == siblings.end()) {
      Unknown(child, path, siblings);
    } else if (child.is_map()) {
      CheckKeys(child, path + ".");
    } else if (child.kind == ConfigNode::Kind::kScalar || child.kind == ConfigNode::Kind::kList) {
      Wrong(path, child, "a map of keys");
    }
  }
}

void ConfigReader::Unknown(const ConfigNode& node, const std::string& path,
                           const std::vector<std::string>& siblings) {
  std::string message = absl::StrCat("unknown key ", Quote(path));
  const std::string prefix = Parent(path);
  // A slip of one letter goes before the right word in the wrong section, and that before a word
  // that is further off.
  const std::string near = Nearest(node.key, siblings);
  const bool slip = !near.empty() && EditDistance(node.key, near) == 1;
  std::vector<std::string> guesses;
  for (const std::string& known : known_) {
    if (!slip && LastPart(known) == node.key) guesses.push_back(known);
  }
  if (guesses.empty() && !near.empty()) {
    guesses.push_back(prefix.empty() ? near : absl::StrCat(prefix, ".", near));
  }
  if (!guesses.empty()) {
    absl::StrAppend(&message, "; did you mean ", absl::StrJoin(guesses, " or "), "?");
  } else {
    absl::StrAppend(&message, "; known here: ");
    for (size_t i = 0; i < siblings.size(); ++i) {
      absl::StrAppend(&message, i > 0 ? ", " : "", siblings[i]);
    }
  }
  errors_->Add(node.key_place, message);
}

}  // namespace krait
