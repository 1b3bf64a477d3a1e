#include "data/text_steps.h"

#include <algorithm>
#include <array>
#include <utility>

#include "data/json_node.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

// The words of GPT-2, by which a ByteLevel cuts.
constexpr char kByteLevelPattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

absl::Status GivenUp(std::string_view text) {
  return Error(ExitCode::kData,
               absl::StrFormat("the tokenizer's pattern takes too many steps at \"%s\"",
                               text.substr(0, std::min<size_t>(text.size(), 40))));
}

}  // namespace

int TextPattern::Find(std::string_view in, size_t from, size_t* begin, size_t* end) {
  if (regex.has_value()) return regex->Find(in, from, begin, end);
  *begin = in.find(text, from);
  if (*begin == std::string_view::npos) return 0;
  *end = *begin + text.size();
  return 1;
}

// Reads the steps of one file.
class TextStepsReader {
 public:
  absl::Status AddNormalizer(const JsonNode& node) {
    if (node.IsNull()) return absl::OkStatus();
    KRAIT_RETURN_IF_ERROR(node.CheckObject());
    KRAIT_ASSIGN_OR_RETURN(const std::string type, node["type"].String());
    constexpr std::pair<const char*, UnicodeForm> kForms[] = {{"NFC", UnicodeForm::kNfc},
                                                              {"NFD", UnicodeForm::kNfd},
                                                              {"NFKC", UnicodeForm::kNfkc},
                                                              {"NFKD", UnicodeForm::kNfkd}};
    for (const auto& [name, form] : kForms) {
      if (type != name) continue;
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({}));
      steps.normalizers_.emplace_back(form);
      return absl::OkStatus();
    }
    if (type == "Sequence") {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"normalizers"}));
      const JsonNode list = node["normalizers"];
      KRAIT_RETURN_IF_ERROR(list.CheckArray());
      for (size_t i = 0; i < list.value->size(); ++i) {
        if (list.At(i)["type"].value->is_string() && *list.At(i)["type"].value == "Sequence") {
          return list.At(i).Unsupported("a Sequence within a Sequence");
        }
        KRAIT_RETURN_IF_ERROR(AddNormalizer(list.At(i)));
      }
      return absl::OkStatus();
    }
    if (type == "Replace") {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"pattern", "content"}));
      ReplaceStep step;
      KRAIT_ASSIGN_OR_RETURN(step.pattern, Pattern(node["pattern"]));
      KRAIT_ASSIGN_OR_RETURN(step.content, node["content"].String());
      steps.normalizers_.emplace_back(std::move(step));
      return absl::OkStatus();
    }
    if (type == "Prepend") {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"prepend"}));
      PrependStep step;
      KRAIT_ASSIGN_OR_RETURN(step.text, node["prepend"].String());
      steps.normalizers_.emplace_back(std::move(step));
      return absl::OkStatus();
    }
    return node.Unsupported("the normalizer \"" + type + "\"");
  }

  absl::Status AddPreTokenizer(const JsonNode& node) {
    if (node.IsNull()) return absl::OkStatus();
    KRAIT_RETURN_IF_ERROR(node.CheckObject());
    KRAIT_ASSIGN_OR_RETURN(const std::string type, node["type"].String());
    if (steps.byte_level_) {
      return node.Unsupported("a pre-tokenizer after ByteLevel (\"" + type + "\")");
    }
    if (type == "Sequence") {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"pretokenizers"}));
      const JsonNode list = node["pretokenizers"];
      KRAIT_RETURN_IF_ERROR(list.CheckArray());
      for (size_t i = 0; i < list.value->size(); ++i) {
        if (list.At(i)["type"].value->is_string() && *list.At(i)["type"].value == "Sequence") {
          return list.At(i).Unsupported("a Sequence within a Sequence");
        }
        KRAIT_RETURN_IF_ERROR(AddPreTokenizer(list.At(i)));
      }
      return absl::OkStatus();
    }
    if (type == "Split") return AddSplit(node);
    if (type == "ByteLevel") return AddByteLevel(node);
    if (type == "Metaspace") return AddMetaspace(node);
    if (type == "Digits") {
      KRAIT_RETURN_IF_ERROR(node.CheckKeys({"individual_digits"}));
      KRAIT_ASSIGN_OR_RETURN(const bool single, node["individual_digits"].Bool(false));
      return AddRegexSplit("\\p{N}", single ? SplitBehavior::kIsolated : SplitBehavior::kContiguous,
                           node.place);
    }
    return node.Unsupported("the pre-tokenizer \"" + type + "\"");
  }

  TextSteps steps;

 private:
  absl::StatusOr<TextPattern> Pattern(const JsonNode& node) {
    KRAIT_RETURN_IF_ERROR(node.CheckObject());
    TextPattern pattern;
    if (node.value->size() == 1 && node.value->contains("Regex")) {
      KRAIT_ASSIGN_OR_RETURN(const std::string text, node["Regex"].String());
      KRAIT_ASSIGN_OR_RETURN(pattern.regex, Regex::Compile(text, node.place));
      return pattern;
    }
    if (node.value->size() == 1 && node.value->contains("String")) {
      KRAIT_ASSIGN_OR_RETURN(pattern.text, node["String"].String());
      if (pattern.text.empty()) return node.Unsupported("an empty pattern");
      return pattern;
    }
    return node.Wrong("an object {\"Regex\": ...} or {\"String\": ...}");
  }

  absl::Status AddRegexSplit(const char* pattern, SplitBehavior behavior,
                             const std::string& place) {
    SplitStep step;
    step.behavior = behavior;
    KRAIT_ASSIGN_OR_RETURN(step.pattern.regex, Regex::Compile(pattern, place));
    steps.pre_tokenizers_.emplace_back(std::move(step));
    return absl::OkStatus();
  }

  absl::Status AddSplit(const JsonNode& node) {
    KRAIT_RETURN_IF_ERROR(node.CheckKeys({"pattern", "behavior", "invert"}));
    SplitStep step;
    KRAIT_ASSIGN_OR_RETURN(step.pattern, Pattern(node["pattern"]));
    KRAIT_ASSIGN_OR_RETURN(step.invert, node["invert"].Bool(false));
    KRAIT_ASSIGN_OR_RETURN(const std::string behavior, node["behavior"].String());
    constexpr std::pair<const char*, SplitBehavior> kBehaviors[] = {
        {"Removed", SplitBehavior::kRemoved},
        {"Isolated", SplitBehavior::kIsolated},
        {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
        {"MergedWithNext", SplitBehavior::kMergedWithNext},
        {"Contiguous", SplitBehavior::kContiguous}};
    const auto* found = std::find_if(std::begin(kBehaviors), std::end(kBehaviors),
                                     [&](const auto& known) { return behavior == known.first; });
    if (found == std::end(kBehaviors)) {
      return node["behavior"].Unsupported("\"" + behavior + "\"");
    }
    step.behavior = found->second;
    steps.pre_tokenizers_.emplace_back(std::move(step));
    return absl::OkStatus();
  }

  absl::Status AddByteLevel(const JsonNode& node) {
    KRAIT_RETURN_IF_ERROR(node.CheckKeys({"add_prefix_space", "trim_offsets", "use_regex"}));
    KRAIT_ASSIGN_OR_RETURN(const bool space, node["add_prefix_space"].Bool(true));
    KRAIT_ASSIGN_OR_RETURN(const bool by_words, node["use_regex"].Bool(true));
    if (space) steps.pre_tokenizers_.emplace_back(SpacePrefixStep());
    if (by_words) {
      KRAIT_RETURN_IF_ERROR(AddRegexSplit(kByteLevelPattern, SplitBehavior::kIsolated, node.place));
    }
    steps.byte_level_ = true;
    return absl::OkStatus();
  }

  absl::Status AddMetaspace(const JsonNode& node) {
    KRAIT_RETURN_IF_ERROR(
        node.CheckKeys({"replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"}));
    MetaspaceStep step;
    KRAIT_ASSIGN_OR_RETURN(step.replacement, node["replacement"].String());
    if (Utf8Length(step.replacement, 0) != step.replacement.size()) {
      return node["replacement"].Wrong("one character");
    }
    KRAIT_ASSIGN_OR_RETURN(const bool space, node["add_prefix_space"].Bool(true));
    if (!node["prepend_scheme"].IsNull()) {
      KRAIT_ASSIGN_OR_RETURN(const std::string scheme, node["prepend_scheme"].String());
      if (scheme == "first") {
        step.prepend = MetaspaceStep::Prepend::kFirst;
      } else if (scheme == "never") {
        step.prepend = MetaspaceStep::Prepend::kNever;
      } else if (scheme != "always") {
        return node["prepend_scheme"].Unsupported("\"" + scheme + "\"");
      }
    }
    if (!space) {
      if (!node["prepend_scheme"].IsNull() && step.prepend != MetaspaceStep::Prepend::kNever) {
        return node["prepend_scheme"].Wrong("\"never\" beside add_prefix_space false");
      }
      step.prepend = MetaspaceStep::Prepend::kNever;
    }
    KRAIT_ASSIGN_OR_RETURN(const bool split, node["split"].Bool(true));
    SplitStep words;
    words.pattern.text = step.replacement;
    words.behavior = SplitBehavior::kMergedWithNext;
    steps.pre_tokenizers_.emplace_back(std::move(step));
    if (split) steps.pre_tokenizers_.emplace_back(std::move(words));
    return absl::OkStatus();
  }
};

