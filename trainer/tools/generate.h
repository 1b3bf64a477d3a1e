// Text generation: sampling from a model token by token.
#ifndef KRAIT_TRAINER_TOOLS_GENERATE_H_
#define KRAIT_TRAINER_TOOLS_GENERATE_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "trainer/tools/inference.h"

namespace krait {

struct SamplingOptions {
  double temperature = 1.0;  // 0: always the most likely token
  int64_t top_k = 0;         // only the k most likely; 0: all
  double top_p = 1.0;        // only the most likely that together reach this share
  uint64_t seed = 1234;
};

// kConfig unless temperature >= 0, top_k >= 0 and 0 < top_p <= 1.
absl::Status CheckSampling(const SamplingOptions& options);

// The id drawn from `logits` [vocab], all finite: softmax(logits / temperature), cut to the top_k
// most likely, then to the shortest run of most likely ids whose share of the rest reaches top_p.
// Equal logits rank by id. A pure function: `index` numbers the draw.
int32_t Sample(const float* logits, int64_t vocab, const SamplingOptions& options, uint64_t index);

struct GenerateStats {
  int64_t tokens = 0;  // generated
  double prompt_seconds = 0, decode_seconds = 0;
};

// Feeds `prompt` (at least one id) and draws up to `tokens` ids below `vocab`, which
// InferenceModel::DecodeTokens says fit, calling `on_token` with each as it is drawn. Ends at one
// of the ids `ends`, which is not handed on, and at an error of `on_token`, which it returns.
absl::StatusOr<GenerateStats> Generate(InferenceModel* model, const std::vector<int32_t>& prompt,
                                       int64_t tokens, int64_t vocab,
                                       const std::vector<int32_t>& ends,
                                       const SamplingOptions& options,
                                       const std::function<absl::Status(int32_t id)>& on_token);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_GENERATE_H_
