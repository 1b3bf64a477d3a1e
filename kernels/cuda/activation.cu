// Elementwise ops on tensors whose rows may be strided, bound by memory.
#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/cuda/activation.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;
// Accesses of each operand that a thread has under way.
constexpr int kPacks = 4;

// Rows of a tensor of up to four dimensions; a contiguous tensor counts as one row.
template <typename T>
struct Strided {
  T* data;
  uint32_t extent[2];  // of the inner two of the three outer dimensions
  int64_t stride[3];   // outer to inner
  __device__ T* Row(uint32_t row) const {
    const uint32_t outer = row / extent[1];
    return data + outer / extent[0] * stride[0] + outer % extent[0] * stride[1] +
           row % extent[1] * stride[2];
  }
};

// T is a type of the dtype's size.
template <typename T>
Strided<T> StridedOf(const Tensor& t, bool one_row) {
  KRAIT_CHECK(t.device() == Device::kCuda && static_cast<int64_t>(sizeof(T)) == SizeOf(t.dtype()));
  Strided<T> rows{static_cast<T*>(t.raw()), {1, 1}, {0, 0, 0}};
  if (one_row) return rows;
  for (int d = t.rank() - 2, to = 2; d >= 0; --d, --to) {
    rows.stride[to] = t.stride(d);
    if (to > 0) rows.extent[to - 1] = static_cast<uint32_t>(t.dim(d));
  }
  return rows;
}

// y = op(y, x), on floats or on bits; y and x are read only where the op says so. Blocks in x share
// a row, blocks in y take rows in turn.
template <typename To, typename From, int kVec, typename Op>
__global__ void __launch_bounds__(kThreads)
    ElementwiseKernel(Strided<To> y, Strided<const From> x, uint32_t rows, int64_t columns, Op op) {
  StartDependent();
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads * kPacks + threadIdx.x) * kVec;
  for (uint32_t row = blockIdx.y; row < rows; row += gridDim.y) {
    To* const to = rows > 1 ? y.Row(row) : y.data;
    const From* const from = rows > 1 ? x.Row(row) : x.data;
    Pack<To, kVec> before[kPacks] = {};
    Pack<From, kVec> read[kPacks] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t column = begin + p * kThreads * kVec;
      if (column >= columns) continue;
      if constexpr (Op::kReadsY) before[p] = Load<kVec>(to + column);
      if constexpr (Op::kReadsX) read[p] = Load<kVec>(from + column);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t column = begin + p * kThreads * kVec;
      if (column < columns) Store(to + column, op(before[p], read[p]));
    }
  }
}

template <typename To, typename From, typename Op>
void Elementwise(const char* name, const Tensor& y, const Tensor& x, Op op, const Context& ctx) {
  if (y.numel() == 0) return;
  KRAIT_CHECK(y.rank() == x.rank());
  for (int d = 0; d < y.rank(); ++d) KRAIT_CHECK(y.dim(d) == x.dim(d));
  const bool one_row = y.contiguous() && x.contiguous();
  KRAIT_CHECK(one_row || (y.stride(-1) == 1 && x.stride(-1) == 1));
  const int64_t columns = one_row ? y.numel() : y.dim(-1);
  // An access of the wider type is 16 bytes.
  constexpr int kVec = 16 / static_cast<int>(std::max(sizeof(To), sizeof(From)));
  const auto aligned = [&](const Tensor& t) {
    bool yes = reinterpret_cast<uintptr_t>(t.raw()) % (kVec * SizeOf(t.dtype())) == 0;
    for (int d = 0; !one_row && d < t.rank() - 1; ++d) yes = yes && t.stride(d) % kVec == 0;
    return yes;
  };
  const bool vectorizable = columns % kVec == 0 && aligned(y) && aligned(x);
  const int64_t per_block = kThreads * kPacks * (vectorizable ? kVec : 1);
  const int64_t rows = y.numel() / columns;
  KRAIT_CHECK(rows <= UINT32_MAX);
  Launch(name,
         vectorizable ? ElementwiseKernel<To, From, kVec, Op> : ElementwiseKernel<To, From, 1, Op>,
         Dependent((columns + per_block - 1) / per_block, std::min<int64_t>(rows, 65535)),
         dim3(kThreads), 0, ctx, StridedOf<To>(y, one_row), StridedOf<const From>(x, one_row),
         static_cast<uint32_t>(rows), columns, op);
}

