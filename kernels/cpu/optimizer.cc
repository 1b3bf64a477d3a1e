#include "kernels/cpu/optimizer.h"

#include <cmath>

#include "kernels/cpu/bf16.h"
#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

// The update uses the moments before they are rounded to M.
template <typename T, typename M>
KRAIT_INLINE void AdamWLoop(int64_t n, const AdamWFactors<T>& factors, const T* __restrict grad,
                            T* __restrict w, M* __restrict m, M* __restrict v) {
  const AdamWFactors<T> f = factors;
  for (int64_t i = 0; i < n; ++i) {
    const T g = grad[i] * f.grad_scale;
    const T mean = f.beta1 * Load(m[i]) + f.one_beta1 * g;
    const T square = f.beta2 * Load(v[i]) + f.one_beta2 * (g * g);
    Store(mean, &m[i]);
    Store(square, &v[i]);
    w[i] = w[i] * f.keep - f.step_size * (mean / (std::sqrt(square) * f.inverse_root2 + f.eps));
  }
}

template <typename T>
KRAIT_INLINE double SumLoop(int64_t n, const T* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

template <typename T>
KRAIT_INLINE double SumOfSquaresLoop(int64_t n, const T* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

}  // namespace

KRAIT_CLONES void AdamWUpdate(int64_t n, const AdamWFactors<float>& f, const float* grad, float* w,
                              float* m, float* v) {
  AdamWLoop(n, f, grad, w, m, v);
}
KRAIT_CLONES void AdamWUpdate(int64_t n, const AdamWFactors<float>& f, const float* grad, float* w,
                              BF16* m, BF16* v) {
  AdamWLoop(n, f, grad, w, m, v);
}
void AdamWUpdate(int64_t n, const AdamWFactors<double>& f, const double* grad, double* w, double* m,
                 double* v) {
  AdamWLoop(n, f, grad, w, m, v);
}

KRAIT_CLONES double SumPiece(int64_t n, const float* x) { return SumLoop(n, x); }
double SumPiece(int64_t n, const double* x) { return SumLoop(n, x); }
KRAIT_CLONES double SumOfSquaresPiece(int64_t n, const float* x) { return SumOfSquaresLoop(n, x); }
double SumOfSquaresPiece(int64_t n, const double* x) { return SumOfSquaresLoop(n, x); }

}  // namespace krait::cpu
