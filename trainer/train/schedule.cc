#include "trainer/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace krait {
namespace {

// 1 at progress 0, `floor` at progress 1; `remaining` falls from 1 to 0.
double Fall(double remaining, double floor) { return floor + (1 - floor) * remaining; }

double Fraction(double from, double s, double to) {
  if (to <= from) return 1;
  return (s - from) / (to - from);
}

double RateAt(const ScheduleConfig& schedule, double lr, double s, double steps) {
  s = std::min(std::max(s, 1.0), std::max(steps, 1.0));
  const auto warmup = static_cast<double>(schedule.warmup_steps);
  // The quotient first: it is exactly 1 at the last warm-up update.
  if (s <= warmup) return lr * (s / warmup);
  switch (schedule.kind) {
    case ScheduleKind::kConstant:
      return lr;
    case ScheduleKind::kCosine: {
      const double angle = std::numbers::pi * Fraction(warmup, s, steps);
      return lr * Fall(0.5 * (1 + std::cos(angle)), schedule.min_lr_ratio);
    }
    case ScheduleKind::kLinear:
      return lr * Fall(1 - Fraction(warmup, s, steps), schedule.min_lr_ratio);
    case ScheduleKind::kWsd: {
      const double start = std::max(warmup, steps - static_cast<double>(schedule.decay_steps));
      if (s <= start) return lr;
      return lr * Fall(1 - Fraction(start, s, steps), schedule.min_lr_ratio);
    }
  }
  return lr;
}

}  // namespace

double LearningRate(const ScheduleConfig& schedule, double lr, int64_t s, int64_t steps) {
  return RateAt(schedule, lr, static_cast<double>(s), static_cast<double>(steps));
}

double LearningRateByTokens(const ScheduleConfig& schedule, double lr, int64_t seen, int64_t tokens,
                            const BatchRamp& batch) {
  return RateAt(schedule, lr, batch.Progress(seen), batch.Progress(tokens));
}

}  // namespace krait
