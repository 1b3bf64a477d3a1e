// The model: embedding, the list of residual sublayers, final norm, LM head; forward, backward,
// recompute, decoding. This is the second file a reader opens.
//
//   h = embed(tokens)
//   for each sublayer:  h = h + delta; y = RMSNorm(h); delta = f(y)      (addition and norm fused)
//   logits = head(RMSNorm(h + delta))
//
// One thread drives it. CPU only computes when the call returns; CUDA work is enqueued on
// ctx.stream.
#ifndef KRAIT_MODEL_HYBRID_MODEL_H_
#define KRAIT_MODEL_HYBRID_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/context.h"
#include "model/activations.h"
#include "model/params.h"
#include "model/spec.h"
#include "model/sublayer.h"
#include "model/weights.h"

namespace krait {

// What backward computes again instead of keeping it; every mode gives the same bits. (SwiGLU
// products, scan outputs and permuted expert rows are recomputed in all of them: their backward
// yields them on the way.)
enum class Recompute : uint8_t {
  kNone,
  kNorms,   // norm outputs, also those of Mamba's inner norms
  kMixers,  // of mixer sublayers only the residual stream before them is kept
  kLayer,   // of a layer only the residual stream before it is kept
};

// One batch of one pass, host or device memory as the model's device.
struct Batch {
  PassShape shape;
  Tensor tokens;     // [B,T] i32
  Tensor targets;    // [B,T] i32, -1 = no target
  Tensor doc_start;  // [B,T] i32, or undefined
};

// Sums of one pass over its tokens; the caller divides.
struct PassSums {
  double cross_entropy = 0;  // sum of token losses
  int64_t targets = 0;
  double aux_loss = 0;            // unscaled, of this pass (already a mean); 0 without MoE
  double z_loss = 0;              // unscaled mean over MoE sublayers
  std::vector<double> imbalance;  // per MoE sublayer: max_e count_e / mean count
};

// Intermediate values for `krait probe`, in order of computation. A tensor is valid during the call
// only. Names: "hidden_states.i" [M,D], input of layer i, the last one the output of the final
// norm; "router_logits.j" [M,E] of MoE sublayer j; "logits" [rows,V], consecutive chunks of rows.
struct ProbeSink {
  std::function<void(const std::string& name, Tensor value)> on_tensor;
};

class HybridModel {
 public:
  // `weights` outlives the model.
  HybridModel(const ModelSpec& spec, const Weights* weights, Recompute recompute);
  ~HybridModel();

  // Makes the activation set for passes of up to `shape`. Forward takes its memory from `arena`,
  // which nothing else uses while the set lives; a pass of a measuring arena finds the size.
  std::unique_ptr<ActivationSet> NewActivations(PassShape shape, Arena* arena) const;

  // One training pass differentiates
  //   loss_scale * sum of token losses + aux_scale * (aux_coef * aux + z_coef * z)
  // with loss_scale = 1 / targets of the whole step (counted before the first pass) and
  // aux_scale = 1 / passes. The LM head runs forward and backward together, in chunks of rows, so
  // that the logits of a pass never exist at once: Forward already adds the head's weight gradient
  // and keeps the gradient of the final norm's output.
  PassSums Forward(const Batch& batch, double loss_scale, ActivationSet* activations,
                   const Context& ctx, const ProbeSink* probe = nullptr);
  // Adds to the weights' gradients; the batch and activations of the Forward before it.
  void Backward(const Batch& batch, double aux_scale, ActivationSet* activations,
                const Context& ctx);

  // Forward without keeping anything, in scratch memory: losses only (evaluation). Works without
  // gradients.
  PassSums Evaluate(const Batch& batch, const Context& ctx);

  // Decoding state of `batch` sequences of up to `max_tokens` tokens.
  using DecodeState = krait::DecodeState;
  std::unique_ptr<DecodeState> NewDecodeState(int64_t batch, int64_t max_tokens, Arena* arena,
                                              const Context& ctx) const;
  // Advances by tokens [B,T] i32 and writes the logits of the last position, logits [B,V] (f32; f64
  // under f64). One call with the whole prompt, then one per token.
  void Decode(Tensor logits, Tensor tokens, DecodeState* state, const Context& ctx);

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return *weights_; }

 private:
  // Which activations of a sublayer stay for the backward.
  struct Keep {
    bool h = false, x = false, saved = false;
  };
  Keep KeepOf(size_t s) const;
  bool FirstOfLayer(size_t s) const;
  PassContext MakePass(const PassShape& shape, Tensor doc_start, const Context& ctx) const;
  RouterStats NewRouterStats(Arena* arena, const Context& ctx) const;

  // Embedding, all sublayers and the final norm, whose output goes to final_x [M,D]. Keeps in `set`
  // what its mode asks for; null: nothing.
  void RunSublayers(Tensor final_x, const Batch& batch, ActivationSet* set, RouterStats* router,
                    const Context& ctx, const ProbeSink* probe) const;
  // LM head and cross-entropy of x [M,D]; the sum of losses. With `with_grad` the head's weight
  // gradient is added and x is overwritten with its gradient.
  double RunHead(Tensor x, const Batch& batch, double loss_scale, bool with_grad,
                 const Context& ctx, const ProbeSink* probe) const;
  // Losses and imbalance from the statistics of a pass of `tokens` tokens (host memory is read).
  void SumRouterStats(const RouterStats& stats, int64_t tokens, PassSums* sums) const;
  // Sets what MoE backwards need of the aux and z-loss.
  void SetRouterGradients(RouterStats* stats, int64_t tokens, double aux_scale,
                          const Context& ctx) const;
  // Fills what the mode did not keep of sublayers [begin, end), which belong together, from scratch
  // memory. The first one's h is kept.
  void Refill(size_t begin, size_t end, ActivationSet* set, const PassContext& pass) const;
  Tensor Embedding() const { return weights_->Get(embedding_); }

  ModelSpec spec_;
  const Weights* weights_;
  Recompute recompute_;
  std::vector<std::unique_ptr<SublayerModule>> sublayers_;
  std::vector<int> norms_;  // storage of each sublayer's norm weight
  int embedding_, final_norm_, head_;
  int64_t moe_count_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_HYBRID_MODEL_H_
