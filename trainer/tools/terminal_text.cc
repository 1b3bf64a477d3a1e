#include "trainer/tools/terminal_text.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

unsigned Byte(char c) { return static_cast<unsigned char>(c); }

// Whether text[i] to the end may be the beginning of a longer UTF-8 sequence.
bool Unfinished(std::string_view text, size_t i) {
  const unsigned lead = Byte(text[i]);
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC2 ? 2 : 1;
  return length > text.size() - i && lead <= 0xF4 &&
         std::all_of(text.begin() + static_cast<int64_t>(i) + 1, text.end(),
                     [](char c) { return (Byte(c) & 0xC0U) == 0x80U; });
}

// Of a sequence that is UTF-8: C0 and C1, and DEL.
bool IsControl(std::string_view sequence) {
  const unsigned first = Byte(sequence[0]);
  if (sequence.size() == 1)
    return (first < 0x20 && first != '\t' && first != '\n') || first == 0x7F;
  return first == 0xC2 && Byte(sequence[1]) < 0xA0;
}

}  // namespace

std::string TerminalText::Take(std::string_view bytes) {
  held_ += bytes;
  const std::string text = std::exchange(held_, "");
  std::string shown;
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text, i);
    if (length == 0 && Unfinished(text, i)) {
      held_ = text.substr(i);
      break;
    }
    const std::string_view sequence = std::string_view(text).substr(i, std::max<size_t>(1, length));
    if (length > 0 && !IsControl(sequence)) {
      shown += sequence;
    } else {
      for (const char c : sequence) absl::StrAppendFormat(&shown, "\\x%02x", Byte(c));
    }
    i += sequence.size();
  }
  return shown;
}

std::string TerminalText::Rest() {
  std::string shown;
  for (const char c : std::exchange(held_, "")) absl::StrAppendFormat(&shown, "\\x%02x", Byte(c));
  return shown;
}

}  // namespace krait
