// AdamW over the whole parameter table: f32 masters, moments, gradient norm, update.
//
// One moment pair per storage, laid out like the weights, and a master where the weights are
// rounded (bf16). One thread drives it; on CUDA all is enqueued.
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
  // Memory from `arena`, which comes zeroed; it may be a measuring one. `weights` outlives the
  // state.
  OptimizerState(const Weights* weights, const OptimizerConfig& config, Arena* arena);

  // Fresh masters by the model's scheme, and the weights rounded from them.
  void Init(const ModelSpec& spec, uint64_t seed, const Context& ctx);
  // The weights rounded from their masters, after these were loaded.
  void MastersToWeights(const Context& ctx);

  // One AdamW update from the weights' gradients. `sum_of_squares` [1] f64 receives that of all
  // gradients as one vector; `control` [kAdamWControlSize] f64 holds the updates applied so far and
  // receives what the step's updates share. An entry of `losses` f64, or a gradient, that is not
  // finite skips the update.
  void Update(double lr, Tensor losses, Tensor sum_of_squares, Tensor control, const Context& ctx);

  // Pieces of a published parameter, flattened. Master: the weight itself where there is no other.
  Tensor Master(int param) const;
  Tensor ExpAvg(int param) const { return Piece(exp_avg_, param); }
  Tensor ExpAvgSq(int param) const { return Piece(exp_avg_sq_, param); }

 private:
  Tensor Piece(const std::vector<Tensor>& of_storages, int param) const;
  Tensor MasterOf(size_t storage) const;

  const Weights* weights_;
  OptimizerConfig config_;
  // Per storage; undefined where not trainable, masters also where the weight is one.
  std::vector<Tensor> master_, exp_avg_, exp_avg_sq_;
  std::vector<Tensor> decay_ranges_;  // per storage, [1,2] or undefined
};

// Every published tensor as boxes of a checkpoint: slot weight (with `optimizer` the master), and
// with `optimizer` exp_avg and exp_avg_sq of the trainable ones. The boxes point into live memory.
std::vector<CheckpointBox> StateBoxes(const Weights& weights, const OptimizerState* optimizer);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_OPTIMIZER_STATE_H_
