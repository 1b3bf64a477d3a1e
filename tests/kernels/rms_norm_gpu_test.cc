// The CUDA RMSNorm against the CPU version of the same header.
//
// Tolerances. f32 is compared with the CPU op in f64 on the same values: a sum of n rounded terms
// is off by about sqrt(n) * 2^-24 of its terms' size, the handful of further roundings by a few
// 2^-24; Bound(n) = 4 * (sqrt(n) + 4) * 2^-24 of the largest term leaves a factor of 4 and more.
// bf16 is compared with the CPU op in bf16: both sides round the same fp32 value, known up to
// Bound(n), so an output may land on a neighbouring bf16 (at most 2^-7 of it per rounding, two
// roundings), but only where a rounding boundary lies within that bound. Boundaries are 2^-8 of a
// value apart or more, so a share of 2^8 * Bound(n) per rounding does at most; where terms cancel,
// small values add a logarithm of that share, so 8 of it are allowed: 3 % at n = 4096. A rounding
// left out or a wrong formula changes tens of per cent.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "kernels/rms_norm.h"
#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::SameBits;
using testing::Set;

constexpr double kEps = 1e-6;
constexpr double kUlp = 0x1p-24;

// A copy of a CPU tensor [M,D] or [D] in device memory, with the same strides and the padding
// between its rows. `shift` elements in front make its address unaligned.
class OnGpu {
 public:
  explicit OnGpu(Tensor host, int64_t shift = 0) : host_(host) {
    const int64_t stride = host.row_stride(), columns = host.dim(-1), size = SizeOf(host.dtype());
    bytes_ = ((host.rows() - 1) * stride + columns) * size;
    memory_ = static_cast<char*>(cuda::Allocate(bytes_ + shift * size, "a test tensor"));
    data_ = memory_ + shift * size;
    cuda::CopyToDevice(data_, host.raw(), bytes_);
    gpu_ = host.rank() == 1 ? Tensor(data_, host.dtype(), Device::kCuda, {columns})
                            : Tensor(data_, host.dtype(), Device::kCuda, {host.rows(), stride})
                                  .Slice(1, 0, columns);
  }
  ~OnGpu() { cuda::Free(memory_); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  operator Tensor() const { return gpu_; }  // NOLINT: passed where a view is taken
  void Download() { cuda::CopyToHost(host_.raw(), data_, bytes_); }

 private:
  Tensor host_, gpu_;
  char *memory_, *data_;
  int64_t bytes_;
};

struct GpuContext {
  GpuContext() : scratch("test scratch on the device", Device::kCuda, int64_t{64} << 20) {
    ctx.device = Device::kCuda;
    ctx.scratch = &scratch;
  }
  Arena scratch;
  Context ctx;
};

struct Shape {
  int64_t rows, cols, pad = 0, shift = 0;
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "M " << s.rows << " D " << s.cols << " pad " << s.pad << " shift " << s.shift;
}

const std::vector<Shape>& Shapes() {
  static const std::vector<Shape> shapes = [] {
    std::vector<Shape> all;
    for (int64_t cols : {1, 7, 320, 4096, 5000}) {
      for (int64_t rows : {1, 3, 1025}) all.push_back({rows, cols});
    }
    // Strided rows and shifted addresses, with and without 16-byte alignment; inner norms of Mamba;
    // rows that take 4 and 8 accesses per thread; the longest row of the unaligned path.
    for (Shape s : {Shape{1025, 320, 16}, Shape{1025, 320, 3}, Shape{3, 4096, 8}, Shape{3, 4096, 1},
                    Shape{3, 4096, 0, 1}, Shape{1025, 16, 272}, Shape{1025, 256, 32},
                    Shape{9, 8192}, Shape{5, 16384}, Shape{3, 8191}}) {
      all.push_back(s);
    }
    return all;
  }();
  return shapes;
}

// Elements of `actual` that are further than `bound` from `expected`, with the worst one.
void ExpectNear(const char* what, Tensor actual, Tensor expected, double bound) {
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

// bf16: each element within two roundings, and few that differ. `floor` is the fp32 error of the
// value before rounding, where terms cancel.
void ExpectSameUpToRounding(const char* what, Tensor actual, Tensor expected, double floor,
                            double share) {
  int64_t different = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double a = Get(actual, i), e = Get(expected, i);
    if (std::fabs(a - e) <= floor) continue;
    ++different;
    ASSERT_LE(std::fabs(a - e), 0x1p-6 * std::fabs(e) + floor) << what << " at element " << i;
  }
  EXPECT_LE(static_cast<double>(different), 2 + share * static_cast<double>(expected.numel()))
      << what;
}

double MaxAbs(Tensor t) {
  double max = 0;
  for (double v : testing::Values(t)) max = std::max(max, std::fabs(v));
  return max;
}

void Copy(Tensor to, Tensor from) {
  for (int64_t i = 0; i < from.numel(); ++i) Set(to, i, Get(from, i));
}

const double kNaN = std::numeric_limits<double>::quiet_NaN();

class RmsNormGpu : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
    gpu_.emplace();
    cpu_.emplace();
  }
  // The CPU reference computes in f64 for f32 and in bf16 for bf16.
  DType dtype() const { return GetParam(); }
  bool f32() const { return dtype() == DType::kF32; }
  DType ref() const { return f32() ? DType::kF64 : DType::kBF16; }
  DType ref_stat() const { return f32() ? DType::kF64 : DType::kF32; }
  static double Bound(int64_t n) { return 4 * (std::sqrt(static_cast<double>(n)) + 4) * kUlp; }
  static double Share(int64_t n) { return 8 * 0x1p8 * Bound(n); }

  std::optional<GpuContext> gpu_;
  std::optional<testing::TestContext> cpu_;
};

