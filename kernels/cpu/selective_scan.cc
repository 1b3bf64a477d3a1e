#include "kernels/cpu/selective_scan.h"

#include <algorithm>

#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

constexpr int64_t W = kScanBlock;
// Steps that rows to be read or written are prefetched ahead.
constexpr int64_t kAhead = 4;

template <typename T>
KRAIT_INLINE void LoadRow(T* __restrict row, const T* __restrict from, int64_t width) {
  if (width == W) {
    for (int64_t i = 0; i < W; ++i) row[i] = from[i];
  } else {
    for (int64_t i = 0; i < W; ++i) row[i] = i < width ? from[i] : T(0);
  }
}

// The next step's row lies on another page, which hardware prefetchers do not foresee.
template <typename T>
KRAIT_INLINE void Prefetch(const T* row) {
  for (int64_t i = 0; i < W; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + i);
  }
}

template <typename T>
KRAIT_INLINE void StoreRow(T* __restrict to, const T* __restrict row, int64_t width) {
  if (width == W) {
    for (int64_t i = 0; i < W; ++i) to[i] = row[i];
  } else {
    for (int64_t i = 0; i < width; ++i) to[i] = row[i];
  }
}

template <typename T>
KRAIT_INLINE void ForwardChunk(const ScanChunk<T>& in, T* __restrict h, TimeRows<T> y) {
  const int64_t states = in.states;
  const T* __restrict a2 = in.a2;
  alignas(64) T x[W], z[W], dt[W], dtx[W], s[W];
  for (int64_t t = 0; t < in.steps; ++t) {
    if (in.Reset(t)) std::fill_n(h, states * W, T(0));
    if (t + kAhead < in.steps) {
      Prefetch(in.x[t + kAhead]), Prefetch(in.z[t + kAhead]), Prefetch(in.dt_raw[t + kAhead]);
      Prefetch(y[t + kAhead]);
    }
    LoadRow(x, in.x[t], in.width);
    LoadRow(z, in.z[t], in.width);
    LoadRow(dt, in.dt_raw[t], in.width);
    for (int64_t i = 0; i < W; ++i) {
      dt[i] = Softplus(dt[i] + in.dt_bias[i]);
      dtx[i] = dt[i] * x[i];
      s[i] = in.d[i] * x[i];
    }
    const T* b = in.b[t];
    const T* c = in.c[t];
    for (int64_t n = 0; n < states; ++n) {
      const T bn = b[n], cn = c[n];
      T* __restrict hn = h + n * W;
      const T* __restrict an = a2 + n * W;
      for (int64_t i = 0; i < W; ++i) {
        hn[i] = Exp2NonPositive(dt[i], an[i]) * hn[i] + bn * dtx[i];
        s[i] += cn * hn[i];
      }
    }
    for (int64_t i = 0; i < W; ++i) s[i] *= Silu(z[i]);
    StoreRow(y[t], s, in.width);
  }
}

template <typename T>
KRAIT_INLINE void DecayStep(T* __restrict decay, const T* __restrict dt, const T* __restrict a2) {
  for (int64_t i = 0; i < W; ++i) decay[i] = Exp2NonPositive(dt[i], a2[i]);
}

// One state's step of all lanes: after = decay * before + b dt x, s += c after. Returns the sum
// over lanes of ds * after, the gradient of c.
template <typename T>
KRAIT_INLINE T KeepStep(const T* __restrict decay, const T* __restrict before, T* __restrict after,
                        T* __restrict s, const T* __restrict dtx, const T* __restrict ds, T b,
                        T c) {
  T dc = 0;
#pragma omp simd reduction(+ : dc)
  for (int64_t i = 0; i < W; ++i) {
    after[i] = decay[i] * before[i] + b * dtx[i];
    s[i] += c * after[i];
    dc += ds[i] * after[i];
  }
  return dc;
}

