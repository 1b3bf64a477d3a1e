// Support for tests of CUDA ops: CPU buffers copied to the device with canaries around them, a CUDA
// context, and comparisons with the CPU's results.
#ifndef KRAIT_TESTS_SUPPORT_ON_GPU_H_
#define KRAIT_TESTS_SUPPORT_ON_GPU_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "kernels/context.h"
#include "kernels/cuda/runtime.h"
#include "kernels/tensor.h"
#include "support/gradcheck.h"

namespace krait::testing {

inline const double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kUlp = 0x1p-24;  // half a unit in the last place of a float near 1

// Skips the test where there is no GPU; to be called in SetUp() or at the start of a test.
#define KRAIT_NEEDS_GPU()                           \
  do {                                              \
    std::string krait_reason;                       \
    if (!::krait::cuda::Available(&krait_reason)) { \
      GTEST_SKIP() << "no GPU: " << krait_reason;   \
    }                                               \
  } while (false)

// A copy of a CPU tensor in device memory, with the same row stride and the padding between rows.
// `shift` elements in front make its address unaligned. Before and behind it lie canaries whose
// bytes are all ones: NaN, so that a read beyond the tensor shows, and checked at the end, so that
// a write does.
class OnGpu {
 public:
  explicit OnGpu(Tensor host, int64_t shift = 0) : host_(host) {
    const int64_t size = SizeOf(host.dtype()), stride = host.row_stride(), columns = host.dim(-1);
    const int64_t rows = columns > 0 ? host.rows() : 0;
    bytes_ = rows > 0 ? ((rows - 1) * stride + columns) * size : 0;
    front_ = kCanary + shift * size;
    std::vector<char> image(static_cast<size_t>(front_ + bytes_ + kCanary), '\xff');
    if (bytes_ > 0) std::memcpy(image.data() + front_, host.raw(), static_cast<size_t>(bytes_));
    memory_ =
        static_cast<char*>(cuda::Allocate(static_cast<int64_t>(image.size()), "a test tensor"));
    cuda::CopyToDevice(memory_, image.data(), static_cast<int64_t>(image.size()));
    char* const data = memory_ + front_;
    const auto full = [&](std::initializer_list<int64_t> shape) {
      return Tensor(data, host.dtype(), Device::kCuda, shape).Slice(-1, 0, columns);
    };
    switch (host.rank()) {
      case 1:
        gpu_ = full({columns});
        break;
      case 2:
        gpu_ = full({host.dim(0), stride});
        break;
      case 3:
        gpu_ = full({host.dim(0), host.dim(1), stride});
        break;
      default:
        gpu_ = full({host.dim(0), host.dim(1), host.dim(2), stride});
    }
  }
  ~OnGpu() {
    std::vector<char> image(static_cast<size_t>(front_ + bytes_ + kCanary));
    cuda::CopyToHost(image.data(), memory_, static_cast<int64_t>(image.size()));
    const auto intact = [](auto begin, auto end) {
      return std::all_of(begin, end, [](char c) { return c == '\xff'; });
    };
    EXPECT_TRUE(intact(image.begin(), image.begin() + front_)) << "written before the tensor";
    EXPECT_TRUE(intact(image.end() - kCanary, image.end())) << "written behind the tensor";
    cuda::Free(memory_);
  }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  operator Tensor() const { return gpu_; }  // NOLINT: passed where a view is taken
  Tensor tensor() const { return gpu_; }
  // Back into the CPU tensor, padding included.
  void Download() {
    if (bytes_ > 0) cuda::CopyToHost(host_.raw(), memory_ + front_, bytes_);
  }

