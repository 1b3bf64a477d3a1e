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

#include "kernels/inner_norms.h"
#include "kernels/selective_scan.h"
#include "model/layout.h"
#include "model/sublayer.h"

namespace krait {

class MambaSublayer : public SublayerModule {
 public:
  MambaSublayer(const ModelSpec& spec, const LocalSizes& sizes, const ParamTable& table, int layer);

  std::unique_ptr<Saved> NewSaved() const override;
  void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
               MixerState* state, const PassContext& pass) const override;
  void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                MixerState* state, const PassContext& pass) const override;
  std::unique_ptr<MixerState> NewState(int64_t batch, int64_t max_tokens, DType compute,
                                       bool with_grad, Arena* arena,
                                       const Context& ctx) const override;
  void KeepState(const MixerState& state, Saved* saved, Arena* keep,
                 const Context& ctx) const override;

 private:
  struct MambaSaved;
  struct MambaState;
  // Whether dt | B | C have norms, or where the two dtypes differ a rounding.
  bool Norms(DType compute) const { return inner_norms_ || compute != Wide(compute); }
  // dt | B | C [M,R+2N] as dt_proj and the scan take them: through their norms and rounded. The
  // same tensor where neither is to be done and one rank runs the pass.
  Tensor NormMemory(const MambaSaved& saved, DType compute, Arena* arena,
                    const PassShape& shape) const;
  // A rank norms its own rows.
  void NormForward(Tensor normed, const MambaSaved& saved, const Weights& weights,
                   const PassContext& pass) const;
  // From d_normed, Wide, the gradient of x_proj's output.
  Tensor NormBackward(Tensor d_normed, const MambaSaved& saved, DType compute,
                      const Weights& weights, const PassContext& pass) const;
  InnerNormWeights NormWeights(const Weights& weights) const;
  SelectiveScanInputs ScanInputs(const MambaSaved& saved, Tensor normed, const Weights& weights,
                                 const PassContext& pass) const;
  // Gives back what ScanInputs took.
  void ReleaseScan(const Weights& weights) const;

  int64_t d_inner_, d_state_, d_conv_, dt_rank_;
  bool inner_norms_;
  double norm_eps_;
  // Storages; -1 where the spec has none.
  int in_proj_, in_proj_bias_, conv_, conv_bias_, x_proj_;
  int dt_norm_, b_norm_, c_norm_;
  int dt_proj_, dt_bias_, a_log_, d_, out_proj_, out_proj_bias_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_MAMBA_SUBLAYER_H_
