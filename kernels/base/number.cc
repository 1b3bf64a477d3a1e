#include "kernels/base/number.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace krait {
namespace {

constexpr char kForms[] = "digits, _, an exponent and the suffixes k, M, B, T, Ki, Mi, Gi";

struct Suffix {
  std::string_view text;
  int decimal;  // exponent of 10
  int binary;   // exponent of 2
};
constexpr Suffix kSuffixes[] = {{"Ki", 0, 10}, {"Mi", 0, 20}, {"Gi", 0, 30}, {"k", 3, 0},
                                {"M", 6, 0},   {"B", 9, 0},   {"T", 12, 0}};

// value = (negative ? -1 : 1) * digits * 10^decimal * 2^binary
struct Parts {
  bool negative = false;
  std::string digits;
  int decimal = 0;
  int binary = 0;
};

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// Moves the digits at the start of `*text` to `*digits`; `_` only between two digits.
bool TakeDigits(std::string_view* text, std::string* digits) {
  while (!text->empty()) {
    const char c = text->front();
    if (c == '_') {
      if (digits->empty() || text->size() < 2 || !IsDigit((*text)[1])) return false;
    } else if (IsDigit(c)) {
      digits->push_back(c);
    } else {
      return true;
    }
    text->remove_prefix(1);
  }
  return true;
}

std::optional<Parts> Fail(std::string* why, const std::string& reason) {
  if (why != nullptr) *why = reason;
  return std::nullopt;
}

std::optional<Parts> Split(std::string_view text, std::string* why) {
  const std::string no_number = std::string("is not a number (") + kForms + ")";
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  while (!lower.empty() && (lower[0] == '-' || lower[0] == '+' || lower[0] == '.'))
    lower.erase(0, 1);
  if (lower == "nan" || lower == "inf" || lower == "infinity") {
    return Fail(why, "is not a finite number");
  }
  Parts parts;
  if (!text.empty() && text.front() == '-') {
    parts.negative = true;
    text.remove_prefix(1);
  }
  std::string whole;
  if (!TakeDigits(&text, &whole)) return Fail(why, no_number);
  std::string fraction;
  if (!text.empty() && text.front() == '.') {
    text.remove_prefix(1);
    if (!TakeDigits(&text, &fraction) || fraction.empty()) return Fail(why, no_number);
  }
  if (whole.empty() && fraction.empty()) return Fail(why, no_number);
  if (whole.size() > 1 && whole[0] == '0') {
    return Fail(why, "has a leading zero (numbers are decimal; write it without)");
  }
  if (!text.empty() && (text.front() == 'e' || text.front() == 'E')) {
    text.remove_prefix(1);
    bool negative = false;
    if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
      negative = text.front() == '-';
      text.remove_prefix(1);
    }
    std::string exponent;
    if (!TakeDigits(&text, &exponent) || exponent.empty()) return Fail(why, no_number);
    if (exponent.size() > 4) return Fail(why, "is out of range");
    parts.decimal = std::stoi(exponent) * (negative ? -1 : 1);
  }
  if (!text.empty()) {
    const auto* suffix = std::find_if(std::begin(kSuffixes), std::end(kSuffixes),
                                      [text](const Suffix& s) { return s.text == text; });
    if (suffix == std::end(kSuffixes)) return Fail(why, no_number);
    parts.decimal += suffix->decimal;
    parts.binary = suffix->binary;
  }
  parts.digits = whole + fraction;
  parts.decimal -= static_cast<int>(std::min<size_t>(fraction.size(), 1'000'000));
  return parts;
}

}  // namespace

std::optional<int64_t> ParseInteger(std::string_view text, std::string* why) {
  std::optional<Parts> parts = Split(text, why);
  if (!parts.has_value()) return std::nullopt;
  // Without zeros at both ends the digits are few, or the number is out of range or not whole.
  std::string digits = parts->digits;
  digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size()));
  while (!digits.empty() && digits.back() == '0') {
    digits.pop_back();
    ++parts->decimal;
  }
  if (digits.empty()) return 0;
  const auto fail = [why](const char* reason) {
    if (why != nullptr) *why = reason;
    return std::nullopt;
  };
  // 10^28 * 2^30 is below 2^124: the arithmetic below is exact.
  constexpr size_t kMaxDigits = 28;
  if (digits.size() > kMaxDigits) return fail("has too many digits for a whole number");
  unsigned __int128 value = 0;
  for (const char c : digits) value = value * 10 + static_cast<unsigned>(c - '0');
  const auto limit = static_cast<unsigned __int128>(std::numeric_limits<int64_t>::max());
  value <<= parts->binary;
  for (; parts->decimal < 0; ++parts->decimal) {
    if (value % 10 != 0) return fail("is not a whole number");
    value /= 10;
  }
  for (; parts->decimal > 0 && value <= limit; --parts->decimal) value *= 10;
  if (value > limit) return fail("is out of range");
  const auto magnitude = static_cast<int64_t>(value);
  return parts->negative ? -magnitude : magnitude;
}

