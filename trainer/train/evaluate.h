// The loss over held-out text.
#ifndef KRAIT_TRAINER_TRAIN_EVALUATE_H_
#define KRAIT_TRAINER_TRAIN_EVALUATE_H_

#include <cstdint>
#include <optional>

#include "data/sampler.h"
#include "model/hybrid_model.h"
#include "trainer/train/pass_batch.h"

namespace krait {

struct EvalResult {
  double loss = 0;  // cross-entropy per target, in nats
  int64_t targets = 0;
  int64_t sequences = 0;
};

// What evaluation runs with: a model, its context, and device memory for a pass and its sums.
struct Evaluator {
  HybridModel* model;
  PassBatch batch;
  Tensor sums;  // [HybridModel::SumsSize()] f64, overwritten
  Context ctx;
};

// The first `sequences` sequences of `data` in stored order (all when there are fewer),
// `micro_batch` of them per pass. Losses are summed in double in that order. kData when they have
// no target.
absl::StatusOr<EvalResult> EvaluateStored(const Evaluator& evaluator, const Dataset& data,
                                          int64_t sequences, int64_t micro_batch);

// Bits per byte of a loss in nats per token: known for the byte tokenizer, whose tokens are bytes.
std::optional<double> BitsPerByte(double loss, const std::string& tokenizer);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_EVALUATE_H_
