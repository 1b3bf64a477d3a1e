// The forward of attention in tiles of 16 or 64 rows times 64 keys (Dao et al., FlashAttention,
// 2205.14135), see attention_tile.cuh. Keys that no row of a tile sees are not read.
#include <cmath>

#include "kernels/cuda/attention_tile.cuh"

namespace krait::cuda {
namespace {

// Keys of a tile: fewer for the block of one warp, so that many blocks are resident and hide each
// other's latency.
template <int kWarps>
constexpr int kTileKeys = kWarps == 1 ? 32 : 64;

template <typename T>
struct ForwardArgs {
  AttentionShape shape;
  Heads<T> y;
  float* lse;  // [B,H,T]
  Heads<const T> q, k, v;
  float* partial_y;    // [splits, B*H*T, P]
  float* partial_lse;  // [splits, B*H*T]
  int splits;
  float scale_log2;  // of scores, times log2(e)
};

template <typename T>
int64_t ForwardBytes(const AttentionShape& shape, int rows) {
  const int keys = rows == 16 ? kTileKeys<1> : kTileKeys<4>;
  const int width = shape.width(), out = std::min(width, kOutColumns);
  return static_cast<int64_t>(sizeof(T)) * ((rows + keys) * TileStride<T>(width) +
                                            keys * TileStride<T>(out) + rows * TileStride<T>(keys));
}

// Block x: (tile of rows, last first, since that sees the most keys), (b, g), range of keys; block
// y: chunk of output columns.
template <typename T, int kWarps>
__global__ void __launch_bounds__(kWarps * 32) ForwardKernel(ForwardArgs<T> args) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kRows = 16 * kWarps, kKeys = kTileKeys<kWarps>;
  const AttentionShape& shape = args.shape;
  const int width = shape.width(), stride = TileStride<T>(width);
  const int chunk = blockIdx.y * kOutColumns, out = min(width - chunk, kOutColumns);
  const int out_stride = TileStride<T>(min(width, kOutColumns));
  constexpr int kPStride = TileStride<T>(kKeys);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const k_tile = q_tile + kRows * stride;
  T* const v_tile = k_tile + kKeys * stride;
  T* const p_tile = v_tile + kKeys * out_stride;
  StartDependent();

  const int rows = shape.rows(), group = shape.group(), pairs = shape.batch * shape.kv_heads;
  const int split = blockIdx.x % args.splits, place = blockIdx.x / args.splits;
  const int b = place % pairs / shape.kv_heads, g = place % shape.kv_heads;
  const int row0 = ((rows + kRows - 1) / kRows - 1 - place / pairs) * kRows;
  const int first_query = row0 / group, last_query = (min(row0 + kRows, rows) - 1) / group;
  int begin = shape.FirstKey(b, first_query), end = shape.prefix() + last_query + 1;
  if (args.splits > 1) {
    const int range = ((end - begin + args.splits - 1) / args.splits + kKeys - 1) / kKeys * kKeys;
    begin += split * range;
    end = min(end, begin + range);
  }
  // Keys that all rows of the tile see.
  const int all_begin = shape.FirstKey(b, last_query), all_end = shape.prefix() + first_query + 1;

