// The characters that stand for bytes in the vocabulary of a byte-level BPE, as GPT-2 chose them:
// printable characters of Latin-1 for themselves, the other bytes in order from U+0100 on.
#ifndef KRAIT_DATA_BYTE_ALPHABET_H_
#define KRAIT_DATA_BYTE_ALPHABET_H_

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"

namespace krait {

class ByteAlphabet {
 public:
  ByteAlphabet();
  // The bytes of a token; none where it holds a character that stands for no byte.
  std::optional<std::string> Bytes(std::string_view token) const;
  const std::string& character(size_t byte) const { return characters_[byte]; }

 private:
  std::array<std::string, 256> characters_;
  absl::flat_hash_map<std::string, char> bytes_;
};

}  // namespace krait

#endif  // KRAIT_DATA_BYTE_ALPHABET_H_
