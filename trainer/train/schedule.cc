#include "trainer/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace krait {
namespace {

// 1 at progress 0, `floor` at progress 1; `remaining` falls from 1 to 0.
double Fall(double remaining, double floor) { return floor + (1 - floor) * remaining; }

double Progress(int64_t from, int64_t s, int64_t to) {
  if (to <= from) return 1;
  return static_cast<double>(s - from) / static_cast<double>(to - from);
}

}  // namespace

double LearningRate(const ScheduleConfig& schedule, double lr, int64_t s, int64_t steps) {
  s = std::clamp<int64_t>(s, 1, std::max<int64_t>(steps, 1));
  const int64_t warmup = schedule.warmup_steps;
  // The quotient first: it is exactly 1 at the last warm-up update.
  if (s <= warmup) return lr * (static_cast<double>(s) / static_cast<double>(warmup));
  switch (schedule.kind) {
    case ScheduleKind::kConstant:
      return lr;
    case ScheduleKind::kCosine: {
      const double angle = std::numbers::pi * Progress(warmup, s, steps);
      return lr * Fall(0.5 * (1 + std::cos(angle)), schedule.min_lr_ratio);
    }
    case ScheduleKind::kLinear:
      return lr * Fall(1 - Progress(warmup, s, steps), schedule.min_lr_ratio);
    case ScheduleKind::kWsd: {
      const int64_t start = std::max(warmup, steps - schedule.decay_steps);
      if (s <= start) return lr;
      return lr * Fall(1 - Progress(start, s, steps), schedule.min_lr_ratio);
    }
  }
  return lr;
}

}  // namespace krait