absl::StatusOr<TextSteps> TextSteps::Read(const nlohmann::json& normalizer,
                                          const nlohmann::json& pre_tokenizer,
                                          const std::string& place) {
  TextStepsReader reader;
  KRAIT_RETURN_IF_ERROR(reader.AddNormalizer({&normalizer, place + " normalizer"}));
  KRAIT_RETURN_IF_ERROR(reader.AddPreTokenizer({&pre_tokenizer, place + " pre_tokenizer"}));
  return std::move(reader.steps);
}

TextSteps TextSteps::Share() const {
  TextSteps shared = *this;
  const auto renew = [](TextPattern* pattern) {
    if (pattern->regex.has_value()) pattern->regex = pattern->regex->Share();
  };
  for (Normalizer& step : shared.normalizers_) {
    if (auto* replace = std::get_if<ReplaceStep>(&step)) renew(&replace->pattern);
  }
  for (PreTokenizer& step : shared.pre_tokenizers_) {
    if (auto* split = std::get_if<SplitStep>(&step)) renew(&split->pattern);
  }
  return shared;
}

absl::StatusOr<std::string> TextSteps::Normalize(std::string_view text) {
  std::string current(text);
  for (Normalizer& step : normalizers_) {
    if (const auto* form = std::get_if<UnicodeForm>(&step)) {
      current = InForm(current, *form);
    } else if (const auto* prepend = std::get_if<PrependStep>(&step)) {
      if (!current.empty()) current.insert(0, prepend->text);
    } else {
      auto& replace = std::get<ReplaceStep>(step);
      std::string next;
      size_t done = 0, begin = 0, end = 0;
      int found = 0;
      while ((found = replace.pattern.Find(current, done, &begin, &end)) > 0) {
        next.append(current, done, begin - done);
        next += replace.content;
        done = end;
      }
      if (found < 0) return GivenUp(std::string_view(current).substr(done));
      next.append(current, done);
      current = std::move(next);
    }
  }
  return current;
}

