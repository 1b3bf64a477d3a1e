// Which sequence a training position reads, and the batches made of them.
//
// Everything is a pure function of (seed, position): any position is reachable in O(1), nothing but
// the number of sequences consumed is saved, and the order does not depend on the number of ranks.
// Global sequence q of the run: the weights choose the source of each q by a low-discrepancy rule
// that is itself O(1); the n-th use of a source reads its sequence perm_epoch(n mod count) with a
// keyed permutation per epoch n / count.
#ifndef KRAIT_DATA_SAMPLER_H_
#define KRAIT_DATA_SAMPLER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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
struct TokenBatch {
  int64_t sequences = 0, seq_len = 0;
  std::vector<int32_t> tokens;     // [sequences, seq_len]
  std::vector<int32_t> targets;    // [sequences, seq_len], -1 = none
  std::vector<int32_t> doc_start;  // [sequences, seq_len]
  int64_t target_count = 0;
};

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
  // Rows for stored order: sequences [first, first+count) of the concatenation of all sources
  // (evaluation). `sequences()` is their number.
  absl::Status ReadStored(int64_t first, int64_t count, TokenBatch* batch) const;
  int64_t sequences() const;

  int64_t seq_len() const { return seq_len_; }
  const std::vector<std::unique_ptr<TokenFile>>& files() const { return files_; }
  // Paths, weights and content hashes: a resume compares it.
  std::string Fingerprint() const;

 private:
  Dataset() = default;
  absl::Status ReadRow(int source, int64_t sequence, int64_t row, TokenBatch* batch) const;

  std::vector<std::unique_ptr<TokenFile>> files_;
  std::vector<double> weights_;
  int64_t seq_len_ = 0;
  uint64_t seed_ = 0;
  bool reset_at_documents_ = true;
};

}  // namespace krait

#endif  // KRAIT_DATA_SAMPLER_H_
