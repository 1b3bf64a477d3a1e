#include "data/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

#include "absl/strings/str_format.h"

namespace krait {
namespace {

constexpr uint32_t kMatchLimit = 100'000'000;  // steps of one match
constexpr size_t kJitStack = size_t{1} << 20;

// Members of a class, without its brackets. Oniguruma's \s is White_Space without U+180E, which
// PCRE2's has.
constexpr char kSpace[] = "\\t-\\r\\x{85}\\p{Z}";
constexpr char kNotSpace[] =
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{7f}-\\x{84}\\x{86}-\\x{9f}\\p{L}\\p{M}\\p{N}\\p{P}\\p{S}"
    "\\p{Cf}\\p{Cn}\\p{Co}\\p{Cs}";
constexpr char kWord[] = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";
// Below U+0100 Oniguruma has another table for \w outside of a class: with the small numbers and
// fractions.
constexpr char kWordAlone[] =
    "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsHex(char c) { return IsDigit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
bool IsLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

// Walks over a pattern of Oniguruma's and writes the same in PCRE2's syntax.
class Translator {
 public:
  Translator(std::string_view pattern, std::string place)
      : in_(pattern), place_(std::move(place)) {}

  absl::StatusOr<std::string> Run() {
    while (at_ < in_.size()) KRAIT_RETURN_IF_ERROR(One());
    return std::move(out_);
  }

 private:
  bool Has(std::string_view text) const { return in_.substr(at_).starts_with(text); }
  void Copy(size_t count) {
    out_ += in_.substr(at_, count);
    at_ += count;
  }
  absl::Status Refuse(const std::string& what) const {
    return Error(
        ExitCode::kConfig,
        absl::StrFormat("%s: %s at byte %d of the pattern is not supported", place_, what, at_));
  }

  absl::Status One() {
    const char c = in_[at_];
    if (c == '\\') return Escape(/*in_class=*/false);
    if (c == '[') return Class();
    if (c == '(') return Group();
    if (c == '{') return Interval();
    Copy(1);
    return absl::OkStatus();
  }

  absl::Status Group() {
    if (!Has("(?")) {
      Copy(1);
      return absl::OkStatus();
    }
    for (const std::string_view known : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
      if (!Has(known)) continue;
      Copy(known.size());
      return absl::OkStatus();
    }
    // In Ruby's syntax it reaches over the alternatives that follow, elsewhere than at the start.
    if (at_ == 0 && Has("(?i)")) {
      Copy(4);
      return absl::OkStatus();
    }
    return Refuse("the group " + std::string(in_.substr(at_, 4)));
  }

  // {n}, {n,}, {n,m}, {,m}; anything else is a brace.
  absl::Status Interval() {
    size_t end = at_ + 1;
    while (end < in_.size() && (IsDigit(in_[end]) || in_[end] == ',')) ++end;
    if (end == in_.size() || in_[end] != '}' || end < at_ + 2) return Refuse("a brace");
    const std::string_view inside = in_.substr(at_ + 1, end - at_ - 1);
    if (end + 1 < in_.size() && (in_[end + 1] == '+' || in_[end + 1] == '?')) {
      return Refuse("an interval before + or ?");
    }
    out_ += inside.front() == ',' ? "{0" : "{";
    out_ += inside;
    out_ += '}';
    at_ = end + 1;
    return absl::OkStatus();
  }

  absl::Status Class() {
    Copy(1);
    if (Has("^")) Copy(1);
    if (Has("]")) return Refuse("a class that begins with ]");
    while (at_ < in_.size() && in_[at_] != ']') {
      if (in_[at_] == '[') return Refuse("a class within a class");
      if (Has("&&")) return Refuse("an intersection of classes");
      if (in_[at_] == '\\') {
        KRAIT_RETURN_IF_ERROR(Escape(/*in_class=*/true));
      } else {
        Copy(1);
      }
    }
    if (at_ == in_.size()) return Error(ExitCode::kData, place_ + ": a class has no end");
    Copy(1);
    return absl::OkStatus();
  }

  // A set of characters, as members of a class or a class of its own.
  void Set(const std::string& members, bool in_class, size_t size, bool negated = false) {
    out_ += in_class ? members : (negated ? "[^" : "[") + members + "]";
    at_ += size;
  }

  absl::Status Escape(bool in_class) {
    if (at_ + 1 == in_.size()) return Error(ExitCode::kData, place_ + ": it ends with \\");
    const char c = in_[at_ + 1];
    switch (c) {
      case 's':
        Set(kSpace, in_class, 2);
        return absl::OkStatus();
      case 'S':
        Set(in_class ? kNotSpace : kSpace, in_class, 2, /*negated=*/true);
        return absl::OkStatus();
      case 'd':
        Set("\\p{Nd}", in_class, 2);
        return absl::OkStatus();
      case 'D':
        Set("\\P{Nd}", in_class, 2);
        return absl::OkStatus();
      case 'w':
        Set(in_class ? kWord : kWordAlone, in_class, 2);
        return absl::OkStatus();
      case 'W':
        if (in_class) return Refuse("\\W in a class");
        Set(kWordAlone, in_class, 2, /*negated=*/true);
        return absl::OkStatus();
      case 'v':
        out_ += "\\x{b}";
        at_ += 2;
        return absl::OkStatus();
      case 'n':
      case 'r':
      case 't':
      case 'f':
        Copy(2);
        return absl::OkStatus();
      case 'p':
      case 'P':
        return Property();
      case 'x':
      case 'u':
        return Code();
      default:
        if (IsLetter(c) || IsDigit(c)) return Refuse(std::string("\\") + c);
        Copy(2);
        return absl::OkStatus();
    }
  }

