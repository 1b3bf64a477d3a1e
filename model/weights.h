// Weights and gradients of one rank, in two planned segments laid out like the parameter table.
#ifndef KRAIT_MODEL_WEIGHTS_H_
#define KRAIT_MODEL_WEIGHTS_H_

#include <cstdint>
#include <vector>

#include "kernels/arena.h"
#include "kernels/context.h"
#include "kernels/placement.h"
#include "model/params.h"

namespace krait {

// Fills `values`, all of a published tensor flattened, f32, f64 or bf16, with its initial values by
// the spec's scheme; random ones are indexed by (seed, published name, element), so that they do
// not depend on the layout.
void InitParam(Tensor values, const Param& param, const ModelSpec& spec, uint64_t seed,
               const Context& ctx);

// How the weights are used in a pass. A sublayer takes a weight with Get ... Release, asks
// Accumulate before it computes a gradient, and reports a finished one with GradReady, once per
// backward pass. On one rank there is nothing behind these; with several, Get waits for an
// all-gather and the last pass's GradReady sends a bucket. Every use is counted, so that one which
// does not balance is found at the end of the pass. Not thread-safe: one thread per rank calls
// these, in program order.
class Weights {
 public:
  // `with_grad` false for inference. The arenas may be measuring ones. Gradients and tensors of
  // class kFp32 are Wide(placement.compute) whatever the compute dtype.
  Weights(const ParamTable* table, Placement placement, bool with_grad, Arena* weight_arena,
          Arena* grad_arena);

  // Before a forward; before a backward as well where several forwards came before it. `first`: of
  // a step: gradients of GradWrite::kZeroed are zeroed, those of kOverwrite are overwritten by the
  // first write. `last`: of a step: finished gradients may be sent off.
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

  // All of a storage, outside of passes (the optimizer, loading).
  Tensor Values(int storage) const { return values_[static_cast<size_t>(storage)]; }
  // A published tensor inside its storage (flattened to one dimension).
  Tensor Param(int param) const;
  Tensor ParamGrad(int param) const;

  const ParamTable& table() const { return *table_; }
  Placement placement() const { return placement_; }
  DType dtype() const { return placement_.compute; }
  bool has_grad() const { return !grads_.empty(); }

  // InitParam of every tensor.
  void Init(const ModelSpec& spec, uint64_t seed, const Context& ctx);

 private:
  Tensor Piece(Tensor storage, const krait::Param& param) const;

  // Of one storage in the pass at hand.
  struct Use {
    int held = 0;          // Get without Release
    bool written = false;  // the gradient, in this step
    int ready = 0;         // GradReady calls of this pass
  };

  const ParamTable* table_;
  Placement placement_;
  std::vector<Tensor> values_;  // one per storage
  std::vector<Tensor> grads_;
  mutable std::vector<Use> uses_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_WEIGHTS_H_
