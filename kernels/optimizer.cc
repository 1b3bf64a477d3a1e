#include "kernels/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/optimizer.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/optimizer.h"

namespace krait {
namespace {

constexpr int64_t kUpdatePiece = 16384;

template <typename T>
cpu::AdamWFactors<T> Factors(const AdamWSettings& settings, double scale, const double* control) {
  const auto cast = [](double x) { return static_cast<T>(x); };
  return {.keep = cast(1 - settings.lr * settings.weight_decay),
          .beta1 = cast(settings.beta1),
          .one_beta1 = cast(1 - settings.beta1),
          .beta2 = cast(settings.beta2),
          .one_beta2 = cast(1 - settings.beta2),
          .step_size = cast(control[kAdamWStepSize] * scale),
          .inverse_root2 = cast(control[kAdamWRootScale]),
          .eps = cast(settings.eps),
          .grad_scale = cast(control[kAdamWGradScale])};
}

// Ranges [R,2] of [0, n), passed through in order.
class RangeWalk {
 public:
  RangeWalk(int64_t n, Tensor ranges) : n_(n) {
    if (!ranges.defined()) return;
    range_ = cpu::DenseData<int64_t>(ranges);
    count_ = ranges.dim(0);
    for (int64_t r = 0, done = 0; r < count_; done = range_[2 * r + 1], ++r) {
      const int64_t begin = range_[2 * r], end = range_[2 * r + 1];
      KRAIT_CHECK(begin >= done && end >= begin && end <= n);
    }
  }
  // The range that holds `element`, or -1; elements come in ascending order.
  int64_t At(int64_t element) {
    while (next_ < count_ && range_[2 * next_ + 1] <= element) ++next_;
    return next_ < count_ && range_[2 * next_] <= element ? next_ : -1;
  }
  // Where the answer of the last At may change.
  int64_t end(int64_t at) const {
    if (next_ == count_) return n_;
    return at >= 0 ? range_[2 * next_ + 1] : range_[2 * next_];
  }

