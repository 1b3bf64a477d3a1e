// Threads on the CPU (OpenMP). Results never depend on the number of threads: work is cut at fixed
// points, and sums are taken over fixed pieces in order.
#ifndef KRAIT_KERNELS_BASE_PARALLEL_FOR_H_
#define KRAIT_KERNELS_BASE_PARALLEL_FOR_H_

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace krait {

// Calls fn(begin, end) for pieces [k*grain, min((k+1)*grain, n)) from a team of threads, one piece
// after another per thread. The pieces do not depend on the number of threads. Runs inline for a
// single piece or inside another parallel region.
template <typename Fn>
void ParallelFor(int64_t n, int64_t grain, const Fn& fn) {
  const int64_t pieces = (n + grain - 1) / grain;
  if (pieces <= 1 || omp_in_parallel()) {
    for (int64_t k = 0; k < pieces; ++k) fn(k * grain, std::min(n, (k + 1) * grain));
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t k = 0; k < pieces; ++k) fn(k * grain, std::min(n, (k + 1) * grain));
}

inline int MaxThreads() { return omp_get_max_threads(); }
inline int ThreadIndex() { return omp_get_thread_num(); }

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_PARALLEL_FOR_H_