 private:
  static constexpr int64_t kCanary = 256;
  Tensor host_, gpu_;
  char* memory_;
  int64_t front_, bytes_;
};

struct GpuContext {
  explicit GpuContext(int64_t scratch_bytes = int64_t{64} << 20)
      : scratch("test scratch on the device", Device::kCuda, scratch_bytes) {
    ctx.device = Device::kCuda;
    ctx.scratch = &scratch;
  }
  ~GpuContext() { EXPECT_EQ(scratch.mark(), 0) << "scratch memory was not released"; }
  operator const Context&() const { return ctx; }  // NOLINT: passed where a Context is taken
  Arena scratch;
  Context ctx;
};

// A test of an op in f32 and in bf16 (the parameter) against the CPU op, which computes in f64 for
// f32 and in bf16 for bf16.
//
// Tolerances. A sum of n rounded terms is off by about sqrt(n) * 2^-24 of its terms' size, the
// handful of further roundings by a few 2^-24; Bound(n) of the largest term leaves a factor of 4
// and more. In bf16 both sides round one fp32 value, known up to Bound(n), so that an output may
// land on a neighbouring bf16, but only where a rounding boundary lies within that bound.
// Boundaries are 2^-8 of a value apart or more, so a share of 2^8 * Bound(n) does at most; where
// terms cancel, small values add a logarithm of that share, so Share(n) is 8 of it: 3 % at n =
// 4096. A rounding left out or a wrong formula changes tens of per cent.
class GpuOpTest : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    KRAIT_NEEDS_GPU();
    gpu_.emplace();
    cpu_.emplace();
  }
  DType dtype() const { return GetParam(); }
  bool f32() const { return dtype() == DType::kF32; }
  DType ref() const { return f32() ? DType::kF64 : DType::kBF16; }
  DType ref_wide() const { return f32() ? DType::kF64 : DType::kF32; }
  static double Bound(int64_t n) { return 4 * (std::sqrt(static_cast<double>(n)) + 4) * kUlp; }
  static double Share(int64_t n) { return 8 * 0x1p8 * Bound(n); }

  std::optional<GpuContext> gpu_;
  std::optional<TestContext> cpu_;
};
inline const auto kGpuDTypes = ::testing::Values(DType::kF32, DType::kBF16);
inline std::string DTypeName(const ::testing::TestParamInfo<DType>& info) {
  return Name(info.param);
}

inline double MaxAbs(Tensor t) {
  double max = 0;
  for (const double v : Values(t)) max = std::max(max, std::fabs(v));
  return max;
}

// to = from, element by element, between dtypes and strides of the CPU.
inline void CopyValues(Tensor to, Tensor from) {
  for (int64_t i = 0; i < from.numel(); ++i) Set(to, i, Get(from, i));
}

// Every element of `actual` is within `bound` of `expected`; NaN is not.
inline void ExpectNear(const char* what, Tensor actual, Tensor expected, double bound) {
  ASSERT_EQ(actual.numel(), expected.numel()) << what;
  double worst = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double error = std::fabs(Get(actual, i) - Get(expected, i));
    if (!(error <= worst)) worst = error, at = i;  // also for NaN
    if (std::isnan(error)) break;
  }
  EXPECT_LE(worst, bound) << what << " at element " << at << ": " << Get(actual, at) << ", not "
                          << Get(expected, at);
}

// For bf16: both sides round one value that each knows up to an fp32 error of `floor`, so an
// element may land on a neighbouring bf16, 2^-7 of it away at most, but at most a share of them do.
inline void ExpectSameUpToRounding(const char* what, Tensor actual, Tensor expected, double floor,
                                   double share) {
  ASSERT_EQ(actual.numel(), expected.numel()) << what;
  int64_t different = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double a = Get(actual, i), e = Get(expected, i);
    if (std::fabs(a - e) <= floor) continue;
    ++different;
    ASSERT_LE(std::fabs(a - e), 0x1p-7 * std::fabs(e) + floor) << what << " at element " << i;
  }
  EXPECT_LE(static_cast<double>(different), 2 + share * static_cast<double>(expected.numel()))
      << what;
}

// A result of compute dtype in a GpuOpTest: `error` is its fp32 error.
inline void ExpectMatches(const char* what, Tensor actual, Tensor expected, double error,
                          double share) {
  if (actual.dtype() == DType::kBF16) {
    ExpectSameUpToRounding(what, actual, expected, error, share);
  } else {
    ExpectNear(what, actual, expected, error);
  }
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_ON_GPU_H_
