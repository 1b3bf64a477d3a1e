#include "kernels/random_fill.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;

const RandomStream& Stream() {
  static const RandomStream stream(17, RandomPurpose::kInit, HashName("a weight"));
  return stream;
}

TEST(RandomFill, IsTheStream) {
  const TestContext ctx;
  for (const DType dtype : {kF64, kF32, kBF16}) {
    Buf normal(dtype, {3, 5}, 2), uniform(dtype, {3, 5}, 1), want(dtype, {3, 5});
    FillNormal(normal, Stream(), 40, 5, 0.02, ctx);
    for (int64_t i = 0; i < 15; ++i) {
      Set(want, i, 0.02 * Stream().Normal(static_cast<uint64_t>(40 + i)));
    }
    EXPECT_TRUE(SameBits(normal, want));
    FillUniform(uniform, Stream(), 40, 5, 0.5, ctx);
    for (int64_t i = 0; i < 15; ++i) {
      Set(want, i, 0.5 * (2 * Stream().Uniform(static_cast<uint64_t>(40 + i)) - 1));
    }
    EXPECT_TRUE(SameBits(uniform, want));
    EXPECT_TRUE(normal.PaddingIntact() && uniform.PaddingIntact());
  }
}

// A box of a larger tensor gets the elements that the whole has there, whatever its own strides.
TEST(RandomFill, ABoxHoldsTheElementsOfTheWhole) {
  const TestContext ctx;
  const int64_t rows = 9, width = 13;
  for (const bool normal : {false, true}) {
    const auto fill = [&](Tensor y, int64_t first) {
      if (normal) {
        FillNormal(y, Stream(), first, width, 0.3, ctx);
      } else {
        FillUniform(y, Stream(), first, width, 0.3, ctx);
      }
    };
    for (const DType dtype : {kF64, kF32, kBF16}) {
      Buf whole(dtype, {rows, width});
      fill(whole, 0);
      struct Box {
        int64_t row, column, rows, columns;
      };
      for (const Box b : {Box{0, 0, 9, 13}, Box{2, 0, 3, 13}, Box{0, 4, 9, 5}, Box{3, 7, 4, 6},
                          Box{8, 12, 1, 1}, Box{4, 4, 0, 5}}) {
        Buf box(dtype, {b.rows, b.columns}, 3);
        fill(box, b.row * width + b.column);
        EXPECT_TRUE(
            SameBits(box, whole.tensor().Slice(0, b.row, b.rows).Slice(1, b.column, b.columns)));
        EXPECT_TRUE(box.PaddingIntact());
      }
    }
  }
}

TEST(RandomFill, MomentsAndBounds) {
  const TestContext ctx;
  const int64_t n = 200000;
  Buf y(kF64, {1, n});
  FillNormal(y, Stream(), 0, n, 2, ctx);
  double sum = 0, squares = 0;
  for (const double x : Values(y)) sum += x, squares += x * x;
  const auto count = static_cast<double>(n);
  // Five standard errors: 2 / sqrt(n) of the mean, 4 sqrt(2 / n) of the mean square 4.
  EXPECT_NEAR(sum / count, 0, 5 * 2 / std::sqrt(count));
  EXPECT_NEAR(squares / count, 4, 5 * 4 * std::sqrt(2 / count));
  FillUniform(y, Stream(), 0, n, 0.25, ctx);
  double low = 1, high = -1;
  for (const double x : Values(y)) low = std::min(low, x), high = std::max(high, x);
  EXPECT_TRUE(low > -0.25 && high < 0.25);
  EXPECT_TRUE(low < -0.2499 && high > 0.2499);
}

// Element numbers beyond 32 bits, and any number of threads.
TEST(RandomFill, LargeNumbersAndThreads) {
  const TestContext ctx;
  const int64_t first = (int64_t{1} << 33) + 5;
  Buf one(kF32, {300, 101}), two(kF32, {300, 101});
  WithThreads(1, [&] { FillNormal(one, Stream(), first, int64_t{1} << 31, 1, ctx); });
  WithThreads(2, [&] { FillNormal(two, Stream(), first, int64_t{1} << 31, 1, ctx); });
  EXPECT_TRUE(SameBits(one, two));
  const auto number = static_cast<uint64_t>(first + 299 * (int64_t{1} << 31) + 100);
  EXPECT_EQ(Get(one, 299 * 101 + 100), static_cast<float>(Stream().Normal(number)));
}

TEST(RandomFill, PlanningTouchesNothing) {
  TestContext ctx;
  ctx.get()->planning = true;
  Buf y(kF32, {2, 2});
  y.Fill(7);
  FillNormal(y, Stream(), 0, 2, 1, ctx);
  FillUniform(y, Stream(), 0, 2, 1, ctx);
  EXPECT_EQ(Values(y), std::vector<double>(4, 7));
}

}  // namespace
}  // namespace krait
