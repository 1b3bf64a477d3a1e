// krait probe on the GPU in fp32 against the golden values of jamba-micro, at the bounds that the
// project sets for it: sums are cut otherwise than on the CPU.
#include <gtest/gtest.h>

#include "kernels/cuda/runtime.h"
#include "support/golden.h"
#include "support/gradcheck.h"
#include "support/temp_folder.h"
#include "trainer/tools/probe.h"

namespace krait {
namespace {

using testing::ReadTensor;
using testing::RelativeError;

TEST(ProbeGpu, Fp32AgreesWithTheGoldenValues) {
  std::string reason;
  if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
  const std::string golden = KRAIT_TEST_GOLDEN "/jamba-micro/";
  const TempFolder folder;
  const auto probe = [&](const std::string& batches, int64_t steps) {
    ProbeOptions options;
    options.hf = KRAIT_TEST_GOLDEN "/jamba-micro";
    options.batches = golden + batches;
    options.out = folder / batches;
    options.steps = steps;
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5", "train.device=cuda",
                         "train.precision=fp32"};
    const absl::Status status = RunProbe(options);
    EXPECT_TRUE(status.ok()) << status;
    auto reader = SafetensorsReader::OpenFile(options.out);
    KRAIT_CHECK(reader.ok());
    return *reader;
  };
  const auto compare = [&](const SafetensorsReader& out, const std::string& prefix,
                           const std::string& file, double bound) {
    const auto reader = SafetensorsReader::OpenFile(golden + file);
    ASSERT_TRUE(reader.ok());
    for (const auto& [name, entry] : reader->entries()) {
      if (name == "input_ids" || name == "batches") continue;
      EXPECT_LE(RelativeError(ReadTensor(out, prefix + name), ReadTensor(*reader, name)), bound)
          << file << ": " << name;
    }
  };
  const SafetensorsReader forward = probe("forward.safetensors", 0);
  compare(forward, "", "forward.safetensors", 5e-6);
  compare(forward, "grad.", "gradients.safetensors", 5e-5);
  const SafetensorsReader steps = probe("trajectory.safetensors", 20);
  compare(steps, "", "trajectory.safetensors", 5e-5);
  compare(steps, "weight.", "after20.safetensors", 5e-4);
}

}  // namespace
}  // namespace krait
