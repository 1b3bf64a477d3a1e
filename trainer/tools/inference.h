// A checkpoint's model for evaluation and generation: weights only. Several ranks evaluate
// together.
#ifndef KRAIT_TRAINER_TOOLS_INFERENCE_H_
#define KRAIT_TRAINER_TOOLS_INFERENCE_H_

#include <memory>
#include <optional>
#include <string>

#include "model/hybrid_model.h"
#include "parallel/groups.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"
#include "trainer/train/evaluate.h"

namespace krait {

class InferenceModel {
 public:
  // `path` is a checkpoint, or a folder of checkpoints or a run, of which the newest whole one is
  // taken; a notice names each that is passed over. The model computes where and in the dtype that
  // the run did, its weights rounded from the stored masters; or as `placement` says.
  // kNoCheckpoint when there is no whole one.
  // On several ranks, which all call it, the model is laid out as the run's parallel.tensor and
  // parallel.expert say, with as many data ranks as there are; kConfig, with the numbers, where
  // these do not divide. Notices are the first rank's; errors are all ranks'. `world` outlives the
  // model.
  static absl::StatusOr<std::unique_ptr<InferenceModel>> Load(
      const std::string& path, const Notice& notice,
      std::optional<Placement> placement = std::nullopt, World* world = nullptr);

  const RunConfig& config() const { return config_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const Weights& weights() const { return *weights_; }
  HybridModel& model() { return *model_; }
  const Mesh& mesh() const { return weights_->layout().mesh(); }

  // What passes of up to `shape` by EvaluateStored need, or a context for Decode (one pass after
  // another, of one sequence state for `max_tokens`). Valid until the next call.
  Evaluator ForEvaluate(PassShape shape);
  // The largest of batch, batch / 2, ... whose passes fit the memory that is free, on every rank; 1
  // at least.
  int64_t EvaluationBatch(int64_t batch, int64_t seq_len) const;
  Context ForDecode(PassShape shape, int64_t max_tokens, std::unique_ptr<SequenceState>* state);
  // How many tokens, at most `tokens`, may follow a prompt for the state of both to fit the memory
  // that is free; below 0 when the prompt's own does not.
  int64_t DecodeTokens(int64_t prompt, int64_t tokens) const;
  static constexpr int64_t kPromptChunk = 512;  // tokens per pass over the prompt

 private:
  InferenceModel() = default;
  // Bytes that a pass of EvaluateStored takes.
  struct EvaluationMemory {
    int64_t scratch, batches;
  };
  EvaluationMemory ToEvaluate(PassShape shape) const;
  struct DecodingMemory {
    int64_t scratch, state;
  };
  DecodingMemory ToDecode(PassShape shape, int64_t max_tokens) const;

  World* world_ = nullptr;
  RunConfig config_;
  Checkpoint checkpoint_;
  std::unique_ptr<Groups> groups_;  // null on a single rank
  std::unique_ptr<ParamTable> table_;
  std::unique_ptr<Arena> weight_arena_, scratch_, state_arena_, batch_arena_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<HybridModel> model_;
};

// Weights without gradients in an arena of exactly their size.
std::unique_ptr<Weights> NewWeights(const ParamTable* table, Placement placement,
                                    std::unique_ptr<Arena>* arena, const Mesh& mesh = {});

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_INFERENCE_H_
