#include "kernels/cpu/vector_math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

namespace krait {
namespace {

// Each function as kernels use it (the clone of this machine) and as plain code (the baseline
// instruction set): they round differently.
#define KRAIT_TEST_LOOP(NAME)                                          \
  KRAIT_CLONES void NAME##Clone(float* y, const float* x, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) y[i] = NAME(x[i]);                 \
  }                                                                    \
  void NAME##Plain(float* y, const float* x, int64_t n) {              \
    for (int64_t i = 0; i < n; ++i) y[i] = NAME(x[i]);                 \
  }
KRAIT_TEST_LOOP(Exp)
KRAIT_TEST_LOOP(Log1p)
KRAIT_TEST_LOOP(Sigmoid)
KRAIT_TEST_LOOP(Silu)
KRAIT_TEST_LOOP(Softplus)

using Loop = void (*)(float*, const float*, int64_t);

// The spacing of floats at |y|, down to that of denormals.
double Ulp(double y) {
  if (std::abs(y) < 0x1p-126) return 0x1p-149;
  return std::ldexp(1.0, std::ilogb(y) - 23);
}

// The floats in [low, high] on a grid of bit patterns; a prime stride visits all exponents and no
// fixed pattern of mantissas.
std::vector<float> Grid(float low, float high) {
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1009) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (value >= low && value <= high) x.push_back(value);
  }
  return x;
}

// The largest error in units of the result's spacing, or of `floor` where that is larger.
template <typename Reference>
double MaxUlp(Loop loop, const std::vector<float>& x, const Reference& reference,
              double floor = 0) {
  std::vector<float> y(x.size());
  loop(y.data(), x.data(), static_cast<int64_t>(x.size()));
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = reference(static_cast<double>(x[i]));
    // Within 2 ulp of the largest float either side of the edge is right.
    const double edge = std::numeric_limits<float>::max();
    if (want > edge + 2 * Ulp(edge)) {
      EXPECT_EQ(y[i], INFINITY) << "x = " << x[i];
    } else if (want < edge - 2 * Ulp(edge)) {
      worst =
          std::max(worst, std::abs(static_cast<double>(y[i]) - want) / std::max(Ulp(want), floor));
    }
  }
  return worst;
}

