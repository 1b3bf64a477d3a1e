// What moves or multiplies whole rows of tokens for the experts: the router's products, permute and
// combine. Bound by memory.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/moe.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = 8;  // experts whose sums a thread holds at a time

// Calls run(T{}, std::integral_constant<int, elements of an access>) for rows of x.
template <typename Run>
void ForRows(const Tensor& x, bool vectorizable, const Run& run) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    if (vectorizable) {
      run(zero, std::integral_constant<int, kVectorOf<T>>());
    } else {
      run(zero, std::integral_constant<int, 1>());
    }
  };
  x.dtype() == DType::kBF16 ? with(BF16()) : with(0.0f);
}

// A warp takes kTokens tokens and all experts, kGroup at a time.
constexpr int kTokens = 4;
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    RouterForwardKernel(Rows<float> logits, Rows<const T> x, Rows<const float> w, int64_t tokens,
                        int experts, int d) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kTokens;
  if (first >= tokens) return;
  for (int group = 0; group < experts; group += kGroup) {
    float sum[kTokens][kGroup] = {};
    for (int col = lane * kVec; col < d; col += 32 * kVec) {
      Pack<float, kVec> in[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first + t < tokens) in[t] = Widen(Load<kVec>(x[first + t] + col));
      }
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        if (group + e >= experts) break;
        const Pack<float, kVec> weight = Load<kVec>(w[group + e] + col);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          if (first + t >= tokens) continue;
#pragma unroll
          for (int j = 0; j < kVec; ++j) sum[t][e] += in[t].v[j] * weight.v[j];
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const float total = WarpSum(sum[t][e]);
        if (lane == 0 && group + e < experts && first + t < tokens) {
          logits[first + t][group + e] = total;
        }
      }
    }
  }
}

// A thread takes one access of columns for kTokens tokens at a time.
template <typename T, int kVec, bool kAccumulate>
__global__ void __launch_bounds__(kThreads)
    RouterBackwardInputKernel(Rows<T> dx, Rows<const float> d_logits, Rows<const float> w,
                              int64_t tokens, int experts, int d) {
  const int col = (blockIdx.y * kThreads + threadIdx.x) * kVec;
  if (col >= d) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  float sum[kTokens][kVec] = {};
  for (int e = 0; e < experts; ++e) {
    const Pack<float, kVec> weight = Load<kVec>(w[e] + col);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= tokens) continue;
      const float gradient = d_logits[first + t][e];
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[t][j] += gradient * weight.v[j];
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (first + t >= tokens) continue;
    T* const at = dx[first + t] + col;
    Pack<float, kVec> out;
    if constexpr (kAccumulate) out = Widen(Load<kVec>(at));
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.v[j] = kAccumulate ? out.v[j] + sum[t][j] : sum[t][j];
    Store(at, Round<T>(out));
  }
}

// Block (columns, piece of tokens, group of experts): partial[piece][e][col]. The gradients of 32
// tokens are read once for the block: read by each thread they took 8 loads beside one of x.
constexpr int kWeightVec = 2;
constexpr int kStaged = kThreads / kGroup;  // tokens
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    RouterBackwardWeightKernel(float* partial, Rows<const float> d_logits, Rows<const T> x,
                               int64_t tokens, int64_t per_piece, int experts, int d) {
  __shared__ Pack<float, kGroup> staged[kStaged];
  const int col = (blockIdx.x * kThreads + threadIdx.x) * kVec;
  const int group = blockIdx.z * kGroup;
  const int own_token = threadIdx.x / kGroup, own_expert = threadIdx.x % kGroup;
  const int64_t begin = blockIdx.y * per_piece, end = min(tokens, begin + per_piece);
  float sum[kGroup][kVec] = {};
  for (int64_t first = begin; first < end; first += kStaged) {
    const int count = static_cast<int>(min(end - first, static_cast<int64_t>(kStaged)));
    __syncthreads();
    staged[own_token].v[own_expert] = own_token < count && group + own_expert < experts
                                          ? d_logits[first + own_token][group + own_expert]
                                          : 0.0f;
    __syncthreads();
    if (col >= d) continue;
#pragma unroll 8
    for (int t = 0; t < count; ++t) {
      const Pack<float, kVec> in = Widen(Load<kVec>(x[first + t] + col));
      const Pack<float, kGroup> gradient = staged[t];
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[e][j] += gradient.v[e] * in.v[j];
      }
    }
  }
  if (col >= d) return;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    if (group + e >= experts) continue;
    float* const to = partial + (static_cast<int64_t>(blockIdx.y) * experts + group + e) * d + col;
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = sum[e][j];
  }
}

