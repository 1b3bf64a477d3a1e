// Learning-rate schedules: pure functions of the update number.
#ifndef KRAIT_TRAINER_TRAIN_SCHEDULE_H_
#define KRAIT_TRAINER_TRAIN_SCHEDULE_H_

#include <cstdint>

#include "trainer/config/config.h"

namespace krait {

// The learning rate of update s = 1..S (W warm-up steps): s <= W: lr * s / W; cosine and linear go
// from lr at s = W to lr * min_lr_ratio at s = S; wsd holds lr until the last decay_steps updates,
// then falls to lr * min_lr_ratio at s = S; constant holds. Beyond S the value at S.
double LearningRate(const ScheduleConfig& schedule, double lr, int64_t s, int64_t steps);

// The same in a run of `tokens` tokens whose batch was changed on the way, for the update that ends
// at its token `seen`: s and S count tokens divided by the present batch, which is by BatchRamp's
// Progress where that is a ramp.
double LearningRateByTokens(const ScheduleConfig& schedule, double lr, int64_t seen, int64_t tokens,
                            const BatchRamp& batch);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_SCHEDULE_H_
