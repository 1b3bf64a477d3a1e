// The makers of the kinds of tokenizers, for MakeTokenizer (tokenizer.h).
#ifndef KRAIT_DATA_TOKENIZER_KINDS_H_
#define KRAIT_DATA_TOKENIZER_KINDS_H_

#include <memory>
#include <string>
#include <string_view>

#include "data/tokenizer.h"

namespace krait {

// The text of the end token as the files beside the tokenizer say it, "" where they say nothing.
struct EndToken {
  std::string text;
  std::string said_by;  // the file
};

// Of a tokenizer.json.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(std::string_view json,
                                                            const EndToken& end,
                                                            const std::string& place);
// Of a SentencePiece model. `add_start`: its start token, where it has one, is put before each
// text.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeSentencePieceTokenizer(std::string_view model,
                                                                      const EndToken& end,
                                                                      bool add_start,
                                                                      const std::string& place);

// 16 hexadecimal digits.
std::string TokenizerHash(std::string_view content);

}  // namespace krait

#endif  // KRAIT_DATA_TOKENIZER_KINDS_H_
