// A run whose batch grows: the data goes on where it is, whatever the size, and so does a run that
// was stopped on the way.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "support/tiny_run.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// 64 tokens for 4 steps, 128 for 4, then 256: sequences of 32.
const char kRamp[] = "train.batch_tokens=64:0 128:250 256:700";

std::vector<int64_t> TokensOf(const std::string& folder) {
  std::vector<int64_t> tokens;
  std::istringstream lines(ReadText(folder + "/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (record.contains("train/loss")) tokens.push_back(record["tokens"].get<int64_t>());
  }
  return tokens;
}

TEST(BatchRampRun, StepsScheduleAndResume) {
  const TinyRun tiny;
  const auto train = [&](const std::string& run, std::vector<std::string> more) {
    std::vector<std::string> all = {kRamp, "train.tokens=1500", "log.every=1", "checkpoint.every=5",
                                    "checkpoint.keep=10"};
    all.insert(all.end(), more.begin(), more.end());
    return tiny.Train(run, all);
  };
  ProcessResult result = train("whole", {});
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  EXPECT_THAT(
      result.out,
      AllOf(HasSubstr("batch 64 tokens"), HasSubstr("batch: 128 tokens from step 5 on"),
            HasSubstr("batch: 256 tokens from step 9 on"),
            HasSubstr("finished: 11 steps, 1.54k tokens"), HasSubstr("the run takes 1.54k")));
  EXPECT_EQ(TokensOf(tiny / "whole"),
            (std::vector<int64_t>{64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536}));
  // From the middle of the second size, and from the first step of a size on.
  for (const char* step : {"step-00000005", "step-00000010"}) {
    const std::string run = std::string("from-") + step;
    result = train(run, {"--resume", tiny / (std::string("whole/checkpoints/") + step)});
    ASSERT_EQ(result.code, 0) << result.out << result.err;
    result = TinyRun::Krait({"checkpoint", "diff", tiny / "whole/checkpoints/step-00000011",
                             tiny / (run + "/checkpoints/step-00000011")});
    EXPECT_EQ(result.code, 0) << result.out << result.err;
  }
  // The same rows as with one size: the sequences of a step are those behind the last one's.
  result = TinyRun::Krait({"plan", tiny.config(), kRamp, "train.tokens=1500"});
  EXPECT_THAT(result.out, AllOf(HasSubstr("ramp        128 tokens from 250 on"),
                                HasSubstr("steps         11 = 1.54k tokens")));
  // Another ramp is another batch.
  result = tiny.Train("whole", {"train.batch_tokens=64:0 128:300", "train.tokens=3000"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("--allow-change batch_tokens"));
}

}  // namespace
}  // namespace krait
