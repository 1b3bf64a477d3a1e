#include "kernels/cpu/moe.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

template <typename T>
KRAIT_INLINE void SoftmaxLoop(int64_t experts, const T* logits, T* __restrict p) {
  const T largest = *std::max_element(logits, logits + experts);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < experts; ++e) {
    p[e] = Exp(logits[e] - largest);
    sum += p[e];
  }
  for (int64_t e = 0; e < experts; ++e) p[e] /= sum;
}

template <typename T>
KRAIT_INLINE double LogSumExpLoop(int64_t experts, const T* logits) {
  const T largest = *std::max_element(logits, logits + experts);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < experts; ++e) sum += Exp(logits[e] - largest);
  return static_cast<double>(largest) + std::log(static_cast<double>(sum));
}

template <typename T>
void TopKLoop(int64_t experts, const T* p, int64_t k, int32_t* choice) {
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (std::find(choice, choice + j, e) != choice + j) continue;
      if (best < 0 || p[e] > p[best]) best = e;
    }
    choice[j] = static_cast<int32_t>(best);
  }
}

template <typename T>
KRAIT_INLINE void ScaleRowLoop(int64_t n, T a, const T* __restrict x, T* __restrict y,
                               bool accumulate) {
  if (accumulate) {
    for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = a * x[i];
  }
}

template <typename T>
KRAIT_INLINE void ScaleInPlaceLoop(int64_t n, T a, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] *= a;
}

template <typename T>
KRAIT_INLINE T DotAndScaleLoop(int64_t n, T a, const T* dy, const T* x, T* y) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; ++i) {
    dot += x[i] * dy[i];
    y[i] = a * dy[i];
  }
  return dot;
}

}  // namespace

KRAIT_CLONES void Softmax(int64_t experts, const float* logits, float* p) {
  SoftmaxLoop(experts, logits, p);
}
void Softmax(int64_t experts, const double* logits, double* p) { SoftmaxLoop(experts, logits, p); }

KRAIT_CLONES double LogSumExp(int64_t experts, const float* logits) {
  return LogSumExpLoop(experts, logits);
}
double LogSumExp(int64_t experts, const double* logits) { return LogSumExpLoop(experts, logits); }

void TopK(int64_t experts, const float* p, int64_t k, int32_t* choice) {
  TopKLoop(experts, p, k, choice);
}
void TopK(int64_t experts, const double* p, int64_t k, int32_t* choice) {
  TopKLoop(experts, p, k, choice);
}

KRAIT_CLONES void ScaleRow(int64_t n, float a, const float* x, float* y, bool accumulate) {
  ScaleRowLoop(n, a, x, y, accumulate);
}
void ScaleRow(int64_t n, double a, const double* x, double* y, bool accumulate) {
  ScaleRowLoop(n, a, x, y, accumulate);
}

KRAIT_CLONES void ScaleInPlace(int64_t n, float a, float* y) { ScaleInPlaceLoop(n, a, y); }
void ScaleInPlace(int64_t n, double a, double* y) { ScaleInPlaceLoop(n, a, y); }

KRAIT_CLONES float DotAndScaleRow(int64_t n, float a, const float* dy, const float* x, float* y) {
  return DotAndScaleLoop(n, a, dy, x, y);
}
double DotAndScaleRow(int64_t n, double a, const double* dy, const double* x, double* y) {
  return DotAndScaleLoop(n, a, dy, x, y);
}

}  // namespace krait::cpu