std::optional<double> ParseNumber(std::string_view text, std::string* why) {
  const std::optional<Parts> parts = Split(text, why);
  if (!parts.has_value()) return std::nullopt;
  const std::string decimal =
      (parts->negative ? "-" : "") + parts->digits + "e" + std::to_string(parts->decimal);
  double value = 0;
  const auto result = std::from_chars(decimal.data(), decimal.data() + decimal.size(), value);
  value = std::ldexp(value, parts->binary);
  if (result.ec != std::errc() || !std::isfinite(value)) {
    if (why != nullptr) *why = "is out of range";
    return std::nullopt;
  }
  return value;
}

std::optional<int64_t> ParseBytes(std::string_view text, std::string* why) {
  std::string plain(text);
  const auto ends = [&plain](std::string_view end) {
    return plain.size() > end.size() && std::string_view(plain).ends_with(end);
  };
  // "GiB" and "GB" name bytes; ParseInteger's B alone is 10^9.
  if (ends("B") && !IsDigit(plain[plain.size() - 2])) plain.pop_back();
  if (ends("K")) plain.back() = 'k';
  if (ends("G")) plain.back() = 'B';
  int64_t times = 1;
  if (ends("Ti")) {
    plain[plain.size() - 2] = 'G';
    times = 1024;
  }
  const std::optional<int64_t> value = ParseInteger(plain, why);
  if (!value.has_value()) return std::nullopt;
  if (*value < 0 || *value > std::numeric_limits<int64_t>::max() / times) {
    if (why != nullptr) *why = "is out of range";
    return std::nullopt;
  }
  return *value * times;
}

std::string PrintNumber(double x) {
  std::array<char, 32> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), x);
  std::string text(buffer.data(), result.ptr);
  // 3e-04 and 1e+22 as people write them: 3e-4, 1e22.
  if (const size_t e = text.find('e'); e != std::string::npos) {
    size_t digit = e + (text[e + 1] == '-' ? 2 : 1);
    while (text[digit] == '+' || (text[digit] == '0' && digit + 1 < text.size())) {
      text.erase(digit, 1);
    }
  }
  return text;
}

std::string PrintGrouped(int64_t n) {
  std::string digits = std::to_string(n);
  const int first = digits[0] == '-' ? 1 : 0;
  for (int i = static_cast<int>(digits.size()) - 3; i > first; i -= 3) {
    digits.insert(static_cast<size_t>(i), 1, ',');
  }
  return digits;
}

namespace {

// Three significant digits of x in [0, 1024).
std::string ThreeDigits(double x) {
  std::array<char, 32> buffer{};
  const int decimals = x < 9.995 ? 2 : x < 99.95 ? 1 : 0;
  std::snprintf(buffer.data(), buffer.size(), "%.*f", decimals, x);
  return buffer.data();
}

}  // namespace

std::string PrintShort(double x) {
  if (x < 0) return absl::StrCat("-", PrintShort(-x));
  constexpr std::array<const char*, 7> kUnits = {"", "k", "M", "B", "T", "P", "E"};
  size_t unit = 0;
  while (x >= 999.5 && unit + 1 < kUnits.size()) {
    x /= 1000;
    ++unit;
  }
  if (unit == 0 && x == std::floor(x)) return std::to_string(static_cast<int64_t>(x));
  return ThreeDigits(x) + kUnits[unit];
}

std::string PrintBytes(int64_t bytes) {
  constexpr std::array<const char*, 7> kUnits = {" B",   " KiB", " MiB", " GiB",
                                                 " TiB", " PiB", " EiB"};
  if (bytes < 1024) return std::to_string(bytes) + kUnits[0];
  auto x = static_cast<double>(bytes);
  size_t unit = 0;
  while (x >= 1023.5) {
    x /= 1024;
    ++unit;
  }
  return ThreeDigits(x) + kUnits[unit];
}

}  // namespace krait
