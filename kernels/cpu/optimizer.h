// AdamW and sums on the CPU; see kernels/optimizer.h. T is the dtype of weight and gradient, M of
// the moments: float/float, float/BF16, double/double.
#ifndef KRAIT_KERNELS_CPU_OPTIMIZER_H_
#define KRAIT_KERNELS_CPU_OPTIMIZER_H_

#include <cstdint>

#include "kernels/base/dtype.h"

namespace krait::cpu {

// The constants of one update, folded in double.
template <typename T>
struct AdamWFactors {
  T keep;              // 1 - lr * weight_decay
  T beta1, one_beta1;  // beta1, 1 - beta1
  T beta2, one_beta2;
  T step_size;      // lr / (1 - beta1^s)
  T inverse_root2;  // 1 / sqrt(1 - beta2^s)
  T eps;
  T grad_scale;
};

void AdamWUpdate(int64_t n, const AdamWFactors<float>& f, const float* grad, float* w, float* m,
                 float* v);
void AdamWUpdate(int64_t n, const AdamWFactors<float>& f, const float* grad, float* w, BF16* m,
                 BF16* v);
void AdamWUpdate(int64_t n, const AdamWFactors<double>& f, const double* grad, double* w, double* m,
                 double* v);

// Sums of x[0,n) and of its squares, in double.
double SumPiece(int64_t n, const float* x);
double SumPiece(int64_t n, const double* x);
double SumOfSquaresPiece(int64_t n, const float* x);
double SumOfSquaresPiece(int64_t n, const double* x);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_OPTIMIZER_H_
