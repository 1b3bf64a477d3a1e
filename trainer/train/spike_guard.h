// The spike guard: steps whose loss or gradient norm is far above those of the steps before are
// skipped (train.spike_guard).
//
// The host keeps the last `window` losses and norms of steps that were applied, in the run's state,
// so that checkpoints hold them. Before a step it gives the device the largest loss and norm that
// the step may have; AdamWPrepare compares on the device, so nothing waits for a value between
// backward pass and update. The values are those that all ranks have added up: the same bits, and
// so the same decision, on each. A skipped step's values do not enter the window.
#ifndef KRAIT_TRAINER_TRAIN_SPIKE_GUARD_H_
#define KRAIT_TRAINER_TRAIN_SPIKE_GUARD_H_

#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"

namespace krait {

struct SpikeLimits {
  double loss, norm;  // infinity: any
};

// mean + z * (standard deviation) of what `state` has, once it has a whole window; where all values
// are equal there is no limit.
SpikeLimits LimitsOf(const SpikeGuardConfig& config, const CheckpointMeta& state);

// After a step that was applied.
void Remember(const SpikeGuardConfig& config, double loss, double norm, CheckpointMeta* state);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_SPIKE_GUARD_H_
