// AdamW over flat storage and the sums it needs, bound by memory.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/optimizer.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;

// The sum over a block in a fixed order, right in thread 0.
__device__ double BlockSum(double value) {
  __shared__ double shared[kThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (const double of_warp : shared) sum += of_warp;
  }
  return sum;
}

// Packs of a thread's loads that are under way at once.
constexpr int kSumPacks = 4;

// partial[b] = the sum of the elements, or of their squares, of block b's turns.
template <bool kSquares, int kVec, typename T>
__global__ void __launch_bounds__(kThreads) SumKernel(double* partial, const T* x, int64_t n) {
  StartDependent();
  double sum = 0;
  const auto add = [&sum](T value) {
    const auto wide = static_cast<double>(ToFloat(value));
    sum = kSquares ? fma(wide, wide, sum) : sum + wide;
  };
  const int64_t packs = n / kVec, step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; pack + (kSumPacks - 1) * step < packs; pack += kSumPacks * step) {
    Pack<T, kVec> loaded[kSumPacks];
#pragma unroll
    for (int p = 0; p < kSumPacks; ++p) loaded[p] = Load<kVec>(x + (pack + p * step) * kVec);
#pragma unroll
    for (int p = 0; p < kSumPacks; ++p) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) add(loaded[p].v[j]);
    }
  }
  for (; pack < packs; pack += step) {
    const Pack<T, kVec> loaded = Load<kVec>(x + pack * kVec);
#pragma unroll
    for (int j = 0; j < kVec; ++j) add(loaded.v[j]);
  }
  if (blockIdx.x == 0 && threadIdx.x < n % kVec) add(x[packs * kVec + threadIdx.x]);
  sum = BlockSum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void FinishSumKernel(double* sum, const double* partial, int partials) {
  StartDependent();
  double mine = 0;
  for (int p = threadIdx.x; p < partials; p += kThreads) mine += partial[p];
  const double total = BlockSum(mine);
  if (threadIdx.x == 0) *sum += total;
}

template <bool kSquares, typename T>
void Sum(const char* name, Tensor sum, Tensor x, Tensor partial, const Context& ctx) {
  if (x.numel() == 0) return;
  KRAIT_CHECK(x.contiguous() && sum.numel() == 1 && partial.numel() >= kSumBlocks);
  const int64_t n = x.numel();
  const bool vectorizable = reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0;
  const int64_t per_block = kThreads * kSumPacks * (vectorizable ? 4 : 1);
  const int64_t blocks = std::min(kSumBlocks, (n + per_block - 1) / per_block);
  Launch(name, vectorizable ? SumKernel<kSquares, 4, T> : SumKernel<kSquares, 1, T>,
         Dependent(blocks), dim3(kThreads), 0, ctx, partial.device_data<double>(),
         static_cast<const T*>(x.device_data<T>()), n);
  Launch(name, FinishSumKernel, Dependent(1), dim3(kThreads), 0, ctx, sum.device_data<double>(),
         static_cast<const double*>(partial.device_data<double>()), static_cast<int>(blocks));
}

__global__ void PrepareKernel(double* control, const double* sum_of_squares, const double* losses,
                              int64_t num_losses, AdamWSettings s) {
  StartDependent();
  const double norm = sqrt(*sum_of_squares);
  bool applied = isfinite(norm) && norm <= s.max_norm;
  for (int64_t i = 0; i < num_losses; ++i) {
    applied = applied && isfinite(losses[i]) && (i > 0 || losses[i] <= s.max_loss);
  }
  control[kAdamWNorm] = norm;
  control[kAdamWApplied] = applied ? 1 : 0;
  if (!applied) return;
  const double steps = control[kAdamWSteps] + 1;
  control[kAdamWSteps] = steps;
  control[kAdamWGradScale] = s.clip > 0 ? fmin(1.0, s.clip / (norm + 1e-6)) : 1.0;
  control[kAdamWStepSize] = s.lr / (1 - pow(s.beta1, steps));
  control[kAdamWRootScale] = 1 / sqrt(1 - pow(s.beta2, steps));
}

// Elements that decay, or whose steps are scaled.
struct Ranges {
  const int64_t* ranges;  // [count, 2], ascending
  int64_t count;

