// What kernels share: 16-byte accesses of several elements, and sums over threads in a fixed order.
#ifndef KRAIT_KERNELS_CUDA_VECTOR_CUH_
#define KRAIT_KERNELS_CUDA_VECTOR_CUH_

#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <type_traits>

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

// 1 / (1 + e^-x) to a few units in the last place plus 2^-23 |x| of it, denormals being 0; 0 and 1
// far out, NaN stays NaN. The plain forms of these two instructions guard against denormals with
// half a dozen more.
__device__ inline float Sigmoid(float x) {
  float e, sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + e));
  return sigmoid;
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
// The elements as floats, and back, rounded. (Element by element, the upper half of a word would
// cost two instructions.)
template <typename T, int kCount>
__device__ inline Pack<float, kCount> Widen(const Pack<T, kCount>& pack) {
  Pack<float, kCount> wide;
  if constexpr (kDTypeOf<T> == DType::kBF16 && kCount % 2 == 0) {
    union {
      Pack<T, kCount> pack;
      uint32_t words[kCount / 2];
    } both = {pack};
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
      wide.v[2 * j] = __uint_as_float(both.words[j] << 16);
      wide.v[2 * j + 1] = __uint_as_float(both.words[j] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) wide.v[j] = ToFloat(pack.v[j]);
  }
  return wide;
}
template <typename T, int kCount>
__device__ inline Pack<T, kCount> Round(const Pack<float, kCount>& wide) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int j = 0; j < kCount; ++j) pack.v[j] = FromFloat<T>(wide.v[j]);
  return pack;
}

// Rows of a tensor in device memory.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* operator[](int64_t row) const { return data + row * stride; }
};
// All dimensions of the tensor but the last must be flattenable.
template <typename T>
Rows<T> RowsOf(const Tensor& t) {
  KRAIT_CHECK(t.stride(-1) == 1);
  for (int d = t.rank() - 3; d >= 0; --d) {
    KRAIT_CHECK(t.dim(d) <= 1 || t.stride(d) == t.dim(d + 1) * t.stride(d + 1));
  }
  return {t.device_data<std::remove_const_t<T>>(), t.row_stride()};
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

// The sum over a group of threads: the blockDim.x threads (a multiple of 32) with the same
// threadIdx.y; the same bits in each. All threads of the block call, and meet at a barrier where
// groups have more than one warp. `shared` holds a float for each warp of the block and may be used
// again only after another barrier: callers alternate between two.
__device__ inline float GroupSum(float value, float* shared) {
  value = WarpSum(value);
  if (blockDim.x == 32) return value;
  const int warps = blockDim.x / 32;
  float* const of_group = shared + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) of_group[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = of_group[0];
  for (int warp = 1; warp < warps; ++warp) sum += of_group[warp];
  return sum;
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_VECTOR_CUH_
