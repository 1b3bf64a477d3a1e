// For tests of several ranks on GPUs.
#ifndef KRAIT_TESTS_SUPPORT_GPU_RANKS_H_
#define KRAIT_TESTS_SUPPORT_GPU_RANKS_H_

#include <gtest/gtest.h>

#include <string>

#include "kernels/cuda/runtime.h"
#include "parallel/gpu.h"
#include "support/ranks.h"

namespace krait::testing {

// Why the ranks cannot compute on GPUs together; "": they can. All ranks call it.
inline std::string NoGpuPerRank() {
  std::string reason;
  const absl::Status mine =
      cuda::Available(&reason) ? absl::OkStatus() : Error(ExitCode::kConfig, "no GPU: " + reason);
  absl::Status status = Agree(TestWorld(), mine);
  if (status.ok()) status = CheckGpus(TestWorld());
  return status.ok() ? "" : MessageOf(status) + " ";
}

// Skips the test on all ranks where they cannot.
#define KRAIT_NEEDS_GPU_PER_RANK()                           \
  do {                                                       \
    const std::string krait_reason = NoGpuPerRank();         \
    if (!krait_reason.empty()) GTEST_SKIP() << krait_reason; \
  } while (false)

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_GPU_RANKS_H_
