// Token files: HDF5 with /tokens [n] u8, u16 or u32, /documents u64 [docs+1] from 0, and attributes
// format_version (1), tokenizer, vocab_size, content_hash (content_hash.h). Files of `data build`
// also say end_token (an id, where the tokenizer has one), text_bytes (of the texts, for bits per
// byte) and tokenizer_files (names, one a line), with the content of each in /tokenizer_file:NAME
// u8.
//
// Files of Megatron-LM and llm.c are read too (foreign_tokens.h): they say neither tokenizer nor,
// the former, how large the vocabulary is.
//
// Sequence k is tokens [k*seq_len, (k+1)*seq_len) in stored order; the tail is dropped.
#ifndef KRAIT_DATA_TOKEN_FILE_H_
#define KRAIT_DATA_TOKEN_FILE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/document_table.h"
#include "data/synthetic.h"
#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "kernels/base/h5.h"
#include "kernels/base/progress.h"
#include "kernels/base/status.h"

namespace krait {

constexpr uint64_t kTokenFileVersion = 1;

// The dtype of /tokens: the smallest that holds the vocabulary.
constexpr DType TokenDType(int64_t vocab_size) {
  return vocab_size <= 256 ? DType::kU8 : vocab_size <= 65536 ? DType::kU16 : DType::kU32;
}

// All errors of this file lead to exit code kData and name path and offset. Neither the tokens nor
// the table of documents (but for some files of other programs) are held in memory.
// Reads are not thread-safe, among them Read, DocumentStarts, Verify and what document_table() has;
// the rest may be asked for meanwhile.
class TokenFile {
 public:
  // Checks everything but the token values: attributes, types, that the vocabulary fits the type,
  // that documents ascend strictly from 0 to the number of tokens.
  static absl::StatusOr<std::unique_ptr<TokenFile>> Open(const std::string& path);
  // A task in place of a file, whose sequences of `seq_len` tokens are documents.
  static absl::StatusOr<std::unique_ptr<TokenFile>> Synthetic(const SyntheticSpec& spec,
                                                              int64_t seq_len, int64_t vocab_size);

  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return documents_.documents(); }
  const std::string& format() const { return format_; }  // "Krait", "Megatron", "llm.c", "task"
  const std::string& tokenizer() const { return tokenizer_; }  // "": not known
  int64_t vocab_size() const { return vocab_size_; }           // 0: not known
  // Bounds the ids of a file that does not know its vocabulary.
  void ExpectVocabulary(int64_t vocab_size) {
    if (vocab_size_ == 0) vocab_size_ = vocab_size;
  }
  const std::string& content_hash() const { return content_hash_; }  // hex
  std::optional<int64_t> end_token() const { return end_token_; }
  // Mean tokens per byte of text, where the file knows it.
  std::optional<double> tokens_per_byte() const;
  // The files of its tokenizer; none for "bytes", and in files that hold none.
  absl::StatusOr<TokenizerFiles> ReadTokenizerFiles() const;
  const std::string& path() const { return path_; }
  DType dtype() const { return dtype_; }
  const DocumentTable& document_table() const { return documents_; }

  // tokens [begin, begin+count) as i32; refuses ids >= vocab_size, naming their offset. On an error
  // `out` holds anything.
  absl::Status Read(int64_t begin, int64_t count, int32_t* out) const;
  // For each token of the range the position within the range of its document's first token (0 when
  // the document began before the range).
  absl::Status DocumentStarts(int64_t begin, int64_t count, int32_t* doc_start) const;
  // Clears the entries of `counts` [count] whose tokens are no targets: all but the answers of a
  // synthetic task, none of a file.
  void Counts(int64_t begin, int64_t count, uint8_t* counts) const;
  // Reads everything and compares it with content_hash; of a foreign file, which keeps none, it
  // reads everything.
  absl::Status Verify() const;

 private:
  TokenFile() = default;
  static absl::StatusOr<std::unique_ptr<TokenFile>> OpenForeign(const std::string& path);
  absl::Status CheckAttributes();
  absl::Status ReadDocuments();
  // An error for the first of `count` stored ids at `raw` that is outside the vocabulary; `begin`
  // is the position of the first.
  absl::Status CheckIds(const void* raw, int64_t begin, int64_t count) const;

