#include "kernels/gemm.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/cpu/gemm.h"
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

constexpr DType kF64 = DType::kF64;

// op(a) op(b) in double, the plain triple loop.
std::vector<double> Reference(Tensor a, bool transpose_a, Tensor b, bool transpose_b) {
  const int64_t m = a.dim(transpose_a ? 1 : 0), k = a.dim(transpose_a ? 0 : 1);
  const int64_t n = b.dim(transpose_b ? 0 : 1);
  std::vector<double> c;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += Get(a, transpose_a ? l * m + i : i * k + l) *
               Get(b, transpose_b ? j * k + l : l * n + j);
      }
      c.push_back(sum);
    }
  }
  return c;
}

TEST(MatMul, AllTransposesWithStridedRows) {
  const TestContext ctx;
  const int64_t m = 7, n = 5, k = 11;
  for (DType dtype : {DType::kF32, kF64}) {
    // k products of order one, each rounded: k * 2^-24 at the very most.
    const double bound = dtype == kF64 ? 2e-15 : 1e-6;
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        Buf a(dtype, {ta ? k : m, ta ? m : k}, 3), b(dtype, {tb ? n : k, tb ? k : n}, 2),
            c(dtype, {m, n}, 4);
        a.FillNormal(1);
        b.FillNormal(2);
        c.Fill(std::numeric_limits<double>::quiet_NaN());  // must not be read
        MatMul(c, a, ta, b, tb, false, ctx);
        std::vector<double> expected = Reference(a, ta, b, tb);
        EXPECT_LE(RelativeError(Values(c), expected), bound);
        MatMul(c, a, ta, b, tb, true, ctx);
        for (double& value : expected) value *= 2;
        EXPECT_LE(RelativeError(Values(c), expected), bound);
        EXPECT_TRUE(c.PaddingIntact());
      }
    }
  }
}

TEST(MatMul, EmptyExtents) {
  const TestContext ctx;
  Buf a(kF64, {0, 3}), b(kF64, {4, 3}), none(kF64, {0, 4});
  MatMul(none, a, false, b, true, false, ctx);  // no rows
  Buf c(kF64, {3, 3});
  c.Fill(5);
  MatMul(c, a, true, a, false, true, ctx);  // an empty sum
  EXPECT_EQ(Get(c, 8), 5);
  MatMul(c, a, true, a, false, false, ctx);
  EXPECT_EQ(Get(c, 8), 0);
}

// CBLAS takes 32-bit extents; the cut into several calls is exercised with a small limit.
TEST(MatMul, ProductsAboveTheExtentLimitAreCut) {
  const int64_t m = 7, n = 9, k = 11;
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      Buf a(kF64, {ta ? k : m, ta ? m : k}), b(kF64, {tb ? n : k, tb ? k : n}), c(kF64, {m, n}, 1);
      a.FillNormal(1);
      b.FillNormal(2);
      const cpu::Matrix<double> ma{a.tensor().data<double>(), a.tensor().row_stride(), ta};
      const cpu::Matrix<double> mb{b.tensor().data<double>(), b.tensor().row_stride(), tb};
      cpu::Gemm<double>(m, n, k, 1.0, ma, mb, false, c.tensor().data<double>(), n + 1, 4);
      EXPECT_LE(RelativeError(Values(c), Reference(a, ta, b, tb)), 2e-15);
      EXPECT_TRUE(c.PaddingIntact());
    }
  }
}

TEST(Linear, GradientsInDouble) {
  const TestContext ctx;
  const int64_t outputs = 5, inputs = 3;
  for (const int64_t m : {1, 6}) {
    Buf x(kF64, {m, inputs}, 2), w(kF64, {outputs, inputs}), b(kF64, {outputs});
    Buf y(kF64, {m, outputs}, 1), cotangent(kF64, {m, outputs}, 3);
    Buf dx(kF64, {m, inputs}, 1), dw(kF64, {outputs, inputs}), db(kF64, {outputs});
    x.FillNormal(1);
    w.FillNormal(2);
    b.FillNormal(3);
    cotangent.FillNormal(4);
    LinearBackwardInput(dx, cotangent, w, false, ctx);
    LinearBackwardWeight(dw, cotangent, x, ctx);
    LinearBackwardBias(db, cotangent, ctx);
    CheckGradients(
        [&] {
          LinearForward(y, x, w, b, ctx);
          return Dot(y, cotangent);
        },
        {{"x", x, dx}, {"w", w, dw}, {"b", b, db}});
    EXPECT_TRUE(y.PaddingIntact() && dx.PaddingIntact());

    // Weight and bias gradients accumulate; the input's does on request.
    const std::vector<double> once = Values(dw), once_b = Values(db), once_x = Values(dx);
    LinearBackwardInput(dx, cotangent, w, true, ctx);
    LinearBackwardWeight(dw, cotangent, x, ctx);
    LinearBackwardBias(db, cotangent, ctx);
    for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(dw)[i], 2 * once[i], 1e-14);
    for (size_t i = 0; i < once_b.size(); ++i) EXPECT_NEAR(Values(db)[i], 2 * once_b[i], 1e-14);
    for (size_t i = 0; i < once_x.size(); ++i) EXPECT_NEAR(Values(dx)[i], 2 * once_x[i], 1e-14);
  }
}

