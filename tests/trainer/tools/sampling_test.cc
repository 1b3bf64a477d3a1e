#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <vector>

#include "trainer/tools/generate.h"

namespace krait {
namespace {

// Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1, in a scattered order.
const std::vector<float> kLogits = {std::log(0.125f), std::log(0.5f), std::log(0.125f),
                                    std::log(0.25f)};

std::map<int32_t, int> Draw(const SamplingOptions& options, int draws) {
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) {
    ++counts[Sample(kLogits.data(), 4, options, static_cast<uint64_t>(i))];
  }
  return counts;
}

TEST(Sample, GreedyTakesTheFirstOfTheBest) {
  SamplingOptions options;
  options.temperature = 0;
  EXPECT_EQ(Sample(kLogits.data(), 4, options, 0), 1);
  const std::vector<float> equal = {1, 2, 2};
  EXPECT_EQ(Sample(equal.data(), 3, options, 0), 1);
}

// 40,000 draws: the standard deviation of a share p is sqrt(p(1-p)/n) <= 0.0025; 5 of them.
constexpr int kDraws = 40000;
constexpr double kFiveSigma = 0.0125;

TEST(Sample, FollowsTheProbabilities) {
  auto counts = Draw({}, kDraws);
  const double expected[] = {0.125, 0.5, 0.125, 0.25};
  for (int id = 0; id < 4; ++id) {
    EXPECT_NEAR(static_cast<double>(counts[id]) / kDraws, expected[id], kFiveSigma) << id;
  }
}

TEST(Sample, TemperatureSharpens) {
  SamplingOptions options;
  options.temperature = 0.5;  // probabilities squared: 16 : 4 : 1 : 1
  auto counts = Draw(options, kDraws);
  EXPECT_NEAR(static_cast<double>(counts[1]) / kDraws, 16.0 / 22, kFiveSigma);
  EXPECT_NEAR(static_cast<double>(counts[3]) / kDraws, 4.0 / 22, kFiveSigma);
}

TEST(Sample, TopKKeepsTheKMostLikely) {
  SamplingOptions options;
  options.top_k = 2;
  auto counts = Draw(options, kDraws);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_NEAR(static_cast<double>(counts[1]) / kDraws, 2.0 / 3, kFiveSigma);
  options.top_k = 3;  // of two equal ones the lower id stays
  counts = Draw(options, kDraws);
  EXPECT_EQ(counts.count(0), 1u);
  EXPECT_EQ(counts.count(2), 0u);
}

TEST(Sample, TopPKeepsTheShortestRunThatReachesIt) {
  SamplingOptions options;
  options.top_p = 0.4;  // the first alone has 0.5
  EXPECT_EQ(Draw(options, 1000).size(), 1u);
  options.top_p = 0.6;
  auto counts = Draw(options, kDraws);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_NEAR(static_cast<double>(counts[3]) / kDraws, 1.0 / 3, kFiveSigma);
  options.top_p = 1.0;
  EXPECT_EQ(Draw(options, 1000).size(), 4u);
}

TEST(Sample, TopPCountsSharesOfWhatTopKLeft) {
  SamplingOptions options;
  options.top_k = 2;    // leaves 2/3 and 1/3
  options.top_p = 0.6;  // which the first reaches
  EXPECT_EQ(Draw(options, 1000).size(), 1u);
}

TEST(Sample, IsAFunctionOfSeedAndIndex) {
  SamplingOptions options;
  std::vector<int32_t> first, again, other;
  for (uint64_t i = 0; i < 200; ++i) {
    first.push_back(Sample(kLogits.data(), 4, options, i));
    again.push_back(Sample(kLogits.data(), 4, options, i));
  }
  options.seed = 99;
  for (uint64_t i = 0; i < 200; ++i) other.push_back(Sample(kLogits.data(), 4, options, i));
  EXPECT_EQ(first, again);
  EXPECT_NE(first, other);
}

TEST(Sample, ExtremeLogitsStayInRange) {
  const std::vector<float> logits = {3e38f, -3e38f, 0.0f};
  SamplingOptions options;
  options.temperature = 1e-3;
  for (uint64_t i = 0; i < 100; ++i) EXPECT_EQ(Sample(logits.data(), 3, options, i), 0);
}

TEST(CheckSampling, RefusesNonsenseAllAtOnce) {
  SamplingOptions options;
  options.temperature = -1;
  options.top_p = 0;
  options.top_k = -3;
  const absl::Status status = CheckSampling(options);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  EXPECT_NE(MessageOf(status).find("--temperature"), std::string::npos);
  EXPECT_NE(MessageOf(status).find("--top-k"), std::string::npos);
  EXPECT_NE(MessageOf(status).find("--top-p"), std::string::npos);
  options = {};
  options.temperature = std::nan("");
  EXPECT_FALSE(CheckSampling(options).ok());
  EXPECT_TRUE(CheckSampling({}).ok());
}

}  // namespace
}  // namespace krait