TEST_P(RmsNormGpu, Forward) {
  for (const Shape& s : Shapes()) {
    SCOPED_TRACE(::testing::Message() << s);
    Buf x(dtype(), {s.rows, s.cols}, s.pad), w(DType::kF32, {s.cols});
    x.FillNormal(1, 2.0), w.FillNormal(2, 0.1, 1.0);
    Buf y(dtype(), {s.rows, s.cols}, s.pad), rstd(DType::kF32, {s.rows});
    y.Fill(kNaN), rstd.Fill(kNaN);
    OnGpu gx(x, s.shift), gw(w), gy(y, s.shift), grstd(rstd);
    RmsNormForward(gy, grstd, gx, gw, kEps, gpu_->ctx);
    gy.Download(), grstd.Download();
    EXPECT_TRUE(y.PaddingIntact());

    Buf ry(ref(), {s.rows, s.cols}), rrstd(ref_stat(), {s.rows}), rx(ref(), {s.rows, s.cols});
    Buf rw(ref_stat(), {s.cols});
    Copy(rx, x), Copy(rw, w);
    RmsNormForward(ry, rrstd, rx, rw, kEps, *cpu_);
    ExpectNear("rstd", rstd, rrstd, Bound(s.cols) * MaxAbs(rrstd));
    if (f32()) {
      ExpectNear("y", y, ry, Bound(s.cols) * MaxAbs(ry));
    } else {
      ExpectSameUpToRounding("y", y, ry, 0, Share(s.cols));
    }
  }
}

