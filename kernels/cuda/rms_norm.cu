// RMSNorm, forward and backward. Both are bound by memory: each row is read once, reduced, and
// written; statistics and sums are fp32.
//
// A row belongs to blockDim.x threads; thread x holds the kVec columns from (x + i * blockDim.x) *
// kVec, i < kItems. Short rows share a block: blockDim.y of them, one warp each.
//
// Rates on an H200, bf16, in bytes that must move (tests/bench/rms_norm_gpu_bench.cc), beside a
// device copy of the same run:
//   M, D                        16384, 4096  16384, 8192  16384, 2048  65536, 256
//   copy                GB/s           4060         4170         3830        3510
//   forward                            3470         3560         3340        3170
//   residual forward                   3950         3560         3980        3650
//   backward                           3090         3410         3050        2930
//   residual backward                  3590         3300         3310        3130
// Staging rows in shared memory leaves the backward 64 registers a thread, so that four blocks of
// 256 threads fit a multiprocessor; with rows prefetched into registers it ran at 2380 GB/s.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

// Rows per block when a row is one warp's.
constexpr int kShortRows = 8;

// Threads of a row at most. Rows of up to 4 accesses by 256 threads are meant to be fast (8192
// columns of bf16); longer ones work.
template <int kVec, int kItems>
constexpr int kMaxThreads = kItems < 8 ? 256 : (kVec == 1 ? 1024 : 512);

// Backward: stages of a block's ring of rows, and blocks that a multiprocessor should hold.
template <int kItems>
constexpr int kStages = kItems < 8 ? 2 : 1;
template <int kItems>
constexpr int kMinBlocks = kItems < 4 ? 4 : (kItems == 4 ? 2 : 1);

// Rows of a tensor in device memory.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* operator[](int64_t row) const { return data + row * stride; }
};
template <typename T>
Rows<T> RowsOf(const Tensor& t) {
  return {t.device_data<std::remove_const_t<T>>(), t.row_stride()};
}

template <typename T, int kVec, int kItems, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads<kVec, kItems>)
    ForwardKernel(Rows<T> h, Rows<T> y, float* rstd, Rows<const T> residual, Rows<const T> delta,
                  const float* w, int64_t rows, int cols, float eps) {
  __shared__ float shared[32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // whole rows, so the threads that meet in RowSum stay together

  // All loads are issued before the first store: h may be the memory of residual.
  Pack<T, kVec> x[kItems], added[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = (threadIdx.x + i * blockDim.x) * kVec;
    if (col >= cols) continue;
    x[i] = Load<kVec>(residual[row] + col);
    if constexpr (kAdd) added[i] = Load<kVec>(delta[row] + col);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = (threadIdx.x + i * blockDim.x) * kVec;
    if (col >= cols) continue;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if constexpr (kAdd) x[i].v[j] = FromFloat<T>(ToFloat(x[i].v[j]) + ToFloat(added[i].v[j]));
      const float value = ToFloat(x[i].v[j]);
      squares += value * value;
    }
    if constexpr (kAdd) Store(h[row] + col, x[i]);
  }
  const float scale = 1.0f / sqrtf(RowSum(squares, shared) / static_cast<float>(cols) + eps);
  if (threadIdx.x == 0) rstd[row] = scale;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = (threadIdx.x + i * blockDim.x) * kVec;
    if (col >= cols) continue;
    const Pack<float, kVec> weight = Load<kVec>(w + col);
    Pack<T, kVec> out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      out.v[j] = FromFloat<T>(ToFloat(x[i].v[j]) * scale * weight.v[j]);
    }
    Store(y[row] + col, out);
  }
}

