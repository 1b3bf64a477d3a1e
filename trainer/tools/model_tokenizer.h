// The tokenizer of a checkpoint: its files lie in a folder `tokenizer` in it (import) or beside it
// (a run), under the name that its manifest gives.
#ifndef KRAIT_TRAINER_TOOLS_MODEL_TOKENIZER_H_
#define KRAIT_TRAINER_TOOLS_MODEL_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

struct ModelTokenizer {
  TokenizerFiles files;  // none for "bytes"
  std::unique_ptr<Tokenizer> tokenizer;
};

// `named`: what the user said instead, "bytes" or a path; "": nothing. kConfig when there is none.
absl::StatusOr<ModelTokenizer> TokenizerOf(const Checkpoint& checkpoint, const std::string& named);

// kConfig unless a model of `vocab_size` has all ids of the tokenizer.
absl::Status CheckVocabulary(const Tokenizer& tokenizer, int64_t vocab_size,
                             const std::string& model);

// The ids at which generation ends: the tokenizer's end token and what an imported
// generation_config.json or config.json says.
std::vector<int32_t> EndTokens(const Tokenizer& tokenizer, const CheckpointMeta& meta);

// What a Hugging Face folder needs for transformers to read the tokenizer: the files, and where
// they lack it a tokenizer_config.json; for "bytes" a tokenizer.json whose tokens are the bytes.
TokenizerFiles FilesForHf(const ModelTokenizer& tokenizer);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_MODEL_TOKENIZER_H_
