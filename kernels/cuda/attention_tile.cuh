// What the plain attention kernels share: tiles of rows in shared memory and products of them.
//
// Queries of the H/G heads that read one key head are rows of one matrix: row r of (b, g) is query
// r / (H/G) of head g * H/G + r % (H/G). So keys and values are read once for all heads of a group.
#ifndef KRAIT_KERNELS_CUDA_ATTENTION_TILE_CUH_
#define KRAIT_KERNELS_CUDA_ATTENTION_TILE_CUH_

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A tensor [B,T,heads,P].
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, time_stride, head_stride;
  __device__ T* At(int64_t b, int64_t t, int64_t h) const {
    return data + b * batch_stride + t * time_stride + h * head_stride;
  }
};
template <typename T>
Heads<T> HeadsOf(const Tensor& t) {
  return {t.device_data<std::remove_const_t<T>>(), t.stride(0), t.stride(1), t.stride(2)};
}

struct AttentionShape {
  int batch, queries, keys, heads, kv_heads, head_dim;
  const int32_t* doc_start;  // [B,T] or null
  int64_t first_key;         // position of key 0
  bool vectors;              // every head of every operand begins and ends at a 16-byte boundary

  __host__ __device__ int group() const { return heads / kv_heads; }
  __host__ __device__ int rows() const { return queries * group(); }
  __host__ __device__ int prefix() const { return keys - queries; }
  // Of a tile in shared memory: its columns, a multiple of 16; those beyond head_dim are zero.
  __host__ __device__ int width() const { return (head_dim + 15) / 16 * 16; }
  // The first key that query t of sequence b sees; it never falls with t.
  __device__ int FirstKey(int b, int t) const {
    if (doc_start == nullptr) return 0;
    const int64_t first = doc_start[static_cast<int64_t>(b) * queries + t] - first_key;
    return first > 0 ? static_cast<int>(first) : 0;
  }
};

// Columns of an output that a block computes; a wider head takes several blocks.
inline constexpr int kOutColumns = 128;
inline int OutChunks(const AttentionShape& shape) {
  return (shape.width() + kOutColumns - 1) / kOutColumns;
}

// Elements between rows of a tile of `columns`, so that the rows of a product's operand begin in
// different banks.
template <typename T>
__host__ __device__ constexpr int TileStride(int columns) {
  return columns + kVectorOf<T>;
}

// Starts copies of rows of a tile; row(i) is the first element of row i, or null for a row of
// zeros. Columns [columns, width) are zeros. To be followed by __pipeline_commit().
template <typename T, typename Row>
__device__ inline void FetchRows(T* tile, int stride, int rows, int width, int columns,
                                 bool vectors, const Row& row) {
  constexpr int kVector = kVectorOf<T>;
  const int accesses = width / kVector;
  int shift = 0;  // 2^shift threads copy a row
  while (shift < 5 && (1 << shift) < accesses) ++shift;
  const int lane = threadIdx.x & ((1 << shift) - 1);
#pragma unroll 4
  for (int i = threadIdx.x >> shift; i < rows; i += blockDim.x >> shift) {
    const T* from = row(i);
    for (int access = lane; access < accesses; access += 1 << shift) {
      const int column = access * kVector;
      auto* to = reinterpret_cast<Pack<T, kVector>*>(tile + i * stride + column);
      if (from != nullptr && vectors && column < columns) {
        FetchAsync(to, from + column);
        continue;
      }
      Pack<T, kVector> pack = {};
      if (from != nullptr) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (column + j < columns) pack.v[j] = from[column + j];
        }
      }
      *to = pack;
    }
  }
}

// The same for rows of one stride, of which the first `valid` exist.
template <typename T>
__device__ inline void FetchRows(T* tile, int stride, int rows, int width, int columns,
                                 bool vectors, const T* from, int64_t from_stride, int valid) {
  constexpr int kVector = kVectorOf<T>;
  const int accesses = width / kVector;
  int shift = 0;  // 2^shift threads copy a row
  while (shift < 5 && (1 << shift) < accesses) ++shift;
  const int first = threadIdx.x >> shift, step = blockDim.x >> shift;
  for (int access = threadIdx.x & ((1 << shift) - 1); access < accesses; access += 1 << shift) {
    const int column = access * kVector;
    T* to = tile + first * stride + column;
    const T* source = from + first * from_stride + column;
    if (vectors && column < columns) {
#pragma unroll 4
      for (int i = first; i < rows; i += step, to += step * stride, source += step * from_stride) {
        __pipeline_memcpy_async(to, source, 16, i < valid ? 0 : 16);
      }
      continue;
    }
    for (int i = first; i < rows; i += step, to += step * stride, source += step * from_stride) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        to[j] = i < valid && column + j < columns ? source[j] : T{};
      }
    }
  }
}

