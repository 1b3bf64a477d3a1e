// Dense feed-forward: SwiGLU MLP, y = down(silu(gate(x)) * up(x)), as Hugging Face JambaMLP.
#ifndef KRAIT_MODEL_MLP_SUBLAYER_H_
#define KRAIT_MODEL_MLP_SUBLAYER_H_

#include <memory>

#include "model/sublayer.h"

namespace krait {

class MlpSublayer : public SublayerModule {
 public:
  MlpSublayer(const ParamTable& table, int layer);

  std::unique_ptr<Saved> NewSaved() const override;
  void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
               MixerState* state, const PassContext& pass) const override;
  void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                MixerState* state, const PassContext& pass) const override;

 private:
  int gate_up_, down_;  // storages
};

}  // namespace krait

#endif  // KRAIT_MODEL_MLP_SUBLAYER_H_
