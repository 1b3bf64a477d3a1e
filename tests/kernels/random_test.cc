#include "kernels/base/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace krait {
namespace {

// The three vectors published for philox4x32, 10 rounds, with the Random123 library (kat_vectors).
TEST(Philox, KnownAnswers) {
  using Block = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (Block{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}));
  EXPECT_EQ(Philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Block{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}));
  EXPECT_EQ(Philox4x32({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, {0xA4093822, 0x299F31D0}),
            (Block{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}));
}

TEST(RandomStream, StreamsDifferInEachOfTheirKeys) {
  std::set<std::array<uint32_t, 4>> blocks;
  int made = 0;
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 40}) {
    for (const RandomPurpose purpose : {RandomPurpose::kInit, RandomPurpose::kSampling}) {
      for (const uint64_t step : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 40}) {
        const RandomStream stream(seed, purpose, step);
        for (const uint64_t index : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 40}) {
          blocks.insert(stream.Bits(index));
          ++made;
        }
      }
    }
  }
  EXPECT_EQ(static_cast<int>(blocks.size()), made);
}

// Bounds are 5 standard errors of the mean and of the variance of n independent values.
TEST(RandomStream, UniformHasTheMomentsOfAUniform) {
  const RandomStream stream(3, RandomPurpose::kSynthetic, 0);
  constexpr int kN = 200000;
  double sum = 0, squares = 0;
  for (int i = 0; i < kN; ++i) {
    const double x = stream.Uniform(static_cast<uint64_t>(i));
    ASSERT_GT(x, 0);
    ASSERT_LT(x, 1);
    sum += x - 0.5;
    squares += (x - 0.5) * (x - 0.5);
  }
  EXPECT_NEAR(sum / kN, 0, 5 * std::sqrt(1.0 / 12 / kN));
  EXPECT_NEAR(squares / kN, 1.0 / 12, 5 * std::sqrt(1.0 / 180 / kN));  // var of (x-1/2)^2: 1/180
}

TEST(RandomStream, NormalHasTheMomentsOfANormal) {
  const RandomStream stream(4, RandomPurpose::kSynthetic, 0);
  constexpr int kN = 200000;
  double sum = 0, squares = 0, fourth = 0;
  for (int i = 0; i < kN; ++i) {
    const double x = stream.Normal(static_cast<uint64_t>(i));
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(sum / kN, 0, 5 * std::sqrt(1.0 / kN));
  EXPECT_NEAR(squares / kN, 1, 5 * std::sqrt(2.0 / kN));
  EXPECT_NEAR(fourth / kN, 3, 5 * std::sqrt(96.0 / kN));  // var of x^4: 105 - 9
}

TEST(HashName, Fnv1a) {
  // Offset basis and the published values for "a" and "foobar".
  EXPECT_EQ(HashName(""), 0xCBF29CE484222325u);
  EXPECT_EQ(HashName("a"), 0xAF63DC4C8601EC8Cu);
  EXPECT_EQ(HashName("foobar"), 0x85944171F73967E8u);
}

TEST(KeyedPermutation, IsABijection) {
  for (const uint64_t n : {1u, 2u, 3u, 5u, 7u, 16u, 17u, 63u, 65u, 255u, 1001u, 4097u, 99991u}) {
    for (uint64_t epoch = 0; epoch < 3; ++epoch) {
      const KeyedPermutation permutation(n, 11, RandomPurpose::kDataShuffle, epoch);
      std::vector<bool> hit(n, false);
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t image = permutation(i);
        ASSERT_LT(image, n);
        ASSERT_FALSE(hit[image]) << "n " << n << ", " << i << " repeats " << image;
        hit[image] = true;
      }
    }
  }
}

TEST(KeyedPermutation, WorksNearTheTopOfTheRange) {
  const uint64_t n = (uint64_t{1} << 62) + 12345;
  const KeyedPermutation permutation(n, 5, RandomPurpose::kDataShuffle, 0);
  std::set<uint64_t> images;
  for (uint64_t i = 0; i < 1000; ++i) {
    images.insert(permutation(n - 1 - i));
    EXPECT_LT(permutation(n - 1 - i), n);
  }
  EXPECT_EQ(images.size(), 1000u);
}

// Chi-square against "every position goes anywhere with equal chance", over seeds; the bound is
// mean + 5 standard deviations of chi-square with n*(n-1) degrees of freedom (variance 2 per
// degree; the n rows are dependent, which the 5 covers).
TEST(KeyedPermutation, IsUniformOverSeeds) {
  for (const uint64_t n : {3u, 10u, 23u}) {
    constexpr int kSeeds = 20000;
    std::vector<double> counts(n * n, 0);
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      const KeyedPermutation permutation(n, seed, RandomPurpose::kDataShuffle, 0);
      for (uint64_t i = 0; i < n; ++i) counts[i * n + permutation(i)] += 1;
    }
    const double expected = static_cast<double>(kSeeds) / static_cast<double>(n);
    double chi = 0;
    for (const double count : counts) chi += (count - expected) * (count - expected) / expected;
    const double degrees = static_cast<double>(n * (n - 1));
    EXPECT_LT(chi, degrees + 5 * std::sqrt(2 * degrees)) << "n " << n;
  }
}

// Neighbours do not stay neighbours: the mean of |p(i+1) - p(i)| is (n+1)/3 for random order.
TEST(KeyedPermutation, ScattersNeighbours) {
  constexpr uint64_t kN = 100003;
  const KeyedPermutation permutation(kN, 9, RandomPurpose::kDataShuffle, 2);
  double sum = 0;
  for (uint64_t i = 0; i + 1 < kN; ++i) {
    sum += std::abs(static_cast<double>(permutation(i + 1)) - static_cast<double>(permutation(i)));
  }
  // Standard deviation of one distance: n/sqrt(18); 5 standard errors, times sqrt(2) because
  // neighbouring distances share an end.
  EXPECT_NEAR(sum / (kN - 1), (kN + 1) / 3.0, 5 * std::sqrt(2.0 / 18 / kN) * kN);
}

}  // namespace
}  // namespace krait