// dw[i] (+)= the sum of partial[p][i] over the pieces, in order.
template <bool kAccumulate>
__global__ void __launch_bounds__(kThreads)
    AddPiecesKernel(float* dw, const float* partial, int64_t pieces, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t p = 0; p < pieces; ++p) sum += partial[p * n + i];
  dw[i] = kAccumulate ? dw[i] + sum : sum;
}

// Blocks of a row, each thread one access.
struct RowPlace {
  int64_t row;
  int column;
  __device__ RowPlace(int vec, int per_row)
      : row(blockIdx.x / per_row),
        column((static_cast<int>(blockIdx.x % per_row) * kThreads + threadIdx.x) * vec) {}
};
int64_t PerRow(int64_t columns, int vec) {
  return (columns + kThreads * vec - 1) / (kThreads * vec);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    PermuteKernel(Rows<T> rows, Rows<const T> x, const int32_t* source, int top_k, int d,
                  int per_row) {
  const RowPlace place(kVec, per_row);
  if (place.column >= d) return;
  const int32_t from = source[place.row];
  Pack<T, kVec> value = {};
  if (from >= 0) value = Load<kVec>(x[from / top_k] + place.column);
  Store(rows[place.row] + place.column, value);
}

// y[t] (+)= sum over j, in order, of weight[t][j] * rows[row_of[t][j]]; no weights: 1.
template <typename T, int kVec, bool kAccumulate, bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    CombineKernel(Rows<T> y, Rows<const T> rows, Rows<const float> weight,
                  Rows<const int32_t> row_of, int top_k, int d, int per_row) {
  const RowPlace place(kVec, per_row);
  if (place.column >= d) return;
  T* const at = y[place.row] + place.column;
  Pack<float, kVec> sum = {};
  if constexpr (kAccumulate) sum = Widen(Load<kVec>(at));
  for (int j = 0; j < top_k; ++j) {
    const Pack<float, kVec> row = Widen(Load<kVec>(rows[row_of[place.row][j]] + place.column));
    const float p = kWeighted ? weight[place.row][j] : 1.0f;
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum.v[i] += kWeighted ? p * row.v[i] : row.v[i];
  }
  Store(at, Round<T>(sum));
}

template <bool kAccumulate, bool kWeighted>
void Combine(const char* name, Tensor y, Tensor rows, Tensor weight, Tensor row_of,
             const Context& ctx) {
  ForRows(y, Vectorizable(y) && Vectorizable(rows), [&](auto zero, auto vec) {
    using T = decltype(zero);
    const int64_t d = y.dim(-1), per_row = PerRow(d, vec);
    Launch(name, CombineKernel<T, vec, kAccumulate, kWeighted>, y.rows() * per_row, dim3(kThreads),
           0, ctx, RowsOf<T>(y), RowsOf<const T>(rows),
           kWeighted ? RowsOf<const float>(weight) : Rows<const float>{nullptr, 0},
           RowsOf<const int32_t>(row_of), static_cast<int>(row_of.dim(1)), static_cast<int>(d),
           static_cast<int>(per_row));
  });
}

__global__ void __launch_bounds__(kThreads)
    RowNumbersKernel(int32_t* numbers, int64_t rows, int64_t used) {
  StartDependent();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) numbers[row] = row < used ? static_cast<int32_t>(row) : -1;
}

}  // namespace

void RouterForward(Tensor logits, Tensor x, Tensor w, const Context& ctx) {
  const int64_t tokens = x.dim(0), experts = w.dim(0), d = w.dim(1);
  KRAIT_CHECK(w.dtype() == DType::kF32 && x.dim(1) == d && logits.dim(1) == experts);
  ForRows(x, Vectorizable(x) && Vectorizable(w), [&](auto zero, auto vec) {
    using T = decltype(zero);
    Launch("RouterForward", RouterForwardKernel<T, vec>,
           (tokens + kWarps * kTokens - 1) / (kWarps * kTokens), dim3(kThreads), 0, ctx,
           RowsOf<float>(logits), RowsOf<const T>(x), RowsOf<const float>(w), tokens,
           static_cast<int>(experts), static_cast<int>(d));
  });
}