TEST_P(RmsNormGpu, Backward) {
  for (const Shape& s : Shapes()) {
    for (bool accumulate : {false, true}) {
      if (accumulate && s.rows > 3) continue;
      SCOPED_TRACE(::testing::Message() << s << " accumulate " << accumulate);
      Buf x(dtype(), {s.rows, s.cols}, s.pad), dy(dtype(), {s.rows, s.cols}, s.pad);
      Buf dx(dtype(), {s.rows, s.cols}, s.pad), w(DType::kF32, {s.cols}), dw(DType::kF32, {s.cols});
      Buf rstd(DType::kF32, {s.rows});
      x.FillNormal(1, 2.0), dy.FillNormal(3), w.FillNormal(2, 0.1, 1.0), dw.FillNormal(4);
      if (accumulate) {
        dx.FillNormal(5);
      } else {
        dx.Fill(kNaN);
      }
      Buf rx(ref(), {s.rows, s.cols}), rdy(ref(), {s.rows, s.cols}), rdx(ref(), {s.rows, s.cols});
      Buf ry(ref(), {s.rows, s.cols}), rrstd(ref_stat(), {s.rows}), rw(ref_stat(), {s.cols});
      Buf rdw(ref_stat(), {s.cols});
      Copy(rx, x), Copy(rdy, dy), Copy(rdx, dx), Copy(rw, w), Copy(rdw, dw);
      RmsNormForward(ry, rrstd, rx, rw, kEps, *cpu_);
      Copy(rstd, rrstd);
      RmsNormBackward(rdx, rdw, rdy, rx, rrstd, rw, accumulate, *cpu_);

      OnGpu gx(x, s.shift), gdy(dy, s.shift), gdx(dx, s.shift), gw(w), gdw(dw), grstd(rstd);
      RmsNormBackward(gdx, gdw, gdy, gx, grstd, gw, accumulate, gpu_->ctx);
      gdx.Download(), gdw.Download();
      EXPECT_TRUE(dx.PaddingIntact());
      // The terms of dx cancel: their size is that of rstd * dy * w, and of what was there.
      const double term = MaxAbs(rrstd) * MaxAbs(rdy) * MaxAbs(rw) + (accumulate ? 4 : 0);
      if (f32()) {
        ExpectNear("dx", dx, rdx, Bound(s.cols) * term);
      } else {
        ExpectSameUpToRounding("dx", dx, rdx, Bound(s.cols) * term, Share(s.cols));
      }
      // dw is fp32 in both cases; a column's terms are about dy * xhat, |xhat| up to 5.
      const double dw_term = std::sqrt(static_cast<double>(s.rows)) * MaxAbs(rdy) * 5 + 4;
      ExpectNear("dw", dw, rdw, Bound(s.rows) * dw_term);
    }
  }
}

TEST_P(RmsNormGpu, ResidualForwardAndBackward) {
  for (const Shape& s : Shapes()) {
    if (s.pad > 0) continue;  // the residual stream is contiguous
    for (bool in_place : {false, true}) {
      if (in_place && s.rows > 3) continue;
      SCOPED_TRACE(::testing::Message() << s << " in place " << in_place);
      Buf residual(dtype(), {s.rows, s.cols}), delta(dtype(), {s.rows, s.cols});
      Buf h(dtype(), {s.rows, s.cols}), y(dtype(), {s.rows, s.cols}), rstd(DType::kF32, {s.rows});
      Buf w(DType::kF32, {s.cols}), dh(dtype(), {s.rows, s.cols}), dy(dtype(), {s.rows, s.cols});
      Buf dw(DType::kF32, {s.cols});
      residual.FillNormal(1), delta.FillNormal(6, 0.5), w.FillNormal(2, 0.1, 1.0);
      h.Fill(kNaN), y.Fill(kNaN), rstd.Fill(kNaN), dh.FillNormal(7), dy.FillNormal(8);

      OnGpu gres(residual, s.shift), gdelta(delta, s.shift), gh(h, s.shift), gy(y, s.shift);
      OnGpu grstd(rstd), gw(w), gdh(dh, s.shift), gdy(dy, s.shift), gdw(dw);
      OnGpu& out = in_place ? gres : gh;
      ResidualRmsNormForward(out, gy, grstd, gres, gdelta, gw, kEps, gpu_->ctx);
      ResidualRmsNormBackward(gdh, gdw, gdy, gdh, out, grstd, gw, gpu_->ctx);
      const Tensor h_out = in_place ? residual.tensor() : h.tensor();

      Buf rres(ref(), {s.rows, s.cols}), rdelta(ref(), {s.rows, s.cols});
      Buf ry(ref(), {s.rows, s.cols}), rrstd(ref_stat(), {s.rows}), rw(ref_stat(), {s.cols});
      Buf rh(ref(), {s.rows, s.cols}), rdh(ref(), {s.rows, s.cols}), rdy(ref(), {s.rows, s.cols});
      Buf rdw(ref_stat(), {s.cols});
      Copy(rres, residual), Copy(rdelta, delta), Copy(rw, w), Copy(rdh, dh), Copy(rdy, dy);
      ResidualRmsNormForward(rh, ry, rrstd, rres, rdelta, rw, kEps, *cpu_);
      ResidualRmsNormBackward(rdh, rdw, rdy, rdh, rh, rrstd, rw, *cpu_);

      out.Download(), gy.Download(), grstd.Download(), gdh.Download(), gdw.Download();
      const double term = MaxAbs(rrstd) * MaxAbs(rdy) * MaxAbs(rw) + 4;
      ExpectNear("rstd", rstd, rrstd, Bound(s.cols) * MaxAbs(rrstd));
      if (f32()) {
        ExpectNear("h", h_out, rh, kUlp * MaxAbs(rh));  // one addition, correctly rounded
        ExpectNear("y", y, ry, Bound(s.cols) * MaxAbs(ry));
        ExpectNear("dh", dh, rdh, Bound(s.cols) * term);
      } else {
        EXPECT_TRUE(SameBits(h_out, rh)) << "h: one addition, correctly rounded";
        ExpectSameUpToRounding("y", y, ry, 0, Share(s.cols));
        ExpectSameUpToRounding("dh", dh, rdh, Bound(s.cols) * term, Share(s.cols));
      }
      const double dw_term = std::sqrt(static_cast<double>(s.rows)) * MaxAbs(rdy) * 5;
      ExpectNear("dw", dw, rdw, Bound(s.rows) * dw_term);
    }
  }
}

