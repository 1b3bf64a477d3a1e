// Token files: HDF5 with /tokens [n] u8, u16 or u32 (chunked), /documents u64 [docs+1] from 0, and
// attributes format_version, tokenizer, vocab_size, content_hash.
//
// Sequence k is tokens [k*seq_len, (k+1)*seq_len) in stored order; the tail is dropped.
#ifndef KRAIT_DATA_TOKEN_FILE_H_
#define KRAIT_DATA_TOKEN_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/h5.h"
#include "kernels/base/status.h"

namespace krait {

// All errors of this file lead to exit code kData and name path and offset. Reads are not
// thread-safe.
class TokenFile {
 public:
  static absl::StatusOr<std::unique_ptr<TokenFile>> Open(const std::string& path);

  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return static_cast<int64_t>(document_starts_.size()) - 1; }
  const std::string& tokenizer() const { return tokenizer_; }
  int64_t vocab_size() const { return vocab_size_; }
  const std::string& content_hash() const { return content_hash_; }  // hex
  const std::string& path() const { return path_; }
  DType dtype() const { return dtype_; }
  // Positions of document starts, ascending from 0, then tokens().
  const std::vector<uint64_t>& document_starts() const { return document_starts_; }

  // tokens [begin, begin+count) as i32; refuses ids >= vocab_size, naming their offset.
  absl::Status Read(int64_t begin, int64_t count, int32_t* out) const;
  // For each token of the range the position within the range of its document's first token (0 when
  // the document began before the range).
  void DocumentStarts(int64_t begin, int64_t count, int32_t* doc_start) const;
  // Reads everything and compares with content_hash and the documents table.
  absl::Status Verify() const;

 private:
  TokenFile() = default;
  H5File file_;
  std::string path_, tokenizer_, content_hash_;
  DType dtype_ = DType::kU8;
  int64_t tokens_ = 0, vocab_size_ = 0;
  std::vector<uint64_t> document_starts_;
};

struct BuildOptions {
  std::string tokenizer = "bytes";
  std::string out;
  std::vector<std::string> paths;  // text files, .jsonl(.gz|.zst), folders (recursively, sorted)
  uint64_t seed = 1234;            // of the document shuffle
};
struct BuildReport {
  int64_t documents = 0, tokens = 0, files = 0, skipped_files = 0;
};
// Writes to a temporary name and renames. Each file is a document, each line of a .jsonl one (field
// "text"). Files of a folder that hold a NUL byte or are empty are skipped and counted; a path
// given by name must be readable.
absl::StatusOr<BuildReport> BuildTokenFile(const BuildOptions& options);

}  // namespace krait

#endif  // KRAIT_DATA_TOKEN_FILE_H_
