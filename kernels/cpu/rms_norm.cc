#include "kernels/cpu/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

// `ivdep`: h may be residual, element by element; nothing else overlaps.
template <typename T, typename S>
KRAIT_INLINE void ForwardLoop(const NormForwardArgs<T, S>& args, int64_t begin, int64_t end) {
  const int64_t n = args.residual.columns;
  const S* w = args.w;
  for (int64_t row = begin; row < end; ++row) {
    const T* h = args.residual[row];
    T* y = args.y[row];
    S squares = 0;
    if (args.delta.data != nullptr) {
      const T* residual = h;
      const T* delta = args.delta[row];
      T* sum = args.h[row];
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < n; ++i) {
        const S value = RoundTo<T>(Load(residual[i]) + Load(delta[i]));
        Store(value, &sum[i]);
        squares += value * value;
      }
      h = sum;
    } else {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < n; ++i) squares += Load(h[i]) * Load(h[i]);
    }
    const S rstd = std::isfinite(squares) ? 1 / std::sqrt(squares / static_cast<S>(n) + args.eps)
                                          : std::numeric_limits<S>::quiet_NaN();
    args.rstd[row] = rstd;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) Store(Load(h[i]) * rstd * w[i], &y[i]);
  }
}

template <bool accumulate, typename T, typename S>
KRAIT_INLINE void BackwardRow(int64_t n, const T* dy, const T* x, const S* w, S rstd, S mean,
                              const T* dx_in, T* dx, S* dw) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S d = Load(dy[i]);
    const S xhat = Load(x[i]) * rstd;
    const S gradient = rstd * (d * w[i] - xhat * mean);
    dw[i] += d * xhat;
    Store(accumulate ? Load(dx_in[i]) + gradient : gradient, &dx[i]);
  }
}

// Rows [begin, end): their dx, and the sum of their contributions to the weight gradient in `dw`.
template <typename T, typename S>
KRAIT_INLINE void BackwardLoop(const NormBackwardArgs<T, S>& args, int64_t begin, int64_t end,
                               S* dw) {
  const int64_t n = args.x.columns;
  const S* w = args.w;
  std::fill_n(dw, n, S{0});
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = args.dy[row];
    const T* x = args.x[row];
    S dot = 0;  // sum of dy * w * x
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < n; ++i) dot += Load(dy[i]) * w[i] * Load(x[i]);
    const S rstd = args.rstd[row];
    const S mean = dot * rstd / static_cast<S>(n);
    if (args.dx_in.data != nullptr) {
      BackwardRow<true>(n, dy, x, w, rstd, mean, args.dx_in[row], args.dx[row], dw);
    } else {
      BackwardRow<false>(n, dy, x, w, rstd, mean, static_cast<const T*>(nullptr), args.dx[row], dw);
    }
  }
}

KRAIT_CLONES void Forward(const NormForwardArgs<float, float>& args, int64_t begin, int64_t end) {
  ForwardLoop(args, begin, end);
}
void Forward(const NormForwardArgs<double, double>& args, int64_t begin, int64_t end) {
  ForwardLoop(args, begin, end);
}
KRAIT_CLONES void Forward(const NormForwardArgs<BF16, float>& args, int64_t begin, int64_t end) {
  ForwardLoop(args, begin, end);
}

KRAIT_CLONES void Backward(const NormBackwardArgs<float, float>& args, int64_t begin, int64_t end,
                           float* dw) {
  BackwardLoop(args, begin, end, dw);
}
void Backward(const NormBackwardArgs<double, double>& args, int64_t begin, int64_t end,
              double* dw) {
  BackwardLoop(args, begin, end, dw);
}
KRAIT_CLONES void Backward(const NormBackwardArgs<BF16, float>& args, int64_t begin, int64_t end,
                           float* dw) {
  BackwardLoop(args, begin, end, dw);
}

constexpr int64_t kPieceElements = 16384;
constexpr int64_t kMaxPieces = 256;
// A piece has enough rows that its partial sum is small beside the rows themselves.
constexpr int64_t kMinPieceRows = 64;

int64_t PieceRows(int64_t rows) {
  return std::max(kMinPieceRows, (rows + kMaxPieces - 1) / kMaxPieces);
}

}  // namespace

template <typename T, typename S>
void NormForward(const NormForwardArgs<T, S>& args) {
  ParallelFor(args.residual.rows, std::max<int64_t>(1, kPieceElements / args.residual.columns),
              [&](int64_t begin, int64_t end) { Forward(args, begin, end); });
}

int64_t NormPieces(int64_t rows) { return (rows + PieceRows(rows) - 1) / PieceRows(rows); }

template <typename T, typename S>
void NormBackward(const NormBackwardArgs<T, S>& args) {
  const int64_t rows = args.x.rows, n = args.x.columns, grain = PieceRows(rows);
  ParallelFor(rows, grain, [&](int64_t begin, int64_t end) {
    Backward(args, begin, end, args.partial + begin / grain * n);
  });
  SumRows(NormPieces(rows), n, args.partial, n, args.dw);
}

template void NormForward(const NormForwardArgs<float, float>&);
template void NormForward(const NormForwardArgs<double, double>&);
template void NormForward(const NormForwardArgs<BF16, float>&);
template void NormBackward(const NormBackwardArgs<float, float>&);
template void NormBackward(const NormBackwardArgs<double, double>&);
template void NormBackward(const NormBackwardArgs<BF16, float>&);

}  // namespace krait::cpu
