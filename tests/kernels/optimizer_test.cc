#include "kernels/optimizer.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::RelativeError;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;

AdamWStep StepNumber(int64_t step) {
  return {.lr = 1e-2 / static_cast<double>(step),
          .beta1 = 0.9,
          .beta2 = 0.95,
          .eps = 1e-3,
          .weight_decay = 0.1,
          .step = step,
          .grad_scale = 0.5};
}

// The header's formula, one element in double.
void Reference(const AdamWStep& s, double g, double* w, double* m, double* v) {
  g *= s.grad_scale;
  *w *= 1 - s.lr * s.weight_decay;
  *m = s.beta1 * *m + (1 - s.beta1) * g;
  *v = s.beta2 * *v + (1 - s.beta2) * g * g;
  const auto n = static_cast<double>(s.step);
  *w -= s.lr / (1 - std::pow(s.beta1, n)) * *m /
        (std::sqrt(*v) / std::sqrt(1 - std::pow(s.beta2, n)) + s.eps);
}

TEST(AdamW, IsTheFormulaOverSeveralSteps) {
  const TestContext ctx;
  const int64_t n = 40001;  // more than two pieces
  for (DType dtype : {kF32, kF64}) {
    Buf w(dtype, {n}), m(dtype, {n}), v(dtype, {n}), grad(dtype, {n});
    w.FillNormal(1);
    std::vector<double> rw = Values(w), rm = Values(m), rv = Values(v);
    const std::vector<double> before = rw;
    for (int64_t step = 1; step <= 5; ++step) {
      grad.FillNormal(static_cast<uint64_t>(10 + step));
      for (size_t i = 0; i < rw.size(); ++i) {
        Reference(StepNumber(step), Get(grad, static_cast<int64_t>(i)), &rw[i], &rm[i], &rv[i]);
      }
      AdamW(w, m, v, grad, StepNumber(step), ctx);
    }
    // Two roundings per step, random in sign.
    const double u = dtype == kF64 ? 0x1p-53 : 0x1p-24;
    EXPECT_LE(RelativeError(Values(w), rw), 5 * u);
    EXPECT_LE(RelativeError(Values(m), rm), 5 * u);
    EXPECT_LE(RelativeError(Values(v), rv), 5 * u);
    EXPECT_GT(RelativeError(before, rw), 1e-3);  // it moved
  }
}

// The first update of Adam is lr * sign(g) whatever the size of g, and decay is decoupled.
TEST(AdamW, FirstStepAndDecay) {
  const TestContext ctx;
  Buf w(kF64, {3}), m(kF64, {3}), v(kF64, {3}), grad(kF64, {3});
  w.Assign({1, 1, 1});
  grad.Assign({1e-3, -7, 0});
  AdamW(w, m, v, grad,
        {.lr = 0.1,
         .beta1 = 0.9,
         .beta2 = 0.95,
         .eps = 0,
         .weight_decay = 0.5,
         .step = 1,
         .grad_scale = 1},
        ctx);
  EXPECT_NEAR(Get(w, 0), 0.95 - 0.1, 1e-15);
  EXPECT_NEAR(Get(w, 1), 0.95 + 0.1, 1e-15);
  EXPECT_TRUE(std::isnan(Get(w, 2)));  // 0/0: eps is what prevents it
}

TEST(AdamW, MomentsInBFloat16AreRoundedAfterTheUpdate) {
  const TestContext ctx;
  const int64_t n = 1000;
  Buf w(kF32, {n}), m(kBF16, {n}), v(kBF16, {n}), grad(kF32, {n});
  w.FillNormal(1);
  m.FillNormal(2);
  v.FillNormal(3, 0.1, 2);
  grad.FillNormal(4);
  Buf w32(kF32, {n}), m32(kF32, {n}), v32(kF32, {n});
  w32.Assign(Values(w));
  m32.Assign(Values(m));
  v32.Assign(Values(v));
  AdamW(w, m, v, grad, StepNumber(3), ctx);
  AdamW(w32, m32, v32, grad, StepNumber(3), ctx);
  // Equal up to how each loop fuses its products.
  EXPECT_LE(RelativeError(w, w32), 0x1p-24);
  // A value near a tie may round the other way: each such element adds 2^-9 / sqrt(1000) = 6e-5.
  Buf rounded(kBF16, {n});
  EXPECT_LE(RelativeError(Values(m), Values(rounded.Assign(Values(m32)))), 1e-4);
  EXPECT_LE(RelativeError(Values(v), Values(rounded.Assign(Values(v32)))), 1e-4);
}