double SiluReference(double x) { return x / (1 + std::exp(-x)); }
double SigmoidReference(double x) { return 1 / (1 + std::exp(-x)); }
double SoftplusReference(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// Bounds: half a unit for every rounding of a value as large as the result (a whole one where the
// operand may lie in the binade above), and 0.1 for the polynomials.
TEST(VectorMath, ErrorsAgainstDouble) {
  const float big = std::numeric_limits<float>::max();
  const std::vector<float> all = Grid(-big, big);
  const std::vector<float> above_minus_1 = Grid(-0x1.fffffep-1f, big);
  const auto exp = [](double x) { return std::exp(x); };
  const auto log1p = [](double x) { return std::log1p(x); };
  struct Case {
    const char* name;
    double clone, plain, bound;
  };
  const Case cases[] = {
      {"Exp", MaxUlp(ExpClone, all, exp), MaxUlp(ExpPlain, all, exp), 1.1},
      {"Log1p", MaxUlp(Log1pClone, above_minus_1, log1p), MaxUlp(Log1pPlain, above_minus_1, log1p),
       1.6},
      {"Sigmoid", MaxUlp(SigmoidClone, all, SigmoidReference),
       MaxUlp(SigmoidPlain, all, SigmoidReference), 2.6},
      // Where the sigmoid is denormal (x < -87) its rounding, 2^-150, is multiplied by |x| < 2^7.
      {"Silu", MaxUlp(SiluClone, all, SiluReference, 0x1p-143),
       MaxUlp(SiluPlain, all, SiluReference, 0x1p-143), 3.1},
      {"Softplus", MaxUlp(SoftplusClone, all, SoftplusReference),
       MaxUlp(SoftplusPlain, all, SoftplusReference), 2.6},
  };
  for (const Case& c : cases) {
    EXPECT_LE(c.clone, c.bound) << c.name;
    EXPECT_LE(c.plain, c.bound) << c.name << " (baseline instruction set)";
    std::printf("%-9s largest error %.2f ulp, baseline %.2f ulp\n", c.name, c.clone, c.plain);
  }
}

TEST(VectorMath, SpecialValues) {
  const float inf = INFINITY;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto check = [](const char* name, Loop loop, float x, float want) {
    // Several equal values, so that the vector body runs as well as its remainder.
    std::vector<float> in(71, x), out(71);
    loop(out.data(), in.data(), 71);
    for (float y : out) {
      const bool same = std::isnan(want) ? std::isnan(y) : y == want;
      ASSERT_TRUE(same) << name << "(" << x << ") = " << y;
    }
  };
  const float tiny = 0x1p-149f;
  for (bool clone : {false, true}) {
    const Loop exp = clone ? ExpClone : ExpPlain;
    for (float x : {0.0f, -0.0f, tiny, -tiny}) check("Exp", exp, x, 1);
    for (float x : {inf, 1e30f, 89.0f}) check("Exp", exp, x, inf);
    for (float x : {-inf, -1e30f, -104.0f}) check("Exp", exp, x, 0);
    check("Exp", exp, nan, nan);
    const Loop log1p = clone ? Log1pClone : Log1pPlain;
    for (float x : {0.0f, tiny, -tiny, inf}) check("Log1p", log1p, x, x);
    check("Log1p", log1p, -1, -inf);
    for (float x : {-1.5f, -inf, nan}) check("Log1p", log1p, x, nan);
    const Loop sigmoid = clone ? SigmoidClone : SigmoidPlain;
    check("Sigmoid", sigmoid, 0, 0.5f);
    for (float x : {inf, 1e30f, 20.0f}) check("Sigmoid", sigmoid, x, 1);
    for (float x : {-inf, -1e30f}) check("Sigmoid", sigmoid, x, 0);
    check("Sigmoid", sigmoid, nan, nan);
    const Loop silu = clone ? SiluClone : SiluPlain;
    for (float x : {0.0f, inf, 1e30f, nan}) check("Silu", silu, x, x);
    for (float x : {-inf, -1e30f}) check("Silu", silu, x, 0);
    const Loop softplus = clone ? SoftplusClone : SoftplusPlain;
    for (float x : {inf, 1e30f, 40.0f, nan}) check("Softplus", softplus, x, x);
    for (float x : {-inf, -1e30f}) check("Softplus", softplus, x, 0);
  }
}

KRAIT_CLONES void DecayClone(float* y, const float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = Exp2NonPositive(x[i], factor);
}
void DecayPlain(float* y, const float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = Exp2NonPositive(x[i], factor);
}

TEST(VectorMath, Exp2NonPositive) {
  const float third = 1.0f / 3;
  const std::vector<float> x = Grid(-191.9f, 0);
  std::vector<float> y(x.size());
  for (const auto loop : {DecayClone, DecayPlain}) {
    loop(y.data(), x.data(), third, static_cast<int64_t>(x.size()));
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double exponent = static_cast<double>(x[i]) * static_cast<double>(third);
      const double want = std::exp2(exponent);
      // Without fused multiply-add the product is rounded first.
      const double product_rounding = 0.5 * Ulp(exponent) * std::log(2.0) * want / Ulp(want);
      const double error = std::abs(static_cast<double>(y[i]) - want) / Ulp(want);
      worst = std::max(worst, error - product_rounding);
    }
    std::printf("Exp2NonPositive largest error %.2f ulp beyond the product's rounding\n", worst);
    EXPECT_LE(worst, 1.6);
  }
  for (float far : {-192.1f, -400.0f, -1e30f, -INFINITY})
    EXPECT_EQ(Exp2NonPositive(far, third), 0.0f);
  EXPECT_EQ(Exp2NonPositive(0.0f, -5.0f), 1.0f);
  EXPECT_EQ(Exp2NonPositive(1.0f, -1.0f), 0.5f);
  EXPECT_TRUE(std::isnan(Exp2NonPositive(std::numeric_limits<float>::quiet_NaN(), -1.0f)));
}

}  // namespace
}  // namespace krait
