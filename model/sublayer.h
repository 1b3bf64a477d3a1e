// The interface of a residual sublayer: y = f(x) between the norm before it and the residual
// addition after it (both done by HybridModel). Forward and backward live side by side in one file
// pair per kind: attention_sublayer, mamba_sublayer, mlp_sublayer, moe_sublayer.{h,cc}.
#ifndef KRAIT_MODEL_SUBLAYER_H_
#define KRAIT_MODEL_SUBLAYER_H_

#include <cstdint>
#include <memory>

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"
#include "model/layout.h"
#include "model/spec.h"
#include "model/weights.h"
#include "parallel/groups.h"

namespace krait {

// The shape of one forward pass, or of one piece of it when its sequences are cut.
struct PassShape {
  int64_t batch = 0;    // B
  int64_t seq_len = 0;  // T
  int ranks = 1;        // tensor ranks that run the pass together
  // Rows that a mixer computes with (B*T), and rows that this rank owns: its part of the residual
  // stream, which norms, routers and experts work on.
  int64_t tokens() const { return batch * seq_len; }
  int64_t own_tokens() const { return tokens() / ranks; }
};

// Saved activations of one sublayer and pass; each kind derives its own struct of tensors.
struct Saved {
  virtual ~Saved() = default;
};

// What a mixer carries from one piece of its sequences to the next (key/value cache, or conv and
// scan state) and, when trained, the gradients that come back. Feed-forward sublayers have none.
struct MixerState {
  virtual ~MixerState() = default;
  // Back to the start of the sequences; gradients zero.
  virtual void Reset(const Context& ctx) = 0;
};

// Router statistics of one pass, whose sequences lie in `groups` groups: each MoE sublayer j (in
// order) has a row for each of them.
struct RouterStats {
  int64_t groups = 1;
  Tensor prob_sum;      // [moe_count*groups,E] sum over tokens of p_e; Wide
  Tensor choice_count;  // [moe_count*groups,E] i64
  Tensor z_sum;         // [moe_count] sum over tokens of logsumexp^2; Wide
  // Set by HybridModel between forward and backward: the gradient of the loss with respect to one
  // token's p_e, [moe_count*groups,E] (undefined: no aux loss), and the factor of the z-loss.
  Tensor d_prob;
  double z_scale = 0;
  // Rounds of MoE sublayers beyond the first of each (model/expert_routes.h).
  int64_t overflow_rounds = 0;
};

struct PassContext {
  PassShape shape;
  Documents documents;
  RouterStats* router = nullptr;  // null: no statistics are wanted (decoding)
  bool recomputing = false;       // a second forward: statistics and states stay as they are
  bool keep_norms = true;         // false: norm outputs are recomputed by the backward
  // When not null: attention's output and lse are kept here although the rest of the sublayer is
  // recomputed, since they are small and cost most; a recomputation finds them in `saved`.
  Arena* keep_attention = nullptr;
  // When not null (probe): an MoE sublayer sets it to its logits [M,E], alive as long as `keep`.
  Tensor* router_logits = nullptr;
  // Likewise a Mamba sublayer sets it to dt_proj's output without bias, [M,I] of this rank's
  // channels.
  Tensor* dt_raw = nullptr;
  const Groups* groups = nullptr;
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
  // `state` not null: the call is the next piece of its sequences; the state is read and advanced
  // (when recomputing: read from `saved`, see KeepState, and left as it is).
  virtual void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                       MixerState* state, const PassContext& pass) const = 0;

  // dx [M,D] (overwritten) from dy [M,D]; adds weight gradients. Uses `saved` up: one backward per
  // forward. dy stays as it is. With `state`, pieces go from last to first, and the gradient of
  // what later pieces read is taken from it and that of what this piece read left in it.
  virtual void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                        MixerState* state, const PassContext& pass) const = 0;

  // The state of `batch` sequences of up to `max_tokens` positions, reset; null for feed-forward
  // kinds. Memory from `arena`. `with_grad`: a backward follows.
  virtual std::unique_ptr<MixerState> NewState(int64_t /*batch*/, int64_t /*max_tokens*/,
                                               DType /*compute*/, bool /*with_grad*/,
                                               Arena* /*arena*/, const Context& /*ctx*/) const {
    return nullptr;
  }
  // Copies into `saved`, before a piece's Forward, what of `state` its backward or recomputation
  // reads and later pieces overwrite. Memory from `keep`.
  virtual void KeepState(const MixerState& /*state*/, Saved* /*saved*/, Arena* /*keep*/,
                         const Context& /*ctx*/) const {}
};

// The gradient of a linear layer's weight, dy^T x, goes through here: run at once.
void Wgrad(const Weights& weights, int storage, Tensor dy, Tensor x, const Context& ctx);
// Likewise of experts, over their rows.
void GroupedWgrad(const Weights& weights, int storage, Tensor dy, Tensor x, Tensor offsets,
                  const Context& ctx);

// One switch over the kinds. `sizes` are this rank's; `index` is the position in spec.sublayers,
// `moe_index` the number of MoE sublayers before it.
std::unique_ptr<SublayerModule> MakeSublayer(const ModelSpec& spec, const LocalSizes& sizes,
                                             const ParamTable& table, int index, int moe_index);

}  // namespace krait

#endif  // KRAIT_MODEL_SUBLAYER_H_
