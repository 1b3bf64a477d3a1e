// What kernels share: 16-byte accesses of several elements, and sums over threads in a fixed order.
#ifndef KRAIT_KERNELS_CUDA_VECTOR_CUH_
#define KRAIT_KERNELS_CUDA_VECTOR_CUH_

#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace krait::cuda {

// The type that kernels compute with for a storage type of dtype.h.
template <typename T>
__device__ inline float ToFloat(T value) {
  if constexpr (kDTypeOf<T> == DType::kBF16) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
  } else {
    return value;
  }
}
// Rounds to nearest even; NaN stays NaN.
template <typename T>
__device__ inline T FromFloat(float value) {
  if constexpr (kDTypeOf<T> == DType::kBF16) {
    return BF16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else {
    return value;
  }
}

// kCount neighbouring elements, moved by one access of up to 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Pack {
  T v[kCount];
};
template <int kCount, typename T>
__device__ inline Pack<T, kCount> Load(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
template <typename T, int kCount>
__device__ inline void Store(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Starts a copy to shared memory that __pipeline_commit() and __pipeline_wait_prior() order; one
// too small for the hardware's asynchronous copy (4 to 16 bytes) is done at once.
template <typename T, int kCount>
__device__ inline void FetchAsync(Pack<T, kCount>* to, const T* from) {
  if constexpr (sizeof(*to) >= 4) {
    __pipeline_memcpy_async(to, from, sizeof(*to));
  } else {
    *to = Load<kCount>(from);
  }
}

// The elements of one 16-byte access.
template <typename T>
inline constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));

// Whether all rows of a tensor start and end at a 16-byte boundary.
inline bool Vectorizable(const Tensor& t) {
  const int64_t per_access = 16 / SizeOf(t.dtype());
  return reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0 && t.dim(-1) % per_access == 0 &&
         (t.rows() <= 1 || t.row_stride() % per_access == 0);
}

// The sum over a warp, the same bits in every lane.
__device__ inline float WarpSum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// The sum over the blockDim.x threads (a multiple of 32) with the same threadIdx.y; when that is
// more than one warp, blockDim.y must be 1 and all threads must call. `shared` holds 32 floats and
// may be used again only after another barrier: callers alternate between two.
__device__ inline float RowSum(float value, float* shared) {
  value = WarpSum(value);
  if (blockDim.x == 32) return value;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  return WarpSum(lane < blockDim.x / 32 ? shared[lane] : 0.0f);
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_VECTOR_CUH_
