// Causal grouped-query attention without biases, as Hugging Face JambaAttention; no positions
// unless rope_theta is set.
#ifndef KRAIT_MODEL_ATTENTION_SUBLAYER_H_
#define KRAIT_MODEL_ATTENTION_SUBLAYER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "model/layout.h"
#include "model/sublayer.h"

namespace krait {

class AttentionSublayer : public SublayerModule {
 public:
  AttentionSublayer(const ModelSpec& spec, const LocalSizes& sizes, const ParamTable& table,
                    int layer);

  std::unique_ptr<Saved> NewSaved() const override;
  void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
               MixerState* state, const PassContext& pass) const override;
  void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                MixerState* state, const PassContext& pass) const override;
  std::unique_ptr<MixerState> NewState(int64_t batch, int64_t max_tokens, DType compute,
                                       bool with_grad, Arena* arena,
                                       const Context& ctx) const override;

 private:
  // The parts of a glued product [M, (H+2G)*P].
  struct Heads {
    Tensor q, k, v;  // [B,T,H,P], [B,T,G,P], [B,T,G,P]
  };
  Heads Split(Tensor qkv, const PassShape& shape) const;
  // Rotates q and k in place; `inverse` is the backward.
  void Rotate(const Heads& heads, bool inverse, const PassContext& pass) const;
  int64_t width() const { return (heads_ + 2 * kv_heads_) * head_dim_; }

  int64_t heads_, kv_heads_, head_dim_;
  double rope_theta_;
  // The storages that yield columns of the glued product: q|k|v, or q and k|v apart.
  struct Part {
    int storage;
    int64_t begin, columns;
  };
  std::vector<Part> parts_;
  int o_proj_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_ATTENTION_SUBLAYER_H_
