// Attention in tiles of kQueryBlock queries times kKeyBlock keys (Dao et al., FlashAttention,
// 2205.14135). A tile's products are CBLAS calls on one thread; what lies between them are row
// loops. Tiles that no query of the block may see are never visited.
#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/check.h"
#include "kernels/base/parallel_for.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vector_math.h"

namespace krait::cpu {
namespace {

constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kPairBlock = 64;  // Rope: pairs whose sine and cosine are held at a time

// One tile: queries [query, query + queries) and keys [key, key + keys) of a row of the batch.
// Query i of the tile sees the tile's keys [begin[i], end[i]).
struct Tile {
  int64_t query, queries, key, keys;
  int64_t begin[kQueryBlock], end[kQueryBlock];
  bool empty;  // no query sees a key
};

// The first key that query t of row b sees.
int64_t FirstKey(const AttentionShape& shape, int64_t b, int64_t t) {
  if (shape.doc_start == nullptr) return 0;
  return std::max<int64_t>(0, shape.doc_start[b * shape.queries + t] - shape.first_key());
}

void SetTile(const AttentionShape& shape, int64_t b, int64_t query, int64_t queries, int64_t key,
             int64_t keys, Tile* tile) {
  tile->query = query;
  tile->queries = queries;
  tile->key = key;
  tile->keys = keys;
  tile->empty = true;
  const int64_t prefix = shape.keys - shape.queries;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t t = query + i;
    const int64_t begin = std::max<int64_t>(FirstKey(shape, b, t) - key, 0);
    const int64_t end = std::clamp<int64_t>(prefix + t + 1 - key, 0, keys);
    tile->begin[i] = std::min(begin, end);
    tile->end[i] = end;
    if (begin < end) tile->empty = false;
  }
}

// One step of the online softmax for a row of scores: s becomes exp(s - max) on [begin, end) and 0
// elsewhere, `max` and `sum` take in the tile; returns the factor that the earlier part shrinks by.
template <typename T>
KRAIT_INLINE T SoftmaxRow(T* s, int64_t begin, int64_t end, int64_t keys, T* max, T* sum) {
  T tile_max = *max;
#pragma omp simd reduction(max : tile_max)
  for (int64_t j = begin; j < end; ++j) tile_max = s[j] > tile_max ? s[j] : tile_max;
  T tile_sum = 0;
#pragma omp simd reduction(+ : tile_sum)
  for (int64_t j = begin; j < end; ++j) {
    s[j] = Exp(s[j] - tile_max);
    tile_sum += s[j];
  }
  std::fill(s, s + begin, T{0});
  std::fill(s + end, s + keys, T{0});
  if (begin == end) return 1;
  const T shrink = Exp(*max - tile_max);
  *max = tile_max;
  *sum = *sum * shrink + tile_sum;
  return shrink;
}

template <typename T>
KRAIT_INLINE void Scale(int64_t n, T factor, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// The softmax step of every row of a tile; y rows (the sum over earlier tiles) shrink with it.
template <typename T>
KRAIT_INLINE void SoftmaxTileLoop(const Tile& tile, T* s, T* max, T* sum, int64_t head_dim, T* y,
                                  int64_t y_stride, bool first) {
  for (int64_t i = 0; i < tile.queries; ++i) {
    const T shrink =
        SoftmaxRow(s + i * kKeyBlock, tile.begin[i], tile.end[i], tile.keys, max + i, sum + i);
    if (!first && shrink != T{1}) Scale(head_dim, shrink, y + i * y_stride);
  }
}

KRAIT_CLONES void SoftmaxTile(const Tile& tile, float* s, float* max, float* sum, int64_t head_dim,
                              float* y, int64_t y_stride, bool first) {
  SoftmaxTileLoop(tile, s, max, sum, head_dim, y, y_stride, first);
}
void SoftmaxTile(const Tile& tile, double* s, double* max, double* sum, int64_t head_dim, double* y,
                 int64_t y_stride, bool first) {
  SoftmaxTileLoop(tile, s, max, sum, head_dim, y, y_stride, first);
}

// Scores to probabilities, and the gradient of the probabilities to that of the unscaled scores.
template <typename T>
KRAIT_INLINE void GradientTileLoop(const Tile& tile, const T* lse, const T* delta, T scale,
                                   T* __restrict s, T* __restrict dp) {
  for (int64_t i = 0; i < tile.queries; ++i) {
    T* p = s + i * kKeyBlock;
    T* ds = dp + i * kKeyBlock;
    const int64_t begin = tile.begin[i], end = tile.end[i];
    const T row_lse = lse[tile.query + i], row_delta = delta[tile.query + i];
    for (int64_t j = begin; j < end; ++j) {
      p[j] = Exp(p[j] - row_lse);
      ds[j] = p[j] * (ds[j] - row_delta) * scale;
    }
    std::fill(p, p + begin, T{0});
    std::fill(p + end, p + tile.keys, T{0});
    std::fill(ds, ds + begin, T{0});
    std::fill(ds + end, ds + tile.keys, T{0});
  }
}

KRAIT_CLONES void GradientTile(const Tile& tile, const float* lse, const float* delta, float scale,
                               float* s, float* dp) {
  GradientTileLoop(tile, lse, delta, scale, s, dp);
}
void GradientTile(const Tile& tile, const double* lse, const double* delta, double scale, double* s,
                  double* dp) {
  GradientTileLoop(tile, lse, delta, scale, s, dp);
}

template <typename T>
KRAIT_INLINE T DotLoop(int64_t n, const T* a, const T* b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
KRAIT_CLONES float DotProduct(int64_t n, const float* a, const float* b) {
  return DotLoop(n, a, b);
}
double DotProduct(int64_t n, const double* a, const double* b) { return DotLoop(n, a, b); }

// Calls fn(task, thread) for each task. Always opens a parallel region, so that CBLAS calls within
// run on one thread and their bits do not depend on how many threads there are.
template <typename Fn>
void ForEachTask(int64_t tasks, const Fn& fn) {
  KRAIT_CHECK(!omp_in_parallel());
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) fn(task, ThreadIndex());
}

template <typename T>
T ScoreScale(const AttentionShape& shape) {
  return static_cast<T>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
}

// Rows [row, ...) of one head as a matrix operand, [time, P] or its transpose.
template <typename T>
Matrix<T> Operand(const Heads<T>& x, int64_t b, int64_t row, int64_t head, bool transposed) {
  return {x.At(b, row, head), x.time_stride, transposed};
}

int64_t Blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The keys [begin, end) that any query of [query, query + queries) sees.
struct KeyRange {
  int64_t begin, end;
};
KeyRange VisibleKeys(const AttentionShape& shape, int64_t b, int64_t query, int64_t queries) {
  int64_t begin = shape.keys;
  for (int64_t i = 0; i < queries; ++i) begin = std::min(begin, FirstKey(shape, b, query + i));
  return {begin, shape.keys - shape.queries + query + queries};
}

// The probabilities and score gradients of one tile of head h, into s and ds.
template <typename T>
void RecomputeTile(const AttentionShape& shape, const Tile& tile, int64_t b, int64_t h, Heads<T> q,
                   Heads<T> k, Heads<T> v, Heads<T> dy, const T* lse, const T* delta, T* s, T* ds) {
  const int64_t g = h / (shape.heads / shape.kv_heads), row = (b * shape.heads + h) * shape.queries;
  const T scale = ScoreScale<T>(shape);
  Gemm<T>(tile.queries, tile.keys, shape.head_dim, scale, Operand(q, b, tile.query, h, false),
          Operand(k, b, tile.key, g, true), false, s, kKeyBlock);
  Gemm<T>(tile.queries, tile.keys, shape.head_dim, T{1}, Operand(dy, b, tile.query, h, false),
          Operand(v, b, tile.key, g, true), false, ds, kKeyBlock);
  GradientTile(tile, lse + row, delta + row, scale, s, ds);
}

// dq of one block of queries of head h.
template <typename T>
void QueryGradient(const AttentionShape& shape, const AttentionGradients<T>& grad, int64_t b,
                   int64_t h, int64_t query, const T* lse, Heads<T> q, Heads<T> k, Heads<T> v,
                   const T* delta, T* s, T* ds) {
  const int64_t g = h / (shape.heads / shape.kv_heads);
  const int64_t queries = std::min(kQueryBlock, shape.queries - query);
  const KeyRange range = VisibleKeys(shape, b, query, queries);
  Tile tile;
  for (int64_t key = range.begin; key < range.end; key += kKeyBlock) {
    SetTile(shape, b, query, queries, key, std::min(kKeyBlock, range.end - key), &tile);
    RecomputeTile(shape, tile, b, h, q, k, v, grad.dy, lse, delta, s, ds);
    Gemm<T>(queries, shape.head_dim, tile.keys, T{1}, Matrix<T>{ds, kKeyBlock, false},
            Operand(k, b, key, g, false), key > range.begin, grad.dq.At(b, query, h),
            grad.dq.time_stride);
  }
}

// dk and dv of one block of keys of key head g: the sum over its query heads and their queries.
template <typename T>
void KeyGradient(const AttentionShape& shape, const AttentionGradients<T>& grad, int64_t b,
                 int64_t g, int64_t key, const T* lse, Heads<T> q, Heads<T> k, Heads<T> v,
                 const T* delta, T* s, T* ds) {
  const int64_t keys = std::min(kKeyBlock, shape.keys - key), group = shape.heads / shape.kv_heads;
  for (int64_t j = 0; j < keys; ++j) {
    std::fill_n(grad.dk.At(b, key + j, g), shape.head_dim, T{0});
    std::fill_n(grad.dv.At(b, key + j, g), shape.head_dim, T{0});
  }
  // The first query at or after the first key.
  const int64_t first = std::max<int64_t>(key - (shape.keys - shape.queries), 0);
  Tile tile;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    for (int64_t query = first; query < shape.queries; query += kQueryBlock) {
      SetTile(shape, b, query, std::min(kQueryBlock, shape.queries - query), key, keys, &tile);
      if (tile.empty) continue;
      RecomputeTile(shape, tile, b, h, q, k, v, grad.dy, lse, delta, s, ds);
      Gemm<T>(keys, shape.head_dim, tile.queries, T{1}, Matrix<T>{s, kKeyBlock, true},
              Operand(grad.dy, b, query, h, false), true, grad.dv.At(b, key, g),
              grad.dv.time_stride);
      Gemm<T>(keys, shape.head_dim, tile.queries, T{1}, Matrix<T>{ds, kKeyBlock, true},
              Operand(q, b, query, h, false), true, grad.dk.At(b, key, g), grad.dk.time_stride);
    }
  }
}

// The document of query t of row b begins at or before its own position.
void CheckDocuments(const AttentionShape& shape) {
  if (shape.doc_start == nullptr) return;
  for (int64_t i = 0; i < shape.batch * shape.queries; ++i) {
    KRAIT_CHECK(shape.doc_start[i] >= 0 &&
                shape.doc_start[i] <= shape.first_position + i % shape.queries);
  }
}

}  // namespace

