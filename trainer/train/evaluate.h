// The loss over held-out text.
#ifndef KRAIT_TRAINER_TRAIN_EVALUATE_H_
#define KRAIT_TRAINER_TRAIN_EVALUATE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/sampler.h"
#include "kernels/base/progress.h"
#include "model/hybrid_model.h"
#include "trainer/train/pass_batch.h"

namespace krait {

double AccuracyOf(double loss, int64_t correct, int64_t targets);

struct EvalResult {
  double loss = 0;  // cross-entropy per target, in nats; NaN without a target
  int64_t targets = 0;
  int64_t correct = 0;  // targets that the model finds likeliest
  int64_t sequences = 0;
  // NaN where the loss is not finite: what is likeliest is then anything.
  double accuracy() const { return AccuracyOf(loss, correct, targets); }
};

// What evaluation runs with: a model, its context, and device memory for a pass and its sums.
struct Evaluator {
  HybridModel* model;
  PassBatch batch;
  Tensor sums;  // [HybridModel::SumsSize()] f64, overwritten
  Context ctx;
  const Groups* groups = nullptr;  // null: a single rank
};

// Sequences [first, first + count) of `data` in stored order, `micro_batch` of them per pass and
// data rank. Losses are summed in double in that order. `progress` counts sequences. On several
// ranks all of them call it and get the result; a last pass is filled up with rows without targets,
// since experts are shared in every pass.
absl::StatusOr<EvalResult> EvaluateStored(const Evaluator& evaluator, const Dataset& data,
                                          int64_t first, int64_t count, int64_t micro_batch,
                                          const Progress& progress = nullptr);

// What an evaluation of a run takes of each source: its share of `tokens` by weight, in whole
// sequences from the beginning of the file, at least one and at most all. The same on every layout.
struct EvalShare {
  std::string name;   // the file's stem; made unique by a number
  int64_t first = 0;  // sequence of the dataset in stored order
  int64_t count = 0;
  std::optional<double> tokens_per_byte;  // of the file
};
std::vector<EvalShare> EvalShares(const Dataset& data, const std::vector<SourceSpec>& sources,
                                  int64_t tokens);

// Bits per byte of a loss in nats per token, of text with so many tokens per byte
// (TokenFile::tokens_per_byte).
std::optional<double> BitsPerByte(double loss, std::optional<double> tokens_per_byte);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_EVALUATE_H_
