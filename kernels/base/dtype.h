// Element types of tensors and files. Plain C++: also included by .cu files.
#ifndef KRAIT_KERNELS_BASE_DTYPE_H_
#define KRAIT_KERNELS_BASE_DTYPE_H_

#include <cstdint>

namespace krait {

enum class DType : uint8_t { kF32, kBF16, kF64, kI32, kI64, kU8, kU16, kU32, kU64 };

constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kU8:
      return 1;
    case DType::kBF16:
    case DType::kU16:
      return 2;
    case DType::kF32:
    case DType::kI32:
    case DType::kU32:
      return 4;
    case DType::kF64:
    case DType::kI64:
    case DType::kU64:
      return 8;
  }
  return 0;
}
const char* Name(DType dtype);  // "f32", "bf16", ...

// bfloat16 as stored: the upper half of a float.
struct BF16 {
  uint16_t bits;
};

template <typename T>
constexpr DType kDTypeOf = DType::kF32;
template <>
inline constexpr DType kDTypeOf<double> = DType::kF64;
template <>
inline constexpr DType kDTypeOf<BF16> = DType::kBF16;
template <>
inline constexpr DType kDTypeOf<int32_t> = DType::kI32;
template <>
inline constexpr DType kDTypeOf<int64_t> = DType::kI64;

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_DTYPE_H_
