// bfloat16 in CPU loops: loads widen to float, stores round to nearest even.
#ifndef KRAIT_KERNELS_CPU_BF16_H_
#define KRAIT_KERNELS_CPU_BF16_H_

#include <bit>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cpu/vector_math.h"

namespace krait::cpu {

KRAIT_INLINE float Load(float x) { return x; }
KRAIT_INLINE double Load(double x) { return x; }
KRAIT_INLINE float Load(BF16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

KRAIT_INLINE void Store(float x, float* out) { *out = x; }
KRAIT_INLINE void Store(double x, double* out) { *out = x; }
// Infinity stays infinity; NaN stays NaN with its quiet bit set, whatever its payload.
KRAIT_INLINE void Store(float x, BF16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>(x == x ? rounded : nan);
}

// x rounded to the precision of T.
template <typename T, typename S>
KRAIT_INLINE S RoundTo(S x) {
  T stored;
  Store(x, &stored);
  return Load(stored);
}

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_BF16_H_
