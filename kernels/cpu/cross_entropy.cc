#include "kernels/cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
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

// The sum of exp(x - maximum); the terms are kept in `terms` unless it is null.
template <bool keep, typename T>
KRAIT_INLINE double SumExpLoop(int64_t n, const T* x, T maximum, T* terms) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const T term = Exp(x[i] - maximum);
      if constexpr (keep) terms[i] = term;
      sum += term;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <typename T>
KRAIT_INLINE T CrossEntropyLoop(int64_t n, const T* logits, int64_t target, T scale, T* d_logits) {
  const T maximum = MaximumLoop(n, logits);
  const T picked = logits[target];  // d_logits may lie over logits
  const double sum = d_logits == nullptr ? SumExpLoop<false>(n, logits, maximum, d_logits)
                                         : SumExpLoop<true>(n, logits, maximum, d_logits);
  if (d_logits != nullptr) {
    const T factor = static_cast<T>(static_cast<double>(scale) / sum);
    for (int64_t i = 0; i < n; ++i) d_logits[i] *= factor;
    d_logits[target] -= scale;
  }
  return static_cast<T>(std::log(sum) + static_cast<double>(maximum - picked));
}

}  // namespace

KRAIT_CLONES float CrossEntropyRow(int64_t n, const float* logits, int64_t target, float scale,
                                   float* d_logits) {
  return CrossEntropyLoop(n, logits, target, scale, d_logits);
}
double CrossEntropyRow(int64_t n, const double* logits, int64_t target, double scale,
                       double* d_logits) {
  return CrossEntropyLoop(n, logits, target, scale, d_logits);
}

}  // namespace krait::cpu
