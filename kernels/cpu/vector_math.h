// Elementary functions for loops over contiguous floats that GCC turns into SIMD: branch-free, no
// tables, no calls. The double versions are libm's; they serve gradient checks.
//
// How a CPU kernel is written: an always-inline template on T holds the loop (KRAIT_INLINE), and a
// plain function around its float instance is compiled once per instruction set and chosen at run
// time (KRAIT_CLONES). The clone must contain no OpenMP: GCC moves the body of a parallel region
// into a function of its own, which is not cloned. So ParallelFor stays outside:
//
//   template <typename T> KRAIT_INLINE void ReluLoop(T* y, const T* x, int64_t n) { ... }
//   KRAIT_CLONES void Relu(float* y, const float* x, int64_t n) { ReluLoop(y, x, n); }
//   void Relu(double* y, const double* x, int64_t n) { ReluLoop(y, x, n); }
//
// Largest errors in float, found by trying values over the whole range against libm in double:
// Exp 1.0 ulp, Log1p 1.1, Sigmoid 2.3, Silu 3.0, Softplus 1.6 (units in the last place of the
// result). Rounding differs between instruction sets (fused multiply-add or not).
#ifndef KRAIT_KERNELS_CPU_VECTOR_MATH_H_
#define KRAIT_KERNELS_CPU_VECTOR_MATH_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// Sanitizers cannot run before the function that picks the clone; Clang 14 has no "arch=" clones.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(KRAIT_SANITIZE)
#define KRAIT_HAS_CLONES
#define KRAIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KRAIT_CLONES
#endif
#define KRAIT_INLINE inline __attribute__((always_inline))

namespace krait {

// e^x. +inf above 88.73, denormal results are exact to rounding, NaN stays NaN.
template <typename T>
KRAIT_INLINE T Exp(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::exp(x);
  } else {
    static_assert(std::is_same_v<T, float>);
    // x = n ln2 + r, |r| <= ln2/2. Adding `magic` rounds to an integer, which then stands in the
    // low bits: 1.5*2^23 leaves n + 254 there, twice the exponent bias.
    constexpr float magic = 0x1.8p23f + 254.0f;
    x = x > 89.0f ? 89.0f : x;
    x = x < -105.0f ? -105.0f : x;
    const float shifted = x * 0x1.715476p0f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    // e^r = 1 + r + r^2 q(r); minimax, relative error 3e-9.
    float q = 1.381453825e-3f;
    q = q * r + 8.368745446e-3f;
    q = q * r + 4.166838899e-2f;
    q = q * r + 1.666652113e-1f;
    q = q * r + 4.999999404e-1f;
    const float p = (q * (r * r) + r) + 1.0f;
    // 2^n as a product of two normal numbers, so that overflow and denormals round once.
    const uint32_t bits = std::bit_cast<uint32_t>(shifted);
    const uint32_t half = bits >> 1;
    return p * std::bit_cast<float>(half << 23) * std::bit_cast<float>((bits - half) << 23);
  }
}

// 2^(x*y) for x*y <= 0; NaN stays NaN. The decay factor of a state. In float it is 0 where
// x*y < -64: beside any input a state scaled by 2^-64 is nothing, and products of such factors
// would be denormals, which cost a hundred cycles each (measured: a backward scan 5 times slower).
// The relative error of 1 - 2^(xy) stays that of float arithmetic for xy near 0, which matters over
// the 1 / (1 - decay) steps that a state lives.
template <typename T>
KRAIT_INLINE T Exp2NonPositive(T x, T y) {
  if constexpr (std::is_same_v<T, double>) {
    return std::exp2(x * y);
  } else {
    static_assert(std::is_same_v<T, float>);
    constexpr float magic = 0x1.8p23f;
    const float xy = x * y;
    const float shifted = xy + magic;
    const float f = xy - (shifted - magic);
    // 2^f = 1 + f q(f) on [-1/2, 1/2]; minimax, relative error 3e-9.
    float q = 1.559491939e-4f;
    q = q * f + 1.340673538e-3f;
    q = q * f + 9.617691860e-3f;
    q = q * f + 5.550310388e-2f;
    q = q * f + 2.402265221e-1f;
    q = q * f + 6.931472421e-1f;
    const uint32_t p = std::bit_cast<uint32_t>(q * f + 1.0f);
    const float power = std::bit_cast<float>(p + (std::bit_cast<uint32_t>(shifted) << 23));
    return xy < -64.0f ? 0.0f : power;
  }
}

// log(1 + x). -inf at -1, NaN below, x for tiny x, +inf at +inf.
template <typename T>
KRAIT_INLINE T Log1p(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::log1p(x);
  } else {
    static_assert(std::is_same_v<T, float>);
    // 1 + x = 2^e (1 + f), -1/4 <= f < 1/2. Scaling x and 1 apart keeps the low bits of a small x
    // that the sum 1 + x loses.
    const uint32_t exponent =
        (std::bit_cast<uint32_t>(1.0f + x) - std::bit_cast<uint32_t>(0.75f)) & 0xff800000u;
    const float scaled = std::bit_cast<float>(std::bit_cast<uint32_t>(x) - exponent);
    // 4 * 2^-e is a normal number for every e <= 127, 2^-e is not.
    const float four = std::bit_cast<float>(std::bit_cast<uint32_t>(4.0f) - exponent);
    const float f = scaled + (0.25f * four - 1.0f);
    // log(1 + f) = f + f^2 q(f); minimax, error 5e-9 f.
    float q = -4.645247385e-2f;
    q = q * f + 1.061148420e-1f;
    q = q * f - 1.319003999e-1f;
    q = q * f + 1.446339190e-1f;
    q = q * f - 1.664280742e-1f;
    q = q * f + 1.999129951e-1f;
    q = q * f - 2.500024438e-1f;
    q = q * f + 3.333344460e-1f;
    q = q * f - 0.5f;
    const float log_f = q * (f * f) + f;
    const float e = static_cast<float>(static_cast<int32_t>(exponent)) * 0x1p-23f;
    float y = e * 0x1.62e43p-1f + (e * -0x1.05c61p-29f + log_f);
    // From here the special cases; each is a select. Written so that NaN passes through.
    y = x > -1.0f ? y : -INFINITY;
    y = x < -1.0f ? NAN : y;
    return x < INFINITY ? y : x;
  }
}

// 1 / (1 + e^-x), without overflow on either side.
template <typename T>
KRAIT_INLINE T Sigmoid(T x) {
  const T e = Exp(-std::abs(x));
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

// x * sigmoid(x); -0 at -inf (the limit).
template <typename T>
KRAIT_INLINE T Silu(T x) {
  constexpr T far = std::is_same_v<T, double> ? T(-800) : T(-150);  // sigmoid(far) is 0
  return (x < far ? far : x) * Sigmoid(x);
}

// log(1 + e^x), without overflow and without cancellation on either side.
template <typename T>
KRAIT_INLINE T Softplus(T x) {
  return (x > T(0) ? x : T(0)) + Log1p(Exp(-std::abs(x)));
}

}  // namespace krait

#endif  // KRAIT_KERNELS_CPU_VECTOR_MATH_H_
