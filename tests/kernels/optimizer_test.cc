#include "kernels/optimizer.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <utility>
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

double SumOfSquares(Tensor x, const Context& ctx) {
  Buf sum(kF64, {1});
  AddSumOfSquares(sum, x, ctx);
  return Get(sum, 0);
}
double Sum(Tensor x, const Context& ctx) {
  Buf sum(kF64, {1});
  AddSum(sum, x, ctx);
  return Get(sum, 0);
}

AdamWSettings StepNumber(int64_t step) {
  return {.lr = 1e-2 / static_cast<double>(step),
          .beta1 = 0.9,
          .beta2 = 0.95,
          .eps = 1e-3,
          .weight_decay = 0.1,
          .clip = 2};
}

// The control of a first or later step whose gradient has this norm.
class Control {
 public:
  Control() : control_(kF64, {kAdamWControlSize}), squares_(kF64, {1}), losses_(kF64, {2}) {}
  void Prepare(double norm, const AdamWSettings& settings, const Context& ctx) {
    squares_.Fill(norm * norm);
    AdamWPrepare(control_, squares_, losses_, settings, ctx);
  }
  double operator[](AdamWControl entry) const { return Get(control_, entry); }
  void Set(AdamWControl entry, double value) { testing::Set(control_, entry, value); }
  void SetLosses(const std::vector<double>& losses) { losses_.Assign(losses); }
  operator Tensor() const { return control_; }  // NOLINT: passed where a view is taken

 private:
  Buf control_, squares_, losses_;
};

// The header's formula, one element in double.
void Reference(const AdamWSettings& s, int64_t step, bool decays, double grad_scale, double g,
               double* w, double* m, double* v) {
  g *= grad_scale;
  if (decays) *w *= 1 - s.lr * s.weight_decay;
  *m = s.beta1 * *m + (1 - s.beta1) * g;
  *v = s.beta2 * *v + (1 - s.beta2) * g * g;
  const auto n = static_cast<double>(step);
  *w -= s.lr / (1 - std::pow(s.beta1, n)) * *m /
        (std::sqrt(*v) / std::sqrt(1 - std::pow(s.beta2, n)) + s.eps);
}

Buf Ranges(const std::vector<double>& bounds) {
  Buf ranges(DType::kI64, {static_cast<int64_t>(bounds.size() / 2), 2});
  ranges.Assign(bounds);
  return ranges;
}

TEST(AdamW, IsTheFormulaOverSeveralSteps) {
  const TestContext ctx;
  const int64_t n = 40001;  // more than two pieces
  // All decay; none; ranges at the edges, between them, empty ones, and beside each other.
  for (const std::vector<double>& bounds : std::vector<std::vector<double>>{
           {0, 40001}, {}, {0, 1, 7, 7, 100, 20000, 20000, 30001, 40000, 40001}}) {
    const Buf ranges = Ranges(bounds);
    std::vector<bool> decays(static_cast<size_t>(n), false);
    for (size_t r = 0; r < bounds.size(); r += 2) {
      for (auto i = static_cast<size_t>(bounds[r]); i < static_cast<size_t>(bounds[r + 1]); ++i) {
        decays[i] = true;
      }
    }
    for (DType dtype : {kF32, kF64}) {
      Buf w(dtype, {n}), m(dtype, {n}), v(dtype, {n}), grad(dtype, {n});
      Control control;
      w.FillNormal(1);
      std::vector<double> rw = Values(w), rm = Values(m), rv = Values(v);
      const std::vector<double> before = rw;
      for (int64_t step = 1; step <= 5; ++step) {
        grad.FillNormal(static_cast<uint64_t>(10 + step));
        control.Prepare(4, StepNumber(step), ctx);
        for (size_t i = 0; i < rw.size(); ++i) {
          Reference(StepNumber(step), step, decays[i], 2 / (4 + 1e-6),
                    Get(grad, static_cast<int64_t>(i)), &rw[i], &rm[i], &rv[i]);
        }
        AdamW(w, w, m, v, grad, bounds.empty() ? Tensor() : ranges.tensor(), control,
              StepNumber(step), ctx);
      }
      // Two roundings per step, random in sign.
      const double u = dtype == kF64 ? 0x1p-53 : 0x1p-24;
      EXPECT_LE(RelativeError(Values(w), rw), 5 * u);
      EXPECT_LE(RelativeError(Values(m), rm), 5 * u);
      EXPECT_LE(RelativeError(Values(v), rv), 5 * u);
      EXPECT_GT(RelativeError(before, rw), 1e-3);  // it moved
    }
  }
}

