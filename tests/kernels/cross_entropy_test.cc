#include "kernels/cross_entropy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
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

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kI32 = DType::kI32;

// The three steps over a whole vocabulary that is in one place.
void CrossEntropy(Tensor losses, Tensor d_logits, Tensor logits, Tensor targets, double scale,
                  const Context& ctx) {
  const DType wide = Wide(logits.dtype());
  const int64_t m = logits.dim(0);
  const VocabularySlice whole = WholeVocabulary(logits.dim(1));
  Buf max(wide, {m}), picked(wide, {m}), sum(kF64, {m}), scale_on_device(kF64, {1});
  scale_on_device.Fill(scale);
  CrossEntropyMax(max, logits, whole, ctx);
  CrossEntropySum(sum, picked, max, logits, targets, whole, ctx);
  CrossEntropyFinish(losses, d_logits, max, sum, picked, logits, targets, whole, scale_on_device,
                     ctx);
}

TEST(CrossEntropy, IsTheFormulaAndSkipsRowsWithoutTarget) {
  const TestContext ctx;
  Buf logits(kF64, {4, 3}, 2), targets(kI32, {4}), losses(kF64, {4}), grad(kF64, {4, 3}, 1);
  logits.Assign({1, 2, 3, 0, 0, 0, 5, 5, 5, -1, 0, 1});
  targets.Assign({2, 0, -1, 0});
  grad.Fill(std::nan(""));
  CrossEntropy(losses, grad, logits, targets, 0.5, ctx);
  const double z = std::exp(1) + std::exp(2) + std::exp(3);
  EXPECT_NEAR(Get(losses, 0), std::log(z) - 3, 1e-15);
  EXPECT_NEAR(Get(losses, 1), std::log(3), 1e-15);
  EXPECT_EQ(Get(losses, 2), 0);
  EXPECT_NEAR(Get(grad, 0), 0.5 * std::exp(1) / z, 1e-16);
  EXPECT_NEAR(Get(grad, 2), 0.5 * (std::exp(3) / z - 1), 1e-16);
  for (int64_t i = 6; i < 9; ++i) EXPECT_EQ(Get(grad, i), 0);
  EXPECT_TRUE(grad.PaddingIntact());
  // The loss alone, and the gradient over the logits.
  Buf alone(kF64, {4});
  CrossEntropy(alone, Tensor(), logits, targets, 0.5, ctx);
  EXPECT_TRUE(SameBits(alone, losses));
  CrossEntropy(alone, logits, logits, targets, 0.5, ctx);
  EXPECT_TRUE(SameBits(alone, losses));
  EXPECT_TRUE(SameBits(logits, grad));
  EXPECT_TRUE(logits.PaddingIntact());
}

TEST(CrossEntropy, GradientInDouble) {
  const TestContext ctx;
  for (const int64_t m : {1, 5}) {
    const int64_t v = 11;
    const double scale = 0.7;
    Buf logits(kF64, {m, v}, 5), targets(kI32, {m}), losses(kF64, {m}), grad(kF64, {m, v});
    logits.FillNormal(1, 2);
    targets.FillIntegers(2, -1, v);
    targets.tensor().data<int32_t>()[0] = 3;
    CrossEntropy(losses, grad, logits, targets, scale, ctx);
    CheckGradients(
        [&] {
          CrossEntropy(losses, Tensor(), logits, targets, scale, ctx);
          double sum = 0;
          for (const double loss : Values(losses)) sum += loss * scale;
          return sum;
        },
        {{"logits", logits, grad}});
  }
}

