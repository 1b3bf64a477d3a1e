#include "kernels/cpu/cross_entropy.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

// Exponentials are added in T over a block, and blocks in double: the sum over a vocabulary of any
// size keeps the accuracy of T.
constexpr int64_t kSumBlock = 1024;

template <typename T>
KRAIT_INLINE T MaximumLoop(int64_t n, const T* x) {
  T maximum = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  return maximum;
}

template <typename T>
KRAIT_INLINE double SumExpLoop(int64_t n, const T* x, T maximum) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += Exp(x[i] - maximum);
    total += static_cast<double>(sum);
  }
  return total;
}

template <typename T>
KRAIT_INLINE void ScaledExpLoop(int64_t n, const T* x, T maximum, T factor, T* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] = Exp(x[i] - maximum) * factor;
}

}  // namespace

KRAIT_CLONES float Maximum(int64_t n, const float* x) { return MaximumLoop(n, x); }
double Maximum(int64_t n, const double* x) { return MaximumLoop(n, x); }

KRAIT_CLONES double SumExp(int64_t n, const float* x, float maximum) {
  return SumExpLoop(n, x, maximum);
}
double SumExp(int64_t n, const double* x, double maximum) { return SumExpLoop(n, x, maximum); }

KRAIT_CLONES void ScaledExp(int64_t n, const float* x, float maximum, float factor, float* y) {
  ScaledExpLoop(n, x, maximum, factor, y);
}
void ScaledExp(int64_t n, const double* x, double maximum, double factor, double* y) {
  ScaledExpLoop(n, x, maximum, factor, y);
}

}  // namespace krait::cpu
