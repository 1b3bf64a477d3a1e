// Causal depthwise convolution over time with SiLU (the short convolution of Mamba, 2312.00752).
//
//   u[b,t,i] = bias[i] + sum_{k=0}^{K-1} w[i,k] * x[b, t-K+1+k, i];   y = silu(u)
//
// Token-major: x, y [B,T,I], rows may be strided (x is half of in_proj's output); w [I,K], K in
// 1..8 (published as [I,1,K]); bias [I] or undefined.
// initial_state [B,K-1,I] holds the K-1 inputs before t = 0 in time order, undefined = zeros;
// final_state, same shape, receives the last K-1 inputs (of initial_state where T < K-1), for the
// next part of the sequence.
// doc_start [B,T] i32 (undefined = all 0): inputs before position doc_start[b,t] of the row count
// as zero for output t. Position 0 continues the initial state: for doc_start = 0 taps reach into
// it, so a row that begins with a new document is given a zero state. final_state holds zeros for
// positions before the last document's start.
#ifndef KRAIT_KERNELS_CAUSAL_CONV1D_H_
#define KRAIT_KERNELS_CAUSAL_CONV1D_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

void CausalConv1dSiluForward(Tensor y, Tensor final_state, Tensor x, Tensor w, Tensor bias,
                             Tensor initial_state, Tensor doc_start, const Context& ctx);

// dx [B,T,I] and d_initial_state are overwritten, dw and dbias accumulate (fixed order). u is
// recomputed. d_final_state is the gradient that arrives through final_state, or undefined.
void CausalConv1dSiluBackward(Tensor dx, Tensor dw, Tensor dbias, Tensor d_initial_state, Tensor dy,
                              Tensor d_final_state, Tensor x, Tensor w, Tensor bias,
                              Tensor initial_state, Tensor doc_start, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_CAUSAL_CONV1D_H_