// Ranges of scaled steps cross those of decay, which is not scaled; a scale of 1 changes no bit.
TEST(AdamW, ScaledStepsOfRanges) {
  const TestContext ctx;
  const int64_t n = 40001;
  const Buf decay = Ranges({0, 5000, 5000, 20000, 39990, 40001});
  const std::vector<double> bounds = {3, 4, 4, 4, 4999, 25000, 25000, 30000};
  const Buf ranges = Ranges(bounds);
  Buf scales(kF64, {4}), ones(kF64, {4});
  scales.Assign({3, 7, 0.25, 0.5}), ones.Fill(1);
  for (const DType dtype : {kF32, kF64}) {
    Buf w(dtype, {n}), m(dtype, {n}), v(dtype, {n}), grad(dtype, {n});
    w.FillNormal(1), m.FillNormal(2, 0.1), v.Fill(0.2), grad.FillNormal(3);
    const std::vector<double> before = Values(w);
    Buf w1(dtype, {n}), m1(dtype, {n}), v1(dtype, {n}), w2(dtype, {n}), m2(dtype, {n}),
        v2(dtype, {n});
    for (Buf* t : {&w1, &w2}) t->Assign(before);
    for (Buf* t : {&m1, &m2}) t->Assign(Values(m));
    for (Buf* t : {&v1, &v2}) t->Assign(Values(v));
    Control control;
    control.Set(kAdamWSteps, 4);
    control.Prepare(4, StepNumber(5), ctx);
    AdamW(w, w, m, v, grad, decay, control, StepNumber(5), ctx);
    AdamW(w1, w1, m1, v1, grad, decay, {ranges, ones}, control, StepNumber(5), ctx);
    EXPECT_TRUE(SameBits(w, w1) && SameBits(m, m1) && SameBits(v, v1));
    AdamW(w2, w2, m2, v2, grad, decay, {ranges, scales}, control, StepNumber(5), ctx);
    EXPECT_TRUE(SameBits(m, m2) && SameBits(v, v2));
    const std::vector<double> plain = Values(w), scaled = Values(w2);
    const double keep = 1 - StepNumber(5).lr * StepNumber(5).weight_decay;
    for (size_t i = 0; i < before.size(); ++i) {
      const auto at = static_cast<double>(i);
      const bool decays = at < 20000 || at >= 39990;
      double scale = 1;
      for (size_t r = 0; r < 4; ++r) {
        if (at >= bounds[2 * r] && at < bounds[2 * r + 1])
          scale = Get(scales, static_cast<int64_t>(r));
      }
      const double kept = before[i] * (decays ? keep : 1);
      const double expected = kept + scale * (plain[i] - kept);
      ASSERT_NEAR(scaled[i], expected, (dtype == kF32 ? 1e-6 : 1e-14) * (1 + std::fabs(kept))) << i;
    }
  }
}

// The first update of Adam is lr * sign(g) whatever the size of g, and decay is decoupled.
TEST(AdamW, FirstStepAndDecay) {
  const TestContext ctx;
  Buf w(kF64, {4}), m(kF64, {4}), v(kF64, {4}), grad(kF64, {4});
  const Buf ranges = Ranges({0, 3});
  w.Assign({1, 1, 1, 1});
  grad.Assign({1e-3, -7, 0, 5});
  const AdamWSettings settings{
      .lr = 0.1, .beta1 = 0.9, .beta2 = 0.95, .eps = 0, .weight_decay = 0.5};
  Control control;
  control.Prepare(1, settings, ctx);
  AdamW(w, w, m, v, grad, ranges, control, settings, ctx);
  EXPECT_NEAR(Get(w, 0), 0.95 - 0.1, 1e-15);
  EXPECT_NEAR(Get(w, 1), 0.95 + 0.1, 1e-15);
  EXPECT_TRUE(std::isnan(Get(w, 2)));  // 0/0: eps is what prevents it
  EXPECT_NEAR(Get(w, 3), 1 - 0.1, 1e-15);
}