int64_t AttentionTileElements() { return kQueryBlock * kKeyBlock; }

template <typename T>
void AttentionForward(const AttentionShape& shape, Heads<T> y, T* lse, Heads<T> q, Heads<T> k,
                      Heads<T> v, T* scratch) {
  CheckDocuments(shape);
  const int64_t blocks = Blocks(shape.queries, kQueryBlock);
  ForEachTask(shape.batch * shape.heads * blocks, [&](int64_t task, int thread) {
    // The last block sees the most keys: it goes first, so that threads end together.
    const int64_t query = (blocks - 1 - task % blocks) * kQueryBlock;
    const int64_t b = task / blocks / shape.heads, h = task / blocks % shape.heads;
    const int64_t g = h / (shape.heads / shape.kv_heads);
    const int64_t queries = std::min(kQueryBlock, shape.queries - query);
    const KeyRange range = VisibleKeys(shape, b, query, queries);
    T* s = scratch + thread * AttentionTileElements();
    T* out = y.At(b, query, h);
    T max[kQueryBlock], sum[kQueryBlock];
    std::fill_n(max, kQueryBlock, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, kQueryBlock, T{0});
    Tile tile;
    for (int64_t key = range.begin; key < range.end; key += kKeyBlock) {
      SetTile(shape, b, query, queries, key, std::min(kKeyBlock, range.end - key), &tile);
      Gemm<T>(queries, tile.keys, shape.head_dim, ScoreScale<T>(shape),
              Operand(q, b, query, h, false), Operand(k, b, key, g, true), false, s, kKeyBlock);
      const bool first = key == range.begin;
      SoftmaxTile(tile, s, max, sum, shape.head_dim, out, y.time_stride, first);
      Gemm<T>(queries, shape.head_dim, tile.keys, T{1}, Matrix<T>{s, kKeyBlock, false},
              Operand(v, b, key, g, false), !first, out, y.time_stride);
    }
    for (int64_t i = 0; i < queries; ++i) {
      Scale(shape.head_dim, T{1} / sum[i], out + i * y.time_stride);
      lse[(b * shape.heads + h) * shape.queries + query + i] = max[i] + std::log(sum[i]);
    }
  });
}

