// What the warps of the selective scan compute: functions of one element, and sums over channels
// and over states as matrix products. Lanes as in selective_scan.cuh: lane = 4 * g + s.
#ifndef KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_MATH_CUH_
#define KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_MATH_CUH_

#include <cstdint>

namespace krait::cuda {

inline constexpr float kLog2E = 0x1.715476p0f, kLn2 = 0x1.62e430p-1f;

__device__ inline float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^x, x <= 0. Exact: the polynomial of the CPU's vector_math.h, whose relative error of 1 - 2^x
// is that of float arithmetic for x near 0.
template <bool kExact>
__device__ inline float Decay(float x) {
  if constexpr (!kExact) return FastExp2(x);
  constexpr float magic = 0x1.8p23f;
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  float q = 1.559491939e-4f;
  q = fmaf(q, f, 1.340673538e-3f);
  q = fmaf(q, f, 9.617691860e-3f);
  q = fmaf(q, f, 5.550310388e-2f);
  q = fmaf(q, f, 2.402265221e-1f);
  q = fmaf(q, f, 6.931472421e-1f);
  const float power =
      __uint_as_float(__float_as_uint(fmaf(q, f, 1.0f)) + (__float_as_uint(shifted) << 23));
  return x < -64.0f ? 0.0f : power;
}

template <bool kExact>
__device__ inline float Softplus(float x) {
  if constexpr (kExact) {
    return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
  } else {
    const float e = FastExp2(-fabsf(x) * kLog2E);
    // log(1 + e) = e q(e) on [0, 1]; minimax, relative error 8e-6.
    float q = -2.38691047e-2f;
    q = fmaf(q, e, 1.01222165e-1f);
    q = fmaf(q, e, -2.10048586e-1f);
    q = fmaf(q, e, 3.25206637e-1f);
    q = fmaf(q, e, -4.99361366e-1f);
    q = fmaf(q, e, 9.99991596e-1f);
    return fmaf(q, e, fmaxf(x, 0.0f));
  }
}
// Its derivative, from its value.
template <bool kExact>
__device__ inline float SoftplusSlope(float value) {
  return kExact ? -expm1f(-value) : 1.0f - FastExp2(value * -kLog2E);
}
template <bool kExact>
__device__ inline float Sigmoid(float x) {
  if constexpr (kExact) return 1.0f / (1.0f + expf(-x));
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(0.5f * x));
  return fmaf(0.5f, tanh, 0.5f);
}

// x sigmoid(x).
template <bool kExact>
__device__ inline float Silu(float x) {
  if constexpr (kExact) return x * Sigmoid<true>(x);
  const float half = 0.5f * x;
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(half));
  return fmaf(half, tanh, half);
}

// d += a b, m16n8k8, inputs cut to TF32.
__device__ inline void MmaTf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                               float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// a b, m16n8k4, inputs cut to TF32.
__device__ inline void ProductTf32(float (&d)[4], float a0, float a1, float b0) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%7,%7,%7,%7};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b0)), "f"(0.0f));
}
// Rounded so that a cut to TF32 rounds to nearest.
__device__ inline float RoundTf32(float x) { return __uint_as_float(__float_as_uint(x) + 0x1000); }

// Matrices of 8 rows of 16 bytes in shared memory: lane 8 i + r gives the address of row r of
// matrix i. A lane's word of a matrix is row g, columns 2s and 2s+1; transposed, rows 2s and 2s+1
// of column g. The lower half of a word is the first of the two.
__device__ inline void LoadMatrices(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}
__device__ inline void LoadTransposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}
__device__ inline void LoadTransposed(uint32_t (&m)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(row)
               : "memory");
}
__device__ inline float LowerHalf(uint32_t two) { return __uint_as_float(two << 16); }
__device__ inline float UpperHalf(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }
__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// The lane's tokens of a tile, or of two, rounded, to rows of tokens.
__device__ inline void StoreTransposed(uint32_t row, const float (&value)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(row),
               "r"(PackBf16(value[0], value[1])), "r"(PackBf16(value[2], value[3]))
               : "memory");
}
__device__ inline void StoreTransposed(uint32_t row, const float (&one)[4], const float (&two)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),
               "r"(PackBf16(one[0], one[1])), "r"(PackBf16(one[2], one[3])),
               "r"(PackBf16(two[0], two[1])), "r"(PackBf16(two[2], two[3]))
               : "memory");
}

// The weights of the states that a lane has, of token g of half `half`, from LoadMatrices().
__device__ inline float4 WeightsOf(const uint32_t (&rows)[4], int half) {
  return {LowerHalf(rows[2 * half]), UpperHalf(rows[2 * half]), LowerHalf(rows[2 * half + 1]),
          UpperHalf(rows[2 * half + 1])};
}