TEST(AdamWPrepare, FillsTheControl) {
  const TestContext ctx;
  AdamWSettings settings = StepNumber(1);
  Control control;
  for (int64_t step = 1; step <= 3; ++step) {
    control.Prepare(5, settings, ctx);
    const auto n = static_cast<double>(step);
    EXPECT_EQ(control[kAdamWSteps], n);
    EXPECT_EQ(control[kAdamWNorm], 5);
    EXPECT_EQ(control[kAdamWApplied], 1);
    EXPECT_DOUBLE_EQ(control[kAdamWGradScale], 2 / (5 + 1e-6));
    EXPECT_DOUBLE_EQ(control[kAdamWStepSize], settings.lr / (1 - std::pow(0.9, n)));
    EXPECT_DOUBLE_EQ(control[kAdamWRootScale], 1 / std::sqrt(1 - std::pow(0.95, n)));
  }
  control.Prepare(1.5, settings, ctx);  // below the largest norm: not scaled up
  EXPECT_EQ(control[kAdamWGradScale], 1);
  settings.clip = 0;  // any norm
  control.Prepare(1e6, settings, ctx);
  EXPECT_EQ(control[kAdamWGradScale], 1);
  EXPECT_EQ(control[kAdamWSteps], 5);
}

// Neither weights, moments nor the count of updates change in a step whose gradient or losses are
// not finite; the next finite one goes on.
TEST(AdamWPrepare, StepsThatAreNotFiniteAreSkipped) {
  const TestContext ctx;
  const AdamWSettings settings = StepNumber(1);
  Buf weight(kBF16, {50}), w(kF32, {50}), m(kF32, {50}), v(kF32, {50}), grad(kF32, {50});
  w.FillNormal(1), weight.FillNormal(1), grad.FillNormal(2), m.FillNormal(3),
      v.FillNormal(4, 0.1, 2);
  Control control;
  control.Prepare(1, settings, ctx);
  const std::vector<double> before = Values(w), m0 = Values(m), v0 = Values(v);
  const std::vector<double> weight0 = Values(weight);
  const auto step = [&](double norm, const std::vector<double>& losses) {
    control.SetLosses(losses);
    control.Prepare(norm, settings, ctx);
    AdamW(weight, w, m, v, grad, Tensor(), control, settings, ctx);
  };
  const double nan = std::nan("");
  for (const auto& [norm, losses] : {std::pair<double, std::vector<double>>{nan, {1, 1}},
                                     {INFINITY, {1, 1}},
                                     {1, {nan, 1}},
                                     {1, {1, -INFINITY}},
                                     {1, {1, nan}}}) {
    step(norm, losses);
    EXPECT_EQ(control[kAdamWApplied], 0);
    EXPECT_EQ(control[kAdamWSteps], 1);
    EXPECT_EQ(Values(w), before);
    EXPECT_EQ(Values(m), m0);
    EXPECT_EQ(Values(v), v0);
    EXPECT_EQ(Values(weight), weight0);
  }
  step(1, {1, 1});
  EXPECT_EQ(control[kAdamWApplied], 1);
  EXPECT_EQ(control[kAdamWSteps], 2);
  EXPECT_NE(Values(w), before);
}

TEST(AdamW, BFloat16WeightIsTheRoundedMaster) {
  const TestContext ctx;
  const int64_t n = 20000;
  Buf weight(kBF16, {n}), master(kF32, {n}), alone(kF32, {n}), m(kF32, {n}), v(kF32, {n}),
      m2(kF32, {n}), v2(kF32, {n}), grad(kF32, {n}), rounded(kBF16, {n});
  weight.Fill(std::nan(""));
  Control control;
  for (int64_t step = 1; step <= 3; ++step) {
    if (step == 1) master.FillNormal(1), alone.FillNormal(1);
    grad.FillNormal(static_cast<uint64_t>(step + 1));
    control.Prepare(1, StepNumber(step), ctx);
    AdamW(weight, master, m, v, grad, Tensor(), control, StepNumber(step), ctx);
    AdamW(alone, alone, m2, v2, grad, Tensor(), control, StepNumber(step), ctx);
    EXPECT_TRUE(SameBits(master, alone)) << step;  // what is rounded is not rounded again
    EXPECT_TRUE(SameBits(weight, rounded.Assign(Values(master)))) << step;
  }
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
  Control control;
  control.Prepare(4, StepNumber(3), ctx);
  AdamW(w, w, m, v, grad, Tensor(), control, StepNumber(3), ctx);
  AdamW(w32, w32, m32, v32, grad, Tensor(), control, StepNumber(3), ctx);
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
  const Buf ranges = Ranges({10, 50000, 70000, 100003});
  Buf grad(kF32, {n});
  grad.FillNormal(3);
  Control control;
  control.Prepare(4, StepNumber(1), ctx);
  std::vector<Buf> w, m, v;
  for (int threads : {1, 2}) {
    w.emplace_back(kF32, std::initializer_list<int64_t>{n});
    m.emplace_back(kF32, std::initializer_list<int64_t>{n});
    v.emplace_back(kF32, std::initializer_list<int64_t>{n});
    w.back().FillNormal(1);
    WithThreads(threads, [&] {
      AdamW(w.back(), w.back(), m.back(), v.back(), grad, ranges, control, StepNumber(1), ctx);
    });
  }
  EXPECT_TRUE(SameBits(w[0], w[1]) && SameBits(m[0], m[1]) && SameBits(v[0], v[1]));
  Buf none(kF32, {0});
  AdamW(none, none, none, none, none, Tensor(), control, StepNumber(1), ctx);
  EXPECT_EQ(SumOfSquares(none, ctx), 0);
}