 private:
  int64_t n_, count_ = 0, next_ = 0;
  const int64_t* range_ = nullptr;
};

// Calls fn(begin, end, whether they decay, the scale of their steps) for pieces that cover [0, n).
template <typename Fn>
void ForEachRange(int64_t n, Tensor decay_ranges, const StepScales& scales, const Fn& fn) {
  RangeWalk decay(n, decay_ranges), scaled(n, scales.ranges);
  KRAIT_CHECK(!scales.ranges.defined() || scales.scales.numel() == scales.ranges.dim(0));
  for (int64_t begin = 0; begin < n;) {
    const int64_t decays = decay.At(begin), at = scaled.At(begin);
    const int64_t end = std::min(decay.end(decays), scaled.end(at));
    fn(begin, end, decays >= 0, at >= 0 ? cpu::DenseData<double>(scales.scales)[at] : 1.0);
    begin = end;
  }
}

template <typename T, typename M>
void Update(Tensor w, Tensor m, Tensor v, Tensor grad, Tensor decay_ranges,
            const StepScales& step_scales, const double* control, const AdamWSettings& settings) {
  const T* gradient = cpu::DenseData<T>(grad);
  T* weight = cpu::DenseData<T>(w);
  M* mean = cpu::DenseData<M>(m);
  M* square = cpu::DenseData<M>(v);
  const auto update = [&](int64_t first, int64_t last, bool decays, double scale) {
    AdamWSettings own = settings;
    if (!decays) own.weight_decay = 0;
    const cpu::AdamWFactors<T> factors = Factors<T>(own, scale, control);
    ParallelFor(last - first, kUpdatePiece, [&](int64_t begin, int64_t end) {
      begin += first;
      cpu::AdamWUpdate(end + first - begin, factors, gradient + begin, weight + begin, mean + begin,
                       square + begin);
    });
  };
  ForEachRange(w.numel(), decay_ranges, step_scales, update);
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

void AddSumOfSquares(Tensor sum, Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer, "AddSumOfSquares", {{"sum", sum}, {"x", x}});
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor partial = ctx.scratch->Alloc(DType::kF64, {cuda::kSumBlocks});
    if (op.planning()) return;
    KRAIT_CUDA(AddSumOfSquares(sum, x, partial, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  const Tensor widened = wide.In(x);
  if (op.planning()) return;
  cpu::DispatchFloat(widened, op.name(), [&](auto zero) {
    const auto* data = cpu::DenseData<decltype(zero)>(widened);
    sum.data<double>()[0] += SumOverPieces(x.numel(), [data](int64_t begin, int64_t end) {
      return cpu::SumOfSquaresPiece(end - begin, data + begin);
    });
  });
}

void AddSum(Tensor sum, Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer, "AddSum", {{"sum", sum}, {"x", x}});
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor partial = ctx.scratch->Alloc(DType::kF64, {cuda::kSumBlocks});
    if (op.planning()) return;
    KRAIT_CUDA(AddSum(sum, x, partial, ctx));
    return;
  }
  if (op.planning()) return;
  cpu::DispatchFloat(x, op.name(), [&](auto zero) {
    const auto* data = cpu::DenseData<decltype(zero)>(x);
    sum.data<double>()[0] += SumOverPieces(x.numel(), [data](int64_t begin, int64_t end) {
      return cpu::SumPiece(end - begin, data + begin);
    });
  });
}

void AdamWPrepare(Tensor control, Tensor sum_of_squares, Tensor losses,
                  const AdamWSettings& settings, const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer, "AdamWPrepare",
             {{"control", control}, {"sum_of_squares", sum_of_squares}, {"losses", losses}});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(AdamWPrepare(control, sum_of_squares, losses, settings, ctx));
    return;
  }
  KRAIT_CHECK(control.numel() == kAdamWControlSize && sum_of_squares.numel() == 1);
  double* c = cpu::DenseData<double>(control);
  const double norm = std::sqrt(sum_of_squares.data<double>()[0]);
  bool applied = std::isfinite(norm) && norm <= settings.max_norm;
  for (int64_t i = 0; i < losses.numel(); ++i) {
    const double loss = cpu::DenseData<double>(losses)[i];
    applied = applied && std::isfinite(loss) && (i > 0 || loss <= settings.max_loss);
  }
  c[kAdamWNorm] = norm;
  c[kAdamWApplied] = applied ? 1 : 0;
  if (!applied) return;
  c[kAdamWSteps] += 1;
  c[kAdamWGradScale] = settings.clip > 0 ? std::min(1.0, settings.clip / (norm + 1e-6)) : 1.0;
  c[kAdamWStepSize] = settings.lr / (1 - std::pow(settings.beta1, c[kAdamWSteps]));
  c[kAdamWRootScale] = 1 / std::sqrt(1 - std::pow(settings.beta2, c[kAdamWSteps]));
}

void AdamW(Tensor weight, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor decay_ranges,
           const StepScales& step_scales, Tensor control, const AdamWSettings& settings,
           const Context& ctx) {
  OpScope op(ctx, OpFamily::kOptimizer, "AdamW",
             {{"weight", weight},
              {"master", master},
              {"m", m},
              {"v", v},
              {"grad", grad},
              {"decay_ranges", decay_ranges},
              {"step_ranges", step_scales.ranges},
              {"step_scales", step_scales.scales},
              {"control", control}});
  op.CountBytes(m.bytes() + v.bytes() + (weight.raw() == master.raw() ? 0 : master.bytes()));
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(
        AdamW(weight, master, m, v, grad, decay_ranges, step_scales, control, settings, ctx));
    return;
  }
  for (Tensor t : {weight, m, v, grad}) KRAIT_CHECK(t.numel() == master.numel());
  KRAIT_CHECK(m.dtype() == v.dtype() && control.numel() == kAdamWControlSize);
  cpu::DispatchFloat(master, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const double* c = cpu::DenseData<double>(control);
    if (c[kAdamWApplied] == 0) return;
    if constexpr (kDTypeOf<T> == DType::kF32) {
      if (m.dtype() == DType::kBF16) {
        return Update<float, BF16>(master, m, v, grad, decay_ranges, step_scales, c, settings);
      }
    }
    Update<T, T>(master, m, v, grad, decay_ranges, step_scales, c, settings);
  });
  const bool applied = control.data<double>()[kAdamWApplied] != 0;
  if (applied && weight.raw() != master.raw()) cpu::Convert(weight, master);
}

}  // namespace krait
