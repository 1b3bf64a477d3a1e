// Sums and maxima over the parts of several ranks, bound by memory: each part is read once.
#include <algorithm>
#include <string>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/parts.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;
// Addresses that travel as kernel arguments. More parts are joined by several launches, of which
// the later ones go on from `out`: that needs it to be as wide as the sum.
constexpr int kMaxParts = 128;
struct PartAddresses {
  const void* data[kMaxParts];
  int count;
  bool go_on;
};

struct SumOp {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct MaxOp {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a != a || a > b ? a : b;
  }
};

// Types other than bf16 compute in themselves.
template <typename T>
using WideOf = std::conditional_t<kDTypeOf<T> == DType::kBF16, float, T>;
template <typename W, typename T>
__device__ W WidenOne(T value) {
  if constexpr (kDTypeOf<T> == DType::kBF16) {
    return ToFloat(value);
  } else {
    return value;
  }
}
template <typename T, typename W>
__device__ T RoundOne(W value) {
  if constexpr (kDTypeOf<T> == DType::kBF16) {
    return FromFloat<T>(value);
  } else {
    return value;
  }
}

// `out` may be one of the parts: a thread reads its elements of all before it writes them.
template <typename To, typename From, int kVec, typename Join>
__global__ void __launch_bounds__(kThreads)
    JoinPartsKernel(To* out, PartAddresses parts, int64_t vectors, Join join) {
  StartDependent();
  using W = WideOf<To>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < vectors;
       v += step) {
    W joined[kVec];
    if (parts.go_on) {
      const Pack<To, kVec> before = Load<kVec>(out + v * kVec);
#pragma unroll
      for (int j = 0; j < kVec; ++j) joined[j] = WidenOne<W>(before.v[j]);
    }
    for (int p = 0; p < parts.count; ++p) {
      const Pack<From, kVec> pack = Load<kVec>(static_cast<const From*>(parts.data[p]) + v * kVec);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const W value = WidenOne<W>(pack.v[j]);
        joined[j] = p == 0 && !parts.go_on ? value : join(joined[j], value);
      }
    }
    Pack<To, kVec> rounded;
#pragma unroll
    for (int j = 0; j < kVec; ++j) rounded.v[j] = RoundOne<To>(joined[j]);
    Store(out + v * kVec, rounded);
  }
}

template <typename To, typename From, typename Join>
void JoinParts(const char* name, const Tensor& out, const std::vector<Tensor>& parts, Join join,
               const Context& ctx) {
  constexpr int kVec = 16 / static_cast<int>(std::max(sizeof(To), sizeof(From)));
  constexpr bool kWide = std::is_same_v<To, WideOf<To>>;
  KRAIT_CHECK(kWide || parts.size() <= kMaxParts);
  for (size_t next = 0; next < parts.size();) {
    PartAddresses addresses = {};
    addresses.go_on = next > 0;
    while (next < parts.size() && addresses.count < kMaxParts) {
      addresses.data[addresses.count++] = parts[next++].raw();
    }
    bool vectors = out.numel() % kVec == 0 &&
                   reinterpret_cast<uintptr_t>(out.raw()) % (kVec * sizeof(To)) == 0;
    for (int p = 0; p < addresses.count; ++p) {
      vectors =
          vectors && reinterpret_cast<uintptr_t>(addresses.data[p]) % (kVec * sizeof(From)) == 0;
    }
    const int64_t count = vectors ? out.numel() / kVec : out.numel();
    // Enough blocks to fill any card; beside other work a few turns cost nothing.
    const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, 2048);
    Launch(
        name, vectors ? JoinPartsKernel<To, From, kVec, Join> : JoinPartsKernel<To, From, 1, Join>,
        Dependent(blocks), dim3(kThreads), 0, ctx, out.device_data<To>(), addresses, count, join);
  }
}

}  // namespace

void SumParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx) {
  const bool narrow = parts.front().dtype() == DType::kBF16;
  KRAIT_CHECK(narrow || parts.front().dtype() == out.dtype());
  switch (out.dtype()) {
    case DType::kF32:
      return narrow ? JoinParts<float, BF16>("SumParts", out, parts, SumOp(), ctx)
                    : JoinParts<float, float>("SumParts", out, parts, SumOp(), ctx);
    case DType::kBF16:
      return JoinParts<BF16, BF16>("SumParts", out, parts, SumOp(), ctx);
    case DType::kF64:
      return JoinParts<double, double>("SumParts", out, parts, SumOp(), ctx);
    case DType::kI64:
      return JoinParts<int64_t, int64_t>("SumParts", out, parts, SumOp(), ctx);
    default:
      KRAIT_FATAL(std::string("SumParts on CUDA does not take ") + Name(out.dtype()));
  }
}

void MaxParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx) {
  JoinParts<float, float>("MaxParts", out, parts, MaxOp(), ctx);
}

}  // namespace krait::cuda
