// The Mamba-1 mixer of Jamba (Gu & Dao, 2312.00752; inner norms: Jamba, 2403.19887; as Hugging Face
// JambaMambaMixer):
//
//   x | z = in_proj(input);  u = silu(conv1d(x));  dt | B | C = x_proj(u)
//   dt, B, C = RMSNorm(dt), RMSNorm(B), RMSNorm(C)              (inner_norms)
//   y = selective_scan(u, softplus(dt_proj(dt)), A, B, C, D) * silu(z);  output = out_proj(y)
//
// The bias of dt_proj is added inside the scan, before the softplus.
#ifndef KRAIT_MODEL_MAMBA_SUBLAYER_H_
#define KRAIT_MODEL_MAMBA_SUBLAYER_H_

#include <cstdint>
#include <memory>

#include "kernels/selective_scan.h"
#include "model/sublayer.h"

namespace krait {

class MambaSublayer : public SublayerModule {
 public:
  MambaSublayer(const ModelSpec& spec, const ParamTable& table, int layer);

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
  struct MambaSaved;
  struct MambaState;
  // Forward and Decode: `state` null starts every sequence anew.
  void Run(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved, MambaState* state,
           const PassContext& pass) const;
  // dt | B | C [M,R+2N] through their norms; without inner norms, the same tensor.
  Tensor NormForward(const MambaSaved& saved, Arena* arena, const Weights& weights,
                     const Context& ctx) const;
  void NormBackward(Tensor d_projected, Tensor d_normed, const MambaSaved& saved,
                    const Weights& weights, const Context& ctx) const;
  SelectiveScanInputs ScanInputs(const MambaSaved& saved, Tensor normed, const Weights& weights,
                                 const PassContext& pass) const;

  int64_t d_inner_, d_state_, d_conv_, dt_rank_;
  bool inner_norms_, conv_bias_, proj_bias_;
  double norm_eps_;
  // Storages; -1 where the spec has none.
  int in_proj_, in_proj_bias_, conv_, conv_bias_weight_, x_proj_;
  int dt_norm_, b_norm_, c_norm_;
  int dt_proj_, dt_bias_, a_log_, d_, out_proj_, out_proj_bias_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_MAMBA_SUBLAYER_H_
