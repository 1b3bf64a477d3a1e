// The CUDA RMSNorm against the CPU version of the same header; tolerances: support/on_gpu.h.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/rms_norm.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::ExpectMatches;
using testing::ExpectNear;
using testing::Get;
using testing::GpuContext;
using testing::kNaN;
using testing::kUlp;
using testing::MaxAbs;
using testing::OnGpu;
using testing::SameBits;
using testing::Set;

constexpr double kEps = 1e-6;

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

class RmsNormGpu : public testing::GpuOpTest {};

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

    Buf ry(ref(), {s.rows, s.cols}), rrstd(ref_wide(), {s.rows}), rx(ref(), {s.rows, s.cols});
    Buf rw(ref_wide(), {s.cols});
    CopyValues(rx, x), CopyValues(rw, w);
    RmsNormForward(ry, rrstd, rx, rw, kEps, *cpu_);
    ExpectNear("rstd", rstd, rrstd, Bound(s.cols) * MaxAbs(rrstd));
    ExpectMatches("y", y, ry, f32() ? Bound(s.cols) * MaxAbs(ry) : 0, Share(s.cols));
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
      Buf ry(ref(), {s.rows, s.cols}), rrstd(ref_wide(), {s.rows}), rw(ref_wide(), {s.cols});
      Buf rdw(ref_wide(), {s.cols});
      CopyValues(rx, x), CopyValues(rdy, dy), CopyValues(rdx, dx), CopyValues(rw, w),
          CopyValues(rdw, dw);
      RmsNormForward(ry, rrstd, rx, rw, kEps, *cpu_);
      CopyValues(rstd, rrstd);
      RmsNormBackward(rdx, rdw, rdy, rx, rrstd, rw, accumulate, *cpu_);

      OnGpu gx(x, s.shift), gdy(dy, s.shift), gdx(dx, s.shift), gw(w), gdw(dw), grstd(rstd);
      RmsNormBackward(gdx, gdw, gdy, gx, grstd, gw, accumulate, gpu_->ctx);
      gdx.Download(), gdw.Download();
      EXPECT_TRUE(dx.PaddingIntact());
      // The terms of dx cancel: their size is that of rstd * dy * w, and of what was there.
      const double term = MaxAbs(rrstd) * MaxAbs(rdy) * MaxAbs(rw) + (accumulate ? 4 : 0);
      ExpectMatches("dx", dx, rdx, Bound(s.cols) * term, Share(s.cols));
      // dw is fp32 in both cases; a column's terms are about dy * xhat, |xhat| up to 5.
      const double dw_term = std::sqrt(static_cast<double>(s.rows)) * MaxAbs(rdy) * 5 + 4;
      ExpectNear("dw", dw, rdw, Bound(s.rows) * dw_term);
    }
  }
}

TEST_P(RmsNormGpu, ResidualForwardAndBackward) {
  for (const Shape& s : Shapes()) {
    for (bool in_place : {false, true}) {
      if (in_place && s.rows > 3) continue;
      SCOPED_TRACE(::testing::Message() << s << " in place " << in_place);
      const auto rows = [&](DType type) { return Buf(type, {s.rows, s.cols}, s.pad); };
      Buf residual = rows(dtype()), delta = rows(dtype()), h = rows(dtype()), y = rows(dtype());
      Buf dh_in = rows(dtype()), dh = rows(dtype()), dy = rows(dtype());
      Buf w(DType::kF32, {s.cols}), rstd(DType::kF32, {s.rows}), dw(DType::kF32, {s.cols});
      residual.FillNormal(1), delta.FillNormal(6, 0.5), w.FillNormal(2, 0.1, 1.0);
      h.Fill(kNaN), y.Fill(kNaN), rstd.Fill(kNaN), dh.Fill(kNaN);
      dh_in.FillNormal(7), dy.FillNormal(8), dw.FillNormal(4);
      Buf rres = rows(ref()), rdelta = rows(ref()), rh = rows(ref()), ry = rows(ref());
      Buf rdh_in = rows(ref()), rdh = rows(ref()), rdy = rows(ref());
      Buf rw(ref_wide(), {s.cols}), rrstd(ref_wide(), {s.rows}), rdw(ref_wide(), {s.cols});
      CopyValues(rres, residual), CopyValues(rdelta, delta), CopyValues(rw, w);
      CopyValues(rdh_in, dh_in), CopyValues(rdy, dy), CopyValues(rdw, dw);
      ResidualRmsNormForward(rh, ry, rrstd, rres, rdelta, rw, kEps, *cpu_);
      ResidualRmsNormBackward(rdh, rdw, rdy, rdh_in, rh, rrstd, rw, *cpu_);

      OnGpu gres(residual, s.shift), gdelta(delta, s.shift), gh(h, s.shift), gy(y, s.shift);
      OnGpu grstd(rstd), gw(w), gdh_in(dh_in, s.shift), gdh(dh, s.shift), gdy(dy, s.shift);
      OnGpu gdw(dw);
      OnGpu& h_out = in_place ? gres : gh;
      OnGpu& dh_out = in_place ? gdh_in : gdh;
      ResidualRmsNormForward(h_out, gy, grstd, gres, gdelta, gw, kEps, gpu_->ctx);
      ResidualRmsNormBackward(dh_out, gdw, gdy, gdh_in, h_out, grstd, gw, gpu_->ctx);
      for (OnGpu* t : {&gres, &gh, &gy, &grstd, &gdh_in, &gdh, &gdw}) t->Download();
      const Buf& h_now = in_place ? residual : h;
      const Buf& dh_now = in_place ? dh_in : dh;
      for (const Buf* b : std::initializer_list<const Buf*>{&h_now, &dh_now, &y})
        EXPECT_TRUE(b->PaddingIntact());
      const double term = MaxAbs(rrstd) * MaxAbs(rdy) * MaxAbs(rw) + 4;
      ExpectNear("rstd", rstd, rrstd, Bound(s.cols) * MaxAbs(rrstd));
      if (f32()) {
        ExpectNear("h", h_now, rh, kUlp * MaxAbs(rh));  // one addition, correctly rounded
      } else {
        EXPECT_TRUE(SameBits(h_now, rh)) << "h: one addition, correctly rounded";
      }
      ExpectMatches("y", y, ry, f32() ? Bound(s.cols) * MaxAbs(ry) : 0, Share(s.cols));
      ExpectMatches("dh", dh_now, rdh, Bound(s.cols) * term, Share(s.cols));
      const double dw_term = std::sqrt(static_cast<double>(s.rows)) * MaxAbs(rdy) * 5 + 4;
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

  Set(x, 320 + 77, 1e30);  // its square overflows
  OnGpu overflowing(x);
  RmsNormForward(gy, grstd, overflowing, gw, kEps, gpu_->ctx);
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

INSTANTIATE_TEST_SUITE_P(, RmsNormGpu, testing::kGpuDTypes, testing::DTypeName);

// 2^31 + 2^18 elements of bf16: offsets beyond 32 bits. Rows repeat with a period that no power of
// two divides, so that a wrapped offset would read and write other values.
TEST(RmsNormGpuLarge, BeyondTwoToThe31Elements) {
  KRAIT_NEEDS_GPU();
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
