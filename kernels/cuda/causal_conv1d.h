// kernels/causal_conv1d.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone.
// Plain C++.
#ifndef KRAIT_KERNELS_CUDA_CAUSAL_CONV1D_H_
#define KRAIT_KERNELS_CUDA_CAUSAL_CONV1D_H_

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"

namespace krait::cuda {

void CausalConv1dSiluForward(Tensor y, Tensor final_state, Tensor x, Tensor w, Tensor bias,
                             Tensor initial_state, const Documents& documents, const Context& ctx);

// Tokens of a block: 8 warps, one after another in time.
inline constexpr int64_t kConvWarps = 8, kConvWarpTokens = 64;
// Rows of the backward pass's scratch `partial` [rows, (K+1) * I] f32.
inline int64_t CausalConv1dPartials(int64_t batch, int64_t time) {
  const int64_t tokens = kConvWarps * kConvWarpTokens;
  return batch * ((time + tokens - 1) / tokens);
}

void CausalConv1dSiluBackward(Tensor dx, Tensor dw, Tensor dbias, Tensor d_initial_state, Tensor dy,
                              Tensor d_final_state, Tensor x, Tensor w, Tensor bias,
                              Tensor initial_state, const Documents& documents, Tensor partial,
                              const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_CAUSAL_CONV1D_H_
