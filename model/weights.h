// Weights and gradients of one rank, in two planned segments laid out like the parameter table.
#ifndef KRAIT_MODEL_WEIGHTS_H_
#define KRAIT_MODEL_WEIGHTS_H_

#include <cstdint>
#include <vector>

#include "kernels/arena.h"
#include "model/params.h"

namespace krait {

// A sublayer takes a weight with Get ... Release and reports its gradient with GradReady. On one
// rank Release and GradReady do nothing; with several, Get waits for an all-gather and GradReady
// sends a bucket. Not thread-safe: one thread per rank calls these, in program order.
class Weights {
 public:
  // `dtype` is the compute dtype (f32; f64 for gradient checks). `with_grad` false for inference.
  // The arenas may be measuring ones.
  Weights(const ParamTable* table, DType dtype, Device device, bool with_grad, Arena* weight_arena,
          Arena* grad_arena);

  Tensor Get(int storage) const { return values_[storage]; }
  void Release(int /*storage*/) const {}
  Tensor Grad(int storage) const { return grads_[storage]; }
  void GradReady(int /*storage*/) const {}

  // A published tensor inside its storage (flattened to one dimension).
  Tensor Param(int param) const;
  Tensor ParamGrad(int param) const;

  const ParamTable& table() const { return *table_; }
  DType dtype() const { return dtype_; }
  bool has_grad() const { return !grads_.empty(); }

  // Initial values by the spec's scheme; random values are indexed by (seed, published name,
  // element), so they do not depend on the layout. Deterministic over threads.
  void Init(const ModelSpec& spec, uint64_t seed);
  void ZeroGrad();

 private:
  Tensor Piece(Tensor storage, const krait::Param& param) const;

  const ParamTable* table_;
  DType dtype_;
  Device device_;
  std::vector<Tensor> values_;  // one per storage
  std::vector<Tensor> grads_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_WEIGHTS_H_
