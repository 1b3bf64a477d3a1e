// krait probe on ranks against tests/golden/jamba-micro, Hugging Face transformers' Jamba: the same
// bounds as on one rank (tests/golden/README.md), whatever the layout.
#include <gtest/gtest.h>
#include <omp.h>

#include <string>
#include <vector>

#include "model/layout.h"
#include "model/support/meshes.h"
#include "paths.h"
#include "support/golden.h"
#include "support/gradcheck.h"
#include "support/ranks.h"
#include "support/temp_folder.h"
#include "trainer/tools/probe.h"

namespace krait::testing {
namespace {

const std::string kGolden = KRAIT_TEST_GOLDEN "/jamba-micro";
constexpr double kForward = 2e-6, kGradient = 2e-5, kAfter20 = 2e-4;

class ProbeRanksTest : public ::testing::Test {
 protected:
  ProbeRanksTest() : folder_(TestWorld()->Broadcast(own_folder_.path())) { omp_set_num_threads(1); }
  // Of a mesh of this world; null world: of the first rank alone.
  ProbeOptions Options(World* world, const std::string& out, int tensor, int expert) const {
    ProbeOptions options;
    options.world = world;
    options.hf = kGolden;
    options.out = folder_ + "/" + out;
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5", "train.device=cpu",
                         "parallel.tensor=" + std::to_string(tensor),
                         "parallel.expert=" + std::to_string(expert)};
    return options;
  }
  static SafetensorsReader Open(const std::string& path) {
    auto reader = SafetensorsReader::OpenFile(path);
    KRAIT_CHECK(reader.ok());
    return *reader;
  }
  static void Compare(const SafetensorsReader& actual, const SafetensorsReader& expected,
                      const std::string& name, const std::string& expected_name, double bound) {
    ASSERT_TRUE(actual.entries().contains(name)) << name;
    EXPECT_EQ(actual.entries().at(name).shape, expected.entries().at(expected_name).shape) << name;
    EXPECT_LE(RelativeError(ReadTensor(actual, name), ReadTensor(expected, expected_name)), bound)
        << name;
  }
  // Every layout of this world that divides the model, and batches of 8 sequences of 32 tokens.
  template <typename Test>
  static void ForLayouts(const Test& test) {
    const int world = TestWorld()->size();
    int count = 0;
    for (const int tensor : {1, 2, 4}) {
      for (const int expert : {1, 2, 4}) {
        if (world % tensor != 0 || world % expert != 0) continue;
        SCOPED_TRACE(MeshName({.data = world / tensor, .tensor = tensor, .expert = expert}));
        test(tensor, expert);
        ++count;
      }
    }
    EXPECT_GT(count, 3);
  }

  TempFolder own_folder_;
  std::string folder_;  // the first rank's
};

TEST_F(ProbeRanksTest, TwentyStepsOfEveryLayout) {
  int run = 0;
  ForLayouts([&](int tensor, int expert) {
    ProbeOptions options = Options(TestWorld(), "steps-" + std::to_string(run++), tensor, expert);
    options.batches = kGolden + "/trajectory.safetensors";
    options.steps = 20;
    const absl::Status status = RunProbe(options);
    ASSERT_TRUE(status.ok()) << status;
    if (!TestWorld()->first()) return;
    const SafetensorsReader out = Open(options.out);
    const SafetensorsReader trajectory = Open(kGolden + "/trajectory.safetensors");
    Compare(out, trajectory, "losses", "losses", kForward);
    Compare(out, trajectory, "grad_norms", "grad_norms", kGradient);
    const SafetensorsReader after = Open(kGolden + "/after20.safetensors");
    for (const auto& [name, entry] : after.entries()) {
      Compare(out, after, "weight." + name, name, kAfter20);
    }
  });
}

TEST_F(ProbeRanksTest, ForwardValuesAndGradientsOfEveryLayout) {
  if (TestWorld()->first()) {
    ProbeOptions alone = Options(nullptr, "alone", 1, 1);
    alone.batches = kGolden + "/trajectory.safetensors";
    const absl::Status status = RunProbe(alone);
    ASSERT_TRUE(status.ok()) << status;
  }
  int run = 0;
  ForLayouts([&](int tensor, int expert) {
    ProbeOptions options = Options(TestWorld(), "values-" + std::to_string(run++), tensor, expert);
    options.batches = kGolden + "/trajectory.safetensors";
    const absl::Status status = RunProbe(options);
    ASSERT_TRUE(status.ok()) << status;
    if (!TestWorld()->first()) return;
    const SafetensorsReader out = Open(options.out), alone = Open(folder_ + "/alone");
    EXPECT_EQ(out.entries().size(), 17u + 163u);
    for (const auto& [name, entry] : alone.entries()) {
      Compare(out, alone, name, name, name.starts_with("grad.") ? kGradient : kForward);
    }
  });
}

// The golden forward values have an odd length: two tensor ranks share each of its sequences.
TEST_F(ProbeRanksTest, GoldenForwardValues) {
  if (TestWorld()->size() != 2) return;
  ProbeOptions options = Options(TestWorld(), "golden", 2, 2);
  options.batches = kGolden + "/forward.safetensors";
  const absl::Status status = RunProbe(options);
  ASSERT_TRUE(status.ok()) << status;
  if (!TestWorld()->first()) return;
  const SafetensorsReader out = Open(options.out);
  const SafetensorsReader forward = Open(kGolden + "/forward.safetensors");
  for (const auto& [name, entry] : forward.entries()) {
    if (name != "input_ids") Compare(out, forward, name, name, kForward);
  }
  const SafetensorsReader gradients = Open(kGolden + "/gradients.safetensors");
  for (const auto& [name, entry] : gradients.entries()) {
    Compare(out, gradients, "grad." + name, name, kGradient);
  }
}

TEST_F(ProbeRanksTest, WhatDoesNotDivideIsRefusedOnce) {
  const int world = TestWorld()->size();
  ProbeOptions options = Options(TestWorld(), "refused", 1, 3);
  options.batches = kGolden + "/trajectory.safetensors";
  absl::Status status = RunProbe(options);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  EXPECT_TRUE(IsAgreed(status));
  EXPECT_EQ(MessageOf(status).empty(), !TestWorld()->first());
  options = Options(TestWorld(), "refused", 1, 1);
  options.batches = kGolden + "/forward.safetensors";  // two sequences
  status = RunProbe(options);
  EXPECT_EQ(status.ok(), world <= 2) << status;
  if (world > 2 && TestWorld()->first()) {
    EXPECT_NE(MessageOf(status).find("the 2 sequences of a batch do not divide among"),
              std::string::npos)
        << status;
  }
}

}  // namespace
}  // namespace krait::testing