TEST(AdamW, ThreadsAndEmpty) {
  const TestContext ctx;
  const int64_t n = 100003;
  Buf grad(kF32, {n});
  grad.FillNormal(3);
  std::vector<Buf> w, m, v;
  for (int threads : {1, 2}) {
    w.emplace_back(kF32, std::initializer_list<int64_t>{n});
    m.emplace_back(kF32, std::initializer_list<int64_t>{n});
    v.emplace_back(kF32, std::initializer_list<int64_t>{n});
    w.back().FillNormal(1);
    WithThreads(threads, [&] { AdamW(w.back(), m.back(), v.back(), grad, StepNumber(1), ctx); });
  }
  EXPECT_TRUE(SameBits(w[0], w[1]) && SameBits(m[0], m[1]) && SameBits(v[0], v[1]));
  Buf none(kF32, {0});
  AdamW(none, none, none, none, StepNumber(1), ctx);
  EXPECT_EQ(SumOfSquares(none, ctx), 0);
}

TEST(Sums, AreExactToDoubleAndTheSameForAnyNumberOfThreads) {
  const TestContext ctx;
  for (const int64_t n : {1, 16384, 16385, 200001}) {
    Buf x(kF32, {n});
    x.FillNormal(5, 1, 0.1);
    long double sum = 0, squares = 0;
    for (const double value : Values(x)) {
      sum += value;
      squares += static_cast<long double>(value) * value;
    }
    double s[2], q[2];
    for (int threads : {1, 2}) {
      WithThreads(threads, [&] {
        s[threads - 1] = Sum(x, ctx);
        q[threads - 1] = SumOfSquares(x, ctx);
      });
    }
    EXPECT_EQ(s[0], s[1]);
    EXPECT_EQ(q[0], q[1]);
    // At most 16384 / 2 additions in a row of a lane, each within 2^-53 of a part of the sum.
    EXPECT_NEAR(q[0], static_cast<double>(squares), static_cast<double>(squares) * 1e-13);
    EXPECT_NEAR(s[0], static_cast<double>(sum), static_cast<double>(squares) * 1e-13);
  }
}

TEST(Sums, NonFiniteValuesShow) {
  const TestContext ctx;
  for (const double bad : std::initializer_list<double>{std::nan(""), INFINITY, -INFINITY}) {
    for (const int64_t at : {int64_t{0}, int64_t{30000}}) {
      Buf x(kF32, {30001});
      Set(x, at, bad);
      EXPECT_FALSE(std::isfinite(SumOfSquares(x, ctx)));
      EXPECT_FALSE(std::isfinite(Sum(x, ctx)));
    }
  }
  // Squares beyond the range of float are still finite in double.
  Buf large(kF32, {2});
  large.Fill(1e30);
  EXPECT_NEAR(SumOfSquares(large, ctx), 2e60, 1e54);
}

// 2^31 + 64 elements, of which only the last page holds anything: zero pages that are only read.
TEST(Sums, OffsetsBeyond32Bits) {
  const TestContext ctx;
  const int64_t n = (int64_t{1} << 31) + 64;
  const size_t bytes = static_cast<size_t>(n) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const Tensor x(memory, kF32, Device::kCpu, {n});
  x.data<float>()[n - 1] = 3;
  EXPECT_EQ(SumOfSquares(x, ctx), 9);
  EXPECT_EQ(munmap(memory, bytes), 0);
}

}  // namespace
}  // namespace krait