// Block b takes rows [b * rows_per_block, (b+1) * rows_per_block) and writes their sum of dy * xhat
// to partial[b]. Rows are fetched into a ring in shared memory ahead of their use. Each thread
// fetches what it alone reads, so that the ring needs no barrier.
template <typename T, int kVec, int kItems, bool kAccumulate>
__global__ void __launch_bounds__(kMaxThreads<kVec, kItems>, kMinBlocks<kItems>)
    BackwardKernel(Rows<T> dx, Rows<float> partial, Rows<const T> dy, Rows<const T> dx_in,
                   Rows<const T> x, const float* rstd, const float* w, int64_t rows,
                   int64_t rows_per_block, int cols) {
  using Access = Pack<T, kVec>;
  extern __shared__ __align__(16) char dynamic[];
  __shared__ float shared[2][32];
  const int threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  // This thread's accesses of x, then of dy, in one stage of the ring.
  const auto slot = [&](int stage, int item) -> Access& {
    return reinterpret_cast<Access*>(dynamic)[(stage * 2 * kItems + item) * threads + thread];
  };
  const int64_t end = min(rows, (blockIdx.x + 1) * rows_per_block);
  const auto fetch = [&](int64_t row, int stage) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = (threadIdx.x + i * blockDim.x) * kVec;
      if (col >= cols || row >= end) continue;
      FetchAsync(&slot(stage, i), x[row] + col);
      FetchAsync(&slot(stage, kItems + i), dy[row] + col);
    }
    __pipeline_commit();
  };

  int64_t row = blockIdx.x * rows_per_block + threadIdx.y;
  for (int ahead = 0; ahead < kStages<kItems> - 1; ++ahead) fetch(row + ahead * blockDim.y, ahead);
  float next_scale = row < end ? rstd[row] : 0.0f;
  Pack<float, kVec> dw_sum[kItems] = {};
  int stage = 0, parity = 0;
  for (; row < end; row += blockDim.y) {
    constexpr int kAhead = kStages<kItems> - 1;
    fetch(row + kAhead * blockDim.y, (stage + kAhead) % kStages<kItems>);
    const float scale = next_scale;
    if (row + blockDim.y < end) next_scale = rstd[row + blockDim.y];
    __pipeline_wait_prior(kAhead);

    float dot = 0.0f;  // of g = dy * w and xhat
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = (threadIdx.x + i * blockDim.x) * kVec;
      if (col >= cols) continue;
      const Access x_now = slot(stage, i), dy_now = slot(stage, kItems + i);
      const Pack<float, kVec> weight = Load<kVec>(w + col);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float product = ToFloat(dy_now.v[j]) * (ToFloat(x_now.v[j]) * scale);
        dw_sum[i].v[j] += product;
        dot += product * weight.v[j];
      }
    }
    const float mean = RowSum(dot, shared[parity]) / static_cast<float>(cols);
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = (threadIdx.x + i * blockDim.x) * kVec;
      if (col >= cols) continue;
      const Access x_now = slot(stage, i), dy_now = slot(stage, kItems + i);
      const Pack<float, kVec> weight = Load<kVec>(w + col);
      Access out;
      if constexpr (kAccumulate) out = Load<kVec>(dx_in[row] + col);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float xhat = ToFloat(x_now.v[j]) * scale;
        float value = scale * (ToFloat(dy_now.v[j]) * weight.v[j] - xhat * mean);
        if constexpr (kAccumulate) value += ToFloat(out.v[j]);
        out.v[j] = FromFloat<T>(value);
      }
      Store(dx[row] + col, out);
    }
    stage = (stage + 1) % kStages<kItems>;
  }

  // Short rows: the block's sum over its warps, in order. Then kItems is 1.
  if (blockDim.y > 1) {
    __syncthreads();  // the ring is read to the end
    auto* of_warp = reinterpret_cast<Pack<float, kVec>*>(dynamic);
    of_warp[thread] = dw_sum[0];
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) dw_sum[0].v[j] += of_warp[y * 32 + threadIdx.x].v[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = (threadIdx.x + i * blockDim.x) * kVec;
    if (col < cols) Store(partial[blockIdx.x] + col, dw_sum[i]);
  }
}

// dw[col] += the sum of partial[p][col] over p: 32 columns a block, 16 strided sums each.
constexpr int kColumns = 32, kSums = 16;
__global__ void ColumnSumKernel(float* dw, Rows<const float> partial, int partials, int cols) {
  __shared__ float shared[kSums][kColumns];
  const int col = static_cast<int>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (int p = threadIdx.y; p < partials; p += kSums) sum += partial[p][col];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= cols) return;
  for (int y = 1; y < kSums; ++y) sum += shared[y][threadIdx.x];
  dw[col] += sum;
}

// Calls run(vec, items, threads), the first two as std::integral_constant, for rows of `cols`.
template <typename T, typename Run>
void ForRowShape(int64_t cols, bool vectorizable, const Run& run) {
  const auto with_vec = [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    const int64_t accesses = (cols + kVec - 1) / kVec;
    const auto with_items = [&](auto items) {
      constexpr int kItems = decltype(items)::value;
      const int64_t threads = (accesses + kItems * 32 - 1) / (kItems * 32) * 32;
      run(vec, items, dim3(static_cast<unsigned>(threads), threads == 32 ? kShortRows : 1));
    };
    if (accesses <= kMaxThreads<kVec, 1>) {
      with_items(std::integral_constant<int, 1>());
    } else if (accesses <= 2 * kMaxThreads<kVec, 2>) {
      with_items(std::integral_constant<int, 2>());
    } else if (accesses <= 4 * kMaxThreads<kVec, 4>) {
      with_items(std::integral_constant<int, 4>());
    } else if (accesses <= 8 * kMaxThreads<kVec, 8>) {
      with_items(std::integral_constant<int, 8>());
    } else {
      KRAIT_FATAL("RmsNorm on CUDA takes rows of at most " +
                  std::to_string(8 * kMaxThreads<kVec, 8> * kVec) +
                  " columns of this alignment, not " + std::to_string(cols));
    }
  };
  if (vectorizable) {
    with_vec(std::integral_constant<int, kVectorOf<T>>());
  } else {
    with_vec(std::integral_constant<int, 1>());
  }
}

