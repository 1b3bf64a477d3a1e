// A mixture-of-experts feed-forward: y = sum over the chosen experts of weight * MLP_e(x), dropless
// (Jamba, 2403.19887, section 3). Router, top-k, permutation and combination are the ops of
// kernels/moe.h.
//
// A rank routes its own tokens. Where an expert group shares the experts, rows travel to the ranks
// that hold them and back (model/expert_routes.h): x out and outputs back in the forward, dy and
// the routing weights out and dx and their gradients back in the backward. Received rows have
// memory for Groups::expert_slack() times the balanced number; more are computed in further rounds,
// whose activations the backward computes again.
#ifndef KRAIT_MODEL_MOE_SUBLAYER_H_
#define KRAIT_MODEL_MOE_SUBLAYER_H_

#include <cstdint>
#include <memory>

#include "model/sublayer.h"

namespace krait {

class MoeSublayer : public SublayerModule {
 public:
  // `moe_index`: row of the router statistics.
  MoeSublayer(const ModelSpec& spec, const LocalSizes& sizes, const ParamTable& table, int layer,
              int moe_index);

  std::unique_ptr<Saved> NewSaved() const override;
  void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
               MixerState* state, const PassContext& pass) const override;
  void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                MixerState* state, const PassContext& pass) const override;

 private:
  struct MoeSaved;

  bool shared() const { return own_experts_ < experts_; }
  // Rows of memory for what a rank's experts receive in a round, of `rows` that each rank sends.
  int64_t Capacity(int64_t rows, const PassContext& pass) const;
  void AddStatistics(const MoeSaved& s, const PassContext& pass) const;
  // The experts' outputs [R,D] for the sorted rows of x; y undefined: only what backward needs.
  void OwnExpertsForward(Tensor y, Tensor x, const Weights& weights, const MoeSaved& s,
                         const PassContext& pass) const;
  void SharedExpertsForward(Tensor y, Tensor x, const Weights& weights, MoeSaved* s,
                            const PassContext& pass) const;
  // The gradient of the sorted rows, d_rows [R,D], and of the routing weights [M,k]; adds the
  // experts' weight gradients.
  void OwnExpertsBackward(Tensor d_rows, Tensor d_weight, Tensor dy, Tensor x,
                          const Weights& weights, const MoeSaved& s, const PassContext& pass) const;
  void SharedExpertsBackward(Tensor d_rows, Tensor d_weight, Tensor dy, Tensor x,
                             const Weights& weights, const MoeSaved& s,
                             const PassContext& pass) const;
  void RouterBackward(Tensor dx, Tensor d_weight, Tensor x, const Weights& weights,
                      const MoeSaved& s, const PassContext& pass) const;

  int64_t experts_, own_experts_, top_k_;
  bool renormalize_;
  int moe_index_;
  int router_, gate_up_, down_;  // storages
};

}  // namespace krait

#endif  // KRAIT_MODEL_MOE_SUBLAYER_H_
