#include "kernels/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/optimizer.h"

namespace krait {
namespace {

constexpr int64_t kUpdatePiece = 16384;

template <typename T>
cpu::AdamWFactors<T> Factors(const AdamWStep& step) {
  const auto s = static_cast<double>(step.step);
  const auto cast = [](double x) { return static_cast<T>(x); };
  return {.keep = cast(1 - step.lr * step.weight_decay),
          .beta1 = cast(step.beta1),
          .one_beta1 = cast(1 - step.beta1),
          .beta2 = cast(step.beta2),
          .one_beta2 = cast(1 - step.beta2),
          .step_size = cast(step.lr / (1 - std::pow(step.beta1, s))),
          .inverse_root2 = cast(1 / std::sqrt(1 - std::pow(step.beta2, s))),
          .eps = cast(step.eps),
          .grad_scale = cast(step.grad_scale)};
}

template <typename T, typename M>
void Update(Tensor w, Tensor m, Tensor v, Tensor grad, const AdamWStep& step) {
  const cpu::AdamWFactors<T> factors = Factors<T>(step);
  const T* gradient = cpu::DenseData<T>(grad);
  T* weight = cpu::DenseData<T>(w);
  M* mean = cpu::DenseData<M>(m);
  M* square = cpu::DenseData<M>(v);
  ParallelFor(w.numel(), kUpdatePiece, [&](int64_t begin, int64_t end) {
    cpu::AdamWUpdate(end - begin, factors, gradient + begin, weight + begin, mean + begin,
                     square + begin);
  });
}

// Adds the values of fn over at most kSumPieces fixed pieces of [0, n), in order. The pieces depend
// on n alone.
constexpr int64_t kSumPieces = 1024;
constexpr int64_t kMinSumPiece = 16384;

template <typename Fn>
double SumOverPieces(int64_t n, const Fn& fn) {
  const int64_t grain = std::max(kMinSumPiece, (n + kSumPieces - 1) / kSumPieces);
  std::array<double, kSumPieces> partial{};
  ParallelFor(n, grain, [&](int64_t begin, int64_t end) {
    partial[static_cast<size_t>(begin / grain)] = fn(begin, end);
  });
  double sum = 0;
  for (const double value : partial) sum += value;
  return sum;
}

}  // namespace

void AdamW(Tensor w, Tensor m, Tensor v, Tensor grad, const AdamWStep& step, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer);
  if (op.planning()) return;
  KRAIT_CHECK(m.numel() == w.numel() && v.numel() == w.numel() && grad.numel() == w.numel());
  KRAIT_CHECK(m.dtype() == v.dtype() && step.step >= 1);
  cpu::DispatchFloat(w, "AdamW", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kDTypeOf<T> == DType::kF32) {
      if (m.dtype() == DType::kBF16) return Update<float, BF16>(w, m, v, grad, step);
    }
    Update<T, T>(w, m, v, grad, step);
  });
}

double SumOfSquares(Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer);
  if (op.planning()) return 0;
  double sum = 0;
  cpu::DispatchFloat(x, "SumOfSquares", [&](auto zero) {
    const auto* data = cpu::DenseData<decltype(zero)>(x);
    sum = SumOverPieces(x.numel(), [data](int64_t begin, int64_t end) {
      return cpu::SumOfSquaresPiece(end - begin, data + begin);
    });
  });
  return sum;
}

double Sum(Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer);
  if (op.planning()) return 0;
  double sum = 0;
  cpu::DispatchFloat(x, "Sum", [&](auto zero) {
    const auto* data = cpu::DenseData<decltype(zero)>(x);
    sum = SumOverPieces(x.numel(), [data](int64_t begin, int64_t end) {
      return cpu::SumPiece(end - begin, data + begin);
    });
  });
  return sum;
}

}  // namespace krait
