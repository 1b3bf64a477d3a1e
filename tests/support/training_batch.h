// The batches and the state of a Trainer under test.
#ifndef KRAIT_TESTS_SUPPORT_TRAINING_BATCH_H_
#define KRAIT_TESTS_SUPPORT_TRAINING_BATCH_H_

#include <string>

#include "data/sampler.h"
#include "kernels/base/check.h"
#include "trainer/train/trainer.h"

namespace krait {

// The batch of the step whose first sequence is `first`.
inline TokenBatch BatchAt(const RunConfig& config, int64_t first) {
  auto data = Dataset::Open(config.data.train, config.data.seq_len, config.model.vocab_size,
                            config.train.seed, config.data.reset_at_documents);
  KRAIT_CHECK(data.ok());
  TokenBatch batch;
  KRAIT_CHECK(
      (*data)->ReadTraining(first, config.accumulation(1) * config.train.micro_batch, &batch).ok());
  return batch;
}

// The bytes of masters and moments, on the CPU.
inline std::string Bits(const Trainer& trainer) {
  std::string bits;
  for (const CheckpointBox& box : trainer.Boxes()) {
    bits.append(static_cast<const char*>(box.data), static_cast<size_t>(box.bytes()));
  }
  return bits;
}

}  // namespace krait

#endif  // KRAIT_TESTS_SUPPORT_TRAINING_BATCH_H_