TEST(CrossEntropy, FloatAgreesWithDouble) {
  const TestContext ctx;
  for (const int64_t v : {256, 65536}) {
    const int64_t m = 6;
    Buf x32(kF32, {m, v}), x64(kF64, {m, v}), targets(kI32, {m}), l32(kF32, {m}), l64(kF64, {m});
    x64.Assign(Values(x32.FillNormal(1, 3)));
    targets.FillIntegers(2, 0, v);
    Buf d32(kF32, {m, v}), d64(kF64, {m, v});
    CrossEntropy(l32, d32, x32, targets, 1e-4, ctx);
    CrossEntropy(l64, d64, x64, targets, 1e-4, ctx);
    // The loss: one rounding of maximum - picked, one of the result, and the relative error of the
    // sum (Exp 1 ulp and the rounding of its argument, up to 24, random over the terms).
    EXPECT_LE(RelativeError(l32, l64), 4 * 0x1p-24);
    // Dominated by the -1 at the target, so compare the softmax alone as well.
    EXPECT_LE(RelativeError(d32, d64), 2 * 0x1p-24);
    for (int64_t i = 0; i < m; ++i) {
      const auto at = i * v + static_cast<int64_t>(Get(targets, i));
      Set(d32, at, 0);
      Set(d64, at, 0);
    }
    // exp(x - max): the argument is rounded at a size of up to 8.
    EXPECT_LE(RelativeError(d32, d64), 12 * 0x1p-24);
  }
}

TEST(CrossEntropy, ExtremeLogits) {
  const TestContext ctx;
  constexpr double kInfinity = INFINITY;
  Buf logits(kF32, {4, 4}), targets(kI32, {4}), losses(kF32, {4}), grad(kF32, {4, 4});
  logits.Assign({1e4, -1e4, 0, 0,               // far apart
                 1, 2, -kInfinity, -kInfinity,  // padding of the vocabulary
                 0, std::nan(""), 0, 0, 0, 0, kInfinity, 0});
  targets.Assign({1, 0, 0, 0});
  CrossEntropy(losses, grad, logits, targets, 1, ctx);
  EXPECT_EQ(Get(losses, 0), 2e4);
  EXPECT_EQ(Get(grad, 0), 1);
  EXPECT_EQ(Get(grad, 1), -1);
  EXPECT_NEAR(Get(losses, 1), std::log(1 + std::exp(1.0)), 1e-6);
  EXPECT_EQ(Get(grad, 6), 0);
  EXPECT_EQ(Get(grad, 7), 0);
  EXPECT_FALSE(std::isfinite(Get(losses, 2)));
  EXPECT_FALSE(std::isfinite(Get(losses, 3)));
}

TEST(CrossEntropy, ThreadsAndNoRows) {
  const TestContext ctx;
  const int64_t m = 300, v = 257;
  Buf logits(kF32, {m, v}), targets(kI32, {m}), l1(kF32, {m}), l2(kF32, {m}), d1(kF32, {m, v}),
      d2(kF32, {m, v});
  logits.FillNormal(1);
  targets.FillIntegers(2, -1, v);
  WithThreads(1, [&] { CrossEntropy(l1, d1, logits, targets, 0.1, ctx); });
  WithThreads(2, [&] { CrossEntropy(l2, d2, logits, targets, 0.1, ctx); });
  EXPECT_TRUE(SameBits(l1, l2) && SameBits(d1, d2));
  Buf none(kF32, {0, 5}), no_targets(kI32, {0}), no_losses(kF32, {0});
  CrossEntropy(no_losses, none, none, no_targets, 1, ctx);
}

