// The interface of a residual sublayer: y = f(x) between the norm before it and the residual
// addition after it (both done by HybridModel). Forward and backward live side by side in one file
// pair per kind: attention.{h,cc}, mamba.{h,cc}, mlp.{h,cc}, moe.{h,cc}.
#ifndef KRAIT_MODEL_SUBLAYER_H_
#define KRAIT_MODEL_SUBLAYER_H_

#include <cstdint>
#include <memory>
#include <vector>

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

// Saved activations of one sublayer and pass; each kind derives its own struct of tensors.
struct Saved {
  virtual ~Saved() = default;
};

// What generation and cut sequences carry from one call to the next, per sublayer: key/value cache,
// or conv and scan state. Feed-forward sublayers have none.
struct MixerState {
  virtual ~MixerState() = default;
};

// Router statistics of one pass, pooled over MoE sublayers for the aux loss.
struct RouterStats {
  // Per MoE sublayer j (in order): [moe_count, E] each.
  Tensor prob_sum;      // sum over tokens of p_e (f32; f64 in checks)
  Tensor choice_count;  // i64
  Tensor z_sum;         // [moe_count]
  // Set by HybridModel between forward and backward: gradient of the total loss with respect to one
  // token's p_e, per MoE sublayer [moe_count, E]; and the factor of the z-loss.
  Tensor d_prob_mean;
  double z_scale = 0;
};

struct PassContext {
  PassShape shape;
  Tensor doc_start;       // [B,T] i32, or undefined: no document resets
  RouterStats* router;    // never null; recomputed forwards do not add to it
  bool add_router_stats;  // false while recomputing
  Tensor* router_logits;  // when not null (probe): receives [M,E] per MoE sublayer, j-th entry
  const Context* ctx;
};

class SublayerModule {
 public:
  virtual ~SublayerModule() = default;

  // Called once per ActivationSet.
  virtual std::unique_ptr<Saved> NewSaved() const = 0;

  // y [M,D] = f(x [M,D]). What backward needs is taken from `keep` and noted in `saved`; everything
  // else comes from ctx->scratch. Forward-only callers pass the scratch arena as `keep` and release
  // it afterwards. x itself is kept by the caller.
  virtual void Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                       const PassContext& pass) = 0;

  // dx [M,D] (overwritten) from dy [M,D]; adds weight gradients.
  virtual void Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                        const PassContext& pass) = 0;

  // The state for up to `max_tokens` positions (attention: cache size), zeroed; null for
  // feed-forward kinds. Memory from `arena`.
  virtual std::unique_ptr<MixerState> NewState(int64_t /*batch*/, int64_t /*max_tokens*/,
                                               DType /*dtype*/, Arena* /*arena*/) const {
    return nullptr;
  }
  // Inference over the next T tokens: reads and advances `state`.
  virtual void Decode(Tensor y, Tensor x, const Weights& weights, MixerState* state,
                      const PassContext& pass) = 0;
};

// One switch over the kinds. `index` is the position in spec.sublayers; `moe_index` the number of
// MoE sublayers before it.
std::unique_ptr<SublayerModule> MakeSublayer(const ModelSpec& spec, const ParamTable& table,
                                             int index, int moe_index);

}  // namespace krait

#endif  // KRAIT_MODEL_SUBLAYER_H_
