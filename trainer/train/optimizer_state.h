// AdamW over the buckets of a layout: f32 masters, moments, gradient norm, update.
//
// A rank holds state for the elements that it owns (model/layout.h), on one rank all: one moment
// pair each, and a master where the weights are rounded (bf16). One thread drives it; on CUDA all
// is enqueued.
#ifndef KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_
#define KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_

#include <cstdint>
#include <vector>

#include "kernels/context.h"
#include "kernels/optimizer.h"
#include "model/bucket_exchange.h"
#include "model/weights.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"

namespace krait {

class OptimizerState {
 public:
  // What this rank owns of one bucket, [n] each over Layout::Own.
  struct Owned {
    Tensor weight, grad;         // in their flats
    Tensor master;               // Wide: the weight itself where that is Wide
    Tensor exp_avg, exp_avg_sq;  // undefined, as `grad`, where not trainable
    Tensor decay;  // [R,2] i64: the ranges of these elements with weight decay; R 0: undefined
    StepScales step_scales;  // of muP (model/params.h)
  };

  // Memory from `arena`, which comes zeroed; it may be a measuring one. `weights` and `exchange`
  // outlive the state; exchange null: a single rank. `ctx` uploads the ranges.
  OptimizerState(const Weights* weights, const OptimizerConfig& config, Arena* arena,
                 const Context& ctx, BucketExchange* exchange = nullptr);

  // Fresh masters by the model's scheme, and the weights rounded from them: also those that other
  // ranks own.
  absl::Status Init(const ModelSpec& spec, uint64_t seed, const Context& ctx,
                    const Progress& progress = nullptr);
  // After what this rank owns was loaded: the weights rounded from their masters, and on several
  // ranks those of the other owners.
  void MastersToWeights(const Context& ctx);

  // Behind the last pass: `sum` [1] f64 = the sum of squares of the gradients that this rank owns:
  // bucket by bucket, in the layout's order.
  void SumOfSquares(Tensor sum, const Context& ctx) const;
  // One AdamW update of what this rank owns, bucket by bucket in the order of the forward pass.
  // `sum_of_squares` [1] f64 is that of all gradients as one vector, so of all owners; `control`
  // [kAdamWControlSize] f64 holds the updates applied so far and receives what the step's updates
  // share. Each bucket's weights then go to the ranks that hold them. An entry of `losses` f64, or
  // a gradient, that is not finite skips the update, and so does a norm above max_norm or a first
  // loss above max_loss.
  void Update(double lr, Tensor losses, Tensor sum_of_squares, Tensor control, const Context& ctx,
              double max_norm = HUGE_VAL, double max_loss = HUGE_VAL);

  const std::vector<Owned>& buckets() const { return buckets_; }  // as Layout::buckets()
  // The master of a published parameter, flattened. Fatal where this rank does not own all of it;
  // on one rank it does.
  Tensor Master(int param) const;

 private:
  void RoundMasters(const Context& ctx);
  void GatherWeights(int bucket, const Context& ctx) const;

  const Weights* weights_;
  BucketExchange* exchange_;
  OptimizerConfig config_;
  std::vector<Owned> buckets_;
  std::vector<Tensor> masters_;  // per flat: of its buckets, one after the other
};

// Every published tensor as boxes of a checkpoint, as far as this rank owns it: slot weight, the
// master, and exp_avg and exp_avg_sq of the trainable ones. `optimizer` null: slot weight alone,
// the weights, as far as this rank holds them. The boxes point into live memory.
std::vector<CheckpointBox> StateBoxes(const Weights& weights, const OptimizerState* optimizer);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_
