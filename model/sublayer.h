// The interface of a residual sublayer: y = f(x) between the norm before it and the residual
// addition after it (both done by HybridModel). Forward and backward live side by side in one file
// pair per kind: attention_sublayer, mamba_sublayer, mlp_sublayer, moe_sublayer.{h,cc}.
#ifndef KRAIT_MODEL_SUBLAYER_H_
#define KRAIT_MODEL_SUBLAYER_H_

#include <cstdint>
#include <memory>

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "model/spec.h"
#include "model/weights.h"

namespace krait {

// The shape of one forward pass.
struct PassShape {
  int64_t batch = 0;    // B
  int64_t seq_len = 0;  // T
  int64_t tokens() const { return batch * seq_len; }
};

// The dtype of statistics, scan states, router and LM-head logits, and losses under a compute
// dtype: f32, or f64 in gradient checks.
inline DType WideDType(DType compute) { return compute == DType::kF64 ? DType::kF64 : DType::kF32; }

// Saved activations of one sublayer and pass; each kind derives its own struct of tensors.
struct Saved {
  virtual ~Saved() = default;
};

// What generation and cut sequences carry from one call to the next, per sublayer: key/value cache,
// or conv and scan state. Feed-forward sublayers have none.
struct MixerState {
  virtual ~MixerState() = default;
};

// Router statistics of one pass. Per MoE sublayer j (in order) one row.
struct RouterStats {
  Tensor prob_sum;      // [moe_count,E] sum over tokens of p_e; WideDType
  Tensor choice_count;  // [moe_count,E] i64
  Tensor z_sum;         // [moe_count] sum over tokens of logsumexp^2; WideDType
  // Set by HybridModel between forward and backward: the gradient of the loss with respect to one
  // token's p_e, [moe_count,E] (undefined: no aux loss), and the factor of the z-loss.
  Tensor d_prob;
  double z_scale = 0;
};

struct PassContext {
  PassShape shape;
  Tensor doc_start;               // [B,T] i32, or undefined: no document resets
  RouterStats* router = nullptr;  // null only where there is no MoE sublayer, and in Decode
  bool add_router_stats = false;  // false while recomputing
  bool keep_norms = true;         // false: norm outputs are recomputed by the backward
  // When not null (probe): an MoE sublayer sets it to its logits [M,E], alive as long as `keep`.
  Tensor* router_logits = nullptr;
  const Context* ctx = nullptr;
};

class SublayerModule {
 public:
  virtual ~SublayerModule() = default;

  // Called once per ActivationSet.
  virtual std::unique_ptr<Saved> NewSaved() const = 0;

  // y [M,D] = f(x [M,D]). What backward needs is taken from `keep` and noted in `saved`; everything
  // else comes from ctx->scratch and is given back. `keep` may be the scratch arena itself (the
  // caller gives it back): so a sublayer takes all that it keeps before it opens a scratch scope.
  // `saved` null: no backward follows; `keep` is then the scratch arena. y undefined: only what
  // backward needs is computed (recompute). x itself is kept by the caller.
  virtual void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                       const PassContext& pass) const = 0;

  // dx [M,D] (overwritten) from dy [M,D]; adds weight gradients. Uses `saved` up: one backward per
  // forward.
  virtual void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                        const PassContext& pass) const = 0;

  // The state for up to `max_tokens` positions (attention: cache size); null for feed-forward
  // kinds. `dtype` is the compute dtype. Memory from `arena`; zeroed unless `planning`.
  virtual std::unique_ptr<MixerState> NewState(int64_t /*batch*/, int64_t /*max_tokens*/,
                                               DType /*dtype*/, Arena* /*arena*/,
                                               const Context& /*ctx*/) const {
    return nullptr;
  }
  // Inference over the next T tokens of every sequence: reads and advances `state`. No documents.
  virtual void Decode(Tensor y, Tensor x, const Weights& weights, MixerState* state,
                      const PassContext& pass) const = 0;
};

// One switch over the kinds. `index` is the position in spec.sublayers; `moe_index` the number of
// MoE sublayers before it.
std::unique_ptr<SublayerModule> MakeSublayer(const ModelSpec& spec, const ParamTable& table,
                                             int index, int moe_index);

}  // namespace krait

#endif  // KRAIT_MODEL_SUBLAYER_H_
