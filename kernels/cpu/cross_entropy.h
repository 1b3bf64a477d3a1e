// Rows of the softmax cross-entropy on the CPU; see kernels/cross_entropy.h.
#ifndef KRAIT_KERNELS_CPU_CROSS_ENTROPY_H_
#define KRAIT_KERNELS_CPU_CROSS_ENTROPY_H_

#include <cstdint>

namespace krait::cpu {

// The largest of x[0,n); -infinity for n = 0.
float Maximum(int64_t n, const float* x);
double Maximum(int64_t n, const double* x);

// The sum of exp(x - maximum) over x[0,n).
double SumExp(int64_t n, const float* x, float maximum);
double SumExp(int64_t n, const double* x, double maximum);

// y[0,n) = factor * exp(x - maximum); y may be x.
void ScaledExp(int64_t n, const float* x, float maximum, float factor, float* y);
void ScaledExp(int64_t n, const double* x, double maximum, double factor, double* y);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_CROSS_ENTROPY_H_