  // \p{L}, \p{^L}, \P{Lu}, \p{Han}
  absl::Status Property() {
    const size_t end = in_.find('}', at_);
    if (at_ + 2 >= in_.size() || in_[at_ + 2] != '{' || end == std::string_view::npos) {
      return Refuse("a property without braces");
    }
    std::string_view name = in_.substr(at_ + 3, end - at_ - 3);
    bool negated = in_[at_ + 1] == 'P';
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    constexpr std::string_view kCategories = "LMNPSZC";
    const bool category = !name.empty() && name.size() <= 2 &&
                          kCategories.find(name.front()) != std::string_view::npos;
    bool letters = !name.empty();
    for (const char c : name) letters = letters && (IsLetter(c) || c == '_');
    // Words that Oniguruma reads as POSIX brackets are no scripts.
    constexpr std::array<std::string_view, 14> kBrackets = {
        "Alnum", "Alpha", "Ascii", "ASCII", "Blank", "Cntrl", "Digit",
        "Graph", "Lower", "Print", "Punct", "Space", "Upper", "Word"};
    for (const std::string_view bracket : kBrackets) letters = letters && name != bracket;
    if (!letters || (!category && name.size() < 3)) {
      return Refuse(absl::StrFormat("the property %s", name));
    }
    absl::StrAppendFormat(&out_, "\\%c{%s%s}", negated ? 'P' : 'p', category ? "" : "sc:", name);
    at_ = end + 1;
    return absl::OkStatus();
  }

  // \x41, \x{3040}, \u3040
  absl::Status Code() {
    const bool braces = at_ + 2 < in_.size() && in_[at_ + 1] == 'x' && in_[at_ + 2] == '{';
    const size_t begin = at_ + (braces ? 3 : 2);
    const size_t most = braces ? 6 : in_[at_ + 1] == 'u' ? 4 : 2;
    size_t end = begin;
    while (end < in_.size() && end < begin + most && IsHex(in_[end])) ++end;
    const bool closed = !braces || (end < in_.size() && in_[end] == '}');
    const bool whole = braces || end == begin + most;
    if (end == begin || !closed || !whole) return Refuse("a character's number");
    absl::StrAppendFormat(&out_, "\\x{%s}", in_.substr(begin, end - begin));
    at_ = end + (braces ? 1 : 0);
    return absl::OkStatus();
  }

  std::string_view in_;
  std::string place_, out_;
  size_t at_ = 0;
};

std::string Reason(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

struct Regex::Compiled {
  explicit Compiled(pcre2_code* compiled) : code(compiled) {}
  ~Compiled() { pcre2_code_free(code); }
  Compiled(const Compiled&) = delete;
  Compiled& operator=(const Compiled&) = delete;
  pcre2_code* code;
};

// What a match writes to.
struct Regex::Scratch {
  explicit Scratch(const Compiled& compiled)
      : match(pcre2_match_data_create_from_pattern(compiled.code, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(size_t{32} << 10, kJitStack, nullptr)) {
    pcre2_set_match_limit(context, kMatchLimit);
    if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Scratch() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(match);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  pcre2_match_data* match;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

absl::StatusOr<std::string> TranslatePattern(std::string_view pattern, const std::string& place) {
  return Translator(pattern, place).Run();
}

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern, const std::string& place) {
  KRAIT_ASSIGN_OR_RETURN(const std::string text, TranslatePattern(pattern, place));
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context, 100);
  int error = 0;
  PCRE2_SIZE offset = 0;
  // In Ruby's syntax ^ and $ are those of lines.
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (code == nullptr) {
    return Error(ExitCode::kData, absl::StrFormat("%s: the pattern %s cannot be read: %s", place,
                                                  pattern, Reason(error)));
  }
  Regex regex;
  regex.compiled_ = std::make_shared<const Compiled>(code);
  uint32_t empty = 0;
  pcre2_pattern_info(code, PCRE2_INFO_MATCHEMPTY, &empty);
  if (empty != 0) {
    return Error(ExitCode::kConfig,
                 absl::StrFormat("%s: the pattern %s matches the empty text, which is not "
                                 "supported",
                                 place, pattern));
  }
  // Where there is no JIT, or it may not write code, PCRE2 interprets the pattern.
  (void)pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  regex.scratch_ = std::make_shared<Scratch>(*regex.compiled_);
  return regex;
}

Regex Regex::Share() const {
  Regex shared = *this;
  shared.scratch_ = std::make_shared<Scratch>(*compiled_);
  return shared;
}

int Regex::Find(std::string_view text, size_t from, size_t* begin, size_t* end) {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  int code = pcre2_match(compiled_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK,
                         scratch_->match, scratch_->context);
  if (code == PCRE2_ERROR_JIT_STACKLIMIT) {
    code = pcre2_match(compiled_->code, subject, text.size(), from,
                       PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch_->match, scratch_->context);
  }
  if (code == PCRE2_ERROR_NOMATCH) return 0;
  if (code < 0) return code;
  const PCRE2_SIZE* at = pcre2_get_ovector_pointer(scratch_->match);
  *begin = at[0];
  *end = at[1];
  return 1;
}

}  // namespace krait