  // The first range that ends behind `element`.
  __device__ int64_t After(int64_t element) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ranges[2 * middle + 1] > element) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
  // The range that holds `element`, or -1, where no range before `range` reaches it.
  __device__ int64_t Find(int64_t element, int64_t range) const {
    while (range < count && ranges[2 * range + 1] <= element) ++range;
    return range < count && ranges[2 * range] <= element ? range : -1;
  }
};

// Where a block's elements [begin, end) lie.
struct RangesOfBlock {
  int64_t first;   // the first range that ends behind `begin`
  bool all, none;  // of them lie in it; in no range

  __device__ RangesOfBlock(const Ranges& r, int64_t begin, int64_t end)
      : first(r.After(begin)),
        all(first < r.count && r.ranges[2 * first] <= begin && r.ranges[2 * first + 1] >= end),
        none(first == r.count || r.ranges[2 * first] >= end) {}
};

// The constants of an update in float, folded in double.
struct Factors {
  float keep, beta1, one_beta1, beta2, one_beta2, eps;
};

// Packs of a thread, all of whose loads are under way at once.
constexpr int kUpdatePacks = 2;

// Block b updates elements [b, b + 1) * kThreads * kUpdatePacks * kVec.
template <typename W, typename M, int kVec>
__global__ void __launch_bounds__(kThreads)
    AdamWKernel(W* weight, float* master, M* m, M* v, const float* grad, Ranges decay,
                Ranges scaled, const double* scales, const double* control, Factors f, int64_t n) {
  StartDependent();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kUpdatePacks * kVec);
  const int64_t end = min(n, begin + kThreads * kUpdatePacks * kVec);
  Pack<float, kVec> g[kUpdatePacks], w[kUpdatePacks];
  Pack<M, kVec> mean[kUpdatePacks], square[kUpdatePacks];
#pragma unroll
  for (int p = 0; p < kUpdatePacks; ++p) {
    const int64_t at = begin + (p * kThreads + threadIdx.x) * kVec;
    if (at + kVec > end) continue;
    g[p] = Load<kVec>(grad + at);
    w[p] = Load<kVec>(master + at);
    mean[p] = Load<kVec>(m + at);
    square[p] = Load<kVec>(v + at);
  }
  if (control[kAdamWApplied] == 0) return;
  const auto grad_scale = static_cast<float>(control[kAdamWGradScale]);
  const auto step_of = [&](int64_t range) {
    const double step = control[kAdamWStepSize];
    return static_cast<float>(range < 0 ? step : step * scales[range]);
  };
  const auto inverse_root2 = static_cast<float>(control[kAdamWRootScale]);
  const RangesOfBlock decaying(decay, begin, end), scaling(scaled, begin, end);
  const bool one_step = scaling.all || scaling.none;
  const float block_step = step_of(scaling.all ? scaling.first : -1);
  // The update uses the moments before they are rounded to M.
  const auto update = [&](int64_t at, float gradient, float& value, M& first, M& second) {
    const float clipped = gradient * grad_scale;
    const float mean_now = f.beta1 * ToFloat(first) + f.one_beta1 * clipped;
    const float square_now = f.beta2 * ToFloat(second) + f.one_beta2 * (clipped * clipped);
    first = FromFloat<M>(mean_now);
    second = FromFloat<M>(square_now);
    const bool decays = decaying.all || (!decaying.none && decay.Find(at, decaying.first) >= 0);
    const float step_size = one_step ? block_step : step_of(scaled.Find(at, scaling.first));
    value = value * (decays ? f.keep : 1.0f) -
            step_size * (mean_now / (sqrtf(square_now) * inverse_root2 + f.eps));
  };
  const bool copies = static_cast<void*>(weight) != master;
#pragma unroll
  for (int p = 0; p < kUpdatePacks; ++p) {
    const int64_t at = begin + (p * kThreads + threadIdx.x) * kVec;
    if (at + kVec <= end) {
      Pack<W, kVec> rounded;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        update(at + j, g[p].v[j], w[p].v[j], mean[p].v[j], square[p].v[j]);
        rounded.v[j] = FromFloat<W>(w[p].v[j]);
      }
      Store(master + at, w[p]);
      Store(m + at, mean[p]);
      Store(v + at, square[p]);
      if (copies) Store(weight + at, rounded);
    } else {
      for (int64_t i = at; i < end; ++i) {
        float value = master[i];
        update(i, grad[i], value, m[i], v[i]);
        master[i] = value;
        if (copies) weight[i] = FromFloat<W>(value);
      }
    }
  }
}

}  // namespace

