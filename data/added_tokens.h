// The added tokens of a tokenizer.json: texts that are cut out before anything else is done, the
// leftmost first and of those the longest, as Hugging Face tokenizers does.
#ifndef KRAIT_DATA_ADDED_TOKENS_H_
#define KRAIT_DATA_ADDED_TOKENS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace krait {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool lstrip = false, rstrip = false;  // takes the white space before or after it along
  bool normalized = false;              // looked for in the normalised text
  bool special = false;
  bool operator==(const AddedToken&) const = default;
};

class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  // `tokens` have contents that are not empty.
  explicit AddedTokenFinder(const std::vector<AddedToken>& tokens);

  // Calls piece(text) and token(id) for the pieces of `text` in order.
  template <typename Piece, typename Token>
  void Cut(std::string_view text, const Piece& piece, const Token& token) const {
    size_t done = 0;
    for (size_t i = 0; i < text.size();) {
      const AddedToken* found = At(text, i);
      if (found == nullptr) {
        ++i;
        continue;
      }
      size_t begin = i, end = i + found->content.size();
      // As in Hugging Face's library the search goes on behind the content alone: of the white
      // space that the token takes along a further token may be made, unless it takes none of its
      // own.
      i = end;
      if (found->lstrip) begin = std::max(done, SpaceBefore(text, begin));
      if (found->rstrip) end = SpaceAfter(text, end);
      if (begin > done) piece(text.substr(done, begin - done));
      if (end > begin) token(found->id);
      done = end;
    }
    if (done < text.size()) piece(text.substr(done));
  }

 private:
  // The longest token at text[i], or null.
  const AddedToken* At(std::string_view text, size_t i) const;
  static size_t SpaceBefore(std::string_view text, size_t end);
  static size_t SpaceAfter(std::string_view text, size_t begin);

  absl::flat_hash_map<std::string, AddedToken> tokens_;  // by content
  // Of the contents that begin with a byte, the longest first.
  std::array<std::vector<size_t>, 256> lengths_;
};

}  // namespace krait

#endif  // KRAIT_DATA_ADDED_TOKENS_H_
