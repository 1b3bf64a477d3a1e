// The steps of a tokenizer.json before byte pair encoding: normalisers, which change a text, and
// pre-tokenizers, which cut it into words. As Hugging Face tokenizers does them.
#ifndef KRAIT_DATA_TEXT_STEPS_H_
#define KRAIT_DATA_TEXT_STEPS_H_

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "data/regex.h"
#include "data/unicode_form.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace krait {

// What a Split or a Replace looks for.
struct TextPattern {
  std::optional<Regex> regex;
  std::string text;  // without a regex; not empty
  // As Regex::Find.
  int Find(std::string_view in, size_t from, size_t* begin, size_t* end);
};

// One normaliser.
struct ReplaceStep {
  TextPattern pattern;
  std::string content;
};
struct PrependStep {
  std::string text;
};
using Normalizer = std::variant<UnicodeForm, ReplaceStep, PrependStep>;

// One pre-tokenizer.
enum class SplitBehavior : uint8_t {
  kRemoved,
  kIsolated,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous
};
struct SplitStep {
  TextPattern pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;
};
struct SpacePrefixStep {};  // ByteLevel's: a space before a piece that does not begin with one
struct MetaspaceStep {
  enum class Prepend : uint8_t { kAlways, kFirst, kNever };
  std::string replacement;
  Prepend prepend = Prepend::kAlways;
};
using PreTokenizer = std::variant<SplitStep, SpacePrefixStep, MetaspaceStep>;

// The steps of one tokenizer, for one thread.
class TextSteps {
 public:
  // Reads `normalizer` and `pre_tokenizer` of a tokenizer.json; errors as MakeTokenizer's.
  static absl::StatusOr<TextSteps> Read(const nlohmann::json& normalizer,
                                        const nlohmann::json& pre_tokenizer,
                                        const std::string& place);
  TextSteps Share() const;

  // A ByteLevel stands among the pre-tokenizers.
  bool byte_level() const { return byte_level_; }

  absl::StatusOr<std::string> Normalize(std::string_view text);
  bool normalizes() const { return !normalizers_.empty(); }
  // Calls word(text) for each word of `text`, which is UTF-8. `at_start`: it begins the whole text.
  absl::Status Cut(std::string_view text, bool at_start,
                   const std::function<absl::Status(std::string_view)>& word);

 private:
  friend class TextStepsReader;
  absl::Status CutFrom(size_t step, std::string_view text, bool at_start,
                       const std::function<absl::Status(std::string_view)>& word);
  absl::Status CutBySplit(SplitStep* split, size_t step, std::string_view text, bool at_start,
                          const std::function<absl::Status(std::string_view)>& word);

  std::vector<Normalizer> normalizers_;
  std::vector<PreTokenizer> pre_tokenizers_;
  bool byte_level_ = false;
};

}  // namespace krait

#endif  // KRAIT_DATA_TEXT_STEPS_H_
