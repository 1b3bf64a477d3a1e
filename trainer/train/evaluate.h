// The loss over held-out text.
#ifndef KRAIT_TRAINER_TRAIN_EVALUATE_H_
#define KRAIT_TRAINER_TRAIN_EVALUATE_H_

#include <cstdint>
#include <optional>

#include "data/sampler.h"
#include "model/hybrid_model.h"

namespace krait {

struct EvalResult {
  double loss = 0;  // cross-entropy per target, in nats
  int64_t targets = 0;
  int64_t sequences = 0;
};

// Views of `count` rows of a host batch from row `first`, as a pass of the model.
Batch PassOf(const TokenBatch& batch, int64_t first, int64_t count);

// The first `sequences` sequences of `data` in stored order (all when there are fewer),
// `micro_batch` of them per pass. Losses are summed in double in that order. kData when they have
// no target.
absl::StatusOr<EvalResult> EvaluateStored(HybridModel* model, const Dataset& data,
                                          int64_t sequences, int64_t micro_batch,
                                          const Context& ctx);

// Bits per byte of a loss in nats per token: known for the byte tokenizer, whose tokens are bytes.
std::optional<double> BitsPerByte(double loss, const std::string& tokenizer);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_EVALUATE_H_