template <typename To, typename From>
struct AddScaledOp {
  static constexpr bool kReadsY = true, kReadsX = true;
  float scale;
  template <int kVec>
  __device__ Pack<To, kVec> operator()(const Pack<To, kVec>& y, const Pack<From, kVec>& x) const {
    Pack<float, kVec> sum = Widen(y);
    const Pack<float, kVec> added = Widen(x);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum.v[j] += scale * added.v[j];
    return Round<To>(sum);
  }
};
template <typename To, typename From>
struct ConvertOp {
  static constexpr bool kReadsY = false, kReadsX = true;
  template <int kVec>
  __device__ Pack<To, kVec> operator()(const Pack<To, kVec>&, const Pack<From, kVec>& x) const {
    return Round<To>(Widen(x));
  }
};
template <typename T>
struct CopyOp {
  static constexpr bool kReadsY = false, kReadsX = true;
  template <int kVec>
  __device__ Pack<T, kVec> operator()(const Pack<T, kVec>&, const Pack<T, kVec>& x) const {
    return x;
  }
};
template <typename T>
struct FillOp {
  static constexpr bool kReadsY = false, kReadsX = false;
  T value;
  template <int kVec>
  __device__ Pack<T, kVec> operator()(const Pack<T, kVec>&, const Pack<T, kVec>&) const {
    Pack<T, kVec> out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.v[j] = value;
    return out;
  }
};

// Calls run(T{}) with an unsigned type of `size` bytes.
template <typename Run>
void WithSize(int64_t size, const Run& run) {
  switch (size) {
    case 1:
      return run(uint8_t());
    case 2:
      return run(uint16_t());
    case 4:
      return run(uint32_t());
    default:
      return run(uint64_t());
  }
}

// Calls run(To{}, From{}) for two floating types.
template <typename Run>
void WithFloats(const char* name, const Tensor& y, const Tensor& x, const Run& run) {
  const auto known = [](const Tensor& t) {
    return t.dtype() == DType::kF32 || t.dtype() == DType::kBF16;
  };
  if (!known(y) || !known(x)) {
    KRAIT_FATAL(std::string(name) + " on CUDA does not take " + Name(x.dtype()) + " to " +
                Name(y.dtype()));
  }
  const auto with_from = [&](auto to) {
    x.dtype() == DType::kBF16 ? run(to, BF16()) : run(to, 0.0f);
  };
  y.dtype() == DType::kBF16 ? with_from(BF16()) : with_from(0.0f);
}

// The bits of a value in an unsigned type, as element of dtype `dtype`.
template <typename U, typename T>
U BitsOf(T value) {
  static_assert(sizeof(U) >= sizeof(T));
  U bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}
uint64_t ElementBits(DType dtype, double value) {
  switch (dtype) {
    case DType::kF32:
      return BitsOf<uint64_t>(static_cast<float>(value));
    case DType::kBF16:
      return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)));
    case DType::kF64:
      return BitsOf<uint64_t>(value);
    case DType::kU64:
      return static_cast<uint64_t>(value);
    default:  // integers: two's complement, cut to their size
      return static_cast<uint64_t>(static_cast<int64_t>(value));
  }
}

}  // namespace

void AddScaled(Tensor y, Tensor x, double scale, const Context& ctx) {
  WithFloats("AddScaled", y, x, [&](auto to, auto from) {
    using To = decltype(to);
    using From = decltype(from);
    Elementwise<To, From>("AddScaled", y, x, AddScaledOp<To, From>{static_cast<float>(scale)}, ctx);
  });
}

void Fill(Tensor y, double value, const Context& ctx) {
  const uint64_t bits = ElementBits(y.dtype(), value);
  if (y.numel() > 0 && bits == 0 && y.contiguous()) return Zero(y.raw(), y.bytes(), ctx.stream);
  WithSize(SizeOf(y.dtype()), [&](auto zero) {
    using T = decltype(zero);
    Elementwise<T, T>("Fill", y, y, FillOp<T>{static_cast<T>(bits)}, ctx);
  });
}

void Copy(Tensor y, Tensor x, const Context& ctx) {
  if (y.dtype() == x.dtype()) {
    WithSize(SizeOf(y.dtype()), [&](auto zero) {
      using T = decltype(zero);
      Elementwise<T, T>("Copy", y, x, CopyOp<T>(), ctx);
    });
    return;
  }
  WithFloats("Copy", y, x, [&](auto to, auto from) {
    using To = decltype(to);
    using From = decltype(from);
    if constexpr (!std::is_same_v<To, From>) {
      Elementwise<To, From>("Copy", y, x, ConvertOp<To, From>(), ctx);
    }
  });
}

}  // namespace krait::cuda
