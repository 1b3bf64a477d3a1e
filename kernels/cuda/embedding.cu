// Embedding. The backward sorts the positions by token, stably and digit by digit, and then adds up
// the rows of each token in ascending position: the order of the CPU version, without atomics.
#include <utility>

#include "kernels/cuda/embedding.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 128;
// Sorted positions that a block looks at for the first of a token.
constexpr int kPositions = 16;
// Rows of one token under way at a time.
constexpr int kAhead = 4;

int64_t Blocks(int64_t n) { return (n + kThreads - 1) / kThreads; }

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(Rows<T> y, const int32_t* tokens, Rows<const T> table, VocabularySlice slice,
                  int d, int per_row) {
  const int64_t i = blockIdx.x / per_row;
  const int col = (static_cast<int>(blockIdx.x % per_row) * kThreads + threadIdx.x) * kVec;
  if (col >= d) return;
  const int64_t row = tokens[i] - slice.first;
  Pack<T, kVec> value = {};
  if (row >= 0 && row < slice.used) value = Load<kVec>(table[row] + col);
  Store(y[i] + col, value);
}

__global__ void __launch_bounds__(kThreads)
    StartKernel(int32_t* keys, int32_t* positions, const int32_t* tokens, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  keys[i] = tokens[i];
  positions[i] = static_cast<int32_t>(i);
}

__global__ void __launch_bounds__(kThreads)
    MoveKernel(int32_t* keys, int32_t* positions, const int32_t* old_keys,
               const int32_t* old_positions, const int32_t* place, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  keys[place[i]] = old_keys[i];
  positions[place[i]] = old_positions[i];
}

// keys ascending; block x looks at kPositions of them, block y at one slice of the columns.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    SumKernel(Rows<float> dtable, Rows<const T> dy, const int32_t* keys, const int32_t* positions,
              VocabularySlice slice, int64_t pad_token, int64_t n, int d) {
  const int col = (blockIdx.y * kThreads + threadIdx.x) * kVec;
  if (col >= d) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPositions;
  for (int64_t s = first; s < min(n, first + kPositions); ++s) {
    const int32_t token = keys[s];
    if (s > 0 && keys[s - 1] == token) continue;
    const int64_t row = token - slice.first;
    if (row < 0 || row >= slice.used || token == pad_token) continue;
    float* const at = dtable[row] + col;
    Pack<float, kVec> sum = Load<kVec>(at);
    int64_t i = s;
    while (i < n && keys[i] == token) {
      Pack<T, kVec> rows[kAhead];
      int count = 0;
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (i + a < n && keys[i + a] == token) {
          rows[a] = Load<kVec>(dy[positions[i + a]] + col);
          count = a + 1;
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (a >= count) continue;
        const Pack<float, kVec> wide = Widen(rows[a]);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum.v[j] += wide.v[j];
      }
      i += count;
    }
    Store(at, sum);
  }
}

// Calls run(T{}, elements of an access).
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

}  // namespace

void EmbeddingForward(Tensor y, Tensor tokens, Tensor table, VocabularySlice slice,
                      const Context& ctx) {
  KRAIT_CHECK(y.dtype() == table.dtype() && y.dim(-1) == table.dim(-1) &&
              slice.used <= table.dim(0) && tokens.numel() == y.rows());
  ForRows(y, Vectorizable(y) && Vectorizable(table), [&](auto zero, auto vec) {
    using T = decltype(zero);
    const int64_t d = y.dim(-1), per_row = (d + kThreads * vec - 1) / (kThreads * vec);
    Launch("EmbeddingForward", ForwardKernel<T, vec>, y.rows() * per_row, dim3(kThreads), 0, ctx,
           RowsOf<T>(y), static_cast<const int32_t*>(tokens.device_data<int32_t>()),
           RowsOf<const T>(table), slice, static_cast<int>(d), static_cast<int>(per_row));
  });
}

void EmbeddingBackward(Tensor dtable, Tensor dy, Tensor tokens, VocabularySlice slice,
                       int64_t pad_token, Tensor scratch, const Context& ctx) {
  const int64_t n = tokens.numel();
  KRAIT_CHECK(dtable.dtype() == DType::kF32 && dy.dim(-1) == dtable.dim(-1) && dy.rows() == n &&
              slice.used <= dtable.dim(0) && scratch.numel() >= EmbeddingScratchWords(n));
  if (n == 0) return;
  constexpr int64_t kBuckets = int64_t{1} << kTokenBits;
  // The offsets come first: they are 64-bit.
  int64_t* const offsets = reinterpret_cast<int64_t*>(scratch.device_data<int32_t>());
  int32_t* keys = reinterpret_cast<int32_t*>(offsets + kBuckets + 1);
  int32_t *positions = keys + n, *next_keys = keys + 2 * n, *next_positions = keys + 3 * n;
  int32_t *const place = keys + 4 * n, *const counts = keys + 5 * n;
  const auto constant = [](int32_t* p) { return static_cast<const int32_t*>(p); };
  Launch("EmbeddingBackward: start", StartKernel, Blocks(n), dim3(kThreads), 0, ctx, keys,
         positions, constant(tokens.device_data<int32_t>()), n);
  for (int shift = 0; shift < 31 && slice.total - 1 >= int64_t{1} << shift; shift += kTokenBits) {
    SortIntoBuckets(place, offsets, counts, {keys, shift, static_cast<int32_t>(kBuckets) - 1}, n,
                    kBuckets,
                    /*alignment=*/1, ctx);
    Launch("EmbeddingBackward: move", MoveKernel, Blocks(n), dim3(kThreads), 0, ctx, next_keys,
           next_positions, constant(keys), constant(positions), constant(place), n);
    std::swap(keys, next_keys);
    std::swap(positions, next_positions);
  }
  ForRows(dy, Vectorizable(dy) && Vectorizable(dtable), [&](auto zero, auto vec) {
    using T = decltype(zero);
    const int64_t d = dy.dim(-1);
    Launch("EmbeddingBackward", SumKernel<T, vec>,
           Grid((n + kPositions - 1) / kPositions, (d + kThreads * vec - 1) / (kThreads * vec)),
           dim3(kThreads), 0, ctx, RowsOf<float>(dtable), RowsOf<const T>(dy), constant(keys),
           constant(positions), slice, pad_token, n, static_cast<int>(d));
  });
}

}  // namespace krait::cuda
