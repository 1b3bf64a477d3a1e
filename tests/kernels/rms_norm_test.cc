#include "kernels/rms_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CheckGradients;
using testing::Dot;
using testing::Get;
using testing::RelativeError;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;
constexpr double kEps = 1e-6;

TEST(RmsNorm, ForwardIsTheFormula) {
  TestContext ctx;
  const int64_t m = 3, d = 5;
  Buf x(kF64, {m, d}, 2), w(kF64, {d}), y(kF64, {m, d}, 1), rstd(kF64, {m});
  x.FillNormal(1);
  w.FillNormal(2);
  RmsNormForward(y, rstd, x, w, 0.5, ctx);
  for (int64_t i = 0; i < m; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < d; ++j) squares += std::pow(Get(x, i * d + j), 2);
    const double r = 1 / std::sqrt(squares / static_cast<double>(d) + 0.5);
    EXPECT_NEAR(Get(rstd, i), r, 1e-15);
    for (int64_t j = 0; j < d; ++j) {
      EXPECT_NEAR(Get(y, i * d + j), Get(x, i * d + j) * r * Get(w, j), 1e-14);
    }
  }
  EXPECT_TRUE(y.PaddingIntact());
}

TEST(RmsNorm, GradientsInDouble) {
  TestContext ctx;
  for (const int64_t m : {1, 5, 67}) {  // 67: two pieces of rows
    for (const int64_t d : {1, 7, 16}) {
      Buf x(kF64, {m, d}, 3), w(kF64, {d}), y(kF64, {m, d}, 1), rstd(kF64, {m}),
          cotangent(kF64, {m, d}, 2), dx(kF64, {m, d}, 4), dw(kF64, {d});
      // Away from 0, where with d = 1 the norm jumps within sqrt(eps).
      x.FillNormal(1, 1, 5);
      w.FillNormal(2);
      cotangent.FillNormal(3);
      const double eps = 0.1;
      RmsNormForward(y, rstd, x, w, eps, ctx);
      RmsNormBackward(dx, dw, cotangent, x, rstd, w, false, ctx);
      CheckGradients(
          [&] {
            RmsNormForward(y, rstd, x, w, eps, ctx);
            return Dot(y, cotangent);
          },
          {{"x", x, dx}, {"w", w, dw}});
      EXPECT_TRUE(dx.PaddingIntact() && y.PaddingIntact());

      const std::vector<double> once = Values(dx), once_w = Values(dw);
      RmsNormBackward(dx, dw, cotangent, x, rstd, w, true, ctx);
      for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(dx)[i], 2 * once[i], 1e-13);
      for (size_t i = 0; i < once_w.size(); ++i) EXPECT_NEAR(Values(dw)[i], 2 * once_w[i], 1e-12);
    }
  }
}

TEST(ResidualRmsNorm, GradientsInDouble) {
  TestContext ctx;
  const int64_t m = 4, d = 9;
  Buf residual(kF64, {m, d}, 1), delta(kF64, {m, d}, 2), w(kF64, {d}), h(kF64, {m, d}),
      y(kF64, {m, d}), rstd(kF64, {m});
  Buf from_y(kF64, {m, d}), from_h(kF64, {m, d}), dh(kF64, {m, d}, 3), dw(kF64, {d});
  residual.FillNormal(1);
  delta.FillNormal(2);
  w.FillNormal(3);
  from_y.FillNormal(4);
  from_h.FillNormal(5);
  const auto loss = [&] {
    ResidualRmsNormForward(h, y, rstd, residual, delta, w, kEps, ctx);
    return Dot(y, from_y) + Dot(h, from_h);
  };
  loss();
  dh.Assign(Values(from_h));  // arrives with the gradient of h from the layers above
  ResidualRmsNormBackward(dh, dw, from_y, dh, h, rstd, w, ctx);
  CheckGradients(loss, {{"residual", residual, dh}, {"delta", delta, dh}, {"w", w, dw}});
  EXPECT_TRUE(dh.PaddingIntact());

  // Into other memory than that of the arriving gradient, which stays as it was.
  Buf elsewhere(kF64, {m, d}, 2), dw_again(kF64, {d});
  elsewhere.Fill(std::nan(""));
  const std::vector<double> arrived = Values(from_h);
  ResidualRmsNormBackward(elsewhere, dw_again, from_y, from_h, h, rstd, w, ctx);
  EXPECT_TRUE(SameBits(elsewhere, dh) && SameBits(dw_again, dw) && elsewhere.PaddingIntact());
  EXPECT_EQ(Values(from_h), arrived);

  // In place, and without an addition.
  const std::vector<double> expected_h = Values(h), expected_y = Values(y);
  ResidualRmsNormForward(residual, y, rstd, residual, delta, w, kEps, ctx);
  EXPECT_EQ(Values(residual), expected_h);
  EXPECT_EQ(Values(y), expected_y);
  y.Fill(0);
  ResidualRmsNormForward(residual, y, rstd, residual, Tensor(), w, kEps, ctx);
  EXPECT_EQ(Values(residual), expected_h);
  EXPECT_LE(RelativeError(Values(y), expected_y), 1e-15);
}