// For 16 states per channel: the sums over states of `even` and `odd`, two tokens' values, times
// the weights of 8 tokens, of which lane group g holds token g's. The lane s that is the number of
// the pair finds the two sums in d[0] and d[3]: the rows of the product are the channels at the
// even token, then at the odd one, its columns the tokens of the weights.
__device__ inline void SumOverStates(float (&d)[4], const float (&even)[4], const float (&odd)[4],
                                     float4 weights) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = 0.0f;
  MmaTf32(d, even[0], odd[0], even[1], odd[1], weights.x, weights.y);
  MmaTf32(d, even[2], odd[2], even[3], odd[3], weights.z, weights.w);
}

// B dt x of four tokens and a lane's states, from the lane's own dt x (RoundTf32) and the
// transposed matrices of B of tokens 0-7 and 8-15 (states 0-7 and 8-15 each): products of the
// channels at two tokens, which a zero at all other tokens chooses, with 4 tokens of B.
__device__ inline void InputsOfQuad(float (&input)[4][4], const float (&dtx)[4],
                                    const uint32_t (&bs)[4], int half, int quad, int s) {
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const float own = dtx[2 * half + odd];
    const float first = s == 2 * quad ? own : 0.0f, second = s == 2 * quad + 1 ? own : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = bs[2 * half + i];
      float product[4];
      ProductTf32(product, first, second, odd == 0 ? LowerHalf(two) : UpperHalf(two));
      input[odd][2 * i] = product[0], input[odd][2 * i + 1] = product[1];
      input[2 + odd][2 * i] = product[2], input[2 + odd][2 * i + 1] = product[3];
    }
  }
}

// The sum over the four lanes of a channel, in each of them.
__device__ inline float QuadSum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// An 8x8 matrix of pairs of bf16 (row = lane / 4, columns 2 (lane % 4), +1), transposed.
__device__ inline uint32_t Transpose(uint32_t rows) {
  uint32_t columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}
// d += a b, m16n8k16.
__device__ inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two tokens' values, rounded: a matrix whose rows are the channels at the first token, then at the
// second, and whose columns are the states.
__device__ inline void PackPair(uint32_t (&packed)[4], const float (&even)[4],
                                const float (&odd)[4]) {
  packed[0] = PackBf16(even[0], even[1]), packed[1] = PackBf16(odd[0], odd[1]);
  packed[2] = PackBf16(even[2], even[3]), packed[3] = PackBf16(odd[2], odd[3]);
}
// As SumOverStates() above, of a pair from PackPair() and the weights of half `half` of the tokens
// that LoadMatrices() gave.
__device__ inline void SumOverStates(float (&d)[4], const uint32_t (&packed)[4],
                                     const uint32_t (&rows)[4], int half) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = 0.0f;
  MmaBf16(d, packed, rows[2 * half], rows[2 * half + 1]);
}

// The sums over a warp's channels of weights times a value per state, for 16 tokens.
//
// bf16: the values of tokens t, t+1, rounded and transposed so that the channels run along the
// contraction, token t's in its first half, t+1's in the second. Columns of the second operand are
// the 8 tokens of a half; all but t's and t+1's are zeros, so that the products of a half's pairs
// add up. f32: by shuffles; lane g keeps tokens g and 8 + g.
template <bool kExact>
struct SumOverChannels {
  float sums[2][4] = {};
  uint32_t even[2],
      odd[2];  // weights of channels 2s, 2s+1 at token g of a half; zero if g is not so

  // Of the weights of the lane's tokens.
  __device__ SumOverChannels(const float (&weights)[4], int g) {
    if constexpr (!kExact) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = Transpose(PackBf16(weights[2 * half], weights[2 * half + 1]));
        even[half] = g % 2 == 0 ? two : 0, odd[half] = g % 2 == 0 ? 0 : two;
      }
    }
  }
  // Tokens 2 * pair and 2 * pair + 1, from PackPair(); `mask` has all bits where g / 2 is pair % 4.
  __device__ void AddPair(const uint32_t (&packed)[4], int pair, uint32_t mask) {
    const uint32_t a[4] = {Transpose(packed[0]), Transpose(packed[2]), Transpose(packed[1]),
                           Transpose(packed[3])};
    MmaBf16(sums[pair / 4], a, even[pair / 4] & mask, odd[pair / 4] & mask);
  }
  __device__ void AddExact(const float (&value)[4], float weight, int token, int g) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sum = value[j] * weight;
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (g == token % 8) sums[token / 8][j] = sum;
    }
  }
  // To quarters of 128 floats, of which a lane has four.
  __device__ void Store(float* to) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float4*>(to + 128 * half) = {sums[half][0], sums[half][1], sums[half][2],
                                                     sums[half][3]};
    }
  }
};
// The token (of 16) and state of element e of a warp's sums (kBcSums).
struct TokenAndState {
  int token, state;
};
template <bool kExact>
__device__ inline TokenAndState BcElement(int e) {
  const int half = e / 128 % 2, lane = e / 4 % 32, g = lane / 4, s = lane % 4, j = e % 4;
  if constexpr (kExact) return {8 * half + g, 4 * s + j};
  return {8 * half + 2 * s + j % 2, g + j / 2 * 8};
}

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_SELECTIVE_SCAN_MATH_CUH_
