#include "data/unicode_form.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/base/check.h"

namespace krait {
namespace {

// Characters with a decomposition or a combining class that Unicode got after its version 9.
// Hugging Face tokenizers has the tables of that version: there they stay as and where they are.
// (Its normalizers beside Unicode's data of today show which ones they are.)
struct Range {
  utf8proc_int32_t first, last;
};
constexpr Range kLater[] = {
    {0x07FD, 0x07FD},   {0x0898, 0x089F},   {0x08CA, 0x08D3},   {0x09FE, 0x09FE},
    {0x0C3C, 0x0C3C},   {0x0D3B, 0x0D3C},   {0x0EBA, 0x0EBA},   {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},
    {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938},
    {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E030, 0x1E06D},
    {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
    {0x1E4EC, 0x1E4EF}, {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

bool IsLater(utf8proc_int32_t code) {
  const auto* found = std::lower_bound(
      std::begin(kLater), std::end(kLater), code,
      [](const Range& range, utf8proc_int32_t value) { return range.last < value; });
  return found != std::end(kLater) && found->first <= code;
}

utf8proc_option_t OptionsOf(UnicodeForm form) {
  int options = UTF8PROC_STABLE;
  const bool composed = form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc;
  options |= composed ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd) options |= UTF8PROC_COMPAT;
  return static_cast<utf8proc_option_t>(options);
}

void AppendInForm(std::string_view text, utf8proc_option_t options, std::string* result) {
  if (text.empty()) return;
  utf8proc_uint8_t* out = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &out, options);
  KRAIT_CHECK(size >= 0);  // it fails on what is no UTF-8, and without memory
  result->append(reinterpret_cast<const char*>(out), static_cast<size_t>(size));
  std::free(out);
}

bool IsAscii(char c) { return static_cast<unsigned char>(c) < 0x80; }

}  // namespace

std::string InForm(std::string_view text, UnicodeForm form) {
  // ASCII is in every form.
  if (std::all_of(text.begin(), text.end(), IsAscii)) return std::string(text);
  const utf8proc_option_t options = OptionsOf(form);
  std::string result;
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    if (IsAscii(text[i])) {
      ++i;
      continue;
    }
    utf8proc_int32_t code = 0;
    const utf8proc_ssize_t length =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i,
                         static_cast<utf8proc_ssize_t>(text.size() - i), &code);
    KRAIT_CHECK(length > 0);
    const auto size = static_cast<size_t>(length);
    if (IsLater(code)) {
      AppendInForm(text.substr(done, i - done), options, &result);
      result += text.substr(i, size);
      done = i + size;
    }
    i += size;
  }
  AppendInForm(text.substr(done), options, &result);
  return result;
}

}  // namespace krait
