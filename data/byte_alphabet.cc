#include "data/byte_alphabet.h"

#include <algorithm>

#include "absl/strings/string_view.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

std::string Utf8Of(unsigned code) {  // below U+0800
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  std::string text(1, static_cast<char>(0xC0U | code >> 6));
  text += static_cast<char>(0x80U | (code & 0x3FU));
  return text;
}

}  // namespace

ByteAlphabet::ByteAlphabet() {
  unsigned next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    characters_[byte] = Utf8Of(itself ? byte : next++);
    bytes_.emplace(characters_[byte], static_cast<char>(byte));
  }
}

std::optional<std::string> ByteAlphabet::Bytes(std::string_view token) const {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const size_t length = std::max<size_t>(1, Utf8Length(token, i));
    const auto found = bytes_.find(absl::string_view(token.data() + i, length));
    if (found == bytes_.end()) return std::nullopt;
    bytes += found->second;
    i += length;
  }
  return bytes;
}

}  // namespace krait