__device__ inline void LoadMatrices(uint32_t (&r)[4], const BF16* address) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ inline void LoadTransposed(uint32_t (&r)[4], const BF16* address) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ inline void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A warp's sums c [16, 8 kTiles]: lane l has rows l/4 and l/4 + 8, of tile j the columns
// 8j + 2(l%4) and the next: c[j] = {first row's two, second row's two}. This is the layout of the
// tensor cores' m16n8 products, which the f32 versions keep.
//
// c += a b^T for a [16, depth] and b [8 kTiles, depth]; depth is a multiple of 16.
template <int kTiles>
__device__ inline void AddTimesTransposed(float (&c)[kTiles][4], const BF16* a, int a_stride,
                                          const BF16* b, int b_stride, int depth) {
  const int lane = threadIdx.x % 32;
  a += lane % 16 * a_stride + lane / 16 * 8;
  b += (lane % 8 + lane / 16 * 8) * b_stride + lane / 8 % 2 * 8;
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    uint32_t ra[4], rb[4];
    LoadMatrices(ra, a + k);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      LoadMatrices(rb, b + 8 * j * b_stride + k);
      MultiplyAdd(c[j], ra, rb[0], rb[1]);
      MultiplyAdd(c[j + 1], ra, rb[2], rb[3]);
    }
  }
}
template <int kTiles>
__device__ inline void AddTimesTransposed(float (&c)[kTiles][4], const float* a, int a_stride,
                                          const float* b, int b_stride, int depth) {
  const int lane = threadIdx.x % 32;
  a += lane / 4 * a_stride;
  b += lane % 4 * 2 * b_stride;
  for (int k = 0; k < depth; k += 4) {
    const Pack<float, 4> a0 = Load<4>(a + k), a1 = Load<4>(a + 8 * a_stride + k);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const Pack<float, 4> b0 = Load<4>(b + 8 * j * b_stride + k);
      const Pack<float, 4> b1 = Load<4>(b + (8 * j + 1) * b_stride + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[j][0] = fmaf(a0.v[i], b0.v[i], c[j][0]);
        c[j][1] = fmaf(a0.v[i], b1.v[i], c[j][1]);
        c[j][2] = fmaf(a1.v[i], b0.v[i], c[j][2]);
        c[j][3] = fmaf(a1.v[i], b1.v[i], c[j][3]);
      }
    }
  }
}

// c += a b for a [16, kDepth] and b [kDepth, columns]; columns is a multiple of 16, tiles beyond it
// are left alone.
template <int kDepth, int kTiles>
__device__ inline void AddTimes(float (&c)[kTiles][4], const BF16* a, int a_stride, const BF16* b,
                                int b_stride, int columns) {
  const int lane = threadIdx.x % 32;
  a += lane % 16 * a_stride + lane / 16 * 8;
  b += lane % 16 * b_stride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t ra[4], rb[4];
    LoadMatrices(ra, a + k);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      if (8 * j >= columns) break;
      LoadTransposed(rb, b + k * b_stride + 8 * j);
      MultiplyAdd(c[j], ra, rb[0], rb[1]);
      MultiplyAdd(c[j + 1], ra, rb[2], rb[3]);
    }
  }
}
template <int kDepth, int kTiles>
__device__ inline void AddTimes(float (&c)[kTiles][4], const float* a, int a_stride, const float* b,
                                int b_stride, int columns) {
  const int lane = threadIdx.x % 32;
  a += lane / 4 * a_stride;
  b += lane % 4 * 2;
  for (int k = 0; k < kDepth; ++k) {
    const float a0 = a[k], a1 = a[8 * a_stride + k];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (8 * j >= columns) break;
      const Pack<float, 2> pair = Load<2>(b + k * b_stride + 8 * j);
      c[j][0] = fmaf(a0, pair.v[0], c[j][0]);
      c[j][1] = fmaf(a0, pair.v[1], c[j][1]);
      c[j][2] = fmaf(a1, pair.v[0], c[j][2]);
      c[j][3] = fmaf(a1, pair.v[1], c[j][3]);
    }
  }
}

// A warp's sums into 16 rows of a tile, rounded to T.
template <typename T, int kTiles>
__device__ inline void StoreTile(T* tile, int stride, const float (&c)[kTiles][4]) {
  const int lane = threadIdx.x % 32;
  T* to = tile + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    Store(to + 8 * j, Round<T>(Pack<float, 2>{c[j][0], c[j][1]}));
    Store(to + 8 * stride + 8 * j, Round<T>(Pack<float, 2>{c[j][2], c[j][3]}));
  }
}

// Half a row of a warp's sums (half 0: row l/4, half 1: row l/4 + 8), times `factor`, into columns
// [0, columns) of a row of device memory.
template <typename T, int kTiles>
__device__ inline void StoreRow(T* row, const float (&c)[kTiles][4], int half, float factor,
                                int columns, bool vectors) {
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int column = 8 * j + first;
    const Pack<T, 2> pair =
        Round<T>(Pack<float, 2>{c[j][half * 2] * factor, c[j][half * 2 + 1] * factor});
    if (vectors) {
      if (column < columns) Store(row + column, pair);
    } else {
      if (column < columns) row[column] = pair.v[0];
      if (column + 1 < columns) row[column + 1] = pair.v[1];
    }
  }
}

// The row's quadruple of lanes: sum and maximum, the same bits in each.
__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Whether every head of `t` [B,T,heads,P] begins and ends at a 16-byte boundary.
inline bool VectorHeads(const Tensor& t) {
  const int64_t per_access = 16 / SizeOf(t.dtype());
  return reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0 && t.dim(3) % per_access == 0 &&
         t.stride(0) % per_access == 0 && t.stride(1) % per_access == 0 &&
         t.stride(2) % per_access == 0;
}

AttentionShape ShapeOf(const Tensor& q, const Tensor& k, const Documents& documents,
                       std::initializer_list<Tensor> operands);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_ATTENTION_TILE_CUH_
