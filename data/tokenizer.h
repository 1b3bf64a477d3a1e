// Tokenizers. Today the byte tokenizer: ids 0 to 255, no special tokens.
#ifndef KRAIT_DATA_TOKENIZER_H_
#define KRAIT_DATA_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string name() const = 0;  // stored in token files
  virtual int64_t vocab_size() const = 0;
  // Appends the ids of `text`.
  virtual void Encode(std::string_view text, std::vector<int32_t>* ids) const = 0;
  // True when Encode(a + b) is Encode(a) followed by Encode(b) for every a and b; then long texts
  // are encoded in pieces.
  virtual bool splits_anywhere() const = 0;
  // The bytes of one id; ids outside the vocabulary give "".
  virtual std::string Decode(int32_t id) const = 0;
  // The id that ends a text, for tokenizers that have one: generation stops at it.
  virtual std::optional<int32_t> end_token() const { return std::nullopt; }
  // Mean bytes per token is known only for the byte tokenizer (1); else bits per byte need counts.
};

// "bytes"; anything else is refused for now (kConfig) with a sentence that says so.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const std::string& name);

}  // namespace krait

#endif  // KRAIT_DATA_TOKENIZER_H_
