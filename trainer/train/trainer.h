// One optimizer step: everything a run computes, nothing that it reads or writes. `krait train`,
// `krait probe` and `krait bench step` drive it.
#ifndef KRAIT_TRAINER_TRAIN_TRAINER_H_
#define KRAIT_TRAINER_TRAIN_TRAINER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "data/sampler.h"
#include "kernels/context.h"
#include "model/bucket_exchange.h"
#include "model/hybrid_model.h"
#include "model/params.h"
#include "model/weights.h"
#include "parallel/groups.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"
#include "trainer/report/step_report.h"
#include "trainer/train/evaluate.h"
#include "trainer/train/memory_plan.h"
#include "trainer/train/optimizer_state.h"
#include "trainer/train/pass_batch.h"

namespace krait {

// The numbers of a step that stay on the device until its end: one f64 vector, read once.
struct StepScalars {
  StepScalars(const HybridModel& model, Arena* arena);
  Tensor all;
  // Parts of it: the sums of the passes (HybridModel), the rounds of expert exchanges beyond the
  // first, the squared norm, AdamW's control.
  Tensor sums, overflow, sum_of_squares, control;
  Tensor shared;      // what ranks add up: all but the control
  Tensor loss_scale;  // [1]
};

// Not thread-safe: one thread drives it. On several ranks all of them call the same functions in
// the same order, each with its own rows; reports are then those of all ranks.
class Trainer {
 public:
  // Reserves PlanTraining's memory. Weights hold no values until Init() or a load; moments are 0.
  // `world` outlives the trainer; null: a single rank.
  explicit Trainer(const RunConfig& config, World* world = nullptr);

  // Fresh weights by the model's init scheme and the run's seed.
  void Init() { KRAIT_CHECK(Init(nullptr).ok()); }
  // `progress` counts elements; after its error the weights hold garbage.
  absl::Status Init(const Progress& progress) {
    return optimizer_.Init(config_.model, config_.train.seed, ctx_, progress);
  }
  // After the boxes were loaded.
  void Loaded() { optimizer_.MastersToWeights(ctx_); }

  // One optimizer step over all rows of `batch`, in passes of train.micro_batch rows. Advances
  // step, sequences and tokens. When loss or gradient is not finite, weights, moments and the Adam
  // count stay as they are and the skip counts grow. The report's time and memory fields are the
  // caller's to fill.
  StepReport Step(const TokenBatch& batch) { return Step(batch, TargetsOf(batch)); }
  // With the targets of all ranks' rows, where they are known.
  StepReport Step(const TokenBatch& batch, int64_t targets);

  // Forward and backward of the whole batch: leaves the gradient of the mean loss in the weights'
  // gradients, as far as this rank owns them, and the losses in the report. Changes no weight.
  StepReport Gradients(const TokenBatch& batch, const ProbeSink* probe = nullptr);

  // Everything a checkpoint holds, as boxes into live memory.
  std::vector<CheckpointBox> Boxes() const { return StateBoxes(weights_, &optimizer_); }

  // Whether every weight (the master, where there is one) is finite; a pass over all of them. Uses
  // the memory of the gradient norm.
  bool WeightsFinite();

  // The step at which the run ends. One given in tokens ends when it has seen them, whatever its
  // batch was on the way.
  int64_t last_step() const;
  // That of the step to come.
  double learning_rate() const;

  // Evaluates the weights as they are, in passes of train.micro_batch rows.
  Evaluator evaluator() { return {&model_, pass_batch_, scalars_.sums, ctx_, groups()}; }

  const RunConfig& config() const { return config_; }
  CheckpointMeta& state() { return state_; }
  const Weights& weights() const { return weights_; }
  const Mesh& mesh() const { return mesh_; }
  // Null on a single rank.
  const Groups* groups() const { return groups_.has_value() ? &*groups_ : nullptr; }
  // Steps whose ranks exchange nothing, to be timed (Groups::SetAlone); weights become garbage.
  void SetAlone(bool alone) {
    if (groups_.has_value()) groups_->SetAlone(alone);
  }
  HybridModel& model() { return model_; }
  OptimizerState& optimizer() { return optimizer_; }
  const OptimizerState& optimizer() const { return optimizer_; }
  const MemoryPlan& memory() const { return memory_; }
  // Of the device's bf16 products; 0 where none is stated (the CPU, an unknown GPU, f32).
  double peak_flops() const { return peak_flops_; }
  Context& ctx() { return ctx_; }
  const Context& ctx() const { return ctx_; }

 private:
  // The targets of all ranks' rows: asks the ranks.
  int64_t TargetsOf(const TokenBatch& batch) const;
  // Forward and backward of the whole batch, enqueued: gradients, and on the way their sums over
  // the ranks, and the sums of its passes.
  void RunPasses(const TokenBatch& batch, int64_t targets, const ProbeSink* probe);
  // Adds up over the ranks what their passes summed.
  void ShareScalars();
  // The losses of the batch, from downloaded sums.
  StepReport ReportOf(const TokenBatch& batch, int64_t targets,
                      const std::vector<double>& scalars) const;

  RunConfig config_;
  Placement placement_;
  Mesh mesh_;
  std::optional<Groups> groups_;
  MemoryPlan memory_;
  ParamTable table_;
  Arena weight_arena_, grad_arena_, optimizer_arena_, activation_arena_, scratch_arena_;
  Arena scalar_arena_, batch_arena_, communication_arena_;
  Context ctx_;
  Weights weights_;
  std::optional<PeerMemory> peers_;  // on GPUs
  std::optional<BucketExchange> exchange_;
  OptimizerState optimizer_;
  HybridModel model_;
  std::unique_ptr<ActivationSet> activations_;
  StepScalars scalars_;
  PassBatch pass_batch_;
  CheckpointMeta state_;
  double peak_flops_ = 0;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_TRAINER_H_
