// The values of kernels/base/random.h on the device: the same integers, and the same formulas in
// double, whose logarithm and cosine differ from the host's by a few units in the last place.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/random_fill.h"
#include "kernels/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;

struct Stream {
  uint32_t key[2], high[2];

  // RandomStream::Bits: Philox4x32-10.
  __device__ uint4 Bits(uint64_t index) const {
    uint4 c = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), high[0], high[1]};
    uint32_t key0 = key[0], key1 = key[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
      const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
      c = {high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0};
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return c;
  }
};

__device__ double ToUniform(uint32_t high, uint32_t low) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32 | low) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

template <typename T, bool kNormal>
__global__ void __launch_bounds__(kThreads)
    FillKernel(Rows<T> y, Stream stream, int64_t rows, int64_t columns, int64_t first,
               int64_t row_step, double scale) {
  StartDependent();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * columns;
       i += step) {
    const int64_t row = i / columns, column = i % columns;
    const uint4 bits = stream.Bits(static_cast<uint64_t>(first + row * row_step + column));
    double value;
    if constexpr (kNormal) {
      const double radius = sqrt(-2.0 * log(ToUniform(bits.x, bits.y)));
      value = scale * (radius * cospi(2.0 * ToUniform(bits.z, bits.w)));
    } else {
      value = scale * (2.0 * ToUniform(bits.x, bits.y) - 1.0);
    }
    y[row][column] = FromFloat<T>(static_cast<float>(value));
  }
}

template <bool kNormal>
void Random(const char* name, const Tensor& y, const RandomStream& stream, int64_t first,
            int64_t row_step, double scale, const Context& ctx) {
  if (y.numel() == 0) return;
  const int64_t blocks = std::min<int64_t>((y.numel() + kThreads - 1) / kThreads, 132 * 32);
  const Stream device_stream{{stream.key()[0], stream.key()[1]},
                             {stream.high()[0], stream.high()[1]}};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Launch(name, FillKernel<T, kNormal>, Dependent(blocks), dim3(kThreads), 0, ctx, RowsOf<T>(y),
           device_stream, y.rows(), y.dim(-1), first, row_step, scale);
  };
  KRAIT_CHECK(y.dtype() == DType::kF32 || y.dtype() == DType::kBF16);
  y.dtype() == DType::kBF16 ? run(BF16()) : run(0.0f);
}

}  // namespace

void FillNormal(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step, double scale,
                const Context& ctx) {
  Random<true>("FillNormal", y, stream, first, row_step, scale, ctx);
}

void FillUniform(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step,
                 double bound, const Context& ctx) {
  Random<false>("FillUniform", y, stream, first, row_step, bound, ctx);
}

}  // namespace krait::cuda
