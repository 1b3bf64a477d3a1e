// Root-mean-square normalisation, alone and joined with the residual addition before it.
//
//   rstd = 1 / sqrt(mean(x^2) + eps);  y = x * rstd * w        (Zhang & Sennrich, 1910.07467)
//
// Statistics are Wide and y is rounded once. (Hugging Face's JambaRMSNorm rounds x * rstd to x's
// dtype as well before it multiplies by w.) A row whose squares overflow has NaN for both: an rstd
// of 0 would make it a row of zeros that nobody notices. x, y, the residual stream and their
// gradients [M,D] have the compute dtype, unit inner stride, and rows that may be strided;
// additions within are Wide and rounded once. w [D], dw [D] and rstd [M] are Wide.
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

// h = residual + delta, y = RmsNorm(h), the norm of the rounded h. h may be the same memory as
// residual. An undefined delta means no addition: then h must be residual, and only y and rstd are
// written.
void ResidualRmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta,
                            Tensor w, double eps, const Context& ctx);

// The gradient of both inputs of the addition is the same: dh = dh_in + the norm's dx, dw as above.
// (dh_in [M,D] is the gradient of h from the layers above; dh is that of residual and delta.) dh
// may be the same memory as dh_in.
void ResidualRmsNormBackward(Tensor dh, Tensor dw, Tensor dy, Tensor dh_in, Tensor h, Tensor rstd,
                             Tensor w, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_RMS_NORM_H_
