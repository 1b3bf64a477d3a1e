// The backward of attention, see attention_tile.cuh: with p = exp(s - lse) recomputed by tile,
//   dv = p^T dy, ds = p (dy v^T - delta) / sqrt(P), delta = sum of y dy, dq = ds k, dk = ds^T q.
// One kernel has tiles of rows and goes through keys for dq, one has tiles of keys and goes through
// rows for dk and dv: the scores are computed twice, and no sum depends on the order of blocks.
#include <cmath>

#include "kernels/cuda/attention_tile.cuh"

namespace krait::cuda {
namespace {

// Rows of the tile of a block, 16 for each of its warps, and of those that it goes through.
constexpr int kRows = 64, kStep = 32, kThreads = 128;

template <typename T>
struct BackwardArgs {
  AttentionShape shape;
  Heads<T> dq, dk, dv;
  Heads<const T> dy, y, q, k, v;
  const float* lse;  // [B,H,T]
  float* delta;      // [B,H,T]
  float scale;

  __device__ int64_t Statistic(int b, int h, int t) const {
    return (static_cast<int64_t>(b) * shape.heads + h) * shape.queries + t;
  }
};

// delta of a row by a warp.
template <typename T>
__global__ void DeltaKernel(BackwardArgs<T> args) {
  StartDependent();
  const AttentionShape& shape = args.shape;
  const int64_t rows = static_cast<int64_t>(shape.batch) * shape.heads * shape.queries;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  // Heads innermost, as in memory.
  const int h = static_cast<int>(row % shape.heads);
  const int t = static_cast<int>(row / shape.heads % shape.queries);
  const int b = static_cast<int>(row / shape.heads / shape.queries);
  const T* y = args.y.At(b, t, h);
  const T* dy = args.dy.At(b, t, h);
  float sum = 0;
  for (int i = threadIdx.x; i < shape.head_dim; i += 32) sum += ToFloat(y[i]) * ToFloat(dy[i]);
  sum = WarpSum(sum);
  if (threadIdx.x == 0) args.delta[args.Statistic(b, h, t)] = sum;
}

// Starts copies of `count` rows from `row0` of (b, g), or keys from `key`.
template <typename T>
__device__ inline void FetchQueries(const BackwardArgs<T>& args, T* tile, const Heads<const T>& x,
                                    int b, int g, int row0, int count) {
  const AttentionShape& shape = args.shape;
  const int rows = shape.rows(), group = shape.group(), width = shape.width();
  FetchRows(tile, TileStride<T>(width), count, width, shape.head_dim, shape.vectors,
            [&](int i) -> const T* {
              const int row = row0 + i;
              return row < rows ? x.At(b, row / group, g * group + row % group) : nullptr;
            });
}
template <typename T>
__device__ inline void FetchKeys(const BackwardArgs<T>& args, T* tile, const Heads<const T>& x,
                                 int b, int g, int key, int count, int end) {
  const int width = args.shape.width();
  FetchRows(tile, TileStride<T>(width), count, width, args.shape.head_dim, args.shape.vectors,
            x.At(b, key, g), x.time_stride, end - key);
}

template <typename T>
int64_t TileBytes(const AttentionShape& shape, int score_tiles) {
  return static_cast<int64_t>(sizeof(T)) * (2 * (kRows + kStep) * TileStride<T>(shape.width()) +
                                            score_tiles * kRows * TileStride<T>(kStep));
}

// Block x: (tile of rows, last first), (b, g); block y: chunk of output columns.
template <typename T>
__global__ void __launch_bounds__(kThreads) QueryGradientKernel(BackwardArgs<T> args) {
  extern __shared__ __align__(16) unsigned char shared[];
  const AttentionShape& shape = args.shape;
  const int width = shape.width(), stride = TileStride<T>(width);
  const int chunk = blockIdx.y * kOutColumns, out = min(width - chunk, kOutColumns);
  constexpr int kScoreStride = TileStride<T>(kStep);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dy_tile = q_tile + kRows * stride;
  T* const k_tile = dy_tile + kRows * stride;
  T* const v_tile = k_tile + kStep * stride;
  T* const ds_tile = v_tile + kStep * stride;
  StartDependent();

  const int rows = shape.rows(), group = shape.group(), pairs = shape.batch * shape.kv_heads;
  const int b = blockIdx.x % pairs / shape.kv_heads, g = blockIdx.x % shape.kv_heads;
  const int row0 = ((rows + kRows - 1) / kRows - 1 - blockIdx.x / pairs) * kRows;
  const int first_query = row0 / group, last_query = (min(row0 + kRows, rows) - 1) / group;
  const int begin = shape.FirstKey(b, first_query), end = shape.prefix() + last_query + 1;
  const int all_begin = shape.FirstKey(b, last_query), all_end = shape.prefix() + first_query + 1;
  FetchQueries(args, q_tile, args.q, b, g, row0, kRows);
  FetchQueries(args, dy_tile, args.dy, b, g, row0, kRows);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int query[2], head[2], row_begin[2], row_end[2];
  float lse_log2[2], delta[2];
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + warp * 16 + lane / 4 + half * 8;
    query[half] = row / group, head[half] = g * group + row % group;
    row_begin[half] = row_end[half] = 0;
    lse_log2[half] = delta[half] = 0;
    if (row >= rows) continue;
    row_begin[half] = shape.FirstKey(b, query[half]);
    row_end[half] = shape.prefix() + query[half] + 1;
    const int64_t at = args.Statistic(b, head[half], query[half]);
    lse_log2[half] = args.lse[at] * kLog2E;
    delta[half] = args.delta[at];
  }
  const float scale_log2 = args.scale * kLog2E;
  float dq[kOutColumns / 8][4] = {};
  T* const ds_rows = ds_tile + warp * 16 * kScoreStride;

