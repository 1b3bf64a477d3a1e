// One optimizer step: everything a run computes, nothing that it reads or writes. `krait train`,
// `krait probe` and `krait bench step` drive it.
#ifndef KRAIT_TRAINER_TRAIN_TRAINER_H_
#define KRAIT_TRAINER_TRAIN_TRAINER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "data/sampler.h"
#include "kernels/context.h"
#include "model/hybrid_model.h"
#include "model/params.h"
#include "model/weights.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"
#include "trainer/report/step_report.h"
#include "trainer/train/memory_plan.h"
#include "trainer/train/optimizer_state.h"

namespace krait {

// Not thread-safe: one thread drives it.
class Trainer {
 public:
  // Reserves PlanTraining's memory. Weights hold no values until Init() or a load; moments are 0.
  explicit Trainer(const RunConfig& config);

  // Fresh weights by the model's init scheme and the run's seed.
  void Init() { weights_.Init(config_.model, config_.train.seed); }

  // One optimizer step over all rows of `batch`, in passes of train.micro_batch rows. Advances
  // step, sequences and tokens. When loss or gradient is not finite, weights, moments and the Adam
  // count stay as they are and the skip counts grow. The report's time and memory fields are the
  // caller's to fill.
  StepReport Step(const TokenBatch& batch);

  // Forward and backward of the whole batch: leaves the gradient of the mean loss in the weights'
  // gradients and the losses in the report. Changes no weight.
  StepReport Gradients(const TokenBatch& batch, const ProbeSink* probe = nullptr);

  // Everything a checkpoint holds, as boxes into live memory.
  std::vector<CheckpointBox> Boxes() const { return StateBoxes(weights_, &optimizer_); }

  const RunConfig& config() const { return config_; }
  CheckpointMeta& state() { return state_; }
  const Weights& weights() const { return weights_; }
  HybridModel& model() { return model_; }
  OptimizerState& optimizer() { return optimizer_; }
  const MemoryPlan& memory() const { return memory_; }
  Context& ctx() { return ctx_; }

 private:
  RunConfig config_;
  MemoryPlan memory_;
  ParamTable table_;
  Arena weight_arena_, grad_arena_, optimizer_arena_, activation_arena_, scratch_arena_;
  Weights weights_;
  OptimizerState optimizer_;
  HybridModel model_;
  std::unique_ptr<ActivationSet> activations_;
  Context ctx_;
  CheckpointMeta state_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_TRAINER_H_
