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
#include <utility>
#include <vector>

#include "kernels/context.h"
#include "kernels/moe.h"
#include "kernels/vocabulary.h"
#include "model/activations.h"
#include "model/params.h"
#include "model/spec.h"
#include "model/sublayer.h"
#include "model/weights.h"

namespace krait {

// What backward computes again instead of keeping it; every mode gives the same bits. (SwiGLU
// products, scan outputs and permuted expert rows are recomputed in all of them: their backward
// yields them on the way. Attention's output is kept in all of them: it is as small as the residual
// stream, and costs most.)
enum class Recompute : uint8_t {
  kNone,
  kNorms,   // norm outputs, also those of Mamba's inner norms
  kMixers,  // of mixer sublayers the residual stream before them is kept
  kLayer,   // of a layer the residual stream before it is kept
};

// The sublayers [begin, end) of the spec that a model runs. The first range has the embedding as
// well, the last one the final norm and the LM head; between ranges the residual stream travels.
// Auxiliary losses are those of the range's own MoE sublayers, pooled or averaged over them alone.
struct SublayerRange {
  size_t begin = 0, end = 0;
};

// One batch of one pass, or of one piece of its sequences, in memory of the model's device.
struct Batch {
  PassShape shape;
  Tensor tokens;   // [B,T] i32
  Tensor targets;  // [B,T] i32, -1 = no target
  // Where documents begin. first_position is the model's to set: the position of a SequenceState.
  Documents documents;
  // The residual stream [M,D] that a range of sublayers takes in (not the first) and gives out (not
  // the last), and the gradients of both for Backward.
  Tensor h_in, h_out, d_h_out, d_h_in;
};

// What the passes of a step add up, f64 on the device: SumsSize() entries. On several ranks the
// token losses and squares are those of a rank's own rows, to be summed over the ranks; the others
// are the same
// on all ranks, or with moe.aux_sequences a data rank's own, to be averaged.
enum PassSum : int64_t {
  kSumCrossEntropy,  // sum of token losses
  kSumAuxLoss,       // unscaled, of each pass (already a mean)
  kSumZLoss,         // unscaled mean over MoE sublayers, of each pass
  kSumSquares,       // of the outputs of sublayers, with the activation loss; else 0
  kSumImbalance,     // one entry per MoE sublayer: max_e count_e / mean count
};
struct PassSums {
  double cross_entropy = 0, aux_loss = 0, z_loss = 0, squares = 0;
  std::vector<double> imbalance;
};
// From the downloaded entries; what stands behind them is passed over with the imbalance's.
PassSums PassSumsOf(const std::vector<double>& sums);

// Intermediate values for `krait probe`, in order of computation. A tensor is valid during the call
// only. Names: "hidden_states.i" [M,D], input of layer i, the last one the output of the final
// norm; "router_logits.j" [M,E] of MoE sublayer j; "logits" [rows,V], consecutive chunks of rows.
// Of several tensor ranks each has its own rows of the first two, and of the logits all rows of the
// ids that it holds.
// With `sublayers` also, of sublayer s of the spec, "output.s" [M,D], "dt_raw.s" [M,I] of a Mamba
// sublayer and, backwards, "gradient.head" [M,D] and "gradient.s" [M,D] of its input.
struct ProbeSink {
  std::function<void(const std::string& name, Tensor value)> on_tensor;
  bool sublayers = false;
};

class HybridModel {
 public:
  // `weights` and `groups` outlive the model; groups null: a single rank. An empty range stands for
  // all sublayers.
  HybridModel(const ModelSpec& spec, const Weights* weights, Recompute recompute,
              SublayerRange range = {}, const Groups* groups = nullptr);
  ~HybridModel();

  // Makes the activation set for passes of up to `shape`. Forward takes its memory from `arena`,
  // which nothing else uses while the set lives; a pass of a measuring arena finds the size.
  std::unique_ptr<ActivationSet> NewActivations(PassShape shape, Arena* arena) const;

  int64_t SumsSize() const { return kSumImbalance + moe_count_; }

  // One training pass differentiates
  //   loss_scale * sum of token losses
  //     + aux_scale * (aux_coef * aux + z_coef * z + activation_coef * activation)
  // with loss_scale [1] f64 = 1 / targets of the whole step and aux_scale = 1 / passes. The LM head
  // runs forward and backward together, in chunks of rows, so that the logits of a pass never exist
  // at once: Forward already adds the head's weight gradient and keeps the gradient of the final
  // norm's output. `sums` [SumsSize()] is added to.
  //
  // activation is the mean over a pass's tokens and d_model channels of the square of a sublayer's
  // output (what it adds to the residual stream), added over the sublayers: the activation loss of
  // Jamba-1.5 (arXiv:2408.12570), which keeps the outputs of the last Mamba layers and of single
  // experts from growing to millions. The paper gives the coefficient, 1e-5, but not over what the
  // mean is taken; this is the stream that the outliers were seen in. The outputs stay in memory
  // until the backward pass, whatever is recomputed.
  //
  // Weights::BeginPass goes before. With `sequence` the batch is the next piece of the pass's
  // sequences, each piece with an activation set of its own; the auxiliary losses are those of all
  // pieces and are taken with the last.
  void Forward(const Batch& batch, Tensor loss_scale, Tensor sums, ActivationSet* activations,
               const Context& ctx, const ProbeSink* probe = nullptr,
               SequenceState* sequence = nullptr);
  // Adds to the weights' gradients; the batch and activations of the Forward before it, pieces from
  // last to first.
  void Backward(const Batch& batch, double aux_scale, ActivationSet* activations,
                const Context& ctx, SequenceState* sequence = nullptr,
                const ProbeSink* probe = nullptr);

