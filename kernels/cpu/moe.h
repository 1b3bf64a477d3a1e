// The loops of expert routing over one token or row; see kernels/moe.h for the formulas.
#ifndef KRAIT_KERNELS_CPU_MOE_H_
#define KRAIT_KERNELS_CPU_MOE_H_

#include <cstdint>

namespace krait::cpu {

// p[0,E) = softmax(logits).
void Softmax(int64_t experts, const float* logits, float* p);
void Softmax(int64_t experts, const double* logits, double* p);

double LogSumExp(int64_t experts, const float* logits);
double LogSumExp(int64_t experts, const double* logits);

// The k largest of p in descending order, equal ones in ascending index. Indices are distinct and
// in range whatever p holds, NaN included.
void TopK(int64_t experts, const float* p, int64_t k, int32_t* choice);
void TopK(int64_t experts, const double* p, int64_t k, int32_t* choice);

// y[0,n) = (y +) a * x.
void ScaleRow(int64_t n, float a, const float* x, float* y, bool accumulate);
void ScaleRow(int64_t n, double a, const double* x, double* y, bool accumulate);

// y[0,n) *= a.
void ScaleInPlace(int64_t n, float a, float* y);
void ScaleInPlace(int64_t n, double a, double* y);

// Returns x . dy and writes y = a * dy; y may be x or dy.
float DotAndScaleRow(int64_t n, float a, const float* dy, const float* x, float* y);
double DotAndScaleRow(int64_t n, double a, const double* dy, const double* x, double* y);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_MOE_H_
