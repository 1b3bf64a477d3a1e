// kernels/rms_norm.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain
// C++.
#ifndef KRAIT_KERNELS_CUDA_RMS_NORM_H_
#define KRAIT_KERNELS_CUDA_RMS_NORM_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// One forward for both norms: h = residual + delta is computed and stored when delta is defined,
// else h is residual and is only read.
void RmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w,
                    double eps, const Context& ctx);

// Takes min(rows, 528) * D floats of scratch for the partial sums of dw.
void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor rstd, Tensor w,
                     bool accumulate, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RMS_NORM_H_