void RouterBackwardInput(Tensor dx, Tensor d_logits, Tensor w, bool accumulate,
                         const Context& ctx) {
  const int64_t tokens = dx.dim(0), experts = w.dim(0), d = w.dim(1);
  KRAIT_CHECK(w.dtype() == DType::kF32 && dx.dim(1) == d && d_logits.dim(1) == experts);
  ForRows(dx, Vectorizable(dx) && Vectorizable(w), [&](auto zero, auto vec) {
    using T = decltype(zero);
    const Grid grid((tokens + kTokens - 1) / kTokens, PerRow(d, vec));
    const auto launch = [&](auto kernel) {
      Launch("RouterBackwardInput", kernel, grid, dim3(kThreads), 0, ctx, RowsOf<T>(dx),
             RowsOf<const float>(d_logits), RowsOf<const float>(w), tokens,
             static_cast<int>(experts), static_cast<int>(d));
    };
    accumulate ? launch(RouterBackwardInputKernel<T, vec, true>)
               : launch(RouterBackwardInputKernel<T, vec, false>);
  });
}

void RouterBackwardWeight(Tensor dw, Tensor d_logits, Tensor x, bool accumulate, Tensor partial,
                          const Context& ctx) {
  const int64_t tokens = x.dim(0), experts = dw.dim(0), d = dw.dim(1), n = experts * d;
  KRAIT_CHECK(dw.dtype() == DType::kF32 && dw.contiguous() && x.dim(1) == d);
  const int64_t pieces = partial.dim(0), per_piece = (tokens + pieces - 1) / pieces;
  float* const sums = partial.device_data<float>();
  // Two columns a thread, so that a model's width fills the card.
  const bool pairs = d % kWeightVec == 0 && x.row_stride() % kWeightVec == 0 &&
                     reinterpret_cast<uintptr_t>(x.raw()) % 8 == 0;
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto kernel, int vec) {
      Launch("RouterBackwardWeight", kernel,
             Grid(PerRow(d, vec), pieces, (experts + kGroup - 1) / kGroup), dim3(kThreads), 0, ctx,
             sums, RowsOf<const float>(d_logits), RowsOf<const T>(x), tokens, per_piece,
             static_cast<int>(experts), static_cast<int>(d));
    };
    pairs ? launch(RouterBackwardWeightKernel<T, kWeightVec>, kWeightVec)
          : launch(RouterBackwardWeightKernel<T, 1>, 1);
  };
  x.dtype() == DType::kBF16 ? with(BF16()) : with(0.0f);
  const auto add = [&](auto kernel) {
    Launch("RouterBackwardWeight sums", kernel, (n + kThreads - 1) / kThreads, dim3(kThreads), 0,
           ctx, dw.device_data<float>(), static_cast<const float*>(sums), pieces, n);
  };
  accumulate ? add(AddPiecesKernel<true>) : add(AddPiecesKernel<false>);
}

void MoePermute(Tensor rows, Tensor x, Tensor source, int64_t top_k, const Context& ctx) {
  KRAIT_CHECK(rows.dim(0) == source.numel() && rows.dtype() == x.dtype());
  ForRows(x, Vectorizable(x) && Vectorizable(rows), [&](auto zero, auto vec) {
    using T = decltype(zero);
    const int64_t d = x.dim(1), per_row = PerRow(d, vec);
    Launch("MoePermute", PermuteKernel<T, vec>, rows.dim(0) * per_row, dim3(kThreads), 0, ctx,
           RowsOf<T>(rows), RowsOf<const T>(x),
           static_cast<const int32_t*>(source.device_data<int32_t>()), static_cast<int>(top_k),
           static_cast<int>(d), static_cast<int>(per_row));
  });
}

void MoePermuteBackward(Tensor dx, Tensor d_rows, Tensor row_of, bool accumulate,
                        const Context& ctx) {
  if (accumulate) {
    Combine<true, false>("MoePermuteBackward", dx, d_rows, Tensor(), row_of, ctx);
  } else {
    Combine<false, false>("MoePermuteBackward", dx, d_rows, Tensor(), row_of, ctx);
  }
}

void MoeCombine(Tensor y, Tensor rows, Tensor weight, Tensor row_of, const Context& ctx) {
  Combine<false, true>("MoeCombine", y, rows, weight, row_of, ctx);
}

void MoeRowNumbers(Tensor numbers, int64_t used, const Context& ctx) {
  const int64_t rows = numbers.numel();
  Launch("MoeRowNumbers", RowNumbersKernel, Dependent((rows + kThreads - 1) / kThreads),
         dim3(kThreads), 0, ctx, numbers.device_data<int32_t>(), rows, used);
}

}  // namespace krait::cuda
