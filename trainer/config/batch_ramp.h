// How many tokens an optimizer step takes: train.batch_tokens, one number or, over a run, a ramp.
#ifndef KRAIT_TRAINER_CONFIG_BATCH_RAMP_H_
#define KRAIT_TRAINER_CONFIG_BATCH_RAMP_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// A step that begins with `from` or more tokens seen takes `tokens`.
struct BatchStage {
  int64_t tokens = 0, from = 0;
  bool operator==(const BatchStage&) const = default;
};

// The batch of a run: stages with rising `from`, that of the first 0. A step that begins before a
// stage is of the size before it, whole, whatever it passes on the way. Never empty.
class BatchRamp {
 public:
  BatchRamp(int64_t tokens) : stages_({{tokens, 0}}) {}  // NOLINT: one size throughout is a ramp
  // "512Ki:0 2Mi:1B 4Mi:10B", SIZE:FROM of each stage. The error says what is wrong.
  static absl::StatusOr<BatchRamp> Parse(std::string_view text);

  const std::vector<BatchStage>& stages() const { return stages_; }
  bool constant() const { return stages_.size() == 1; }
  int64_t largest() const;
  // Of the step that begins with `seen` tokens seen.
  int64_t At(int64_t seen) const;
  // Where the batch of that step ends: the `from` of the next stage, or the largest int64_t.
  int64_t EndOf(int64_t seen) const;
  // Steps from `seen` tokens to at least `until`.
  int64_t Steps(int64_t seen, int64_t until) const;
  // Tokens seen after `steps` more steps.
  int64_t After(int64_t seen, int64_t steps) const;
  // Steps in which the ramp comes to `seen` tokens, with fractions: of tokens / batch.
  double Progress(int64_t seen) const;
  // "524288", or the form that Parse reads.
  std::string Text() const;

  bool operator==(const BatchRamp&) const = default;

 private:
  explicit BatchRamp(std::vector<BatchStage> stages) : stages_(std::move(stages)) {}
  size_t StageAt(int64_t seen) const;
  int64_t End(size_t stage) const;

  std::vector<BatchStage> stages_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_BATCH_RAMP_H_
