// Paths are looked up, written and removed by the first rank, so that no rank sees another state of
// the disk. Main threads only, all ranks alike.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_RANKS_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_RANKS_H_

#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "parallel/world.h"

namespace krait {

// The first rank's paths on every rank, or its error.
absl::StatusOr<std::vector<std::string>> PathsOfFirst(
    World* world, const absl::StatusOr<std::vector<std::string>>& paths);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_RANKS_H_
