// Routing: per token softmax and top-k, statistics, losses, and the order of the experts' rows.
#include "kernels/cuda/bucket_sort.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/moe.h"
#include "kernels/cuda/vector.cuh"
#include "kernels/gemm.h"

namespace krait::cuda {
namespace {

constexpr int kThreads = 128;

int64_t Blocks(int64_t n) { return (n + kThreads - 1) / kThreads; }

// A token's logits, probabilities and choices.
struct Token {
  const float* logits;
  int experts;
  __device__ float Max() const {
    float max = logits[0];
    for (int e = 1; e < experts; ++e) max = fmaxf(max, logits[e]);
    return max;
  }
  __device__ float LogSumExp() const {
    const float max = Max();
    float sum = 0.0f;
    for (int e = 0; e < experts; ++e) sum += expf(logits[e] - max);
    return max + logf(sum);
  }
};

__global__ void __launch_bounds__(kThreads)
    RouteForwardKernel(Rows<float> probs, Rows<int32_t> choice, Rows<float> weight,
                       Rows<const float> logits, int64_t tokens, int experts, int top_k,
                       bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const Token token{logits[t], experts};
  float* const p = probs[t];
  const float max = token.Max();
  float sum = 0.0f;
  for (int e = 0; e < experts; ++e) {
    p[e] = expf(token.logits[e] - max);
    sum += p[e];
  }
  for (int e = 0; e < experts; ++e) p[e] /= sum;
  int32_t* const chosen = choice[t];
  float total = 0.0f;
  for (int j = 0; j < top_k; ++j) {
    int best = -1;
    for (int e = 0; e < experts; ++e) {
      bool taken = false;
      for (int i = 0; i < j; ++i) taken = taken || chosen[i] == e;
      if (!taken && (best < 0 || p[e] > p[best])) best = e;
    }
    chosen[j] = best;
    total += p[best];
  }
  for (int j = 0; j < top_k; ++j) weight[t][j] = renormalize ? p[chosen[j]] / total : p[chosen[j]];
}

// See kernels/moe.cc, RouteBackward, for the formula.
__global__ void __launch_bounds__(kThreads)
    RouteBackwardKernel(Rows<float> d_logits, Rows<const float> d_weight, const float* d_probs,
                        int64_t group_rows, float z_scale, Rows<const float> probs,
                        Rows<const int32_t> choice, Rows<const float> weight,
                        Rows<const float> logits, int64_t tokens, int experts, int top_k,
                        bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const float* const p = probs[t];
  const int32_t* const chosen = choice[t];
  float total = 1.0f, shift = 0.0f;
  if (renormalize) {
    total = 0.0f;
    for (int j = 0; j < top_k; ++j) {
      total += p[chosen[j]];
      shift += d_weight[t][j] * weight[t][j];
    }
  }
  float* const q = d_logits[t];
  const float* const d_prob = d_probs != nullptr ? d_probs + t / group_rows * experts : nullptr;
  for (int e = 0; e < experts; ++e) q[e] = d_prob != nullptr ? d_prob[e] : 0.0f;
  for (int j = 0; j < top_k; ++j) q[chosen[j]] += (d_weight[t][j] - shift) / total;
  float inner = 0.0f;
  for (int e = 0; e < experts; ++e) inner += p[e] * q[e];
  const float z = z_scale == 0.0f ? 0.0f : 2.0f * z_scale * Token{logits[t], experts}.LogSumExp();
  for (int e = 0; e < experts; ++e) q[e] = p[e] * (q[e] - inner + z);
}

// Block b, of `pieces` per group: the sums over its tokens, partial[b] = sum of p per expert, then
// that of lse^2; counts are integers, so their order does not matter.
__global__ void __launch_bounds__(kThreads)
    StatisticsKernel(Rows<double> partial, unsigned long long* choice_count,
                     Rows<const float> probs, Rows<const int32_t> choice, Rows<const float> logits,
                     int64_t group_rows, int64_t pieces, int64_t per_block, int experts,
                     int top_k) {
  __shared__ double sums[kThreads];
  const int64_t group = blockIdx.x / pieces, first = group * group_rows;
  const int64_t begin = min(first + blockIdx.x % pieces * per_block, first + group_rows);
  const int64_t end = min(begin + per_block, first + group_rows);
  choice_count += group * experts;
  for (int e = 0; e <= experts; ++e) {
    double sum = 0.0;
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
      if (e < experts) {
        sum += static_cast<double>(probs[t][e]);
      } else {
        const double lse = static_cast<double>(Token{logits[t], experts}.LogSumExp());
        sum += lse * lse;
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x][e] = sums[0];
    __syncthreads();
  }
  for (int64_t i = begin * top_k + threadIdx.x; i < end * top_k; i += kThreads) {
    atomicAdd(&choice_count[choice[i / top_k][i % top_k]], 1ull);
  }
}

// Block g: the sums of group g; the last one that of z over all groups.
__global__ void AddStatisticsKernel(float* prob_sum, float* z_sum, Rows<const double> partial,
                                    int64_t pieces, int experts) {
  const int64_t group = blockIdx.x, groups = gridDim.x - 1;
  if (group == groups) {
    if (threadIdx.x > 0) return;
    double total = 0.0;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0.0;
      for (int64_t b = 0; b < pieces; ++b) sum += partial[g * pieces + b][experts];
      total += sum;
    }
    *z_sum += static_cast<float>(total);
    return;
  }
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    double sum = 0.0;
    for (int64_t b = 0; b < pieces; ++b) sum += partial[group * pieces + b][e];
    prob_sum[group * experts + e] += static_cast<float>(sum);
  }
}

