// AdamW (Loshchilov & Hutter, 1711.05101, as torch.optim.AdamW) and the sums it needs.
#ifndef KRAIT_KERNELS_OPTIMIZER_H_
#define KRAIT_KERNELS_OPTIMIZER_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

struct AdamWStep {
  double lr;
  double beta1, beta2, eps;
  double weight_decay;  // 0 for tensors without decay
  int64_t step;         // 1 for the first update
  double grad_scale;    // the clip factor, applied to the gradient
};

// w *= 1 - lr*wd; m = b1*m + (1-b1)*g; v = b2*v + (1-b2)*g^2;
// w -= lr/(1-b1^s) * m / (sqrt(v)/sqrt(1-b2^s) + eps).   All [n] f32 (f64 in checks); m and v may
// be bf16 (rounded to nearest even).
void AdamW(Tensor w, Tensor m, Tensor v, Tensor grad, const AdamWStep& step, const Context& ctx);

// Sum of squares of x [n] in double, fixed order, independent of the number of threads. NaN or
// infinity in x gives a non-finite sum. Host result: synchronises on CUDA.
double SumOfSquares(Tensor x, const Context& ctx);
// Sum of x [n] in double, likewise.
double Sum(Tensor x, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_OPTIMIZER_H_