TEST(AdamW, PlanningTouchesNothing) {
  TestContext ctx;
  ctx.get()->planning = true;
  Buf w(kF32, {5}), grad(kF32, {5}), sum(kF64, {1});
  w.Fill(1), grad.Fill(1);
  Control control;
  control.Prepare(1, StepNumber(1), ctx);
  AdamW(w, w, w, w, grad, Tensor(), control, StepNumber(1), ctx);
  AddSum(sum, grad, ctx);
  AddSumOfSquares(sum, grad, ctx);
  EXPECT_EQ(control[kAdamWSteps], 0);
  EXPECT_EQ(Values(w), std::vector<double>(5, 1));
  EXPECT_EQ(Get(sum, 0), 0);
}

TEST(AdamWDeathTest, RangesOutOfOrderOrOutsideAreFatal) {
  const TestContext ctx;
  Buf w(kF32, {10});
  Control control;
  control.Prepare(1, StepNumber(1), ctx);
  for (const std::vector<double>& bounds :
       std::vector<std::vector<double>>{{5, 7, 3, 4}, {3, 2}, {0, 11}, {0, 5, 4, 6}}) {
    const Buf ranges = Ranges(bounds);
    EXPECT_DEATH(AdamW(w, w, w, w, w, ranges, control, StepNumber(1), ctx), "check failed");
  }
}

TEST(AdamW, StepsAboveTheirLimitsAreSkipped) {
  const TestContext ctx;
  AdamWSettings settings = StepNumber(1);
  settings.max_norm = 4, settings.max_loss = 7;
  Control control;
  const auto applied = [&](double norm, const std::vector<double>& losses) {
    control.SetLosses(losses);
    const double steps = control[kAdamWSteps];
    control.Prepare(norm, settings, ctx);
    EXPECT_EQ(control[kAdamWNorm], norm);
    EXPECT_EQ(control[kAdamWSteps], steps + control[kAdamWApplied]);
    return control[kAdamWApplied];
  };
  EXPECT_EQ(applied(4, {7, 8}), 1);  // the second loss has no limit
  EXPECT_EQ(applied(4.001, {7, 8}), 0);
  EXPECT_EQ(applied(4, {7.001, 8}), 0);
  settings.max_norm = settings.max_loss = HUGE_VAL;
  EXPECT_EQ(applied(1e30, {1e30, 1}), 1);
}

TEST(AdamWDeathTest, AScaleForEachRange) {
  const TestContext ctx;
  Buf w(kF32, {10}), scales(kF64, {2});
  Control control;
  control.Prepare(1, StepNumber(1), ctx);
  const Buf ranges = Ranges({0, 5});
  const auto update = [&] {
    AdamW(w, w, w, w, w, Tensor(), {ranges, scales}, control, StepNumber(1), ctx);
  };
  EXPECT_DEATH(update(), "check failed");
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

TEST(Sums, AreAddedToWhatIsThere) {
  const TestContext ctx;
  Buf x(kF32, {3}), sum(kF64, {1});
  x.Assign({1, 2, -4});
  sum.Fill(100);
  AddSum(sum, x, ctx);
  EXPECT_EQ(Get(sum, 0), 99);
  AddSumOfSquares(sum, x, ctx);
  EXPECT_EQ(Get(sum, 0), 120);
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
