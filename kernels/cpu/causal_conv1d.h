// The loops of the causal convolution; see kernels/causal_conv1d.h for the formulas.
//
// Which row a tap reads (x, the initial state, or zeros) is decided once per token for all
// channels; the loops over channels see row pointers only. The number of taps is 4 or 8 there, so
// that they unroll: shorter kernels have zero taps in front.
//
// Learned: a loop over taps around one over channels is jammed by GCC into scalar code; taps
// innermost and unrolled is three times as fast, and the sigmoid is then the larger part. Walking
// down time in blocks of channels is half as fast as whole rows: every row is another page.
#ifndef KRAIT_KERNELS_CPU_CAUSAL_CONV1D_H_
#define KRAIT_KERNELS_CPU_CAUSAL_CONV1D_H_

#include <cstdint>

namespace krait::cpu {

inline constexpr int64_t kMaxConvTaps = 8;
inline int64_t PaddedConvTaps(int64_t taps) { return taps <= 4 ? 4 : 8; }

// One token: u[i] = bias[i] + sum_k w[k * w_stride + i] * rows[k][i], i in [0, channels), where k
// runs to `taps` = PaddedConvTaps.
template <typename T>
struct ConvToken {
  int64_t channels, taps;
  const T* rows[kMaxConvTaps];  // never null
  const T* w;
  int64_t w_stride;
  const T* bias;
};

// y[i] = silu(u[i]).
void ConvSilu(const ConvToken<float>& in, float* y);
void ConvSilu(const ConvToken<double>& in, double* y);

// With du = dy * silu'(u), adds w[k] * du to d_rows[k], du * rows[k] to dw[k * w_stride + i] and
// du to dbias. d_rows are never null; they do not overlap, but several may be one row whose content
// is of no interest. The last one, the token itself, is overwritten.
void ConvSiluGradient(const ConvToken<float>& in, const float* dy, float* const* d_rows, float* dw,
                      float* dbias);
void ConvSiluGradient(const ConvToken<double>& in, const double* dy, double* const* d_rows,
                      double* dw, double* dbias);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_CAUSAL_CONV1D_H_
