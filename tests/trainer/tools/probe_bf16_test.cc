// krait probe in bf16 on the CPU against its float32 values, over the golden jamba-micro.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "support/golden.h"
#include "support/gradcheck.h"
#include "support/temp_folder.h"
#include "trainer/tools/probe.h"

namespace krait {
namespace {

using testing::ReadTensor;
using testing::RelativeError;

constexpr int64_t kSteps = 20, kTokens = 8 * 32, kVocab = 256, kExperts = 4, kTopK = 2;
constexpr int kMoeSublayers = 4;

class ProbeBf16 : public ::testing::Test {
 protected:
  ProbeBf16() { omp_set_num_threads(1); }
  SafetensorsReader Run(const std::string& precision) {
    ProbeOptions options;
    options.hf = KRAIT_TEST_GOLDEN "/jamba-micro";
    options.batches = options.hf + "/trajectory.safetensors";
    options.steps = kSteps;
    options.out = folder_ / precision;
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5", "train.precision=" + precision};
    const absl::Status status = RunProbe(options);
    KRAIT_CHECK(status.ok());
    auto reader = SafetensorsReader::OpenFile(options.out);
    KRAIT_CHECK(reader.ok());
    return *reader;
  }
  TempFolder folder_;
};

// The experts that each token of MoE sublayer j chooses.
std::vector<std::set<int64_t>> Choices(const SafetensorsReader& run, int j) {
  const auto logits = ReadTensor(run, "router_logits." + std::to_string(j));
  KRAIT_CHECK(static_cast<int64_t>(logits.size()) == kTokens * kExperts);
  std::vector<std::set<int64_t>> choices;
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto at = [&](int64_t e) { return logits[static_cast<size_t>(t * kExperts + e)]; };
    std::vector<int64_t> order = {0, 1, 2, 3};
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return at(a) > at(b); });
    choices.emplace_back(order.begin(), order.begin() + kTopK);
  }
  return choices;
}

TEST_F(ProbeBf16, StaysNearFloat32) {
  const SafetensorsReader wide = Run("fp32"), narrow = Run("bf16");

  const auto losses = ReadTensor(wide, "losses"), narrow_losses = ReadTensor(narrow, "losses");
  ASSERT_EQ(narrow_losses.size(), static_cast<size_t>(kSteps));
  double worst_loss = 0;
  for (size_t s = 0; s < losses.size(); ++s) {
    const double error = std::abs(narrow_losses[s] / losses[s] - 1);
    EXPECT_LE(error, 0.01) << "step " << s;
    worst_loss = std::max(worst_loss, error);
  }
  EXPECT_LT(narrow_losses.back(), narrow_losses.front());

  // A token whose experts differ is computed by other weights: it says nothing about rounding.
  std::vector<bool> agree(kTokens, true);
  for (int j = 0; j < kMoeSublayers; ++j) {
    const auto a = Choices(wide, j), b = Choices(narrow, j);
    for (size_t t = 0; t < agree.size(); ++t) agree[t] = agree[t] && a[t] == b[t];
  }
  const auto logits = ReadTensor(wide, "logits"), narrow_logits = ReadTensor(narrow, "logits");
  std::vector<double> kept, narrow_kept;
  for (size_t t = 0; t < agree.size(); ++t) {
    if (!agree[t]) continue;
    const auto begin = static_cast<int64_t>(t) * kVocab;
    kept.insert(kept.end(), logits.begin() + begin, logits.begin() + begin + kVocab);
    narrow_kept.insert(narrow_kept.end(), narrow_logits.begin() + begin,
                       narrow_logits.begin() + begin + kVocab);
  }
  const double error = RelativeError(narrow_kept, kept);
  EXPECT_LE(error, 3e-2);
  // bf16 keeps 8 bits: were the two equal, the run would not be one in bf16.
  EXPECT_GE(error, 1e-4);
  const double share = static_cast<double>(std::count(agree.begin(), agree.end(), true)) / kTokens;
  EXPECT_GE(share, 0.75);
  std::printf("worst loss %.2e, logits %.2e over %.1f %% of the tokens\n", worst_loss, error,
              100 * share);
}

}  // namespace
}  // namespace krait