absl::Status TextSteps::Cut(std::string_view text, bool at_start,
                            const std::function<absl::Status(std::string_view)>& word) {
  return CutFrom(0, text, at_start, word);
}

absl::Status TextSteps::CutFrom(size_t step, std::string_view text, bool at_start,
                                const std::function<absl::Status(std::string_view)>& word) {
  if (text.empty()) return absl::OkStatus();
  if (step == pre_tokenizers_.size()) return word(text);
  PreTokenizer& kind = pre_tokenizers_[step];
  if (auto* split = std::get_if<SplitStep>(&kind)) {
    return CutBySplit(split, step, text, at_start, word);
  }
  std::string changed;
  if (const auto* space = std::get_if<MetaspaceStep>(&kind)) {
    for (const char c : text) c == ' ' ? changed += space->replacement : changed += c;
    const bool prepend = space->prepend == MetaspaceStep::Prepend::kAlways ||
                         (space->prepend == MetaspaceStep::Prepend::kFirst && at_start);
    if (prepend && !changed.starts_with(space->replacement)) {
      changed.insert(0, space->replacement);
    }
  } else {
    if (text.starts_with(' ')) return CutFrom(step + 1, text, at_start, word);
    changed = " ";
    changed += text;
  }
  return CutFrom(step + 1, changed, at_start, word);
}

absl::Status TextSteps::CutBySplit(SplitStep* split, size_t step, std::string_view text,
                                   bool at_start,
                                   const std::function<absl::Status(std::string_view)>& word) {
  const auto next = [&](size_t begin, size_t end) {
    return CutFrom(step + 1, text.substr(begin, end - begin), at_start && begin == 0, word);
  };
  // The piece that is not handed on yet, and whether it ends with a match.
  size_t open = 0, open_end = 0;
  bool open_match = false;
  const auto flush = [&]() -> absl::Status {
    const size_t begin = std::exchange(open, open_end);
    return open_end > begin ? next(begin, open_end) : absl::OkStatus();
  };
  // Takes [begin, end), which follows what came before it.
  const auto take = [&](size_t begin, size_t end, bool match) -> absl::Status {
    if (begin == end) return absl::OkStatus();
    match = match != split->invert;
    bool joins = false;
    switch (split->behavior) {
      case SplitBehavior::kRemoved:
        if (match) {
          KRAIT_RETURN_IF_ERROR(flush());
          open = open_end = end;
          open_match = true;
          return absl::OkStatus();
        }
        break;
      case SplitBehavior::kIsolated:
        break;
      case SplitBehavior::kMergedWithPrevious:
        joins = match && !open_match;
        break;
      case SplitBehavior::kMergedWithNext:
        joins = open_match && !match;
        break;
      case SplitBehavior::kContiguous:
        joins = match == open_match;
        break;
    }
    if (!joins) KRAIT_RETURN_IF_ERROR(flush());
    open_end = end;
    open_match = match;
    return absl::OkStatus();
  };
  size_t done = 0, begin = 0, end = 0;
  int found = 0;
  while ((found = split->pattern.Find(text, done, &begin, &end)) > 0) {
    if (end == begin) {  // of a look-around alone; no pattern that matches the empty text gets here
      found = -1;
      break;
    }
    KRAIT_RETURN_IF_ERROR(take(done, begin, false));
    KRAIT_RETURN_IF_ERROR(take(begin, end, true));
    done = end;
  }
  if (found < 0) return GivenUp(text.substr(done));
  KRAIT_RETURN_IF_ERROR(take(done, text.size(), false));
  return flush();
}

}  // namespace krait
