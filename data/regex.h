// Regular expressions of tokenizer files, matched by PCRE2.
//
// The files are written for Oniguruma (Ruby's syntax, Unicode properties), which Hugging Face
// tokenizers uses. What both read alike is handed on; \s, \d, \w and scripts are spelled out as
// Oniguruma means them; what they read differently (\h, \b, {1,3}+, nested classes, back
// references,
// ...) is refused with its place. PCRE2 10.42 knows the characters of Unicode 14: one that was
// assigned later is no letter to it.
#ifndef KRAIT_DATA_REGEX_H_
#define KRAIT_DATA_REGEX_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "kernels/base/status.h"

namespace krait {

// For one thread; Share() makes another for a further one.
class Regex {
 public:
  // kConfig for what is not supported, kData for what is no pattern; `place` begins the message. A
  // pattern that matches the empty text is refused.
  static absl::StatusOr<Regex> Compile(std::string_view pattern, const std::string& place);
  Regex Share() const;

  // The leftmost match in text[from, end), where `text` is UTF-8 and `from` lies between two
  // characters. 1: found, 0: none, below 0: PCRE2 gave up (a pattern that takes too many steps).
  int Find(std::string_view text, size_t from, size_t* begin, size_t* end);

 private:
  struct Compiled;
  struct Scratch;
  std::shared_ptr<const Compiled> compiled_;
  std::shared_ptr<Scratch> scratch_;
};

// `pattern` in PCRE2's syntax; errors as of Compile.
absl::StatusOr<std::string> TranslatePattern(std::string_view pattern, const std::string& place);

}  // namespace krait

#endif  // KRAIT_DATA_REGEX_H_
