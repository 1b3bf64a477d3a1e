// SwiGLU (Shazeer, 2002.05202): product[M,F] = silu(gate) * up with gate = gate_up[:, :F],
// up = gate_up[:, F:], gate_up [M,2F]; silu(x) = x / (1 + exp(-x)).
//
// A feed-forward is y = product w_down^T with gate_up = x w_gate_up^T. The ops join SwiGLU to the
// matrix product beside it, so that a device may do both at once; today each runs two
// kernels, and in bf16 what passes between them (gate_up, d_product) is rounded. Activations have
// the compute dtype. The grouped ops leave rows beyond offsets[E] unspecified.
#ifndef KRAIT_KERNELS_SWIGLU_H_
#define KRAIT_KERNELS_SWIGLU_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// gate_up[M,2F] = x[M,D] w[2F,D]^T; `product` [M,F], when defined.
void LinearSwiGluForward(Tensor product, Tensor gate_up, Tensor x, Tensor w, const Context& ctx);
// With d_product = dy[M,D] w_down[D,F]: d_gate_up [M,2F], overwritten, may be the same memory as
// gate_up; product [M,F], when defined, is computed again (the weight gradient of down needs it).
void SwiGluLinearBackward(Tensor d_gate_up, Tensor product, Tensor dy, Tensor w_down,
                          Tensor gate_up, const Context& ctx);

// The routing weights of rows that experts compute: row r belongs to choice source[r] of weight and
// d_weight [M,k] (Wide) in flat order; source [rows] i32 is -1 for rows of padding.
struct RowWeights {
  Tensor weight, d_weight, source;
};

// The same for each expert over its own rows (offsets [E+1], see kernels/gemm.h); w [E,2F,D].
void GroupedLinearSwiGluForward(Tensor product, Tensor gate_up, Tensor x, Tensor w, Tensor offsets,
                                const Context& ctx);
// dy holds the gradient of the combined output for each row, not yet times its routing weight p:
// with d_product = dy w_down[e], so that no expert output is needed,
//   d_weight[source[r]] = product[r] . d_product[r]
//   d_gate_up[r] = p * (SwiGLU backward of d_product[r]);   product[r] = p * silu(gate) * up
// The weighted product with the unweighted dy gives down's weight gradient. Rows of padding become
// zero.
void GroupedSwiGluLinearBackward(Tensor d_gate_up, Tensor product, const RowWeights& rows,
                                 Tensor dy, Tensor w_down, Tensor gate_up, Tensor offsets,
                                 const Context& ctx);

// The elementwise parts, without matrix products.
void SwiGluForward(Tensor product, Tensor gate_up, const Context& ctx);
void SwiGluBackward(Tensor d_gate_up, Tensor product, Tensor d_product, Tensor gate_up,
                    const Context& ctx);
// As GroupedSwiGluLinearBackward. Rows with source -1 become zero.
void WeightedSwiGluBackward(Tensor d_gate_up, Tensor product, const RowWeights& rows,
                            Tensor d_product, Tensor gate_up, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_SWIGLU_H_
