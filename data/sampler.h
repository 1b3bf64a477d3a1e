// Which sequence a training position reads, and the batches made of them.
//
// Everything is a pure function of where the run started or last changed its data (position.h) and
// of the position: any position is reachable in O(1), and the order does not depend on the number
// of ranks. Global sequence q of the run: the weights choose the source of each q (mix.h); the n-th
// use of a source reads its sequence perm(n mod count), with one keyed permutation per source and
// epoch n / count, so that a source gives each of its sequences once per epoch.
#ifndef KRAIT_DATA_SAMPLER_H_
#define KRAIT_DATA_SAMPLER_H_

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/mix.h"
#include "data/position.h"
#include "data/synthetic.h"
#include "data/token_file.h"
#include "kernels/base/status.h"

namespace krait {

struct SourceSpec {
  std::string path;
  double weight = 1.0;
  std::string named_at =
      {};  // for messages: where the user named it, such as "x.yaml:3:4: data.train[0]"
  std::optional<SyntheticSpec> synthetic = {};  // instead of a file; `path` is then its name
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

  // Shapes it for `rows` rows, of which it then holds anything.
  void Resize(int64_t rows, int64_t row_tokens);
  // Adds rows without targets until there are `rows`.
  void FillUp(int64_t rows);
};

// Targets that are kept: those of which the model has seen `context` tokens of the same document
// and sequence before them, within [context_begin, context_end), and which lie at [token_begin,
// token_end) of their file.
struct TargetRange {
  int64_t context_begin = 0, context_end = std::numeric_limits<int64_t>::max();
  int64_t token_begin = 0, token_end = std::numeric_limits<int64_t>::max();
};

// kData unless the file's tokens are of `tokenizer`, which is that of `other`, or one of the two is
// not known ("").
absl::Status CheckSameTokenizer(const TokenFile& file, const std::string& other,
                                const std::string& tokenizer);

// Of the functions that read rows one thread at a time calls one; the others but Seek and Only may
// be called meanwhile. Errors of reading are kData and name file and offset; a batch then holds
// anything.
class Dataset {
 public:
  // Opens every source, each at its beginning; collects all errors (kData): missing or broken
  // files, fewer than one sequence, no target (every token of a file starts a document), vocab_size
  // of a file above the model's, tokenizers that differ, weights not > 0.
  static absl::StatusOr<std::unique_ptr<Dataset>> Open(const std::vector<SourceSpec>& sources,
                                                       int64_t seq_len, int64_t model_vocab,
                                                       uint64_t seed, bool reset_at_documents);

  // How these sources go on from a position of an earlier start; Seek does so. Training positions
  // before it can no longer be asked for.
  absl::StatusOr<Continuation> ContinueFrom(const DataPosition& saved) const;
  void Seek(Continuation continuation);

  // Sequence of training position q >= 0.
  SequenceRef At(int64_t q) const;
  // Where each source stands at training position q.
  DataPosition PositionAt(int64_t q) const;
  // The same for the user, a line for each source of the mix: its path, its epoch as in "1.37".
  std::vector<std::string> StandingAt(int64_t q) const;
  // Rows for positions [first, first + count), in order.
  absl::Status ReadTraining(int64_t first, int64_t count, TokenBatch* batch) const;
  // Rows for positions [first + k * stride, first + k * stride + rows) for k = 0 ... passes - 1: a
  // rank's own rows of each pass of a step, and nothing of what the others read. Ends early, with
  // anything in the batch, when `cancelled` becomes true.
  absl::Status ReadTraining(int64_t first, int64_t passes, int64_t stride, int64_t rows,
                            TokenBatch* batch, const std::atomic<bool>* cancelled = nullptr) const;
  // Rows for stored order: sequences [first, first+count) of the concatenation of all sources
  // (evaluation), first + count <= sequences(), their number.
  absl::Status ReadStored(int64_t first, int64_t count, TokenBatch* batch) const;
  int64_t sequences() const;
  int64_t SequencesOf(int source) const;

  int64_t seq_len() const { return seq_len_; }
  const std::vector<std::unique_ptr<TokenFile>>& files() const { return files_; }
  // From here on only these targets; the others are -1 (evaluation).
  void Only(const TargetRange& range) { only_ = range; }

  // Of all files; "" where none says it.
  std::string tokenizer() const;
  // Paths, weights and content hashes, a line per source.
  std::string Fingerprint() const;
  // The content hashes.
  std::vector<std::string> Contents() const;
  // A line for each file that holds the tokens of one before it.
  std::vector<std::string> Repeated() const;

 private:
  Dataset() = default;
  absl::Status ReadRow(int source, int64_t sequence, int64_t row, TokenBatch* batch) const;
  absl::StatusOr<bool> HasTargets(const TokenFile& file) const;

  std::vector<std::unique_ptr<TokenFile>> files_;
  std::vector<double> weights_;
  // Where the run started or its data last changed. `mix` and `uses` count sources as the position
  // does.
  Continuation start_;
  std::vector<int64_t> uses_;  // of the mix, before the start
  int64_t seq_len_ = 0;
  uint64_t seed_ = 0;
  bool reset_at_documents_ = true;
  TargetRange only_;
};

}  // namespace krait

#endif  // KRAIT_DATA_SAMPLER_H_
