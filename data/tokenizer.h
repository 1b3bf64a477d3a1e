// Tokenizers: texts to ids and back.
//
// "bytes": ids 0 to 255, no special tokens. Else a file: a Hugging Face tokenizer.json (byte-level
// BPE, or BPE of characters with byte fallback) or a SentencePiece model. What a file asks for
// beyond that is refused by name.
#ifndef KRAIT_DATA_TOKENIZER_H_
#define KRAIT_DATA_TOKENIZER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// The files that make up a tokenizer, name to content: "tokenizer.json" or "tokenizer.model" and
// what lies beside it in a Hugging Face folder (tokenizer_config.json, ...). Empty for "bytes".
using TokenizerFiles = std::map<std::string, std::string>;

// One object serves one thread at a time.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // "bytes", or the kind of the file and a hash of what decides its ids ("bpe-0123456789abcdef"):
  // tokenizers of one name give the same ids. Stored in token files and checkpoints.
  const std::string& name() const { return name_; }
  int64_t vocab_size() const { return vocab_size_; }  // the largest id + 1
  // The id that ends a text, where the tokenizer has one: documents of `data build` end with it,
  // and generation stops at it.
  std::optional<int32_t> end_token() const { return end_token_; }
  // What the tokenizer puts before and after each text by itself, such as a start token.
  const std::vector<int32_t>& prefix() const { return prefix_; }
  const std::vector<int32_t>& suffix() const { return suffix_; }

  // Appends the ids of `text`, without prefix and suffix. kData for a text that it cannot encode.
  virtual absl::Status Encode(std::string_view text, std::vector<int32_t>* ids) = 0;
  // True when Encode(a + b) is Encode(a) followed by Encode(b) for every a and b; then long texts
  // are encoded in pieces.
  virtual bool splits_anywhere() const { return false; }
  // The bytes that `id` adds to a text; ids outside the vocabulary add nothing. `at_start`: no
  // token of text came before it (SentencePiece begins a text with a space that is none). A
  // character may reach over several ids.
  virtual std::string Decode(int32_t id, bool at_start) const = 0;
  // The text that a special token stands for ("</s>"), which Decode may leave out.
  virtual std::string TokenText(int32_t id) const { return Decode(id, /*at_start=*/false); }
  // Another one over the same vocabulary, for a further thread.
  virtual std::unique_ptr<Tokenizer> Share() const = 0;

 protected:
  std::string name_;
  int64_t vocab_size_ = 0;
  std::optional<int32_t> end_token_;
  std::vector<int32_t> prefix_, suffix_;
};

// Turns ids into the bytes of a text, one after another.
class TextDecoder {
 public:
  // `at_start`: the ids begin the text. The tokenizer outlives it.
  explicit TextDecoder(const Tokenizer& tokenizer, bool at_start = true)
      : tokenizer_(tokenizer), at_start_(at_start) {}
  // What the next id adds.
  std::string Next(int32_t id);

 private:
  const Tokenizer& tokenizer_;
  bool at_start_;  // only tokens without a text of their own came so far
};

// The text of `ids`.
std::string DecodeAll(const Tokenizer& tokenizer, const std::vector<int32_t>& ids);

// The files of "bytes" (none) or of a path: tokenizer.json or a SentencePiece model, and its
// companions in the same folder; or of a folder that holds them. kConfig when it is neither, kData
// when a file cannot be read.
absl::StatusOr<TokenizerFiles> ReadTokenizerFiles(const std::string& name_or_path);
// Into `folder`, which is made; files of the same name are replaced.
absl::Status WriteTokenizerFiles(const TokenizerFiles& files, const std::string& folder,
                                 ExitCode code);
// Whether `name` is that of a file ReadTokenizerFiles takes along.
bool IsTokenizerFile(const std::string& name);

// kData for a broken file, kConfig for one that asks for what is not supported; `place`, the folder
// or file they are from, begins the messages. The end token is that of tokenizer_config.json (or
// special_tokens_map.json), else SentencePiece's, else the special token of a usual name
// ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"); none where there is none of these. A
// SentencePiece model's start token is its prefix unless tokenizer_config.json says
// "add_bos_token": false; a tokenizer.json has it in its template.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const TokenizerFiles& files,
                                                         const std::string& place);
// Both in one: of "bytes" or a path.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const std::string& name_or_path);

}  // namespace krait

#endif  // KRAIT_DATA_TOKENIZER_H_
