// AdamW over the whole parameter table: moments, gradient norm, update.
//
// One moment pair per storage, laid out like the weights. One thread drives it.
#ifndef KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_
#define KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_

#include <cstdint>
#include <vector>

#include "kernels/context.h"
#include "model/weights.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"

namespace krait {

class OptimizerState {
 public:
  // Moments from `arena`, whose memory comes zeroed; it may be a measuring one. `weights` outlives
  // the state.
  OptimizerState(const Weights* weights, const OptimizerConfig& config, Arena* arena);

  // Norm of all gradients as one vector: sums of squares in double, storages in table order.
  double GradNorm(const Context& ctx) const;

  // One AdamW update from the weights' gradients. `step` counts applied updates, 1 for the first.
  // `grad_scale` is the clip factor.
  void Update(double lr, double grad_scale, int64_t step, const Context& ctx);

  // The moments of a published parameter, flattened.
  Tensor ExpAvg(int param) const { return Piece(exp_avg_, param); }
  Tensor ExpAvgSq(int param) const { return Piece(exp_avg_sq_, param); }

 private:
  Tensor Piece(const std::vector<Tensor>& moments, int param) const;

  const Weights* weights_;
  OptimizerConfig config_;
  std::vector<Tensor> exp_avg_, exp_avg_sq_;  // per storage; undefined where not trainable
};

// min(1, clip / (norm + 1e-6)), 1 for clip 0.
double ClipFactor(double clip, double norm);

// Every published tensor as boxes of a checkpoint: slot weight, and with `optimizer` exp_avg and
// exp_avg_sq of the trainable ones. The boxes point into the weights and moments.
std::vector<CheckpointBox> StateBoxes(const Weights& weights, const OptimizerState* optimizer);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_