// First half: the states h[t+1] after each step and the decays a[t], the output, and what of the
// gradient is local to a token and channel. Second half: time backwards,
//   g_t = dy_t silu(z_t) C_t + carry,  carry = a_t g_t  (the gradient of h_{t-1}).
template <typename T>
KRAIT_INLINE void BackwardChunk(const ScanChunk<T>& in, const ScanChunkGradients<T>& grad,
                                T* __restrict workspace) {
  const int64_t states = in.states, row = states * W;
  T* __restrict h = workspace;
  T* __restrict a = h + (kScanChunk + 1) * row;
  T* __restrict xs = a + kScanChunk * row;
  T* __restrict dts = xs + kScanChunk * W;
  T* __restrict slopes = dts + kScanChunk * W;  // d softplus / d raw
  T* __restrict dss = slopes + kScanChunk * W;  // gradient of s
  T* __restrict chunk_da = dss + kScanChunk * W;
  const T* __restrict a2 = in.a2;
  alignas(64) T z[W], dy[W], s[W], dtx[W], gate[W], dz[W];
  for (int64_t t = 0; t < in.steps; ++t) {
    T* __restrict x = xs + t * W;
    T* __restrict dt = dts + t * W;
    T* __restrict slope = slopes + t * W;
    T* __restrict ds = dss + t * W;
    if (t + kAhead < in.steps) {
      Prefetch(in.x[t + kAhead]), Prefetch(in.z[t + kAhead]);
      Prefetch(grad.dy[t + kAhead]), Prefetch(in.dt_raw[t + kAhead]);
      Prefetch(grad.dz[t + kAhead]);
      if (grad.y.data != nullptr) Prefetch(grad.y[t + kAhead]);
    }
    LoadRow(x, in.x[t], in.width);
    LoadRow(z, in.z[t], in.width);
    LoadRow(dy, grad.dy[t], in.width);
    LoadRow(dt, in.dt_raw[t], in.width);
    for (int64_t i = 0; i < W; ++i) {
      const T raw = dt[i] + in.dt_bias[i];
      dt[i] = Softplus(raw);
      slope[i] = Sigmoid(raw);
      dtx[i] = dt[i] * x[i];
      s[i] = in.d[i] * x[i];
      const T sigmoid = Sigmoid(z[i]);
      gate[i] = z[i] * sigmoid;
      ds[i] = dy[i] * gate[i];
      dz[i] = dy[i] * (sigmoid + gate[i] * (1 - sigmoid));  // times s, to come
    }
    T* before = h + t * row;
    T* after = before + row;
    T* decay = a + t * row;
    const T* b = in.b[t];
    const T* c = in.c[t];
    T* dc = grad.dc + t * states;
    if (in.Reset(t)) {
      // A zero decay cuts the state here and its gradient on the way back.
      std::fill_n(decay, row, T(0));
      for (int64_t n = 0; n < states; ++n) {
        dc[n] = KeepStep(decay + n * W, before + n * W, after + n * W, s, dtx, ds, b[n], c[n]);
      }
    } else {
      for (int64_t n = 0; n < states; ++n) {
        DecayStep(decay + n * W, dt, a2 + n * W);
        dc[n] = KeepStep(decay + n * W, before + n * W, after + n * W, s, dtx, ds, b[n], c[n]);
      }
    }
    for (int64_t i = 0; i < W; ++i) {
      dz[i] *= s[i];
      s[i] *= gate[i];
    }
    StoreRow(grad.dz[t], dz, in.width);
    if (grad.y.data != nullptr) StoreRow(grad.y[t], s, in.width);
  }

  // Sums over time are taken within the chunk first: sums of sums lose less.
  alignas(64) T d_dt[W], d_dtx[W], dd[W] = {}, d_dt_bias[W] = {};
  std::fill_n(chunk_da, row, T(0));
  for (int64_t t = in.steps - 1; t >= 0; --t) {
    if (t >= kAhead) Prefetch(grad.dx[t - kAhead]), Prefetch(grad.d_dt_raw[t - kAhead]);
    const T* __restrict x = xs + t * W;
    const T* __restrict dt = dts + t * W;
    const T* __restrict slope = slopes + t * W;
    const T* __restrict ds = dss + t * W;
    for (int64_t i = 0; i < W; ++i) {
      d_dt[i] = 0;
      d_dtx[i] = 0;
      dtx[i] = dt[i] * x[i];
    }
    const T* b = in.b[t];
    const T* c = in.c[t];
    for (int64_t n = 0; n < states; ++n) {
      const T bn = b[n], cn = c[n];
      const T* __restrict an = a2 + n * W;
      const T* __restrict before = h + t * row + n * W;
      const T* __restrict decay = a + t * row + n * W;
      T* __restrict carry = grad.carry + n * W;
      T* __restrict da = chunk_da + n * W;
      T db = 0;
#pragma omp simd reduction(+ : db)
      for (int64_t i = 0; i < W; ++i) {
        const T g = ds[i] * cn + carry[i];
        db += g * dtx[i];
        d_dtx[i] += g * bn;
        const T next = decay[i] * g;
        const T q = next * before[i];
        d_dt[i] += an[i] * q;
        da[i] += dt[i] * q;
        carry[i] = next;
      }
      grad.db[t * states + n] = db;
    }
    constexpr T ln2 = static_cast<T>(0x1.62e42fefa39efp-1);
    for (int64_t i = 0; i < W; ++i) {
      const T d_raw = (d_dt[i] * ln2 + d_dtx[i] * x[i]) * slope[i];
      dd[i] += ds[i] * x[i];
      d_dt_bias[i] += d_raw;
      d_dtx[i] = d_dtx[i] * dt[i] + ds[i] * in.d[i];
      d_dt[i] = d_raw;
    }
    StoreRow(grad.dx[t], d_dtx, in.width);
    StoreRow(grad.d_dt_raw[t], d_dt, in.width);
  }
  for (int64_t i = 0; i < row; ++i) grad.da[i] += chunk_da[i];
  for (int64_t i = 0; i < W; ++i) {
    grad.dd[i] += dd[i];
    grad.d_dt_bias[i] += d_dt_bias[i];
  }
}

}  // namespace

KRAIT_CLONES void ScanForwardChunk(const ScanChunk<float>& in, float* h, TimeRows<float> y) {
  ForwardChunk(in, h, y);
}
void ScanForwardChunk(const ScanChunk<double>& in, double* h, TimeRows<double> y) {
  ForwardChunk(in, h, y);
}

KRAIT_CLONES void ScanBackwardChunk(const ScanChunk<float>& in,
                                    const ScanChunkGradients<float>& grad, float* workspace) {
  BackwardChunk(in, grad, workspace);
}
void ScanBackwardChunk(const ScanChunk<double>& in, const ScanChunkGradients<double>& grad,
                       double* workspace) {
  BackwardChunk(in, grad, workspace);
}

}  // namespace krait::cpu
