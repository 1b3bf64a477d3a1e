// What the first rank does alone and all ranks must know: paths are looked up, written and removed
// by it, so that no rank sees another state of the disk. Main threads only, all ranks alike.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_RANKS_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_RANKS_H_

#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "parallel/world.h"

namespace krait {

// The world, or that of this process alone where it is null.
World* OrAlone(World* world);

// The first rank's status on every rank, as Agree gives it; what the others pass is ignored.
absl::Status StatusOfFirst(World* world, const absl::Status& status);

// The first rank's paths on every rank, or its error.
absl::StatusOr<std::vector<std::string>> PathsOfFirst(
    World* world, const absl::StatusOr<std::vector<std::string>>& paths);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_RANKS_H_
