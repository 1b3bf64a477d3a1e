// Causal grouped-query attention without biases, as Hugging Face JambaAttention; no positions
// unless rope_theta is set.
#ifndef KRAIT_MODEL_ATTENTION_SUBLAYER_H_
#define KRAIT_MODEL_ATTENTION_SUBLAYER_H_

#include <cstdint>
#include <memory>

#include "model/sublayer.h"

namespace krait {

class AttentionSublayer : public SublayerModule {
 public:
  AttentionSublayer(const ModelSpec& spec, const ParamTable& table, int layer);

  std::unique_ptr<Saved> NewSaved() const override;
  void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
               const PassContext& pass) const override;
  void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                const PassContext& pass) const override;
  std::unique_ptr<MixerState> NewState(int64_t batch, int64_t max_tokens, DType dtype, Arena* arena,
                                       const Context& ctx) const override;
  void Decode(Tensor y, Tensor x, const Weights& weights, MixerState* state,
              const PassContext& pass) const override;

 private:
  // The parts of a glued product [M, (H+2G)*P].
  struct Heads {
    Tensor q, k, v;  // [B,T,H,P], [B,T,G,P], [B,T,G,P]
  };
  Heads Split(Tensor qkv, const PassShape& shape) const;
  // Rotates q and k in place; `inverse` is the backward.
  void Rotate(const Heads& heads, int64_t first_position, bool inverse,
              const PassContext& pass) const;

  int64_t heads_, kv_heads_, head_dim_;
  double rope_theta_;
  int qkv_, o_proj_;  // storages
};

}  // namespace krait

#endif  // KRAIT_MODEL_ATTENTION_SUBLAYER_H_