TEST_P(RmsNormGpu, WithoutDeltaTheResidualIsOnlyRead) {
  Buf h(dtype(), {5, 320}), y(dtype(), {5, 320}), plain(dtype(), {5, 320});
  Buf rstd(DType::kF32, {5}), w(DType::kF32, {320});
  h.FillNormal(1), w.FillNormal(2);
  const std::vector<double> before = testing::Values(h);
  OnGpu gh(h), gy(y), gplain(plain), grstd(rstd), gw(w);
  ResidualRmsNormForward(gh, gy, grstd, gh, Tensor(), gw, kEps, gpu_->ctx);
  RmsNormForward(gplain, grstd, gh, gw, kEps, gpu_->ctx);
  gh.Download(), gy.Download(), gplain.Download();
  EXPECT_EQ(testing::Values(h), before);
  EXPECT_TRUE(SameBits(y, plain));
}

TEST_P(RmsNormGpu, TwoRunsGiveTheSameBits) {
  for (const Shape s : {Shape{1025, 4096}, Shape{4099, 256}, Shape{1025, 321}}) {
    Buf x(dtype(), {s.rows, s.cols}), dy(dtype(), {s.rows, s.cols}), w(DType::kF32, {s.cols});
    x.FillNormal(1), dy.FillNormal(2), w.FillNormal(3);
    OnGpu gx(x), gdy(dy), gw(w);
    std::vector<Buf> results;
    for (int run = 0; run < 2; ++run) {
      Buf y(dtype(), {s.rows, s.cols}), dx(dtype(), {s.rows, s.cols}), dw(DType::kF32, {s.cols});
      Buf rstd(DType::kF32, {s.rows});
      OnGpu gy(y), gdx(dx), gdw(dw), grstd(rstd);
      RmsNormForward(gy, grstd, gx, gw, kEps, gpu_->ctx);
      RmsNormBackward(gdx, gdw, gdy, gx, grstd, gw, false, gpu_->ctx);
      gy.Download(), gdx.Download(), gdw.Download(), grstd.Download();
      for (Buf* b : {&y, &dx, &dw, &rstd}) results.push_back(std::move(*b));
    }
    for (size_t i = 0; i < 4; ++i) EXPECT_TRUE(SameBits(results[i], results[i + 4])) << s << i;
  }
}

TEST_P(RmsNormGpu, NaNStaysInItsRow) {
  Buf x(dtype(), {3, 320}), y(dtype(), {3, 320}), rstd(DType::kF32, {3}), w(DType::kF32, {320});
  x.FillNormal(1), w.FillNormal(2);
  Set(x, 320 + 77, kNaN);
  OnGpu gx(x), gy(y), grstd(rstd), gw(w);
  RmsNormForward(gy, grstd, gx, gw, kEps, gpu_->ctx);
  gy.Download();
  for (int64_t i = 0; i < 3 * 320; ++i) EXPECT_EQ(std::isnan(Get(y, i)), i / 320 == 1) << i;
}

TEST_P(RmsNormGpu, EmptyInputLaunchesNothing) {
  Buf w(DType::kF32, {8}), dw(DType::kF32, {8});
  OnGpu gw(w), gdw(dw);
  const Tensor none = Tensor(gw).View({1, 8}).Slice(0, 0, 0);
  const Tensor no_rows = Tensor(gw).Slice(0, 0, 0);
  RmsNormForward(none, no_rows, none, gw, kEps, gpu_->ctx);
  RmsNormBackward(none, gdw, none, none, no_rows, gw, false, gpu_->ctx);
  gdw.Download();
  EXPECT_EQ(testing::Values(dw), std::vector<double>(8, 0.0));
}

