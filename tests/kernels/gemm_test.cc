#include "kernels/gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/gemm.h"
#include "kernels/cuda/gemm.h"
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
    dw.Fill(std::nan(""));
    x.FillNormal(1);
    w.FillNormal(2);
    b.FillNormal(3);
    cotangent.FillNormal(4);
    LinearBackwardInput(dx, cotangent, w, false, ctx);
    LinearBackwardWeight(dw, cotangent, x, false, ctx);
    LinearBackwardBias(db, cotangent, ctx);
    CheckGradients(
        [&] {
          LinearForward(y, x, w, b, ctx);
          return Dot(y, cotangent);
        },
        {{"x", x, dx}, {"w", w, dw}, {"b", b, db}});
    EXPECT_TRUE(y.PaddingIntact() && dx.PaddingIntact());

    // The bias gradient accumulates; the others do on request.
    const std::vector<double> once = Values(dw), once_b = Values(db), once_x = Values(dx);
    LinearBackwardInput(dx, cotangent, w, true, ctx);
    LinearBackwardWeight(dw, cotangent, x, true, ctx);
    LinearBackwardBias(db, cotangent, ctx);
    for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(dw)[i], 2 * once[i], 1e-14);
    for (size_t i = 0; i < once_b.size(); ++i) EXPECT_NEAR(Values(db)[i], 2 * once_b[i], 1e-14);
    for (size_t i = 0; i < once_x.size(); ++i) EXPECT_NEAR(Values(dx)[i], 2 * once_x[i], 1e-14);

    // Overwriting does not read what was there.
    dw.Fill(std::nan(""));
    dx.Fill(std::nan(""));
    LinearBackwardWeight(dw, cotangent, x, false, ctx);
    LinearBackwardInput(dx, cotangent, w, false, ctx);
    EXPECT_EQ(Values(dw), once);
    EXPECT_EQ(Values(dx), once_x);
  }
}

TEST(Linear, AddBiasAddsToEveryRow) {
  const TestContext ctx;
  for (const DType dtype : {DType::kF32, kF64, DType::kBF16}) {
    Buf y(dtype, {3, 4, 5}, 2), bias(dtype, {5});
    y.FillIntegers(1, -50, 50);
    bias.FillIntegers(2, -50, 50);
    std::vector<double> want = Values(y);
    for (size_t i = 0; i < want.size(); ++i) want[i] += Get(bias, static_cast<int64_t>(i % 5));
    AddBias(y, bias, ctx);
    EXPECT_EQ(Values(y), want);
    EXPECT_TRUE(y.PaddingIntact());
  }
  // bf16: the sum is rounded once, a tie to even.
  Buf y(DType::kBF16, {1, 2}), bias(DType::kBF16, {2});
  y.Assign({256, 258});
  bias.Assign({1, 1});
  AddBias(y, bias, ctx);
  EXPECT_EQ(Values(y), (std::vector<double>{256, 260}));
  // The bias of LinearForward is the same sum in another place.
  Buf x(kF64, {3, 2}), w(kF64, {4, 2}), b(kF64, {4}), one(kF64, {3, 4}), two(kF64, {3, 4});
  x.FillNormal(1), w.FillNormal(2), b.FillNormal(3);
  LinearForward(one, x, w, b, ctx);
  LinearForward(two, x, w, Tensor(), ctx);
  AddBias(two, b, ctx);
  EXPECT_LE(RelativeError(two, one), 1e-15);
}

