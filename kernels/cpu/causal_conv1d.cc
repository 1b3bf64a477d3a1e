#include "kernels/cpu/causal_conv1d.h"

#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

// Row pointers by value: GCC reloads them in the loop when they stay behind a reference.
template <typename T, int kTaps>
struct Rows {
  T* rows[kTaps];
};

template <typename T, int kTaps>
KRAIT_INLINE Rows<const T, kTaps> InputRows(const ConvToken<T>& in) {
  Rows<const T, kTaps> x;
  for (int k = 0; k < kTaps; ++k) x.rows[k] = in.rows[k];
  return x;
}
template <typename T, int kTaps>
KRAIT_INLINE Rows<const T, kTaps> WeightRows(const ConvToken<T>& in) {
  Rows<const T, kTaps> w;
  for (int k = 0; k < kTaps; ++k) w.rows[k] = in.w + k * in.w_stride;
  return w;
}

template <int kTaps, typename T>
KRAIT_INLINE void Forward(const ConvToken<T>& in, T* y) {
  const auto x = InputRows<T, kTaps>(in), w = WeightRows<T, kTaps>(in);
  const T* bias = in.bias;
#pragma omp simd
  for (int64_t i = 0; i < in.channels; ++i) {
    T u = bias[i];
    for (int k = 0; k < kTaps; ++k) u += w.rows[k][i] * x.rows[k][i];
    y[i] = Silu(u);
  }
}

template <int kTaps, typename T>
KRAIT_INLINE void Backward(const ConvToken<T>& in, const T* dy, T* const* d_rows, T* dw, T* dbias) {
  const auto x = InputRows<T, kTaps>(in), w = WeightRows<T, kTaps>(in);
  Rows<T, kTaps> dx;
  for (int k = 0; k < kTaps; ++k) dx.rows[k] = d_rows[k];
  const T* bias = in.bias;
  const int64_t stride = in.w_stride;
#pragma omp simd
  for (int64_t i = 0; i < in.channels; ++i) {
    T u = bias[i];
    for (int k = 0; k < kTaps; ++k) u += w.rows[k][i] * x.rows[k][i];
    const T sigmoid = Sigmoid(u);
    const T du = dy[i] * (sigmoid + u * sigmoid * (1 - sigmoid));
    dbias[i] += du;
    for (int k = 0; k < kTaps; ++k) dw[k * stride + i] += du * x.rows[k][i];
    for (int k = 0; k < kTaps - 1; ++k) dx.rows[k][i] += du * w.rows[k][i];
    dx.rows[kTaps - 1][i] = du * w.rows[kTaps - 1][i];
  }
}

template <typename T>
KRAIT_INLINE void ForwardToken(const ConvToken<T>& in, T* y) {
  in.taps == 4 ? Forward<4>(in, y) : Forward<8>(in, y);
}

template <typename T>
KRAIT_INLINE void BackwardToken(const ConvToken<T>& in, const T* dy, T* const* d_rows, T* dw,
                                T* dbias) {
  in.taps == 4 ? Backward<4>(in, dy, d_rows, dw, dbias) : Backward<8>(in, dy, d_rows, dw, dbias);
}

}  // namespace

KRAIT_CLONES void ConvSilu(const ConvToken<float>& in, float* y) { ForwardToken(in, y); }
void ConvSilu(const ConvToken<double>& in, double* y) { ForwardToken(in, y); }

KRAIT_CLONES void ConvSiluGradient(const ConvToken<float>& in, const float* dy,
                                   float* const* d_rows, float* dw, float* dbias) {
  BackwardToken(in, dy, d_rows, dw, dbias);
}
void ConvSiluGradient(const ConvToken<double>& in, const double* dy, double* const* d_rows,
                      double* dw, double* dbias) {
  BackwardToken(in, dy, d_rows, dw, dbias);
}

}  // namespace krait::cpu
