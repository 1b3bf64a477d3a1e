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

// The dtype of statistics, scan states, router and LM-head losses, and gradients of weights under a
// compute dtype.
constexpr DType Wide(DType compute) { return compute == DType::kF64 ? DType::kF64 : DType::kF32; }

// kDTypeOf<T> is the dtype whose elements are stored as T; other types do not compile.
template <typename T>
struct DTypeOfType;
template <>
struct DTypeOfType<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOfType<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOfType<BF16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOfType<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOfType<int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOfType<uint8_t> {
  static constexpr DType value = DType::kU8;
};
template <>
struct DTypeOfType<uint16_t> {
  static constexpr DType value = DType::kU16;
};
template <>
struct DTypeOfType<uint32_t> {
  static constexpr DType value = DType::kU32;
};
template <>
struct DTypeOfType<uint64_t> {
  static constexpr DType value = DType::kU64;
};
template <typename T>
inline constexpr DType kDTypeOf = DTypeOfType<T>::value;

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_DTYPE_H_