TEST(Linear, HigherRankInputsAreRows) {
  const TestContext ctx;
  Buf x(kF64, {2, 3, 4}, 1), w(kF64, {5, 4}), y(kF64, {2, 3, 5}), flat(kF64, {6, 5}),
      dense(kF64, {6, 4});
  x.FillNormal(1);
  dense.FillNormal(1);
  w.FillNormal(2);
  LinearForward(y, x, w, Tensor(), ctx);
  LinearForward(flat, dense, w, Tensor(), ctx);
  EXPECT_EQ(Values(y), Values(flat));
}

TEST(Linear, BiasGradientOfManyRowsKeepsItsAccuracy) {
  const TestContext ctx;
  const int64_t m = 5000, n = 300;
  Buf dy(DType::kF32, {m, n}), db(DType::kF32, {n});
  dy.FillNormal(1, 1, 3);
  LinearBackwardBias(db, dy, ctx);
  std::vector<double> expected(static_cast<size_t>(n));
  for (int64_t i = 0; i < m * n; ++i) expected[static_cast<size_t>(i % n)] += Get(dy, i);
  // Sums of 128 rows, then of 40 sums: at most 168 roundings, in practice their square root.
  EXPECT_LE(RelativeError(Values(db), expected), 20 * 0x1p-24);
  Buf one(DType::kF32, {n}), two(DType::kF32, {n});
  WithThreads(1, [&] { LinearBackwardBias(one, dy, ctx); });
  WithThreads(2, [&] { LinearBackwardBias(two, dy, ctx); });
  EXPECT_TRUE(SameBits(one, two));
}

TEST(GroupedLinear, EqualsOneProductPerExpertAndAllowsEmptyExperts) {
  const TestContext ctx;
  const int64_t experts = 4, outputs = 5, inputs = 3, m = 7;
  const std::vector<int64_t> offsets = {0, 3, 3, 4, 7};
  Buf x(kF64, {m, inputs}, 1), w(kF64, {experts, outputs, inputs}), y(kF64, {m, outputs}, 2),
      cotangent(kF64, {m, outputs}), dx(kF64, {m, inputs}), dw(kF64, {experts, outputs, inputs});
  x.FillNormal(1);
  w.FillNormal(2);
  cotangent.FillNormal(3);
  GroupedLinearBackwardInput(dx, cotangent, w, offsets.data(), ctx);
  GroupedLinearBackwardWeight(dw, cotangent, x, offsets.data(), ctx);
  CheckGradients(
      [&] {
        GroupedLinearForward(y, x, w, offsets.data(), ctx);
        return Dot(y, cotangent);
      },
      {{"x", x, dx}, {"w", w, dw}});
  EXPECT_TRUE(y.PaddingIntact());
  for (int64_t i = 0; i < outputs * inputs; ++i) EXPECT_EQ(Get(dw, outputs * inputs + i), 0);
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t row = offsets[static_cast<size_t>(e)]; row < offsets[static_cast<size_t>(e + 1)];
         ++row) {
      for (int64_t o = 0; o < outputs; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < inputs; ++i) {
          sum += Get(x, row * inputs + i) * Get(w, (e * outputs + o) * inputs + i);
        }
        EXPECT_NEAR(Get(y, row * outputs + o), sum, 1e-14);
      }
    }
  }
}

TEST(GroupedLinear, NoRowsAtAll) {
  const TestContext ctx;
  const std::vector<int64_t> offsets = {0, 0, 0};
  Buf x(kF64, {0, 3}), y(kF64, {0, 5}), w(kF64, {2, 5, 3}), dw(kF64, {2, 5, 3});
  dw.Fill(2);
  GroupedLinearForward(y, x, w, offsets.data(), ctx);
  GroupedLinearBackwardInput(x, y, w, offsets.data(), ctx);
  GroupedLinearBackwardWeight(dw, y, x, offsets.data(), ctx);
  EXPECT_EQ(Get(dw, 0), 2);
}

// CBLAS cuts sums differently for different numbers of threads, but the same for the same number.
TEST(MatMul, SameBitsAgainWithTheSameThreads) {
  const TestContext ctx;
  const int64_t m = 203, n = 171, k = 700;
  Buf a(DType::kF32, {m, k}), b(DType::kF32, {n, k}), first(DType::kF32, {m, n}),
      again(DType::kF32, {m, n});
  a.FillNormal(1);
  b.FillNormal(2);
  for (const int threads : {1, 2}) {
    WithThreads(threads, [&] {
      MatMul(first, a, false, b, true, false, ctx);
      for (int i = 0; i < 5; ++i) {
        MatMul(again, a, false, b, true, false, ctx);
        EXPECT_TRUE(SameBits(first, again));
      }
    });
  }
}

TEST(MatMul, PlanningTouchesNothing) {
  TestContext ctx;
  ctx.get()->planning = true;
  const Tensor t(nullptr, DType::kF32, Device::kCpu, {4, 4});
  MatMul(t, t, false, t, false, false, ctx);
  LinearForward(t, t, t, Tensor(), ctx);
  LinearBackwardWeight(t, t, t, ctx);
}

}  // namespace
}  // namespace krait
