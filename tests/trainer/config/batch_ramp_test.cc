// The ramp of train.batch_tokens: its words, and where its steps come to.
#include "trainer/config/batch_ramp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "trainer/config/config.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

BatchRamp Ramp(const std::string& text) {
  const auto ramp = BatchRamp::Parse(text);
  KRAIT_CHECK(ramp.ok());
  return *ramp;
}

TEST(BatchRamp, Words) {
  const BatchRamp ramp = Ramp("512Ki:0  2Mi:1B 4Mi:10B");
  EXPECT_EQ(ramp.stages(), (std::vector<BatchStage>{
                               {524288, 0}, {2097152, 1'000'000'000}, {4194304, 10'000'000'000}}));
  EXPECT_EQ(ramp.Text(), "524288:0 2097152:1000000000 4194304:10000000000");
  EXPECT_EQ(Ramp(ramp.Text()), ramp);
  EXPECT_EQ(ramp.largest(), 4194304);
  EXPECT_EQ(Ramp("64:0 64:100"), BatchRamp(64));  // no change is no stage
  EXPECT_EQ(Ramp("64:0").Text(), "64");
}

TEST(BatchRamp, StepsAreWholeAndPassTheEndOfTheirStage) {
  const BatchRamp ramp = Ramp("10:0 30:25 20:100");
  // 0 10 20 | 30 60 90 | 120 140 ...
  const int64_t seen[] = {0, 10, 20, 30, 60, 90, 120, 140, 160};
  for (int64_t step = 0; step < 9; ++step) {
    EXPECT_EQ(ramp.After(0, step), seen[step]);
    EXPECT_EQ(ramp.Steps(0, seen[step]), step);
    for (int64_t more = 0; step + more < 9; ++more) {
      EXPECT_EQ(ramp.After(seen[step], more), seen[step + more]);
      EXPECT_EQ(ramp.Steps(seen[step], seen[step + more]), more);
    }
  }
  EXPECT_EQ(ramp.Steps(0, 121), 7);
  EXPECT_EQ(ramp.Steps(140, 100), 0);
  EXPECT_EQ(ramp.At(24), 10);
  EXPECT_EQ(ramp.At(25), 30);
  EXPECT_EQ(ramp.EndOf(24), 25);
  EXPECT_EQ(ramp.EndOf(100), std::numeric_limits<int64_t>::max());
  EXPECT_DOUBLE_EQ(ramp.Progress(25), 2.5);
  EXPECT_DOUBLE_EQ(ramp.Progress(140), 2.5 + 2.5 + 2);
  // A step over several stages at once.
  EXPECT_EQ(Ramp("100:0 5:10 7:20").After(0, 2), 107);
  EXPECT_EQ(BatchRamp(8).After(16, 3), 40);
  EXPECT_EQ(BatchRamp(8).Steps(16, 41), 4);
}

TEST(BatchRamp, Mistakes) {
  const auto error = [](const std::string& text) {
    return MessageOf(BatchRamp::Parse(text).status());
  };
  EXPECT_EQ(error("64:5"), "the first size holds from 0 tokens on, not from 5");
  EXPECT_EQ(error("64:0 128"), "\"128\" has no colon");
  EXPECT_EQ(error("64:0 128:0"), "\"128:0\" begins no later than the size before it");
  EXPECT_EQ(error("64:0 128:9 256:8"), "\"256:8\" begins no later than the size before it");
  EXPECT_THAT(error("0:0"), HasSubstr("\"0\" of \"0:0\" is out of range"));
  EXPECT_THAT(error("64:-1"), HasSubstr("\"-1\" of \"64:-1\""));
  EXPECT_THAT(error("64:"), HasSubstr("\"\" of \"64:\""));
  EXPECT_THAT(error("64:0:7"), HasSubstr("of \"64:0:7\""));
  EXPECT_THAT(error("1e30:0"), HasSubstr("of \"1e30:0\""));
}

absl::StatusOr<RunConfig> Config(const std::string& batch) {
  return ParseConfig(
      "model: {vocab_size: 40, d_model: 32, n_layers: 2, mixer: {ratio: \"0:1\"}, mlp: {d_ff: 8}}\n"
      "data: {train: [{synthetic: {task: recall, items: 4}}], seq_len: 16}\n"
      "train: {tokens: 1000, micro_batch: 2, batch_tokens: " +
          batch +
          "}\n"
          "schedule: {warmup_steps: 0}\n",
      "r.yaml", {}, ConfigUse::kTrain, 1);
}

TEST(BatchRamp, InAConfig) {
  const auto config = Config("\"64:0 128:200 32:700\"");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->train.steps, 4 + 4 + 8);  // 256, 768, 1024
  EXPECT_EQ(config->accumulation(1), 4);
  EXPECT_EQ(config->accumulation(1, 32), 1);
  EXPECT_THAT(config->ToYaml(), HasSubstr("batch_tokens: \"64:0 128:200 32:700\""));
  const auto again = ParseConfig(config->ToYaml(), "again", {}, ConfigUse::kTrain, 1);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->train.batch_tokens, config->train.batch_tokens);
  EXPECT_EQ(MessageOf(Config("64:0 100:200").status()),
            "r.yaml:3:53: train.batch_tokens 100 must be a multiple of data.seq_len 16 x "
            "train.micro_batch 2 x 1 data rank = 32; the nearest valid values are 96 and 128");
  EXPECT_EQ(MessageOf(Config("\"64:1\"").status()),
            "r.yaml:3:53: train.batch_tokens: \"64:1\": the first size holds from 0 tokens on, not "
            "from 1; expected a whole number, or SIZE:FROM words with rising FROM, the tokens seen "
            "from which SIZE holds, such as \"512Ki:0 2Mi:1B\"");
}

}  // namespace
}  // namespace krait
