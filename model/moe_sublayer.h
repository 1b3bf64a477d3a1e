// Mixture of experts: softmax router, dropless top-k, SwiGLU experts (Jamba, 2403.19887; Hugging
// Face JambaSparseMoeBlock):
//
//   p = softmax(router(x));  y = sum over the top-k e of w_e * down_e(silu(gate_e(x)) * up_e(x))
//
// The rows of one expert are brought together (permute), run through grouped products and added
// back under their weights (combine).
#ifndef KRAIT_MODEL_MOE_SUBLAYER_H_
#define KRAIT_MODEL_MOE_SUBLAYER_H_

#include <cstdint>
#include <memory>

#include "model/sublayer.h"

namespace krait {

class MoeSublayer : public SublayerModule {
 public:
  // `moe_index`: row of the router statistics.
  MoeSublayer(const ModelSpec& spec, const ParamTable& table, int layer, int moe_index);

  std::unique_ptr<Saved> NewSaved() const override;
  void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
               MixerState* state, const PassContext& pass) const override;
  void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                MixerState* state, const PassContext& pass) const override;

 private:
  int64_t experts_, top_k_;
  bool renormalize_;
  int moe_index_;
  int router_, gate_up_, down_;  // storages
};

}  // namespace krait

#endif  // KRAIT_MODEL_MOE_SUBLAYER_H_
