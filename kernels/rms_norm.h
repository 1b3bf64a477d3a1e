// Root-mean-square normalisation, alone and joined with the residual addition before it.
//
//   rstd = 1 / sqrt(mean(x^2) + eps);  y = (x * rstd) * w        (Zhang & Sennrich, 1910.07467;
//   as Hugging Face JambaRMSNorm: statistics in fp32, x * rstd rounded to x's dtype, then times w)
//
// x, y [M,D] with unit inner stride (rows may be strided: norms on slices of x_proj's output);
// w [D]: f32 on both devices (f64 in gradient checks); rstd [M]: f32 (f64 when x is f64).
// Supported x dtypes: f32, f64 (CPU only), bf16.
#ifndef KRAIT_KERNELS_RMS_NORM_H_
#define KRAIT_KERNELS_RMS_NORM_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

void RmsNormForward(Tensor y, Tensor rstd, Tensor x, Tensor w, double eps, const Context& ctx);

// dx (= or += when `accumulate`) and dw += ; with g = dy * w, xhat = x * rstd:
//   dx = rstd * (g - xhat * mean(g * xhat)),  dw = sum over rows of dy * xhat (fixed order).
void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor rstd, Tensor w,
                     bool accumulate, const Context& ctx);

// h = residual + delta, y = RmsNorm(h). h may be the same memory as residual. An undefined delta
// means no addition: then h must be residual, and only y and rstd are written.
void ResidualRmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta,
                            Tensor w, double eps, const Context& ctx);

// The gradient of both inputs of the addition is the same: dh += the norm's dx. (dh [M,D] comes in
// holding the gradient of h from the layers above and leaves holding that of residual and delta.)
void ResidualRmsNormBackward(Tensor dh, Tensor dw, Tensor dy, Tensor h, Tensor rstd, Tensor w,
                             const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_RMS_NORM_H_