  FetchRows(q_tile, stride, kRows, width, shape.head_dim, shape.vectors, [&](int i) -> const T* {
    const int row = row0 + i;
    return row < rows ? args.q.At(b, row / group, g * group + row % group) : nullptr;
  });
  __pipeline_commit();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int query[2], row_begin[2], row_end[2];
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + warp * 16 + lane / 4 + half * 8;
    query[half] = row / group;
    row_begin[half] = row < rows ? shape.FirstKey(b, query[half]) : 0;
    row_end[half] = row < rows ? shape.prefix() + query[half] + 1 : 0;
  }
  float y[kOutColumns / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // sum: of this lane's columns
  T* const p_rows = p_tile + warp * 16 * kPStride;

  for (int key = begin; key < end; key += kKeys) {
    __syncthreads();
    const int valid = end - key;
    FetchRows(k_tile, stride, kKeys, width, shape.head_dim, shape.vectors, args.k.At(b, key, g),
              args.k.time_stride, valid);
    __pipeline_commit();
    FetchRows(v_tile, out_stride, kKeys, out, shape.head_dim - chunk, shape.vectors,
              args.v.At(b, key, g) + chunk, args.v.time_stride, valid);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float s[kKeys / 8][4] = {};
    AddTimesTransposed(s, q_tile + warp * 16 * stride, stride, k_tile, stride, width);
    const bool all_seen = key >= all_begin && key + kKeys <= min(all_end, end);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = max[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[j][half * 2 + i];
          score *= args.scale_log2;
          if (!all_seen) {
            const int column = key + 8 * j + lane % 4 * 2 + i;
            if (column < row_begin[half] || column >= min(row_end[half], end)) score = -INFINITY;
          }
          tile_max = fmaxf(tile_max, score);
        }
      }
      tile_max = QuadMax(tile_max);
      const float base = tile_max == -INFINITY ? 0.0f : tile_max;
      const float shrink = exp2f(max[half] - base);
      max[half] = tile_max;
      sum[half] *= shrink;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[j][half * 2 + i];
          score = exp2f(score - base);
          sum[half] += score;
        }
      }
      if (__any_sync(~0u, shrink != 1.0f)) {  // rarely, after the first tiles
#pragma unroll
        for (int j = 0; j < kOutColumns / 8; ++j) {
          y[j][half * 2] *= shrink;
          y[j][half * 2 + 1] *= shrink;
        }
      }
    }
    StoreTile(p_rows, kPStride, s);
    __pipeline_wait_prior(0);
    __syncthreads();
    AddTimes<kKeys>(y, p_rows, kPStride, v_tile, out_stride, out);
  }
  __pipeline_wait_prior(0);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = QuadSum(sum[half]);
    if (row_end[half] == 0) continue;
    const int h = g * group + (row0 + warp * 16 + lane / 4 + half * 8) % group;
    const int columns = shape.head_dim - chunk;
    const int64_t at = (static_cast<int64_t>(b) * shape.heads + h) * shape.queries + query[half];
    const float lse = max[half] * kLn2 + logf(total);  // of no keys: minus infinity
    if (args.splits == 1) {
      StoreRow(args.y.At(b, query[half], h) + chunk, y, half, 1 / total, columns, shape.vectors);
      if (chunk == 0 && lane % 4 == 0) args.lse[at] = lse;
    } else {
      const int64_t heads_queries = static_cast<int64_t>(shape.batch) * shape.heads * shape.queries;
      const int64_t part = split * heads_queries + at;
      StoreRow(args.partial_y + part * shape.head_dim + chunk, y, half,
               total > 0 ? 1 / total : 1.0f, columns, shape.vectors);
      if (chunk == 0 && lane % 4 == 0) args.partial_lse[part] = lse;
    }
  }
}

// y and lse of all ranges of keys from those of each. A block has a row; its threads in y take
// turns at the ranges.
constexpr int kMergeColumns = 64, kMergeStrides = 8;

template <typename T>
__global__ void __launch_bounds__(kMergeColumns* kMergeStrides) MergeKernel(ForwardArgs<T> args) {
  __shared__ float weights[kMaxAttentionSplits];
  __shared__ float sums[kMergeStrides][kMergeColumns];
  StartDependent();
  const AttentionShape& shape = args.shape;
  const int64_t rows = static_cast<int64_t>(shape.batch) * shape.heads * shape.queries;
  const int64_t row = blockIdx.x;
  const float* const lse = args.partial_lse + row;
  const int thread = threadIdx.y * kMergeColumns + threadIdx.x;
  const auto each_split = [&](auto fn) {
    for (int i = thread; i < args.splits; i += kMergeColumns * kMergeStrides) fn(i);
    __syncthreads();
  };
  each_split([&](int i) { weights[i] = lse[i * rows]; });
  float max = -INFINITY, sum = 0;
  for (int split = 0; split < args.splits; ++split) max = fmaxf(max, weights[split]);
  __syncthreads();
  each_split([&](int i) { weights[i] = expf(weights[i] - max); });
  for (int split = 0; split < args.splits; ++split) sum += weights[split];
  if (thread == 0) args.lse[row] = max + logf(sum);
  const auto t = static_cast<int>(row % shape.queries);
  const auto h = static_cast<int>(row / shape.queries % shape.heads);
  const auto b = static_cast<int>(row / shape.queries / shape.heads);
  for (int first = 0; first < shape.head_dim; first += kMergeColumns) {
    const int column = first + threadIdx.x;
    float y = 0;
    if (column < shape.head_dim) {
#pragma unroll 4
      for (int split = threadIdx.y; split < args.splits; split += kMergeStrides) {
        y += weights[split] * args.partial_y[(split * rows + row) * shape.head_dim + column];
      }
    }
    sums[threadIdx.y][threadIdx.x] = y;
    __syncthreads();
    if (threadIdx.y == 0 && column < shape.head_dim) {
      for (int i = 1; i < kMergeStrides; ++i) y += sums[i][threadIdx.x];
      args.y.At(b, t, h)[column] = FromFloat<T>(y / sum);
    }
    __syncthreads();
  }
}

