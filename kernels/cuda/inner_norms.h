// kernels/inner_norms.h on CUDA tensors, called by its dispatch functions alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_INNER_NORMS_H_
#define KRAIT_KERNELS_CUDA_INNER_NORMS_H_

#include <algorithm>

#include "kernels/context.h"
#include "kernels/inner_norms.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// With norms; normed and d_projected f32 or bf16, all else f32.
void InnerNormsForward(Tensor normed, Tensor rstd, Tensor projected, const InnerNormWeights& w,
                       double eps, const Context& ctx);

// Blocks of the backward pass; fixed, so that sums do not depend on the device.
inline constexpr int64_t kInnerNormBlocks = 264;
// Rows of the backward pass's scratch `partial` [rows, R+2N] f32.
inline int64_t InnerNormPartials(int64_t rows) { return std::min(rows, kInnerNormBlocks); }

void InnerNormsBackward(Tensor d_projected, const InnerNormWeights& dw, Tensor d_normed,
                        Tensor projected, Tensor rstd, const InnerNormWeights& w, Tensor partial,
                        const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_INNER_NORMS_H_