template <typename T>
void AttentionBackward(const AttentionShape& shape, const AttentionGradients<T>& grad, Heads<T> y,
                       const T* lse, Heads<T> q, Heads<T> k, Heads<T> v, T* delta, T* scratch) {
  CheckDocuments(shape);
  const int64_t rows = shape.batch * shape.heads;
  ParallelFor(rows * shape.queries, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % shape.queries, h = i / shape.queries % shape.heads,
                    b = i / shape.queries / shape.heads;
      delta[i] = DotProduct(shape.head_dim, y.At(b, t, h), grad.dy.At(b, t, h));
    }
  });
  const int64_t query_blocks = Blocks(shape.queries, kQueryBlock);
  ForEachTask(rows * query_blocks, [&](int64_t task, int thread) {
    T* s = scratch + 2 * thread * AttentionTileElements();
    const int64_t query = (query_blocks - 1 - task % query_blocks) * kQueryBlock;
    QueryGradient(shape, grad, task / query_blocks / shape.heads, task / query_blocks % shape.heads,
                  query, lse, q, k, v, delta, s, s + AttentionTileElements());
  });
  const int64_t key_blocks = Blocks(shape.keys, kKeyBlock);
  ForEachTask(shape.batch * shape.kv_heads * key_blocks, [&](int64_t task, int thread) {
    T* s = scratch + 2 * thread * AttentionTileElements();
    KeyGradient(shape, grad, task / key_blocks / shape.kv_heads, task / key_blocks % shape.kv_heads,
                task % key_blocks * kKeyBlock, lse, q, k, v, delta, s, s + AttentionTileElements());
  });
}

