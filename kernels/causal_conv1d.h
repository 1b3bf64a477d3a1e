// Causal depthwise convolution over time with SiLU (the short convolution of Mamba, 2312.00752).
//
//   u[b,t,i] = bias[i] + sum_{k=0}^{K-1} w[i,k] * x[b, t-K+1+k, i];   y = silu(u)
//
// Token-major: x, y [B,T,I], rows may be strided (x is half of in_proj's output); w [I,K], K in
// 1..8 (published as [I,1,K]); bias [I] or undefined.
// initial_state [B,K-1,I] holds the inputs at the K-1 positions before documents.first_position in
// time order, undefined = zeros; final_state, same shape, receives the last K-1 inputs (of
// initial_state where T < K-1), for the next piece of the sequence. Taps reach back to the start of
// their token's document and not beyond (kernels/documents.h); final_state holds zeros for
// positions before the last token's document. Activations, states, w and bias have the compute
// dtype; dw and dbias are Wide.
#ifndef KRAIT_KERNELS_CAUSAL_CONV1D_H_
#define KRAIT_KERNELS_CAUSAL_CONV1D_H_

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"

namespace krait {

void CausalConv1dSiluForward(Tensor y, Tensor final_state, Tensor x, Tensor w, Tensor bias,
                             Tensor initial_state, const Documents& documents, const Context& ctx);

// dx [B,T,I] and d_initial_state are overwritten, dw and dbias accumulate (fixed order). u is
// recomputed. d_final_state is the gradient that arrives through final_state, or undefined.
void CausalConv1dSiluBackward(Tensor dx, Tensor dw, Tensor dbias, Tensor d_initial_state, Tensor dy,
                              Tensor d_final_state, Tensor x, Tensor w, Tensor bias,
                              Tensor initial_state, const Documents& documents, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_CAUSAL_CONV1D_H_