INSTANTIATE_TEST_SUITE_P(, RmsNormGpu, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& dtype) { return std::string(Name(dtype.param)); });

// 2^31 + 2^18 elements of bf16: offsets beyond 32 bits. Rows repeat with a period that no power of
// two divides, so that a wrapped offset would read and write other values.
TEST(RmsNormGpuLarge, BeyondTwoToThe31Elements) {
  std::string reason;
  if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
  constexpr int64_t kCols = 4096, kRows = (int64_t{1} << 19) + 64, kPeriod = 1009;
  GpuContext gpu;
  testing::TestContext cpu;
  Buf pattern(DType::kBF16, {kPeriod, kCols}), w(DType::kF32, {kCols}), dw(DType::kF32, {kCols});
  pattern.FillNormal(1), w.FillNormal(2);
  Buf y(DType::kBF16, {kPeriod, kCols}), rstd(DType::kF32, {kPeriod});
  Buf dx(DType::kBF16, {kPeriod, kCols});
  RmsNormForward(y, rstd, pattern, w, kEps, cpu);
  RmsNormBackward(dx, dw, pattern, pattern, rstd, w, false, cpu);  // dy = x

  Arena memory("test tensors", Device::kCuda, 2 * kRows * kCols * 2 + (int64_t{16} << 20));
  const Tensor gx = memory.Alloc(DType::kBF16, {kRows, kCols});
  const Tensor out = memory.Alloc(DType::kBF16, {kRows, kCols});
  const Tensor grstd = memory.Alloc(DType::kF32, {kRows});
  const Tensor gdw = memory.Alloc(DType::kF32, {kCols});
  OnGpu gw(w);
  for (int64_t row = 0; row < kRows; row += kPeriod) {
    const int64_t count = std::min(kPeriod, kRows - row);
    cuda::CopyToDevice(gx.Slice(0, row, 1).raw(), pattern.tensor().raw(), count * kCols * 2);
  }
  const auto check = [&](const char* what, Tensor expected) {
    Buf row(DType::kBF16, {kCols});
    int64_t different = 0;
    // Around the first element beyond 2^31, the first and the last rows, and some between.
    for (int64_t r : {int64_t{0}, int64_t{1}, int64_t{1} << 18, (int64_t{1} << 19) - 1,
                      int64_t{1} << 19, (int64_t{1} << 19) + 1, kRows - 1}) {
      cuda::CopyToHost(row.tensor().raw(), out.Slice(0, r, 1).raw(), kCols * 2);
      for (int64_t c = 0; c < kCols; ++c) {
        const double a = Get(row, c), e = Get(expected, r % kPeriod * kCols + c);
        different += a != e;
        ASSERT_LE(std::fabs(a - e), 0x1p-6 * std::fabs(e) + 1e-3) << what << " " << r << ", " << c;
      }
    }
    EXPECT_LE(different, 28672 / 30) << what;  // neighbours by rounding
  };
  RmsNormForward(out, grstd, gx, gw, kEps, gpu.ctx);
  check("y", y);
  RmsNormBackward(out, gdw, gx, gx, grstd, gw, false, gpu.ctx);
  check("dx", dx);
  // dw is the sum over all rows, each of them a row of the pattern.
  Buf gpu_dw(DType::kF32, {kCols});
  cuda::CopyToHost(gpu_dw.tensor().raw(), gdw.raw(), kCols * 4);
  for (int64_t c = 0; c < kCols; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < kPeriod; ++r) {
      const double repeats = static_cast<double>(kRows / kPeriod + (r < kRows % kPeriod));
      const double x = Get(pattern, r * kCols + c);
      sum += repeats * x * x * Get(rstd, r);  // positive terms: no cancellation
    }
    // Partial sums of 1 to 2 thousand rows, then 400 of them: sqrt(n) * 2^-24 each, times 4.
    ASSERT_NEAR(Get(gpu_dw, c), sum, 4 * std::sqrt(2000.0) * kUlp * sum) << c;
  }
}

}  // namespace
}  // namespace krait