template <typename T>
void Rope(const AttentionShape& shape, Heads<T> x, const double* frequency, bool inverse) {
  const int64_t half = shape.head_dim / 2;
  ParallelFor(shape.batch * shape.queries, 16, [&](int64_t begin, int64_t end) {
    T cosine[kPairBlock], sine[kPairBlock];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / shape.queries, t = row % shape.queries;
      const int64_t start = shape.doc_start == nullptr ? 0 : shape.doc_start[row];
      const auto position = static_cast<double>(shape.first_position + t - start);
      for (int64_t i0 = 0; i0 < half; i0 += kPairBlock) {
        const int64_t pairs = std::min(kPairBlock, half - i0);
        for (int64_t i = 0; i < pairs; ++i) {
          const double angle = position * frequency[i0 + i];
          cosine[i] = static_cast<T>(std::cos(angle));
          sine[i] = static_cast<T>(inverse ? -std::sin(angle) : std::sin(angle));
        }
        for (int64_t h = 0; h < shape.heads; ++h) {
          T* low = x.At(b, t, h) + i0;
          T* high = low + half;
          for (int64_t i = 0; i < pairs; ++i) {
            const T a = low[i], c = high[i];
            low[i] = a * cosine[i] - c * sine[i];
            high[i] = c * cosine[i] + a * sine[i];
          }
        }
      }
    }
  });
}

template void AttentionForward(const AttentionShape&, Heads<float>, float*, Heads<float>,
                               Heads<float>, Heads<float>, float*);
template void AttentionForward(const AttentionShape&, Heads<double>, double*, Heads<double>,
                               Heads<double>, Heads<double>, double*);
template void AttentionBackward(const AttentionShape&, const AttentionGradients<float>&,
                                Heads<float>, const float*, Heads<float>, Heads<float>,
                                Heads<float>, float*, float*);
template void AttentionBackward(const AttentionShape&, const AttentionGradients<double>&,
                                Heads<double>, const double*, Heads<double>, Heads<double>,
                                Heads<double>, double*, double*);
template void Rope(const AttentionShape&, Heads<float>, const double*, bool);
template void Rope(const AttentionShape&, Heads<double>, const double*, bool);

}  // namespace krait::cpu
