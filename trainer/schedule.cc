#include "trainer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace krait {
namespace {

// From 1 at progress 0 to `floor` at progress 1.
double Fall(double progress, double floor, DecayShape shape) {
  double remaining = 1 - progress;
  if (shape == DecayShape::kCosine) remaining = 0.5 * (1 + std::cos(std::numbers::pi * progress));
  if (shape == DecayShape::kSqrt) remaining = 1 - std::sqrt(progress);
  return floor + (1 - floor) * remaining;
}

double Progress(int64_t from, int64_t s, int64_t to) {
  if (to <= from) return 1;
  return static_cast<double>(s - from) / static_cast<double>(to - from);
}

}  // namespace

double LearningRate(const ScheduleConfig& schedule, double lr, int64_t s, int64_t steps) {
  s = std::clamp<int64_t>(s, 1, std::max<int64_t>(steps, 1));
  const int64_t warmup = schedule.warmup_steps;
  if (s <= warmup) return lr * static_cast<double>(s) / static_cast<double>(warmup);
  switch (schedule.kind) {
    case ScheduleKind::kConstant:
      return lr;
    case ScheduleKind::kCosine:
      return lr * Fall(Progress(warmup, s, steps), schedule.min_lr_ratio, DecayShape::kCosine);
    case ScheduleKind::kLinear:
      return lr * Fall(Progress(warmup, s, steps), schedule.min_lr_ratio, DecayShape::kLinear);
    case ScheduleKind::kWsd: {
      const int64_t start = std::max(warmup, steps - schedule.decay_steps);
      if (s <= start) return lr;
      return lr * Fall(Progress(start, s, steps), schedule.min_lr_ratio, schedule.decay);
    }
  }
  return lr;
}

}  // namespace krait
