#include "trainer/train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace krait {
namespace {

constexpr double kLr = 3e-4;

ScheduleConfig Make(ScheduleKind kind, int64_t warmup, double min_ratio, int64_t decay = 0) {
  ScheduleConfig schedule;
  schedule.kind = kind;
  schedule.warmup_steps = warmup;
  schedule.min_lr_ratio = min_ratio;
  schedule.decay_steps = decay;
  return schedule;
}

// End points are compared for equality: the formulas yield them without rounding.
TEST(Schedule, WarmUpRisesFromTheFirstUpdateToExactlyLr) {
  for (const ScheduleKind kind : {ScheduleKind::kCosine, ScheduleKind::kWsd, ScheduleKind::kLinear,
                                  ScheduleKind::kConstant}) {
    for (const int64_t warmup : {1, 3, 7, 2000}) {
      const ScheduleConfig schedule = Make(kind, warmup, 0.1, 10);
      EXPECT_EQ(LearningRate(schedule, kLr, warmup, 5000), kLr);
      EXPECT_DOUBLE_EQ(LearningRate(schedule, kLr, 1, 5000), kLr / static_cast<double>(warmup));
      for (int64_t s = 2; s <= warmup; ++s) {
        EXPECT_GT(LearningRate(schedule, kLr, s, 5000), LearningRate(schedule, kLr, s - 1, 5000));
      }
    }
  }
}

TEST(Schedule, WithoutWarmUp) {
  EXPECT_EQ(LearningRate(Make(ScheduleKind::kConstant, 0, 0.1), kLr, 1, 10), kLr);
  EXPECT_DOUBLE_EQ(LearningRate(Make(ScheduleKind::kLinear, 0, 0), kLr, 1, 10), kLr * 0.9);
  EXPECT_DOUBLE_EQ(LearningRate(Make(ScheduleKind::kCosine, 0, 0), kLr, 5, 10), kLr * 0.5);
}

TEST(Schedule, TheLastUpdateIsExactlyTheFloor) {
  for (const double floor : {0.0, 0.1, 0.3, 1.0}) {
    for (const int64_t steps : {11, 300, 99999}) {
      EXPECT_EQ(LearningRate(Make(ScheduleKind::kCosine, 10, floor), kLr, steps, steps),
                kLr * floor);
      EXPECT_EQ(LearningRate(Make(ScheduleKind::kLinear, 10, floor), kLr, steps, steps),
                kLr * floor);
      EXPECT_EQ(LearningRate(Make(ScheduleKind::kWsd, 10, floor, 1), kLr, steps, steps),
                kLr * floor);
      EXPECT_EQ(LearningRate(Make(ScheduleKind::kConstant, 10, floor), kLr, steps, steps), kLr);
    }
  }
}

TEST(Schedule, BeyondTheLastUpdateTheValueStays) {
  const ScheduleConfig schedule = Make(ScheduleKind::kCosine, 10, 0.1);
  EXPECT_EQ(LearningRate(schedule, kLr, 1000, 100), kLr * 0.1);
}

TEST(Schedule, CosineAndLinearBetween) {
  // Progress 1/4 and 1/2 of 100 updates after 20 of warm-up.
  const ScheduleConfig cosine = Make(ScheduleKind::kCosine, 20, 0.2);
  EXPECT_DOUBLE_EQ(LearningRate(cosine, kLr, 45, 120),
                   kLr * (0.2 + 0.8 * 0.5 * (1 + std::sqrt(0.5))));
  EXPECT_DOUBLE_EQ(LearningRate(cosine, kLr, 70, 120), kLr * 0.6);
  const ScheduleConfig linear = Make(ScheduleKind::kLinear, 20, 0.2);
  EXPECT_DOUBLE_EQ(LearningRate(linear, kLr, 45, 120), kLr * 0.8);
  EXPECT_DOUBLE_EQ(LearningRate(linear, kLr, 70, 120), kLr * 0.6);
}

TEST(Schedule, WsdHoldsUntilTheDecay) {
  const ScheduleConfig schedule = Make(ScheduleKind::kWsd, 10, 0.1, 20);
  for (int64_t s = 10; s <= 80; ++s) EXPECT_EQ(LearningRate(schedule, kLr, s, 100), kLr) << s;
  EXPECT_DOUBLE_EQ(LearningRate(schedule, kLr, 81, 100), kLr * (1 - 0.9 / 20));
  EXPECT_DOUBLE_EQ(LearningRate(schedule, kLr, 90, 100), kLr * 0.55);
  EXPECT_EQ(LearningRate(schedule, kLr, 100, 100), kLr * 0.1);
}

}  // namespace
}  // namespace krait
