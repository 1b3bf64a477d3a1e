// How long work reports how far it is, and is asked to end.
#ifndef KRAIT_KERNELS_BASE_PROGRESS_H_
#define KRAIT_KERNELS_BASE_PROGRESS_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"

namespace krait {

// Called now and then with the part that is done, in any unit. An error ends the work, which
// returns it. Empty: nobody wants to know.
using Progress = std::function<absl::Status(int64_t done, int64_t total)>;

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_PROGRESS_H_
