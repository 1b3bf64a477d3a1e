// Which sequence a training position reads, and the batches made of them.
//
// Everything is a pure function of (seed, position): any position is reachable in O(1), nothing but
// the number of sequences consumed is saved, and the order does not depend on the number of ranks.
// Global sequence q of the run: the weights choose the source of each q (mix.h); the n-th use of a
// source reads its sequence perm(n mod count), with one keyed permutation per source and epoch
// n / count, so that a source gives each of its sequences once per epoch.
#ifndef KRAIT_DATA_SAMPLER_H_
#define KRAIT_DATA_SAMPLER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/mix.h"
#include "data/token_file.h"
#include "kernels/base/status.h"

namespace krait {

struct SourceSpec {
  std::string path;
  double weight = 1.0;
};

struct SequenceRef {
  int source;
  int64_t epoch;
  int64_t sequence;  // k of that source
};

// Host arrays of `sequences` rows.
//
// doc_start[t] is the position in the row of the first token of t's document, 0 when that lies
// before the row. targets[t] is tokens[t + 1], and -1 at the last position and where token t + 1
// starts a document. Without reset_at_documents a row counts as one document: doc_start is 0 and
// only the last position has no target.
struct TokenBatch {
  int64_t sequences = 0, seq_len = 0;
  std::vector<int32_t> tokens;     // [sequences, seq_len]
  std::vector<int32_t> targets;    // [sequences, seq_len], -1 = none
  std::vector<int32_t> doc_start;  // [sequences, seq_len]
  int64_t target_count = 0;        // targets that are not -1
};

// kData unless the file's tokens are of `tokenizer`, which is that of `other`.
absl::Status CheckSameTokenizer(const TokenFile& file, const std::string& other,
                                const std::string& tokenizer);

// Not thread-safe. Errors of reading are kData and name file and offset; a batch then holds
// anything.
class Dataset {
 public:
  // Opens every source; collects all errors (kData): missing or broken files, fewer than one
  // sequence, vocab_size of a file above the model's, tokenizers that differ, weights not > 0.
  static absl::StatusOr<std::unique_ptr<Dataset>> Open(const std::vector<SourceSpec>& sources,
                                                       int64_t seq_len, int64_t model_vocab,
                                                       uint64_t seed, bool reset_at_documents);

  // Sequence of training position q >= 0.
  SequenceRef At(int64_t q) const;
  // Rows for positions [first, first + count), in order.
  absl::Status ReadTraining(int64_t first, int64_t count, TokenBatch* batch) const;
  // Rows for positions [first + k * stride, first + k * stride + rows) for k = 0 ... passes - 1: a
  // rank's own rows of each pass of a step, and nothing of what the others read.
  absl::Status ReadTraining(int64_t first, int64_t passes, int64_t stride, int64_t rows,
                            TokenBatch* batch) const;
  // Rows for stored order: sequences [first, first+count) of the concatenation of all sources
  // (evaluation), first + count <= sequences(), their number.
  absl::Status ReadStored(int64_t first, int64_t count, TokenBatch* batch) const;
  int64_t sequences() const;
  int64_t SequencesOf(int source) const;

  int64_t seq_len() const { return seq_len_; }
  const std::vector<std::unique_ptr<TokenFile>>& files() const { return files_; }
  // Paths, weights and content hashes, a line per source: a resume compares it.
  std::string Fingerprint() const;

 private:
  Dataset() = default;
  // Shapes `batch` for `count` rows.
  void Prepare(int64_t count, TokenBatch* batch) const;
  absl::Status ReadRow(int source, int64_t sequence, int64_t row, TokenBatch* batch) const;

  std::vector<std::unique_ptr<TokenFile>> files_;
  std::vector<double> weights_;
  Mix mix_;
  int64_t seq_len_ = 0;
  uint64_t seed_ = 0;
  bool reset_at_documents_ = true;
};

}  // namespace krait

#endif  // KRAIT_DATA_SAMPLER_H_