  for (int key = begin; key < end; key += kStep) {
    __syncthreads();
    FetchKeys(args, k_tile, args.k, b, g, key, kStep, end);
    FetchKeys(args, v_tile, args.v, b, g, key, kStep, end);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    float s[kStep / 8][4] = {}, dp[kStep / 8][4] = {};
    AddTimesTransposed(s, q_tile + warp * 16 * stride, stride, k_tile, stride, width);
    AddTimesTransposed(dp, dy_tile + warp * 16 * stride, stride, v_tile, stride, width);
    const bool all_seen = key >= all_begin && key + kStep <= all_end;
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, column = key + 8 * j + lane % 4 * 2 + i % 2;
        const bool seen = all_seen || (column >= row_begin[half] && column < row_end[half]);
        const float p = exp2f(s[j][i] * scale_log2 - lse_log2[half]);
        s[j][i] = seen ? p * (dp[j][i] - delta[half]) : 0.0f;
      }
    }
    StoreTile(ds_rows, kScoreStride, s);
    __syncwarp();
    AddTimes<kStep>(dq, ds_rows, kScoreStride, k_tile + chunk, stride, out);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row_end[half] == 0) continue;
    StoreRow(args.dq.At(b, query[half], head[half]) + chunk, dq, half, args.scale,
             shape.head_dim - chunk, shape.vectors);
  }
}

