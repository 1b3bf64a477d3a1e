// krait probe in bf16 on the CPU against its float32 values, over the golden jamba-micro.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "paths.h"
#include "support/temp_folder.h"
#include "trainer/tools/probe_testing.h"

namespace krait {
namespace {

using testing::ReadTensor;

constexpr int64_t kSteps = 20;

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

  const std::vector<bool> agree = testing::AgreeingTokens(wide, narrow);
  const double error = testing::LogitsError(narrow, wide, agree), share = testing::Share(agree);
  EXPECT_LE(error, 3e-2);
  // bf16 keeps 8 bits: were the two equal, the run would not be one in bf16.
  EXPECT_GE(error, 1e-4);
  EXPECT_GE(share, 0.75);
  std::printf("worst loss %.2e, logits %.2e over %.1f %% of the tokens\n", worst_loss, error,
              100 * share);
}

}  // namespace
}  // namespace krait
