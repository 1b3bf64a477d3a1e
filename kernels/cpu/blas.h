// OpenBLAS, the CPU's matrix products. It is loaded at the first use and not with the program: when
// it is loaded it takes address space for each thread, and where a limit (ulimit -v) refuses that
// it waits for ever. So commands that multiply nothing do without it, and the space is looked for
// first.
#ifndef KRAIT_KERNELS_CPU_BLAS_H_
#define KRAIT_KERNELS_CPU_BLAS_H_

#include <cblas.h>

#include <string>

#include "kernels/base/status.h"

namespace krait::cpu {

struct Blas {
  decltype(&cblas_sgemm) sgemm;
  decltype(&cblas_dgemm) dgemm;
  const char* core;  // the kernels that it chose for this processor: "Haswell", "SkylakeX"
};

// Loads it at the first call, under a limit with the buffers of all threads; any thread.
// kOutOfMemory when the process may not have the space, kConfig when the library is missing.
absl::StatusOr<Blas> LoadBlas();

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_BLAS_H_
