// Weights and gradients of one rank, in two planned segments of flat memory (model/layout.h). A
// storage is a view of its flat.
#ifndef KRAIT_MODEL_WEIGHTS_H_
#define KRAIT_MODEL_WEIGHTS_H_

#include <cstdint>
#include <vector>

#include "kernels/arena.h"
#include "kernels/context.h"
#include "kernels/placement.h"
#include "model/layout.h"
#include "model/params.h"
#include "parallel/mesh.h"

namespace krait {

class BucketExchange;

// How the weights are used in a pass. A sublayer takes a weight with Get ... Release, asks
// Accumulate before it computes a gradient, and reports a finished one with GradReady, once per
// backward pass. On one rank there is nothing behind these; with several, Get waits for the weights
// of the ranks that own them and the last pass's GradReady sends a bucket. Every use is counted, so
// that one which does not balance is found at the end of the pass. Not thread-safe: one thread per
// rank calls these, in program order.
class Weights {
 public:
  // `with_grad` false for inference. The arenas may be measuring ones; padding relies on their
  // memory coming zeroed. Gradients and tensors of class kFp32 are Wide(placement.compute) whatever
  // the compute dtype. `table` outlives the weights and was built for mesh.tensor; mesh.rank says
  // whose part this is.
  Weights(const ParamTable* table, Placement placement, bool with_grad, Arena* weight_arena,
          Arena* grad_arena, const Mesh& mesh = {},
          int64_t bucket_elements = Layout::kBucketElements);

  // Of several ranks: what sends gradients and brings weights; it outlives the weights' use.
  void SetExchange(BucketExchange* exchange) { exchange_ = exchange; }

  // Before a forward; before a backward as well where several forwards came before it. `first`: of
  // a step: gradients of GradWrite::kZeroed are zeroed, those of kOverwrite are overwritten by the
  // first write. `last`: of a step: a bucket's gradients are sent as soon as they are ready. `ctx`
  // outlives the pass.
  void BeginPass(const Context& ctx, bool first, bool last);
  // After a forward, and after a backward that has finished the gradients of `storages` and of no
  // others: fatal when the uses do not balance.
  void EndForward() const;
  void EndBackward(const std::vector<int>& storages) const;

  Tensor Get(int storage) const;
  void Release(int storage) const;
  Tensor Grad(int storage) const { return grads_[storage]; }
  // Whether the next op that computes this gradient adds to it; the first call of a step answers
  // false for a gradient of kOverwrite, and counts as its first write.
  bool Accumulate(int storage) const;
  void GradReady(int storage) const;

  // Outside of passes (the optimizer, loading): the flats of the layout, [numel]. No gradient of
  // what is not trained.
  Tensor FlatWeight(int flat) const { return flat_weights_[static_cast<size_t>(flat)]; }
  Tensor FlatGrad(int flat) const { return flat_grads_[static_cast<size_t>(flat)]; }
  // A published tensor, flattened to one dimension. Fatal where this rank does not hold all of it
  // in one piece; on one rank it does.
  Tensor Param(int param) const { return Whole(flat_weights_, param); }
  Tensor ParamGrad(int param) const { return Whole(flat_grads_, param); }

  const Layout& layout() const { return layout_; }
  const ParamTable& table() const { return layout_.table(); }
  Placement placement() const { return placement_; }
  DType dtype() const { return placement_.compute; }
  bool has_grad() const { return has_grad_; }

  // Initial values (model/init.h) of all that this rank holds.
  void Init(const ModelSpec& spec, uint64_t seed, const Context& ctx);

 private:
  Tensor Whole(const std::vector<Tensor>& flats, int param) const;

  // Of one storage in the pass at hand.
  struct Use {
    int held = 0;          // Get without Release
    bool written = false;  // the gradient, in this step
    int ready = 0;         // GradReady calls of this pass
  };

  Layout layout_;
  Placement placement_;
  std::vector<Tensor> flat_weights_, flat_grads_;
  std::vector<Tensor> values_;  // one per storage, with the padding rows of a vocabulary
  std::vector<Tensor> grads_;
  bool has_grad_;
  mutable std::vector<Use> uses_;
  BucketExchange* exchange_ = nullptr;  // null on one rank
  const Context* sending_ = nullptr;    // that of the pass, in the last one of a step
  mutable std::vector<int> unready_;    // storages of each bucket whose gradients are to come
};

}  // namespace krait

#endif  // KRAIT_MODEL_WEIGHTS_H_
