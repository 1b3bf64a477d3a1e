// The two clocks.
#ifndef KRAIT_KERNELS_BASE_CLOCK_H_
#define KRAIT_KERNELS_BASE_CLOCK_H_

#include <chrono>

namespace krait {

// Seconds since 1970, for what is recorded; may jump when the machine's clock is set.
inline double UnixSeconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Seconds since some moment, for differences; never runs backwards.
inline double MonotonicSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_CLOCK_H_
