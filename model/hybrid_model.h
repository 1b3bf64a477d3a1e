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
#include "model/params.h"
#include "model/spec.h"
#include "model/sublayer.h"
#include "model/weights.h"

namespace krait {

enum class Recompute : uint8_t {
  kNone,
  kNorms,   // norm outputs (also Mamba's inner norms) and SwiGLU products are recomputed
  kMixers,  // of mixer sublayers only the input is kept
  kLayer,   // of a layer only the input is kept
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

// Copies of intermediate values for `krait probe`; filled when given. Each callback tensor is valid
// during the call only.
struct ProbeSink {
  std::function<void(const std::string& name, Tensor value)> on_tensor;
};

// Saved activations of one pass in flight.
class ActivationSet;

class HybridModel {
 public:
  // `weights` outlives the model.
  HybridModel(const ModelSpec& spec, const Weights* weights, Recompute recompute);
  ~HybridModel();

  // Makes the activation set for passes of up to `shape`; memory from `arena`.
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

  // Forward without keeping anything: losses only (evaluation).
  PassSums Evaluate(const Batch& batch, const Context& ctx);

  // Decoding state of `batch` sequences of up to `max_tokens` tokens.
  class DecodeState;
  std::unique_ptr<DecodeState> NewDecodeState(int64_t batch, int64_t max_tokens,
                                              Arena* arena) const;
  // Advances by tokens [B,T] i32 and writes the logits of the last position, logits [B,V] (f32).
  void Decode(Tensor logits, Tensor tokens, DecodeState* state, const Context& ctx);

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return *weights_; }

 private:
  ModelSpec spec_;
  const Weights* weights_;
  Recompute recompute_;
  std::vector<std::unique_ptr<SublayerModule>> sublayers_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_HYBRID_MODEL_H_