// Slices of the vocabulary, combined as ranks do it: the maximum, then two sums. Every column
// carries padding, which holds NaN.
TEST(CrossEntropy, SlicesCombineToTheWhole) {
  const TestContext ctx;
  const int64_t m = 40, v = 11;
  const double scale = 0.3;
  for (const DType dtype : {kF32, kF64, DType::kBF16}) {
    const DType wide = Wide(dtype);
    Buf logits(dtype, {m, v}), targets(kI32, {m}), losses(wide, {m}), grad(dtype, {m, v}),
        scale_on_device(kF64, {1});
    logits.FillNormal(1, 3);
    targets.FillIntegers(2, -1, v);
    scale_on_device.Fill(scale);
    CrossEntropy(losses, grad, logits, targets, scale, ctx);
    // Used columns of each slice: two; three, one of them all padding; targets outside of most.
    for (const std::vector<int64_t>& sizes :
         std::vector<std::vector<int64_t>>{{6, 5}, {10, 1}, {4, 7, 0}, {1, 5, 5}, {0, 11, 0}}) {
      std::vector<VocabularySlice> slices;
      std::vector<Buf> parts, maxima, sums, picks;
      Buf max(wide, {m}), sum(kF64, {m}), picked(wide, {m});
      max.Fill(-INFINITY);
      int64_t first = 0;
      for (const int64_t used : sizes) {
        slices.push_back({first, used, v});
        Buf& part = parts.emplace_back(dtype, std::initializer_list<int64_t>{m, 12}, 2);
        part.Fill(std::nan(""));
        for (int64_t i = 0; i < m * used; ++i) {
          Set(part, i / used * 12 + i % used, Get(logits, i / used * v + first + i % used));
        }
        Buf& own = maxima.emplace_back(wide, std::initializer_list<int64_t>{m});
        CrossEntropyMax(own, part, slices.back(), ctx);
        if (used == 0) {
          EXPECT_EQ(Get(own, 0), -INFINITY);
        }
        for (int64_t i = 0; i < m; ++i) Set(max, i, std::max(Get(max, i), Get(own, i)));
        first += used;
      }
      for (size_t s = 0; s < slices.size(); ++s) {
        Buf own_sum(kF64, {m}), own_picked(wide, {m});
        own_sum.Fill(std::nan(""));
        own_picked.Fill(std::nan(""));
        CrossEntropySum(own_sum, own_picked, max, parts[s], targets, slices[s], ctx);
        for (int64_t i = 0; i < m; ++i) {
          Set(sum, i, Get(sum, i) + Get(own_sum, i));
          Set(picked, i, Get(picked, i) + Get(own_picked, i));
        }
        if (slices[s].used == 0) {
          EXPECT_EQ(Values(own_sum), std::vector<double>(static_cast<size_t>(m), 0));
          EXPECT_EQ(Values(own_picked), std::vector<double>(static_cast<size_t>(m), 0));
        }
      }
      for (size_t s = 0; s < slices.size(); ++s) {
        Buf own_losses(wide, {m}), own_grad(dtype, {m, 12}, 1);
        own_grad.Fill(std::nan(""));
        CrossEntropyFinish(own_losses, own_grad, max, sum, picked, parts[s], targets, slices[s],
                           scale_on_device, ctx);
        // The sum of exponentials is of doubles in another order; losses are rounded once.
        const double u = wide == kF64 ? 0x1p-53 : 0x1p-24;
        EXPECT_LE(RelativeError(own_losses, losses), 2 * u);
        const Tensor of_slice = grad.tensor().Slice(1, slices[s].first, slices[s].used);
        if (slices[s].used > 0) {
          EXPECT_LE(RelativeError(own_grad.tensor().Slice(1, 0, slices[s].used), of_slice),
                    dtype == DType::kBF16 ? 0x1p-9 : 4 * u);
        }
        for (const double padding :
             Values(own_grad.tensor().Slice(1, slices[s].used, 12 - slices[s].used))) {
          EXPECT_EQ(padding, 0);
        }
        EXPECT_TRUE(own_grad.PaddingIntact());
      }
    }
  }
}

TEST(CrossEntropyDeathTest, TargetsOutsideTheVocabularyAreFatal) {
  const TestContext ctx;
  Buf logits(kF32, {1, 5}), targets(kI32, {1}), losses(kF32, {1});
  targets.Fill(5);
  EXPECT_DEATH(CrossEntropy(losses, Tensor(), logits, targets, 1, ctx), "check failed");
}

}  // namespace
}  // namespace krait