  // Forward without keeping anything, in scratch memory: adds the losses to `sums` (evaluation).
  // Works without gradients. `correct`, where it is given, grows by the targets of this rank's own
  // rows that have the largest logit (one of several that are equal counts): the device is waited
  // for.
  void Evaluate(const Batch& batch, Tensor sums, const Context& ctx, int64_t* correct = nullptr,
                const ProbeSink* probe = nullptr);

  // The state of `batch` sequences of up to `max_tokens` tokens, at their start. `with_grad`: for
  // training on pieces of sequences of exactly max_tokens.
  std::unique_ptr<SequenceState> NewSequence(int64_t batch, int64_t max_tokens, bool with_grad,
                                             Arena* arena, const Context& ctx) const;
  void Reset(SequenceState* sequence, const Context& ctx) const;
  // As if `position` tokens had been seen: for planning runs.
  void SkipTo(int64_t position, SequenceState* sequence) const;
  // Advances by tokens [B,T] i32 and writes the logits of the last position, logits [B,V] Wide. One
  // call with the whole prompt, then one per token.
  void Decode(Tensor logits, Tensor tokens, SequenceState* sequence, const Context& ctx);

  // Rounds of expert exchanges beyond the first of each (model/expert_routes.h), in training passes
  // since the last call.
  int64_t TakeOverflowRounds() { return std::exchange(overflow_rounds_, 0); }

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return *weights_; }

 private:
  // Which activations of a sublayer stay for the backward.
  struct Keep {
    bool h = false, x = false, saved = false, attention = false;  // its output and lse
  };
  Keep KeepOf(size_t s) const;
  bool first() const { return range_.begin == 0; }
  bool last() const { return range_.end == spec_.sublayers.size(); }
  bool FirstOfLayer(size_t s) const;
  PassContext MakePass(const Batch& batch, const SequenceState* sequence, const Context& ctx) const;
  // Of passes of `batch` sequences. Those that are no whole groups of moe.aux_sequences
  // (evaluation's last pass) are one.
  RouterStats NewRouterStats(int64_t batch, Arena* arena) const;
  void ResetRouterStats(const RouterStats& stats, const Context& ctx) const;
  MoeLossShape LossShape(const RouterStats& stats, int64_t tokens) const;

  // Embedding (or h_in), the sublayers and, in the last range, the final norm, whose output goes to
  // final_x [M,D]; otherwise the stream goes to h_out. Keeps in `set` what its mode asks for; null:
  // nothing.
  void RunSublayers(Tensor final_x, const Batch& batch, ActivationSet* set, SequenceState* sequence,
                    const PassContext& pass, const ProbeSink* probe) const;
  // LM head and cross-entropy of x [M,D], added to `sums`. With `with_grad` the head's weight
  // gradient is computed and x is overwritten with its gradient. `correct` as in Evaluate.
  void RunHead(Tensor x, Tensor targets, Tensor loss_scale, Tensor sums, bool with_grad,
               const PassContext& pass, const ProbeSink* probe, int64_t* correct = nullptr) const;
  // The ranks whose router statistics are added up: those of the stage, or with moe.aux_sequences
  // those that run the pass together, whose sequences are no other rank's. Null: this one alone.
  const Communicator* RouterRanks() const;
  // The tokens of their passes, of which this rank's pass has `tokens`.
  int64_t RouterTokens(int64_t tokens) const;
  // The auxiliary losses of a pass of `tokens` tokens, added to `sums`, once the ranks have added
  // up their statistics.
  void AddRouterLosses(const RouterStats& stats, int64_t tokens, Tensor sums,
                       const Context& ctx) const;
  // Sets what MoE backwards need of them.
  void SetRouterGradients(RouterStats* stats, int64_t tokens, double aux_scale,
                          const Context& ctx) const;
  // Fills what the mode did not keep of sublayers [begin, end), which belong together, from scratch
  // memory. The first one's h is kept.
  void Refill(size_t begin, size_t end, ActivationSet* set, SequenceState* sequence,
              const PassContext& backward_pass) const;

  ModelSpec spec_;
  const Weights* weights_;
  Recompute recompute_;
  SublayerRange range_;
  const Groups* groups_;
  VocabularySlice vocabulary_;
  // Both by index into spec_.sublayers; only those of the range are set.
  std::vector<std::unique_ptr<SublayerModule>> sublayers_;
  std::vector<int> norms_;     // storage of each sublayer's norm weight
  std::vector<int> storages_;  // whose gradients the range's backward finishes
  int embedding_, final_norm_, head_;
  int64_t moe_count_;
  int64_t overflow_rounds_ = 0;
};

}  // namespace krait

#endif  // KRAIT_MODEL_HYBRID_MODEL_H_