// All of `like` have the rows, columns and dtype of x.
void CheckShapes(const Tensor& x, std::initializer_list<Tensor> like, const Tensor& rstd,
                 const Tensor& w) {
  KRAIT_CHECK(x.dtype() == DType::kF32 || x.dtype() == DType::kBF16);
  for (const Tensor& t : like) {
    KRAIT_CHECK(t.dtype() == x.dtype() && t.rows() == x.rows() && t.dim(-1) == x.dim(-1));
  }
  KRAIT_CHECK(w.dtype() == DType::kF32 && w.numel() == x.dim(-1) && w.contiguous());
  KRAIT_CHECK(rstd.dtype() == DType::kF32 && rstd.numel() == x.rows() && rstd.contiguous());
}

template <typename T, bool kAdd>
void Forward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w, double eps,
             const Context& ctx) {
  const bool vectorizable = Vectorizable(h) && Vectorizable(y) && Vectorizable(residual) &&
                            (!kAdd || Vectorizable(delta)) && Vectorizable(w);
  const int64_t rows = residual.rows(), cols = residual.dim(-1);
  ForRowShape<T>(cols, vectorizable, [&](auto vec, auto items, dim3 threads) {
    Launch("RmsNormForward", ForwardKernel<T, vec, items, kAdd>, (rows + threads.y - 1) / threads.y,
           threads, 0, ctx, RowsOf<T>(h), RowsOf<T>(y), rstd.device_data<float>(),
           RowsOf<const T>(residual), kAdd ? RowsOf<const T>(delta) : Rows<const T>{nullptr, 0},
           static_cast<const float*>(w.device_data<float>()), rows, static_cast<int>(cols),
           static_cast<float>(eps));
  });
}

template <typename T, bool kAccumulate>
void Backward(Tensor dx, Tensor dw, Tensor partial, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd,
              Tensor w, const Context& ctx) {
  const bool vectorizable = Vectorizable(dx) && (!kAccumulate || Vectorizable(dx_in)) &&
                            Vectorizable(dy) && Vectorizable(x) && Vectorizable(w);
  const int64_t rows = x.rows(), cols = x.dim(-1);
  ForRowShape<T>(cols, vectorizable, [&](auto vec, auto items, dim3 threads) {
    const int64_t groups = (rows + threads.y - 1) / threads.y;
    const int64_t groups_per_block = (groups + partial.dim(0) - 1) / partial.dim(0);
    const int64_t blocks = (groups + groups_per_block - 1) / groups_per_block;
    const int64_t ring_bytes = kStages<items> * 2 * items * threads.x * threads.y *
                               static_cast<int64_t>(sizeof(Pack<T, vec>));
    Launch("RmsNormBackward", BackwardKernel<T, vec, items, kAccumulate>, blocks, threads,
           ring_bytes, ctx, RowsOf<T>(dx), RowsOf<float>(partial), RowsOf<const T>(dy),
           kAccumulate ? RowsOf<const T>(dx_in) : Rows<const T>{nullptr, 0}, RowsOf<const T>(x),
           static_cast<const float*>(rstd.device_data<float>()),
           static_cast<const float*>(w.device_data<float>()), rows, groups_per_block * threads.y,
           static_cast<int>(cols));
    Launch("RmsNormBackward column sums", ColumnSumKernel, (cols + kColumns - 1) / kColumns,
           dim3(kColumns, kSums), 0, ctx, dw.device_data<float>(), RowsOf<const float>(partial),
           static_cast<int>(blocks), static_cast<int>(cols));
  });
}

}  // namespace

void RmsNormForward(Tensor h, Tensor y, Tensor rstd, Tensor residual, Tensor delta, Tensor w,
                    double eps, const Context& ctx) {
  if (residual.numel() == 0) return;
  CheckShapes(residual, {h, y, delta.defined() ? delta : residual}, rstd, w);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (delta.defined()) {
      Forward<T, true>(h, y, rstd, residual, delta, w, eps, ctx);
    } else {
      Forward<T, false>(h, y, rstd, residual, delta, w, eps, ctx);
    }
  };
  residual.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

void RmsNormBackward(Tensor dx, Tensor dw, Tensor dy, Tensor dx_in, Tensor x, Tensor rstd, Tensor w,
                     Tensor partial, const Context& ctx) {
  if (x.numel() == 0) return;
  CheckShapes(x, {dx, dy, dx_in.defined() ? dx_in : dx}, rstd, w);
  KRAIT_CHECK(dw.dtype() == DType::kF32 && dw.numel() == x.dim(-1) && dw.contiguous());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (dx_in.defined()) {
      Backward<T, true>(dx, dw, partial, dy, dx_in, x, rstd, w, ctx);
    } else {
      Backward<T, false>(dx, dw, partial, dy, dx_in, x, rstd, w, ctx);
    }
  };
  x.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace krait::cuda
