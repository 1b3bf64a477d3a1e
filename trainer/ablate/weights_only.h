// What stays of a finished run's checkpoints.
#ifndef KRAIT_TRAINER_ABLATE_WEIGHTS_ONLY_H_
#define KRAIT_TRAINER_ABLATE_WEIGHTS_ONLY_H_

#include <string>

#include "kernels/base/status.h"

namespace krait {

// Of the checkpoints in `dir` the newest one stays, without the optimizer's moments unless
// `keep_moments`: such a one evaluates, generates, exports and starts other runs (--init), but is
// not trained on. It is written anew, in the format's way, before anything is removed. Holds the
// weights in memory. A folder without checkpoints, or with a damaged newest one, stays as it is.
absl::Status KeepFinal(const std::string& dir, bool keep_moments);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_WEIGHTS_ONLY_H_