// bf16 inputs with outputs of bf16 or f32: the f32 sums, rounded once or not at all; gradients of
// weights and biases are f32.
TEST(Linear, BFloat16InputsGiveBFloat16OrFloat) {
  const TestContext ctx;
  const int64_t m = 9, n = 7, k = 33;
  Buf x(DType::kBF16, {m, k}, 1), w(DType::kBF16, {n, k}), dy(DType::kBF16, {m, n}, 2);
  x.FillNormal(1), w.FillNormal(2), dy.FillNormal(3);
  Buf x32(DType::kF32, {m, k}), w32(DType::kF32, {n, k}), dy32(DType::kF32, {m, n});
  x32.Assign(Values(x)), w32.Assign(Values(w)), dy32.Assign(Values(dy));
  Buf narrow(DType::kBF16, {m, n}), wide(DType::kF32, {m, n}), want(DType::kF32, {m, n}),
      rounded(DType::kBF16, {m, n});
  LinearForward(want, x32, w32, Tensor(), ctx);
  LinearForward(narrow, x, w, Tensor(), ctx);
  LinearForward(wide, x, w, Tensor(), ctx);
  EXPECT_TRUE(SameBits(wide, want));
  EXPECT_TRUE(SameBits(narrow, rounded.Assign(Values(want))));
  Buf dw(DType::kF32, {n, k}), dw32(DType::kF32, {n, k}), db(DType::kF32, {n}),
      db32(DType::kF32, {n});
  dw.Fill(std::nan(""));
  LinearBackwardWeight(dw, dy, x, false, ctx);
  LinearBackwardWeight(dw32, dy32, x32, false, ctx);
  LinearBackwardBias(db, dy, ctx);
  LinearBackwardBias(db32, dy32, ctx);
  EXPECT_TRUE(SameBits(dw, dw32) && SameBits(db, db32));
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

// Offsets of experts as a tensor.
Buf Offsets(const std::vector<double>& begin) {
  Buf offsets(DType::kI64, {static_cast<int64_t>(begin.size())});
  offsets.Assign(begin);
  return offsets;
}

TEST(GroupedLinear, EqualsOneProductPerExpertAndAllowsEmptyExperts) {
  const TestContext ctx;
  const int64_t experts = 4, outputs = 5, inputs = 3, used = 7;
  const std::vector<int64_t> begin = {0, 3, 3, 4, 7};
  const Buf offsets = Offsets({0, 3, 3, 4, 7});
  // As many rows as are in use, and more: those are neither read nor written.
  for (const int64_t m : {used, used + 4}) {
    Buf x(kF64, {m, inputs}, 1), w(kF64, {experts, outputs, inputs}), y(kF64, {m, outputs}, 2),
        cotangent(kF64, {m, outputs}), dx(kF64, {m, inputs}), dw(kF64, {experts, outputs, inputs});
    for (Buf* unused : {&x, &cotangent, &y, &dx, &dw}) unused->Fill(std::nan(""));
    const auto fill = [&](const Buf& to, uint64_t seed) {
      Buf values(kF64, {used, to.tensor().dim(1)});
      values.FillNormal(seed);
      for (int64_t i = 0; i < values.tensor().numel(); ++i) Set(to, i, Get(values, i));
    };
    fill(x, 1);
    fill(cotangent, 3);
    w.FillNormal(2);
    GroupedLinearBackwardInput(dx, cotangent, w, offsets, ctx);
    GroupedLinearBackwardWeight(dw, cotangent, x, offsets, false, ctx);
    CheckGradients(
        [&] {
          GroupedLinearForward(y, x, w, offsets, ctx);
          return Dot(y.tensor().Slice(0, 0, used), cotangent.tensor().Slice(0, 0, used));
        },
        {{"x", x.tensor().Slice(0, 0, used), dx.tensor().Slice(0, 0, used)}, {"w", w, dw}});
    EXPECT_TRUE(y.PaddingIntact());
    for (const Buf* out : {&y, &dx}) {
      for (const double value : Values(out->tensor().Slice(0, used, m - used))) {
        EXPECT_TRUE(std::isnan(value));
      }
    }
    // The expert without rows: zero when overwriting, as it was when accumulating.
    for (int64_t i = 0; i < outputs * inputs; ++i) EXPECT_EQ(Get(dw, outputs * inputs + i), 0);
    const std::vector<double> once = Values(dw);
    GroupedLinearBackwardWeight(dw, cotangent, x, offsets, true, ctx);
    for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(dw)[i], 2 * once[i], 1e-14);
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t row = begin[static_cast<size_t>(e)]; row < begin[static_cast<size_t>(e + 1)];
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
}

TEST(GroupedLinear, NoRowsAtAll) {
  const TestContext ctx;
  const Buf offsets = Offsets({0, 0, 0});
  Buf x(kF64, {0, 3}), y(kF64, {0, 5}), w(kF64, {2, 5, 3}), dw(kF64, {2, 5, 3});
  dw.Fill(2);
  GroupedLinearForward(y, x, w, offsets, ctx);
  GroupedLinearBackwardInput(x, y, w, offsets, ctx);
  GroupedLinearBackwardWeight(dw, y, x, offsets, true, ctx);
  EXPECT_EQ(Values(dw), std::vector<double>(30, 2));
  dw.Fill(std::nan(""));
  GroupedLinearBackwardWeight(dw, y, x, offsets, false, ctx);
  EXPECT_EQ(Values(dw), std::vector<double>(30, 0));
}

TEST(GroupedLinear, RowAlignment) {
  EXPECT_EQ(ExpertRowAlignment(Device::kCpu), 1);
  EXPECT_EQ(ExpertRowAlignment(Device::kCuda), 128);
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
  LinearBackwardWeight(t, t, t, false, ctx);
}

// cuBLASLt chooses by it: an alignment that is too small costs a factor of two to ten.
TEST(Gemm, AlignmentOfAddresses) {
  const auto of = [](uint64_t address) {
    return cuda::AlignmentOf(reinterpret_cast<const void*>(address));
  };
  EXPECT_EQ(of(0x1001), 1u);
  EXPECT_EQ(of(0x1006), 2u);
  EXPECT_EQ(of(0x1f80), 128u);
  for (int bit = 8; bit < 64; ++bit) EXPECT_EQ(of(uint64_t{1} << bit), 256u) << bit;
  EXPECT_EQ(of(0x7f3c00000000), 256u);
}

}  // namespace
}  // namespace krait