// Block x: (tile of keys, first first, since that is seen by the most queries), (b, g); block y:
// chunk of output columns. Scores are transposed: rows are keys, columns are rows of queries.
template <typename T>
__global__ void __launch_bounds__(kThreads) KeyGradientKernel(BackwardArgs<T> args) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float lse_log2[kStep], delta[kStep];
  __shared__ int row_begin[kStep], row_end[kStep];
  const AttentionShape& shape = args.shape;
  const int width = shape.width(), stride = TileStride<T>(width);
  const int chunk = blockIdx.y * kOutColumns, out = min(width - chunk, kOutColumns);
  constexpr int kScoreStride = TileStride<T>(kStep);
  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + kRows * stride;
  T* const q_tile = v_tile + kRows * stride;
  T* const dy_tile = q_tile + kStep * stride;
  T* const p_tile = dy_tile + kStep * stride;
  T* const ds_tile = p_tile + kRows * kScoreStride;
  StartDependent();

  const int rows = shape.rows(), group = shape.group(), pairs = shape.batch * shape.kv_heads;
  const int b = blockIdx.x % pairs / shape.kv_heads, g = blockIdx.x % shape.kv_heads;
  const int key0 = blockIdx.x / pairs * kRows, key_end = min(key0 + kRows, shape.keys);
  FetchKeys(args, k_tile, args.k, b, g, key0, kRows, key_end);
  FetchKeys(args, v_tile, args.v, b, g, key0, kRows, key_end);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale_log2 = args.scale * kLog2E;
  float dk[kOutColumns / 8][4] = {}, dv[kOutColumns / 8][4] = {};
  T* const p_rows = p_tile + warp * 16 * kScoreStride;
  T* const ds_rows = ds_tile + warp * 16 * kScoreStride;

  // From the first query at or after the first key to the first one whose document begins later.
  for (int row0 = max(0, key0 - shape.prefix()) * group; row0 < rows; row0 += kStep) {
    if (shape.FirstKey(b, row0 / group) >= key_end) break;
    __syncthreads();
    FetchQueries(args, q_tile, args.q, b, g, row0, kStep);
    FetchQueries(args, dy_tile, args.dy, b, g, row0, kStep);
    __pipeline_commit();
    if (threadIdx.x < kStep) {
      const int row = row0 + threadIdx.x, query = row / group;
      const bool valid = row < rows;
      const int64_t at = valid ? args.Statistic(b, g * group + row % group, query) : 0;
      lse_log2[threadIdx.x] = valid ? args.lse[at] * kLog2E : 0.0f;
      delta[threadIdx.x] = valid ? args.delta[at] : 0.0f;
      row_begin[threadIdx.x] = valid ? shape.FirstKey(b, query) : 0;
      row_end[threadIdx.x] = valid ? shape.prefix() + query + 1 : 0;
    }
    __pipeline_wait_prior(0);
    __syncthreads();
    float p[kStep / 8][4] = {}, ds[kStep / 8][4] = {};
    AddTimesTransposed(p, k_tile + warp * 16 * stride, stride, q_tile, stride, width);
    AddTimesTransposed(ds, v_tile + warp * 16 * stride, stride, dy_tile, stride, width);
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = key0 + warp * 16 + lane / 4 + i / 2 * 8;
        const int column = 8 * j + lane % 4 * 2 + i % 2;
        const bool seen = key >= row_begin[column] && key < row_end[column];
        p[j][i] = seen ? exp2f(p[j][i] * scale_log2 - lse_log2[column]) : 0.0f;
        ds[j][i] = seen ? p[j][i] * (ds[j][i] - delta[column]) : 0.0f;
      }
    }
    StoreTile(p_rows, kScoreStride, p);
    StoreTile(ds_rows, kScoreStride, ds);
    __syncwarp();
    AddTimes<kStep>(dv, p_rows, kScoreStride, dy_tile + chunk, stride, out);
    AddTimes<kStep>(dk, ds_rows, kScoreStride, q_tile + chunk, stride, out);
  }
  __pipeline_wait_prior(0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = key0 + warp * 16 + lane / 4 + half * 8;
    if (key >= key_end) continue;
    const int columns = shape.head_dim - chunk;
    StoreRow(args.dk.At(b, key, g) + chunk, dk, half, args.scale, columns, shape.vectors);
    StoreRow(args.dv.At(b, key, g) + chunk, dv, half, 1.0f, columns, shape.vectors);
  }
}

template <typename T>
void Backward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse, Tensor q, Tensor k,
              Tensor v, const Documents& documents, Tensor delta, const Context& ctx) {
  BackwardArgs<T> args{};
  args.shape = ShapeOf(q, k, documents, {dq, dk, dv, dy, q, k, v});
  args.dq = HeadsOf<T>(dq), args.dk = HeadsOf<T>(dk), args.dv = HeadsOf<T>(dv);
  args.dy = HeadsOf<const T>(dy), args.y = HeadsOf<const T>(y);
  args.q = HeadsOf<const T>(q), args.k = HeadsOf<const T>(k), args.v = HeadsOf<const T>(v);
  args.lse = lse.device_data<float>();
  args.delta = delta.device_data<float>();
  const AttentionShape& shape = args.shape;
  args.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  const int64_t rows = int64_t{1} * shape.batch * shape.heads * shape.queries;
  Launch("AttentionDelta", DeltaKernel<T>, Dependent((rows + 3) / 4), dim3(32, 4), 0, ctx, args);
  const int64_t pairs = int64_t{1} * shape.batch * shape.kv_heads;
  Launch("AttentionQueryGradient", QueryGradientKernel<T>,
         Dependent(pairs * ((shape.rows() + kRows - 1) / kRows), OutChunks(shape)), dim3(kThreads),
         TileBytes<T>(shape, 1), ctx, args);
  Launch("AttentionKeyGradient", KeyGradientKernel<T>,
         Dependent(pairs * ((shape.keys + kRows - 1) / kRows), OutChunks(shape)), dim3(kThreads),
         TileBytes<T>(shape, 2), ctx, args);
}

}  // namespace

void AttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse, Tensor q,
                       Tensor k, Tensor v, const Documents& documents, const CudnnCalls& calls,
                       const AttentionScratch& scratch, const Context& ctx) {
  if (calls.sequences > 0 &&
      CudnnAttentionBackward(dq, dk, dv, dy, y, lse, q, k, v, documents, calls, scratch, ctx)) {
    return;
  }
  if (q.dtype() == DType::kF32) {
    Backward<float>(dq, dk, dv, dy, y, lse, q, k, v, documents, scratch.delta, ctx);
  } else {
    Backward<BF16>(dq, dk, dv, dy, y, lse, q, k, v, documents, scratch.delta, ctx);
  }
}

}  // namespace krait::cuda