// One block; thread i takes pools and groups i, i + kThreads, ... and the first one adds up.
__global__ void __launch_bounds__(kThreads)
    LossesForwardKernel(double* aux, double* z, double* imbalance, Rows<const float> prob_sum,
                        Rows<const int64_t> choice_count, const float* z_sum, int64_t sublayers,
                        int64_t experts, MoeLossShape shape) {
  __shared__ double parts[kThreads];
  const int64_t groups = shape.groups, per_pool = sublayers / shape.pools;
  const double n = static_cast<double>(shape.tokens / groups * per_pool);
  double part = 0.0;
  for (int64_t i = threadIdx.x; i < shape.pools * groups; i += kThreads) {
    const int64_t pool = i / groups, begin = pool * per_pool * groups + i % groups;
    double sum = 0.0;
    for (int64_t e = 0; e < experts; ++e) {
      double prob = 0.0;
      int64_t count = 0;
      for (int64_t row = begin; row < (pool + 1) * per_pool * groups; row += groups) {
        prob += static_cast<double>(prob_sum[row][e]);
        count += choice_count[row][e];
      }
      sum += prob / n * (static_cast<double>(count) / n);
    }
    part += static_cast<double>(experts) * sum / static_cast<double>(shape.pools * groups);
  }
  parts[threadIdx.x] = part;
  for (int64_t j = threadIdx.x; j < sublayers; j += kThreads) {
    int64_t most = 0;
    for (int64_t e = 0; e < experts; ++e) {
      int64_t count = 0;
      for (int64_t g = 0; g < groups; ++g) count += choice_count[j * groups + g][e];
      most = max(most, count);
    }
    imbalance[j] +=
        static_cast<double>(most * experts) / static_cast<double>(shape.tokens * shape.top_k);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  double aux_loss = 0.0;
  for (int i = 0; i < kThreads; ++i) aux_loss += parts[i];
  *aux += aux_loss;
  double z_loss = 0.0;
  for (int64_t j = 0; j < sublayers; ++j) {
    z_loss += static_cast<double>(z_sum[j]) / static_cast<double>(shape.tokens * sublayers);
  }
  *z += z_loss;
}

__global__ void LossesBackwardKernel(Rows<float> d_prob, Rows<const int64_t> choice_count,
                                     double scale, int64_t sublayers, int64_t experts,
                                     MoeLossShape shape) {
  const int64_t groups = shape.groups, per_pool = sublayers / shape.pools;
  const double n = static_cast<double>(shape.tokens / groups * per_pool);
  for (int64_t i = threadIdx.x; i < shape.pools * groups * experts; i += blockDim.x) {
    const int64_t pool = i / experts / groups, e = i % experts;
    const int64_t begin = pool * per_pool * groups + i / experts % groups;
    const int64_t end = (pool + 1) * per_pool * groups;
    int64_t count = 0;
    for (int64_t row = begin; row < end; row += groups) count += choice_count[row][e];
    const double value = scale * static_cast<double>(experts) * (static_cast<double>(count) / n) /
                         (n * static_cast<double>(shape.pools * groups));
    for (int64_t row = begin; row < end; row += groups) d_prob[row][e] = static_cast<float>(value);
  }
}

// source[place[i]] = i; the rest of source is -1 already.
__global__ void __launch_bounds__(kThreads)
    SourceKernel(int32_t* source, const int32_t* row_of, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) source[row_of[i]] = static_cast<int32_t>(i);
}

__global__ void __launch_bounds__(kThreads) NoSourceKernel(int32_t* source, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) source[i] = -1;
}

}  // namespace

void MoeRouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                     const Context& ctx) {
  const int64_t tokens = logits.dim(0), experts = logits.dim(1), top_k = choice.dim(1);
  KRAIT_CHECK(top_k >= 1 && top_k <= experts);
  Launch("MoeRouteForward", RouteForwardKernel, Blocks(tokens), dim3(kThreads), 0, ctx,
         RowsOf<float>(probs), RowsOf<int32_t>(choice), RowsOf<float>(weight),
         RowsOf<const float>(logits), tokens, static_cast<int>(experts), static_cast<int>(top_k),
         renormalize);
}

void MoeRouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob, double z_scale, Tensor probs,
                      Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                      const Context& ctx) {
  const int64_t tokens = logits.dim(0), experts = logits.dim(1), top_k = choice.dim(1);
  Launch("MoeRouteBackward", RouteBackwardKernel, Blocks(tokens), dim3(kThreads), 0, ctx,
         RowsOf<float>(d_logits), RowsOf<const float>(d_weight),
         static_cast<const float*>(d_prob.defined() ? d_prob.device_data<float>() : nullptr),
         d_prob.defined() ? std::max<int64_t>(1, tokens / d_prob.dim(0)) : 1,
         static_cast<float>(z_scale), RowsOf<const float>(probs), RowsOf<const int32_t>(choice),
         RowsOf<const float>(weight), RowsOf<const float>(logits), tokens,
         static_cast<int>(experts), static_cast<int>(top_k), renormalize);
}

void MoeStatistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                   Tensor logits, Tensor partial, const Context& ctx) {
  const int64_t tokens = probs.dim(0), experts = probs.dim(1), groups = prob_sum.dim(0);
  if (tokens == 0) return;
  const int64_t group_rows = tokens / groups, planned = partial.dim(0) / groups;
  const int64_t per_block = (group_rows + planned - 1) / planned;
  const int64_t pieces = (group_rows + per_block - 1) / per_block;
  Launch("MoeStatistics", StatisticsKernel, groups * pieces, dim3(kThreads), 0, ctx,
         RowsOf<double>(partial),
         reinterpret_cast<unsigned long long*>(choice_count.device_data<int64_t>()),
         RowsOf<const float>(probs), RowsOf<const int32_t>(choice), RowsOf<const float>(logits),
         group_rows, pieces, per_block, static_cast<int>(experts), static_cast<int>(choice.dim(1)));
  Launch("MoeStatistics sums", AddStatisticsKernel, groups + 1, dim3(kThreads), 0, ctx,
         prob_sum.device_data<float>(), z_sum.device_data<float>(), RowsOf<const double>(partial),
         pieces, static_cast<int>(experts));
}

void MoeLossesForward(Tensor aux, Tensor z, Tensor imbalance, Tensor prob_sum, Tensor choice_count,
                      Tensor z_sum, const MoeLossShape& shape, const Context& ctx) {
  Launch("MoeLossesForward", LossesForwardKernel, 1, dim3(kThreads), 0, ctx,
         aux.device_data<double>(), z.device_data<double>(), imbalance.device_data<double>(),
         RowsOf<const float>(prob_sum), RowsOf<const int64_t>(choice_count),
         static_cast<const float*>(z_sum.device_data<float>()), z_sum.numel(), prob_sum.dim(1),
         shape);
}

void MoeLossesBackward(Tensor d_prob, Tensor choice_count, double scale, const MoeLossShape& shape,
                       const Context& ctx) {
  Launch("MoeLossesBackward", LossesBackwardKernel, 1, dim3(kThreads), 0, ctx,
         RowsOf<float>(d_prob), RowsOf<const int64_t>(choice_count), scale,
         d_prob.dim(0) / shape.groups, d_prob.dim(1), shape);
}

void MoeSort(Tensor row_of, Tensor source, Tensor offsets, Tensor choice, Tensor counts,
             const Context& ctx) {
  const int64_t n = choice.numel(), experts = offsets.numel() - 1;
  KRAIT_CHECK(row_of.numel() == n && row_of.contiguous() && choice.contiguous());
  int32_t* const rows = row_of.device_data<int32_t>();
  int32_t* const from = source.device_data<int32_t>();
  SortIntoBuckets(rows, offsets.device_data<int64_t>(), counts.device_data<int32_t>(),
                  {choice.device_data<int32_t>()}, n, experts, ExpertRowAlignment(Device::kCuda),
                  ctx);
  Launch("MoeSort: no source", NoSourceKernel, Blocks(source.numel()), dim3(kThreads), 0, ctx, from,
         source.numel());
  Launch("MoeSort: source", SourceKernel, Blocks(n), dim3(kThreads), 0, ctx, from,
         static_cast<const int32_t*>(rows), n);
}

}  // namespace krait::cuda
