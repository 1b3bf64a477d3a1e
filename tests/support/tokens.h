// A token file written directly, for what `data build` does not make.
#ifndef KRAIT_TESTS_SUPPORT_TOKENS_H_
#define KRAIT_TESTS_SUPPORT_TOKENS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "data/token_file.h"
#include "kernels/base/check.h"
#include "kernels/base/h5.h"

namespace krait {

// One document of `count` tokens 1, of a vocabulary of 100, said to be `tokenizer`'s and to have
// the hash `content`.
inline std::string WriteTokens(const std::string& path, const std::string& tokenizer, int64_t count,
                               const std::string& content = "0000000000000000") {
  auto file = H5File::Create(path, ExitCode::kCannotSave);
  KRAIT_CHECK(file.ok());
  const std::vector<uint8_t> tokens(static_cast<size_t>(count), 1);
  const uint64_t documents[] = {0, static_cast<uint64_t>(count)};
  KRAIT_CHECK(file->CreateChunked("tokens", DType::kU8, 64).ok());
  KRAIT_CHECK(file->Append("tokens", tokens.data(), count).ok());
  KRAIT_CHECK(file->CreateChunked("documents", DType::kU64, 64).ok());
  KRAIT_CHECK(file->Append("documents", documents, 2).ok());
  KRAIT_CHECK(file->WriteAttribute("format_version", kTokenFileVersion).ok());
  KRAIT_CHECK(file->WriteAttribute("vocab_size", 100).ok());
  KRAIT_CHECK(file->WriteAttribute("tokenizer", tokenizer).ok());
  KRAIT_CHECK(file->WriteAttribute("content_hash", content).ok());
  KRAIT_CHECK(file->Close().ok());
  return path;
}

}  // namespace krait

#endif  // KRAIT_TESTS_SUPPORT_TOKENS_H_
