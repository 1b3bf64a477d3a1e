// krait probe on the GPU over the golden jamba-micro, at the bounds that the project sets for it.
// In fp32 against the golden values: sums are cut otherwise than on the CPU. In bf16 as near to
// fp32 as the CPU's bf16 is.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "kernels/cuda/runtime.h"
#include "paths.h"
#include "support/temp_folder.h"
#include "trainer/tools/probe_testing.h"

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

TEST(ProbeGpu, Bf16IsAsNearToFloat32AsTheCpus) {
  std::string reason;
  if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
  const TempFolder folder;
  const auto probe = [&](const std::string& device, const std::string& precision) {
    ProbeOptions options;
    options.hf = KRAIT_TEST_GOLDEN "/jamba-micro";
    options.batches = options.hf + "/trajectory.safetensors";
    options.steps = 20;
    options.out = folder / (device + precision);
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5", "train.device=" + device,
                         "train.precision=" + precision};
    const absl::Status status = RunProbe(options);
    EXPECT_TRUE(status.ok()) << status;
    auto reader = SafetensorsReader::OpenFile(options.out);
    KRAIT_CHECK(reader.ok());
    return *reader;
  };
  const SafetensorsReader wide = probe("cpu", "fp32"), cpu = probe("cpu", "bf16"),
                          gpu = probe("cuda", "bf16");
  const auto agree = testing::AgreeingTokens(wide, gpu), both = testing::AgreeingTokens(cpu, gpu);
  const auto on_cpu = testing::AgreeingTokens(wide, cpu);
  const double error = testing::LogitsError(gpu, wide, agree);
  const double cpu_error = testing::LogitsError(cpu, wide, on_cpu);
  std::printf(
      "logits: GPU %.2e over %.1f %% of the tokens, CPU %.2e over %.1f %%; they agree on "
      "%.1f %%\n",
      error, 100 * testing::Share(agree), cpu_error, 100 * testing::Share(on_cpu),
      100 * testing::Share(both));
  EXPECT_LE(error, 2 * cpu_error);
  // Expert choices may flip where rounding decides, on the GPU hardly more than on the CPU.
  EXPECT_GE(testing::Share(agree), testing::Share(on_cpu) - 0.05);
  const auto losses = ReadTensor(wide, "losses"), gpu_losses = ReadTensor(gpu, "losses");
  for (size_t s = 0; s < losses.size(); ++s) {
    EXPECT_LE(std::abs(gpu_losses[s] / losses[s] - 1), 0.01) << "step " << s;
  }
}

}  // namespace
}  // namespace krait