TEST(RmsNorm, FloatAndBFloat16AgreeWithDouble) {
  TestContext ctx;
  const int64_t m = 70, d = 323;
  for (DType dtype : {kF32, kBF16}) {
    Buf x(dtype, {m, d}, 5), delta(dtype, {m, d}), w(kF32, {d}), y(dtype, {m, d}), rstd(kF32, {m}),
        dy(dtype, {m, d}), h(dtype, {m, d}), dh(dtype, {m, d}), dw(kF32, {d});
    Buf x64(kF64, {m, d}), delta64(kF64, {m, d}), w64(kF64, {d}), y64(kF64, {m, d}),
        rstd64(kF64, {m}), dy64(kF64, {m, d}), h64(kF64, {m, d}), dh64(kF64, {m, d}),
        dw64(kF64, {d});
    x64.Assign(Values(x.FillNormal(1)));
    delta64.Assign(Values(delta.FillNormal(2)));
    w64.Assign(Values(w.FillNormal(3)));
    dy64.Assign(Values(dy.FillNormal(4)));
    dh64.Assign(Values(dh.FillNormal(5)));
    ResidualRmsNormForward(h, y, rstd, x, delta, w, kEps, ctx);
    ResidualRmsNormForward(h64, y64, rstd64, x64, delta64, w64, kEps, ctx);
    // Relative to one rounding u of the rows' type: h is rounded once; y twice more, after h.
    const double u = dtype == kBF16 ? 0x1p-9 : 0x1p-24;
    EXPECT_LE(RelativeError(h, h64), u);
    EXPECT_LE(RelativeError(y, y64), 3 * u);
    // Sums of 323 squares in at least four lanes: well under 16 roundings of float, and for
    // bfloat16 the rounding of h averages out.
    EXPECT_LE(RelativeError(rstd, rstd64), dtype == kBF16 ? u : 16 * u);
    ResidualRmsNormBackward(dh, dw, dy, dh, h, rstd, w, ctx);
    ResidualRmsNormBackward(dh64, dw64, dy64, dh64, h64, rstd64, w64, ctx);
    EXPECT_LE(RelativeError(dh, dh64), 4 * u);
    EXPECT_LE(RelativeError(dw, dw64), 4 * u);
  }
}

TEST(RmsNorm, StatisticsOfBFloat16RowsAreThoseOfTheRoundedSum) {
  TestContext ctx;
  Buf residual(kBF16, {1, 2}), delta(kBF16, {1, 2}), w(kF32, {2}), h(kBF16, {1, 2}),
      y(kBF16, {1, 2}), rstd(kF32, {1});
  residual.Assign({256, 1});
  delta.Assign({1, 0});  // 257 is a tie between 256 and 258: even
  w.Fill(1);
  ResidualRmsNormForward(h, y, rstd, residual, delta, w, 0, ctx);
  EXPECT_EQ(Get(h, 0), 256);
  EXPECT_NEAR(Get(rstd, 0), 1 / std::sqrt((256 * 256 + 1) / 2.0), 1e-9);
}

TEST(RmsNorm, TheSameForAnyNumberOfThreads) {
  const int64_t m = 1000, d = 77;
  Buf x(kF32, {m, d}), w(kF32, {d}), dy(kF32, {m, d});
  x.FillNormal(1);
  w.FillNormal(2);
  dy.FillNormal(3);
  Buf y1(kF32, {m, d}), y2(kF32, {m, d}), r1(kF32, {m}), r2(kF32, {m}), dx1(kF32, {m, d}),
      dx2(kF32, {m, d}), dw1(kF32, {d}), dw2(kF32, {d});
  const auto run = [&](Tensor y, Tensor rstd, Tensor dx, Tensor dw) {
    TestContext ctx;
    RmsNormForward(y, rstd, x, w, kEps, ctx);
    RmsNormBackward(dx, dw, dy, x, rstd, w, false, ctx);
  };
  WithThreads(1, [&] { run(y1, r1, dx1, dw1); });
  WithThreads(2, [&] { run(y2, r2, dx2, dw2); });
  EXPECT_TRUE(SameBits(y1, y2) && SameBits(r1, r2) && SameBits(dx1, dx2) && SameBits(dw1, dw2));
}

TEST(RmsNorm, NoRowsAndPlanning) {
  TestContext ctx;
  Buf x(kF32, {0, 4}), w(kF32, {4}), rstd(kF32, {0}), dw(kF32, {4});
  RmsNormForward(x, rstd, x, w, kEps, ctx);
  RmsNormBackward(x, dw, x, x, rstd, w, false, ctx);
  EXPECT_EQ(Values(dw), std::vector<double>(4, 0));

  Arena plan("plan");
  ctx.get()->planning = true;
  ctx.get()->scratch = &plan;
  const Tensor t(nullptr, kF32, Device::kCpu, {1000, 77}), v(nullptr, kF32, Device::kCpu, {77});
  RmsNormBackward(t, v, t, t, v, v, false, ctx);
  // 1000 rows in pieces of 64 rows.
  EXPECT_EQ(plan.high_water(), (16 * 77 * 4 + 255) / 256 * 256);
  EXPECT_EQ(plan.mark(), 0);
}

TEST(RmsNorm, NonFiniteRowsStayVisible) {
  TestContext ctx;
  for (DType dtype : {kF32, kBF16}) {
    Buf x(dtype, {2, 8}), w(kF32, {8}), y(dtype, {2, 8}), rstd(kF32, {2});
    x.Fill(1);
    w.Fill(1);
    Set(x, 3, std::nan(""));
    Set(x, 8, INFINITY);
    RmsNormForward(y, rstd, x, w, kEps, ctx);
    EXPECT_TRUE(std::isnan(Get(y, 0)));
    EXPECT_TRUE(std::isnan(Get(y, 8)));
    x.Fill(1e30);  // its square is none
    RmsNormForward(y, rstd, x, w, kEps, ctx);
    EXPECT_TRUE(std::isnan(Get(rstd, 1)));
    EXPECT_TRUE(std::isnan(Get(y, 15)));
  }
}

}  // namespace
}  // namespace krait