void AddSum(Tensor sum, Tensor x, Tensor partial, const Context& ctx) {
  Sum<false, float>("AddSum", sum, x, partial, ctx);
}

void AddSumOfSquares(Tensor sum, Tensor x, Tensor partial, const Context& ctx) {
  x.dtype() == DType::kBF16 ? Sum<true, BF16>("AddSumOfSquares", sum, x, partial, ctx)
                            : Sum<true, float>("AddSumOfSquares", sum, x, partial, ctx);
}

void AdamWPrepare(Tensor control, Tensor sum_of_squares, Tensor losses,
                  const AdamWSettings& settings, const Context& ctx) {
  KRAIT_CHECK(control.numel() == kAdamWControlSize && sum_of_squares.numel() == 1);
  KRAIT_CHECK(!losses.defined() || losses.contiguous());
  Launch("AdamWPrepare", PrepareKernel, Dependent(1), dim3(1), 0, ctx,
         control.device_data<double>(),
         static_cast<const double*>(sum_of_squares.device_data<double>()),
         static_cast<const double*>(losses.defined() ? losses.device_data<double>() : nullptr),
         losses.defined() ? losses.numel() : int64_t{0}, settings);
}

void AdamW(Tensor weight, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor decay_ranges,
           const StepScales& step_scales, Tensor control, const AdamWSettings& settings,
           const Context& ctx) {
  const int64_t n = master.numel();
  if (n == 0) return;
  for (const Tensor& t : {weight, master, m, v, grad}) {
    KRAIT_CHECK(t.numel() == n && t.contiguous());
  }
  KRAIT_CHECK(m.dtype() == v.dtype() && control.numel() == kAdamWControlSize);
  const auto ranges_of = [](const Tensor& t) {
    if (!t.defined() || t.numel() == 0) return Ranges{nullptr, 0};
    KRAIT_CHECK(t.contiguous() && t.dim(-1) == 2);
    return Ranges{t.device_data<int64_t>(), t.numel() / 2};
  };
  const Ranges decay = ranges_of(decay_ranges), scaled = ranges_of(step_scales.ranges);
  const double* scales = nullptr;
  if (scaled.count > 0) {
    KRAIT_CHECK(step_scales.scales.contiguous() && step_scales.scales.numel() == scaled.count);
    scales = step_scales.scales.device_data<double>();
  }
  const auto cast = [](double x) { return static_cast<float>(x); };
  const Factors factors{cast(1 - settings.lr * settings.weight_decay),
                        cast(settings.beta1),
                        cast(1 - settings.beta1),
                        cast(settings.beta2),
                        cast(1 - settings.beta2),
                        cast(settings.eps)};
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.raw()) % (4 * SizeOf(t.dtype())) == 0;
  };
  const bool vectorizable =
      aligned(weight) && aligned(master) && aligned(m) && aligned(v) && aligned(grad);
  const auto run = [&](auto w_zero, auto m_zero) {
    using W = decltype(w_zero);
    using M = decltype(m_zero);
    const int64_t per_block = kThreads * kUpdatePacks * (vectorizable ? 4 : 1);
    Launch("AdamW", vectorizable ? AdamWKernel<W, M, 4> : AdamWKernel<W, M, 1>,
           Dependent((n + per_block - 1) / per_block), dim3(kThreads), 0, ctx,
           weight.device_data<W>(), master.device_data<float>(), m.device_data<M>(),
           v.device_data<M>(), static_cast<const float*>(grad.device_data<float>()), decay, scaled,
           scales, static_cast<const double*>(control.device_data<double>()), factors, n);
  };
  const auto with_weight = [&](auto w_zero) {
    m.dtype() == DType::kBF16 ? run(w_zero, BF16()) : run(w_zero, 0.0f);
  };
  weight.dtype() == DType::kBF16 ? with_weight(BF16()) : with_weight(0.0f);
}

}  // namespace krait::cuda
