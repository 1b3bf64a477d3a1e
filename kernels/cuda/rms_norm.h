// kernels/rms_norm.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain
// C++.
#ifndef KRAIT_KERNELS_CUDA_RMS_NORM_H_
#define KRAIT_KERNELS_CUDA_RMS_NORM_H_

#include <algorithm>
#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// One forward for both norms: h = residual + delta is computed and stored when delta is defined,
// else h is residual and is only read.
void RmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w,
                    double eps, const Context& ctx);

// Rows of `partial`, the partial sums of dw: at most 4 blocks for each of the 132 multiprocessors
// of an H100 or H200. Fixed, so that the sums do not depend on the device.
inline int64_t RmsNormPartials(int64_t rows) { return std::min<int64_t>(rows, 528); }

// dx = dx_in (undefined: zero) + the norm's gradient; dx may be the same memory as dx_in. partial
// [RmsNormPartials(rows), D] f32.
void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd, Tensor w,
                     Tensor partial, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RMS_NORM_H_
