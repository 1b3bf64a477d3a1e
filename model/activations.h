// Memory of one pass: what forward leaves for backward, and what pieces of cut sequences carry
// along.
#ifndef KRAIT_MODEL_ACTIVATIONS_H_
#define KRAIT_MODEL_ACTIVATIONS_H_

#include <memory>
#include <vector>

#include "kernels/arena.h"
#include "kernels/tensor.h"
#include "model/sublayer.h"

namespace krait {

// Saved activations of one pass (or piece) in flight. Made by HybridModel::NewActivations, filled
// by Forward, used up by Backward. Which tensors are defined between the two depends on the
// recompute mode.
class ActivationSet {
 private:
  friend class HybridModel;

  struct SublayerActivations {
    Tensor h;     // [M,D] the residual stream that the norm reads
    Tensor x;     // [M,D] the norm's output, the sublayer's input
    Tensor rstd;  // [M]
    Tensor y;     // [M,D] the sublayer's output; with the activation loss only
    std::unique_ptr<Saved> saved;
  };

  PassShape max_shape_;
  Arena* arena_ = nullptr;  // all that is taken from it since `mark_` belongs to this pass
  int64_t mark_ = 0;
  std::vector<SublayerActivations> sublayers_;
  Tensor final_h_;     // [M,D]
  Tensor final_rstd_;  // [M]
  Tensor d_final_;     // [M,D] gradient of the final norm's output
  RouterStats router_;
};

// What sequences that are run in pieces carry from one call to the next: for training on pieces
// (HybridModel::NewSequence with gradients) and for decoding. Whole sequences need none.
class SequenceState {
 public:
  int64_t position() const { return position_; }      // tokens seen
  int64_t max_tokens() const { return max_tokens_; }  // of each sequence

 private:
  friend class HybridModel;

  int64_t batch_ = 0;
  int64_t max_tokens_ = 0;
  int64_t position_ = 0;
  std::vector<std::unique_ptr<MixerState>> sublayers_;
  RouterStats router_;  // over all pieces of the pass; undefined when decoding
};

}  // namespace krait

#endif  // KRAIT_MODEL_ACTIVATIONS_H_
