// krait probe on the GPUs of several ranks, over NCCL, against tests/golden/jamba-micro: fp32 at
// the bounds of one GPU (probe_gpu_test.cc), bf16 against one rank, whatever the layout.
#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
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

// Of tensor and expert ranks.
class GpuProbeRanksTest : public ::testing::TestWithParam<std::tuple<int, int>> {
 protected:
  GpuProbeRanksTest() : folder_(TestWorld()->Broadcast(own_folder_.path())) {
    omp_set_num_threads(1);
  }
  void SetUp() override {
    const int world = TestWorld()->size();
    const auto [tensor, expert] = GetParam();
    if (world % tensor != 0 || world % expert != 0) GTEST_SKIP() << "no such layout";
    KRAIT_NEEDS_GPU_PER_RANK();
    name_ = MeshName({.data = world / tensor, .tensor = tensor, .expert = expert});
    layout_ = {"parallel.tensor=" + std::to_string(tensor),
               "parallel.expert=" + std::to_string(expert)};
  }
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

  TempFolder own_folder_;
  std::string folder_;  // the first rank's
  std::string name_;
  std::vector<std::string> layout_;
};

std::string LayoutName(const ::testing::TestParamInfo<std::tuple<int, int>>& layout) {
  return absl::StrCat("T", std::get<0>(layout.param), "E", std::get<1>(layout.param));
}
INSTANTIATE_TEST_SUITE_P(Layout, GpuProbeRanksTest,
                         ::testing::Combine(::testing::Values(1, 2, 4), ::testing::Values(1, 2, 4)),
                         LayoutName);

// The layout on the ranks of `world` against golden values and one rank.
void GpuProbeRanksTest::CheckFp32(World* world) const {
  SafetensorsReader alone;
  if (world->first()) alone = Probe(nullptr, "alone", "fp32", {});
  const SafetensorsReader out = Probe(world, "several", "fp32", layout_);
  if (!TestWorld()->first()) return;
  double worst[4] = {};
  for (const auto& [entry_name, entry] : alone.entries()) {
    if (entry_name.starts_with("weight.")) continue;
    const bool forward = entry_name.starts_with("logits") || entry_name.starts_with("hidden") ||
                         entry_name.starts_with("router");
    const double error = RelativeError(ReadTensor(out, entry_name), ReadTensor(alone, entry_name));
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
      name_.c_str(), worst[0], worst[1], worst[2], worst[3]);
}

TEST_P(GpuProbeRanksTest, Fp32AgreesWithTheGoldenValues) { CheckFp32(TestWorld()); }

// Gradients and weights travel within machines and then between them.
TEST_P(GpuProbeRanksTest, Fp32OfMachinesOfTwoAgreesToo) {
  if (TestWorld()->size() < 4) return;
  SplitWorld machines(TestWorld(), 2);
  CheckFp32(&machines);
}

TEST_P(GpuProbeRanksTest, Bf16FollowsOneRankAndRepeatsItsBits) {
  SafetensorsReader alone;
  if (TestWorld()->first()) alone = Probe(nullptr, "alone", "bf16", {});
  const SafetensorsReader out = Probe(TestWorld(), "several", "bf16", layout_);
  const SafetensorsReader again = Probe(TestWorld(), "again", "bf16", layout_);
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
    std::printf("%s: %s within %.2e of one rank's\n", name_.c_str(), entry_name, worst);
  }
  for (const auto& [entry_name, entry] : out.entries()) {
    EXPECT_EQ(ReadTensor(out, entry_name), ReadTensor(again, entry_name)) << entry_name;
  }
}

// What runs beside the passes comes late, on each rank by another time: a wait that is missing
// shows.
TEST_P(GpuProbeRanksTest, DelaysBesideThePassesLeaveTheBits) {
  static void* memory = nullptr;
  constexpr int64_t kBytes = int64_t{1} << 29;  // a fifth of a millisecond to zero
  memory = cuda::Allocate(kBytes, "a delay");
  const SafetensorsReader plain = Probe(TestWorld(), "several", "fp32", layout_);
  const SafetensorsReader late = [&] {
    const SideStreamDelay delay([](void* stream) {
      for (int k = 0; k < 3 + TestWorld()->rank(); ++k) cuda::Zero(memory, kBytes, stream);
    });
    return Probe(TestWorld(), "late", "fp32", layout_);
  }();
  cuda::Free(memory);
  if (!TestWorld()->first()) return;
  for (const auto& [entry_name, entry] : plain.entries()) {
    EXPECT_EQ(ReadTensor(plain, entry_name), ReadTensor(late, entry_name)) << entry_name;
  }
}

}  // namespace
}  // namespace krait::testing
