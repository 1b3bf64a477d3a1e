// kernels/rms_norm.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain
// C++.
#ifndef KRAIT_KERNELS_CUDA_RMS_NORM_H_
#define KRAIT_KERNELS_CUDA_RMS_NORM_H_

#include <algorithm>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// One forward for both norms: h = residual + delta is computed and stored when delta is defined,
// else h is residual and is only read.
void RmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w,
                    double eps, const Context& ctx);

// Blocks of both passes: one for each of the 132 multiprocessors of an H100 or H200. Fixed, so that
// sums do not depend on the device.
inline constexpr int64_t kNormBlocks = 132;
// Rows of the backward pass's scratch `partial` [rows, D] f32.
inline int64_t RmsNormPartials(int64_t rows) { return std::min(rows, kNormBlocks); }

// dx = dx_in + the norm's gradient; an undefined dx_in counts as zero. dx may be the memory of
// dx_in.
void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd, Tensor w,
                     Tensor partial, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RMS_NORM_H_