  // `count` tokens as they are stored.
  absl::Status ReadStored(int64_t begin, int64_t count, void* raw) const;

  H5File file_;
  File foreign_;  // open instead
  int64_t foreign_begin_ = 0;
  std::optional<SyntheticTokens> synthetic_;  // likewise
  std::string format_ = "Krait";
  std::string path_, tokenizer_, content_hash_, tokenizer_files_;
  std::optional<int64_t> end_token_, text_bytes_;
  DType dtype_ = DType::kU8;
  int64_t tokens_ = 0, vocab_size_ = 0;
  DocumentTable documents_;
  mutable std::vector<uint64_t> starts_;  // of DocumentStarts
};

// Writes the files of the token file's tokenizer, if it holds any, into `folder`: kCannotSave.
absl::Status KeepTokenizer(const TokenFile& file, const std::string& folder);

struct BuildOptions {
  std::string tokenizer = "bytes";  // or a path (ReadTokenizerFiles)
  std::string out;
  std::vector<std::string> paths;  // text files, .jsonl and .json(.gz|.zst), folders (recursively)
  uint64_t seed = 1234;            // of the document shuffle
  bool force = false;              // replace an older token file
  int threads = 0;                 // that encode; 0: all that this process may use
  int64_t max_bad = 0;             // records that may be passed over; one more is an error
  Progress progress = nullptr;     // in bytes of the inputs, counted twice: read, and written out
};
struct BuildReport {
  int64_t documents = 0, tokens = 0;
  int64_t files = 0;              // that gave documents
  int64_t linked_files = 0;       // of them those that a symbolic link in a folder led to
  int64_t plain_json_files = 0;   // of them .json files in folders without records: one text each
  int64_t skipped_files = 0;      // of folders: empty, no text, no files, links to nowhere
  int64_t repeated_files = 0;     // not read again: links to files of the same folder
  int64_t repeated_folders = 0;   // likewise: links to folders gone through (also loops)
  int64_t hidden = 0;             // files and folders whose name begins with a dot: passed over
  int64_t skipped_documents = 0;  // empty texts of .jsonl and .json files
  int64_t bad_records = 0;        // passed over (BuildOptions::max_bad)
  std::vector<std::string> bad;   // the first of them: place and reason
  int64_t text_bytes = 0;         // of the texts
  int64_t resumed_documents = 0;  // taken over from a build that was killed
};

// Writes a token file: to a temporary name in the folder of `out`, fsync, then rename; an existing
// `out` stays untouched until then. What killed builds of `out` left goes first.
//
// Each file is a document, each line of a .jsonl or .ndjson one (an object with a string "text";
// blank lines are passed over), and each object of a .json file (a list of them, or one after
// another). Documents are framed as the tokenizer does it (Tokenizer::prefix, suffix), end with its
// end token, and are shuffled by `seed`; the result is a pure function of the contents, the order
// of `paths`, the tokenizer and the seed, not of the threads. Files of a folder are taken in the
// order of their paths. In folders symbolic links are followed, but nothing is read twice because
// of them; names that begin with a dot are passed over; files that hold a NUL byte or nothing are
// skipped; .json files without such objects are texts. All that is counted. A path given by name
// must be text, or a folder that has some.
//
// The texts are read and encoded once, into OUT.parts (build_parts.h), about as large as `out`;
// then the documents are copied from there in their new order. From the first mark on, after some
// 64 MB of text, the folder stays when the build ends early for whatever reason, and the same build
// goes on from it; one over other inputs or with another tokenizer begins anew.
//
// Memory: 16 bytes per document, 100 per input file, per thread 4 MB and some 4 batches of 1 MB of
// text or one record (at most 1 GiB), whichever is more.
// Errors: kData with the place (path, line, byte); what cannot be opened, of all paths at once;
// kConfig for a bad tokenizer or `out`; kCannotSave when `out` cannot be written; kStopped after a
// request to stop (kernels/base/stop_signals.h).
absl::StatusOr<BuildReport> BuildTokenFile(const BuildOptions& options);

}  // namespace krait

#endif  // KRAIT_DATA_TOKEN_FILE_H_
