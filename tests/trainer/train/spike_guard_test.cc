// Outlier steps are skipped, their values stay out of the window, and a resumed run decides alike.
#include "trainer/train/spike_guard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <limits>

#include "support/tiny_run.h"
#include "support/training_batch.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(SpikeGuard, LimitsAreMeanAndDeviationOfAWholeWindow) {
  constexpr double kAny = std::numeric_limits<double>::infinity();
  const SpikeGuardConfig config{.window = 4, .z = 2};
  CheckpointMeta state;
  for (const double x : {9.0, 1.0, 2.0}) Remember(config, x, 3, &state);
  EXPECT_EQ(LimitsOf(config, state).loss, kAny);
  Remember(config, 3, 3, &state);
  // Mean 3.75, deviations 5.25, -2.75, -1.75, -0.75.
  EXPECT_DOUBLE_EQ(LimitsOf(config, state).loss,
                   3.75 + 2 * std::sqrt((27.5625 + 7.5625 + 3.0625 + 0.5625) / 3));
  EXPECT_EQ(LimitsOf(config, state).norm, kAny);  // all are equal
  Remember(config, 4, 5, &state);
  EXPECT_THAT(state.recent_losses, ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(state.recent_norms, ElementsAre(3, 3, 3, 5));
  EXPECT_DOUBLE_EQ(LimitsOf(config, state).loss, 2.5 + 2 * std::sqrt(5.0 / 3));
  Remember(config, std::nan(""), 1, &state);  // a step without targets
  EXPECT_THAT(state.recent_losses, ElementsAre(1, 2, 3, 4));
  // A smaller window takes the newest; a larger one waits.
  EXPECT_DOUBLE_EQ(LimitsOf({.window = 2, .z = 1}, state).loss, 3.5 + std::sqrt(0.5));
  EXPECT_EQ(LimitsOf({.window = 5, .z = 1}, state).loss, kAny);
  EXPECT_EQ(LimitsOf({}, state).loss, kAny);
  Remember({}, 1, 1, &state);  // off: nothing is kept
  EXPECT_TRUE(state.recent_losses.empty() && state.recent_norms.empty());
}

class SpikeGuardTrainer : public ::testing::Test {
 protected:
  SpikeGuardTrainer() { omp_set_num_threads(1); }
  RunConfig Config(const std::vector<std::string>& words) const {
    auto config = LoadConfig(tiny_.config(), words, ConfigUse::kTrain, 1);
    KRAIT_CHECK(config.ok());
    return *config;
  }
  TinyRun tiny_;
};

TEST_F(SpikeGuardTrainer, AnOutlierChangesNothing) {
  const RunConfig config = Config({"train.spike_guard.window=8", "train.spike_guard.z=6"});
  const RunConfig off = Config({});
  Trainer trainer(config), plain(off);
  trainer.Init();
  plain.Init();
  for (int64_t s = 0; s < 10; ++s) {
    EXPECT_FALSE(trainer.Step(BatchAt(config, 4 * s)).was_skipped);
    plain.Step(BatchAt(config, 4 * s));
  }
  EXPECT_TRUE(Bits(trainer) == Bits(plain));  // it only looks
  EXPECT_EQ(trainer.state().recent_losses.size(), 8U);
  // A head blown up for one step: loss and norm are far off, and finite.
  const Tensor head = trainer.weights().Param(trainer.weights().table().Find("lm_head.weight"));
  for (int64_t i = 0; i < head.numel(); ++i) head.data<float>()[i] *= 1000;
  const std::string before = Bits(trainer);
  const std::vector<double> losses = trainer.state().recent_losses;
  const StepReport report = trainer.Step(BatchAt(config, 40));
  EXPECT_TRUE(report.was_skipped && report.was_spike);
  EXPECT_TRUE(std::isfinite(report.loss) && std::isfinite(report.grad_norm));
  EXPECT_TRUE(Bits(trainer) == before);
  EXPECT_EQ(trainer.state().recent_losses, losses);
  EXPECT_EQ(trainer.state().skipped, 1);
  EXPECT_EQ(trainer.state().adam_steps, 10);
  EXPECT_EQ(trainer.state().step, 11);
}

// With so small a z every third step or so is an outlier.
TEST(SpikeGuardRun, AResumedRunDecidesAlike) {
  const TinyRun tiny;
  const std::vector<std::string> guard = {"train.steps=40", "train.spike_guard.window=8",
                                          "train.spike_guard.z=0.8", "log.every=1",
                                          "checkpoint.every=20"};
  ProcessResult result = tiny.Train("whole", guard);
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, HasSubstr("| skipped: a spike ("));
  EXPECT_THAT(result.out, HasSubstr("skipped steps: "));
  // Killed behind step 20's checkpoint: it starts there again.
  ASSERT_EQ(tiny.Train("cut", guard).code, 0);
  ASSERT_EQ(TinyRun::Krait({"checkpoint", "diff", tiny / "whole/checkpoints/step-00000020",
                            tiny / "cut/checkpoints/step-00000020"})
                .code,
            0);
  std::vector<std::string> words = tiny.TrainWords("again", guard);
  words.insert(words.end(), {"--resume", tiny / "whole/checkpoints/step-00000020"});
  result = TinyRun::Krait(words);
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, HasSubstr("resuming at step 20"));
  EXPECT_THAT(result.out, HasSubstr("| skipped: a spike ("));
  result = TinyRun::Krait({"checkpoint", "diff", tiny / "whole/checkpoints/step-00000040",
                           tiny / "again/checkpoints/step-00000040"});
  EXPECT_EQ(result.code, 0) << result.out << result.err;
}

}  // namespace
}  // namespace krait
