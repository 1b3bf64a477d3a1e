// krait probe on the GPUs of several ranks, over NCCL, against tests/golden/jamba-micro: fp32 at
// the bounds of one GPU (probe_gpu_test.cc), bf16 against one rank, whatever the layout.
#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/event.h"
#include "model/support/meshes.h"
#include "paths.h"
#include "support/golden.h"
#include "support/gpu_ranks.h"
#include "support/gradcheck.h"
#include "support/temp_folder.h"
#include "trainer/tools/probe.h"

namespace krait::testing {
namespace {

const std::string kGolden = KRAIT_TEST_GOLDEN "/jamba-micro";

class GpuProbeRanksTest : public ::testing::Test {
 protected:
  GpuProbeRanksTest() : folder_(TestWorld()->Broadcast(own_folder_.path())) {
    omp_set_num_threads(1);
  }
  void SetUp() override { KRAIT_NEEDS_GPU_PER_RANK(); }
  // Twenty steps of a mesh of this world, or of the first rank alone where `world` is null.
  SafetensorsReader Probe(World* world, const std::string& name, const std::string& precision,
                          const std::vector<std::string>& layout) const {
    ProbeOptions options;
    options.world = world;
    options.hf = kGolden;
    options.batches = kGolden + "/trajectory.safetensors";
    options.steps = 20;
    options.out = folder_ + "/" + name;
    options.force = true;
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5", "train.device=cuda",
                         "train.precision=" + precision};
    options.overrides.insert(options.overrides.end(), layout.begin(), layout.end());
    const absl::Status status = RunProbe(options);
    EXPECT_TRUE(status.ok()) << status;
    if (world != nullptr && !world->first()) return {};
    auto reader = SafetensorsReader::OpenFile(options.out);
    KRAIT_CHECK(reader.ok());
    return *reader;
  }
  void CheckFp32(World* world) const;
  template <typename Test>
  static void ForLayouts(const Test& test) {
    const int world = TestWorld()->size();
    for (const int tensor : {1, 2, 4}) {
      for (const int expert : {1, 2, 4}) {
        if (world % tensor != 0 || world % expert != 0) continue;
        const std::string name =
            MeshName({.data = world / tensor, .tensor = tensor, .expert = expert});
        SCOPED_TRACE(name);
        test(name, std::vector<std::string>{"parallel.tensor=" + std::to_string(tensor),
                                            "parallel.expert=" + std::to_string(expert)});
      }
    }
  }

  TempFolder own_folder_;
  std::string folder_;  // the first rank's
};

// Every layout on the ranks of `world` against golden values and one rank.
void GpuProbeRanksTest::CheckFp32(World* world) const {
  SafetensorsReader alone;
  if (world->first()) alone = Probe(nullptr, "alone", "fp32", {});
  ForLayouts([&](const std::string& name, const std::vector<std::string>& layout) {
    const SafetensorsReader out = Probe(world, name, "fp32", layout);
    if (!TestWorld()->first()) return;
    double worst[4] = {};
    for (const auto& [entry_name, entry] : alone.entries()) {
      if (entry_name.starts_with("weight.")) continue;
      const bool forward = entry_name.starts_with("logits") || entry_name.starts_with("hidden") ||
                           entry_name.starts_with("router");
      const double error =
          RelativeError(ReadTensor(out, entry_name), ReadTensor(alone, entry_name));
      EXPECT_LE(error, forward ? 5e-6 : 5e-5) << entry_name;
      worst[forward ? 2 : 3] = std::max(worst[forward ? 2 : 3], error);
    }
    const auto compare = [&](const std::string& prefix, const std::string& file, double bound,
                             double* largest) {
      const auto reader = SafetensorsReader::OpenFile(kGolden + "/" + file);
      ASSERT_TRUE(reader.ok());
      for (const auto& [entry_name, entry] : reader->entries()) {
        if (entry_name == "input_ids" || entry_name == "batches") continue;
        const double error =
            RelativeError(ReadTensor(out, prefix + entry_name), ReadTensor(*reader, entry_name));
        *largest = std::max(*largest, error);
        EXPECT_LE(error, bound) << file << ": " << entry_name;
      }
    };
    compare("", "trajectory.safetensors", 5e-5, &worst[0]);
    compare("weight.", "after20.safetensors", 5e-4, &worst[1]);
    std::printf(
        "%s: losses and norms %.1e, weights after 20 steps %.1e; beside one rank forward %.1e, "
        "gradients %.1e\n",
        name.c_str(), worst[0], worst[1], worst[2], worst[3]);
  });
}

TEST_F(GpuProbeRanksTest, Fp32AgreesWithTheGoldenValuesInEveryLayout) { CheckFp32(TestWorld()); }

// Gradients and weights travel within machines and then between them.
TEST_F(GpuProbeRanksTest, Fp32OfMachinesOfTwoAgreesToo) {
  if (TestWorld()->size() < 4) return;
  SplitWorld machines(TestWorld(), 2);
  CheckFp32(&machines);
}

TEST_F(GpuProbeRanksTest, Bf16FollowsOneRankAndRepeatsItsBits) {
  SafetensorsReader alone;
  if (TestWorld()->first()) alone = Probe(nullptr, "alone", "bf16", {});
  ForLayouts([&](const std::string& name, const std::vector<std::string>& layout) {
    const SafetensorsReader out = Probe(TestWorld(), name, "bf16", layout);
    const SafetensorsReader again = Probe(TestWorld(), name + "-again", "bf16", layout);
    if (!TestWorld()->first()) return;
    for (const auto& [entry_name, bound] :
         {std::pair{"losses", 0.005}, std::pair{"grad_norms", 0.02}}) {
      const auto one = ReadTensor(alone, entry_name), several = ReadTensor(out, entry_name);
      ASSERT_EQ(one.size(), several.size());
      double worst = 0;
      for (size_t s = 0; s < one.size(); ++s) {
        worst = std::max(worst, std::fabs(several[s] / one[s] - 1));
      }
      EXPECT_LE(worst, bound) << entry_name;
      std::printf("%s: %s within %.2e of one rank's\n", name.c_str(), entry_name, worst);
    }
    for (const auto& [entry_name, entry] : out.entries()) {
      EXPECT_EQ(ReadTensor(out, entry_name), ReadTensor(again, entry_name)) << entry_name;
    }
  });
}

// What runs beside the passes comes late, on each rank by another time: a wait that is missing
// shows.
TEST_F(GpuProbeRanksTest, DelaysBesideThePassesLeaveTheBits) {
  static void* memory = nullptr;
  constexpr int64_t kBytes = int64_t{1} << 29;  // a fifth of a millisecond to zero
  memory = cuda::Allocate(kBytes, "a delay");
  ForLayouts([&](const std::string& name, const std::vector<std::string>& layout) {
    const SafetensorsReader plain = Probe(TestWorld(), name, "fp32", layout);
    const SafetensorsReader late = [&] {
      const SideStreamDelay delay([](void* stream) {
        for (int k = 0; k < 3 + TestWorld()->rank(); ++k) cuda::Zero(memory, kBytes, stream);
      });
      return Probe(TestWorld(), name + "-late", "fp32", layout);
    }();
    if (!TestWorld()->first()) return;
    for (const auto& [entry_name, entry] : plain.entries()) {
      EXPECT_EQ(ReadTensor(plain, entry_name), ReadTensor(late, entry_name)) << entry_name;
    }
  });
  cuda::Free(memory);
}

}  // namespace
}  // namespace krait::testing
