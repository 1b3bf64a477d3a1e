#include "kernels/cpu/activation.h"

#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

template <typename T>
KRAIT_INLINE void SwiGluLoop(int64_t n, const T* gate, const T* up, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * Sigmoid(gate[i]) * up[i];
}

// silu'(g) = s + g s (1 - s) with s = sigmoid(g). Each element is read before it is written, so the
// gradients may lie over the inputs: `ivdep` says that no other overlap exists.
template <typename T>
KRAIT_INLINE void SwiGluGradientLoop(int64_t n, const T* dy, const T* gate, const T* up, T* d_gate,
                                     T* d_up) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T g = gate[i], u = up[i], d = dy[i];
    const T s = Sigmoid(g);
    const T silu = g * s;
    d_gate[i] = d * u * (s + silu * (1 - s));
    d_up[i] = d * silu;
  }
}

template <typename T>
KRAIT_INLINE void SwiGluGradientWithOutputLoop(int64_t n, const T* dy, const T* gate, const T* up,
                                               T* d_gate, T* d_up, T* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T g = gate[i], u = up[i], d = dy[i];
    const T s = Sigmoid(g);
    const T silu = g * s;
    d_gate[i] = d * u * (s + silu * (1 - s));
    d_up[i] = d * silu;
    y[i] = silu * u;
  }
}

template <typename T>
KRAIT_INLINE void AddLoop(int64_t n, const T* x, T* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

KRAIT_CLONES void SwiGluGradientAlone(int64_t n, const float* dy, const float* gate,
                                      const float* up, float* d_gate, float* d_up) {
  SwiGluGradientLoop(n, dy, gate, up, d_gate, d_up);
}

KRAIT_CLONES void SwiGluGradientWithOutput(int64_t n, const float* dy, const float* gate,
                                           const float* up, float* d_gate, float* d_up, float* y) {
  SwiGluGradientWithOutputLoop(n, dy, gate, up, d_gate, d_up, y);
}

}  // namespace

KRAIT_CLONES void SwiGlu(int64_t n, const float* gate, const float* up, float* y) {
  SwiGluLoop(n, gate, up, y);
}
void SwiGlu(int64_t n, const double* gate, const double* up, double* y) {
  SwiGluLoop(n, gate, up, y);
}

void SwiGluGradient(int64_t n, const float* dy, const float* gate, const float* up, float* d_gate,
                    float* d_up, float* y) {
  if (y == nullptr) {
    SwiGluGradientAlone(n, dy, gate, up, d_gate, d_up);
  } else {
    SwiGluGradientWithOutput(n, dy, gate, up, d_gate, d_up, y);
  }
}
void SwiGluGradient(int64_t n, const double* dy, const double* gate, const double* up,
                    double* d_gate, double* d_up, double* y) {
  if (y == nullptr) {
    SwiGluGradientLoop(n, dy, gate, up, d_gate, d_up);
  } else {
    SwiGluGradientWithOutputLoop(n, dy, gate, up, d_gate, d_up, y);
  }
}

KRAIT_CLONES void Add(int64_t n, const float* x, float* y) { AddLoop(n, x, y); }
void Add(int64_t n, const double* x, double* y) { AddLoop(n, x, y); }

}  // namespace krait::cpu