template <typename T>
void Forward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, const Documents& documents,
             const AttentionScratch& scratch, const Context& ctx) {
  ForwardArgs<T> args{};
  args.shape = ShapeOf(q, k, documents, {y, q, k, v});
  args.y = HeadsOf<T>(y);
  args.lse = lse.device_data<float>();
  args.q = HeadsOf<const T>(q), args.k = HeadsOf<const T>(k), args.v = HeadsOf<const T>(v);
  args.splits = static_cast<int>(AttentionSplits(q, k));
  if (args.splits > 1) {
    args.partial_y = scratch.partial_y.device_data<float>();
    args.partial_lse = scratch.partial_lse.device_data<float>();
  }
  const AttentionShape& shape = args.shape;
  args.scale_log2 = kLog2E / std::sqrt(static_cast<float>(shape.head_dim));
  const int tile = static_cast<int>(AttentionRows(shape.rows()));
  const int64_t blocks =
      int64_t{1} * shape.batch * shape.kv_heads * ((shape.rows() + tile - 1) / tile) * args.splits;
  const auto launch = [&](auto kernel) {
    Launch("AttentionForward", kernel, Dependent(blocks, OutChunks(shape)), dim3(2 * tile),
           ForwardBytes<T>(shape, tile), ctx, args);
  };
  tile == 16 ? launch(ForwardKernel<T, 1>) : launch(ForwardKernel<T, 4>);
  if (args.splits > 1) {
    const int64_t rows = int64_t{1} * shape.batch * shape.heads * shape.queries;
    Launch("AttentionMerge", MergeKernel<T>, Dependent(rows), dim3(kMergeColumns, kMergeStrides), 0,
           ctx, args);
  }
}

// Block x: a row of the mask.
__global__ void MaskKernel(BF16* mask, int64_t stride, AttentionShape shape, int64_t first) {
  StartDependent();
  const int64_t row = blockIdx.x;
  const auto b = static_cast<int>(first + row / shape.queries);
  const int begin = shape.FirstKey(b, static_cast<int>(row % shape.queries));
  for (int column = threadIdx.x * 8; column < stride; column += blockDim.x * 8) {
    Pack<BF16, 8> pack;
#pragma unroll
    for (int j = 0; j < 8; ++j) pack.v[j].bits = column + j < begin ? 0xff80 : 0;
    Store(mask + row * stride + column, pack);
  }
}

}  // namespace

void DocumentMask(Tensor mask, const Documents& documents, int64_t first, const Context& ctx) {
  AttentionShape shape{};
  shape.queries = static_cast<int>(documents.doc_start.dim(1));
  shape.doc_start = documents.doc_start.device_data<int32_t>();
  shape.first_key = documents.first_position;
  Launch("DocumentMask", MaskKernel, Dependent(mask.rows()), dim3(128), 0, ctx,
         mask.device_data<BF16>(), mask.dim(-1), shape, first);
}

AttentionShape ShapeOf(const Tensor& q, const Tensor& k, const Documents& documents,
                       std::initializer_list<Tensor> operands) {
  const int64_t group = q.dim(2) / k.dim(2);
  KRAIT_CHECK(q.dim(3) <= kMaxHeadDim && k.dim(1) < INT32_MAX - 64 &&
              q.dim(1) * group < INT32_MAX - 64 && q.dim(0) * q.dim(2) < INT32_MAX);
  AttentionShape shape{};
  shape.batch = static_cast<int>(q.dim(0));
  shape.queries = static_cast<int>(q.dim(1));
  shape.keys = static_cast<int>(k.dim(1));
  shape.heads = static_cast<int>(q.dim(2));
  shape.kv_heads = static_cast<int>(k.dim(2));
  shape.head_dim = static_cast<int>(q.dim(3));
  if (documents.doc_start.defined()) {
    shape.doc_start = documents.doc_start.device_data<int32_t>();
  }
  shape.first_key = documents.first_position + shape.queries - shape.keys;
  shape.vectors = true;
  for (const Tensor& t : operands) shape.vectors = shape.vectors && VectorHeads(t);
  return shape;
}

void AttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                      const Documents& documents, const CudnnCalls& calls,
                      const AttentionScratch& scratch, const Context& ctx) {
  if (lse.numel() == 0) return;
  if (calls.sequences > 0 &&
      CudnnAttentionForward(y, lse, q, k, v, documents, calls, scratch, ctx)) {
    return;
  }
  if (q.dtype() == DType::kF32) {
    Forward<float>(y, lse, q, k, v, documents, scratch, ctx);
  } else {
    Forward<BF16>(y, lse, q, k, v, documents, scratch, ctx);
  }
}

}  // namespace krait::cuda
