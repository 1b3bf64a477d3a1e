// krait probe against the golden values of jamba-micro (tests/golden/README.md).
//
// Bounds: those of the project, some ten times what a right fp32 implementation is away from the
// float64 values.
#include "trainer/tools/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include "paths.h"
#include "support/golden.h"
#include "support/gradcheck.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::HasSubstr;
using testing::ReadTensor;
using testing::RelativeError;

const std::string kGolden = KRAIT_TEST_GOLDEN "/jamba-micro";
constexpr double kForward = 2e-6, kGradient = 2e-5, kAfter20 = 2e-4;

class ProbeTest : public ::testing::Test {
 protected:
  ProbeTest() { omp_set_num_threads(1); }
  ProbeOptions Options() const {
    ProbeOptions options;
    options.hf = kGolden;
    options.out = folder_ / "out.safetensors";
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5"};
    return options;
  }
  static SafetensorsReader Open(const std::string& path) {
    auto reader = SafetensorsReader::OpenFile(path);
    KRAIT_CHECK(reader.ok());
    return *reader;
  }
  // Every tensor of `golden` against PREFIX + its name.
  static void Compare(const SafetensorsReader& out, const std::string& prefix,
                      const std::string& golden, double bound) {
    const SafetensorsReader reader = Open(kGolden + "/" + golden);
    for (const auto& [name, entry] : reader.entries()) {
      if (name == "input_ids") continue;
      const auto found = out.entries().find(prefix + name);
      ASSERT_NE(found, out.entries().end()) << prefix << name;
      EXPECT_EQ(found->second.shape, entry.shape) << name;
      EXPECT_EQ(found->second.dtype, DType::kF32) << name;
      EXPECT_LE(RelativeError(ReadTensor(out, prefix + name), ReadTensor(reader, name)), bound)
          << golden << ": " << name;
    }
  }
  TempFolder folder_;
};

TEST_F(ProbeTest, ForwardAndGradientsOfInputIds) {
  ProbeOptions options = Options();
  options.batches = kGolden + "/forward.safetensors";
  const absl::Status status = RunProbe(options);
  ASSERT_TRUE(status.ok()) << status;
  const SafetensorsReader out = Open(options.out);
  Compare(out, "", "forward.safetensors", kForward);
  Compare(out, "grad.", "gradients.safetensors", kGradient);
  // 17 forward values and 163 gradients, nothing of steps that were not asked for.
  EXPECT_EQ(out.entries().size(), 17u + 163u);
}

TEST_F(ProbeTest, TwentyStepsOfBatches) {
  ProbeOptions options = Options();
  options.batches = kGolden + "/trajectory.safetensors";
  options.steps = 20;
  const absl::Status status = RunProbe(options);
  ASSERT_TRUE(status.ok()) << status;
  const SafetensorsReader out = Open(options.out);
  Compare(out, "weight.", "after20.safetensors", kAfter20);
  const SafetensorsReader golden = Open(kGolden + "/trajectory.safetensors");
  EXPECT_LE(RelativeError(ReadTensor(out, "losses"), ReadTensor(golden, "losses")), kForward);
  EXPECT_LE(RelativeError(ReadTensor(out, "grad_norms"), ReadTensor(golden, "grad_norms")),
            kGradient);
  // The forward values are those of batches[0].
  EXPECT_EQ(ReadTensor(out, "loss")[0], ReadTensor(out, "losses")[0]);
  EXPECT_EQ(out.entries().at("logits").shape, (std::vector<int64_t>{8, 32, 256}));
  EXPECT_EQ(out.entries().at("router_logits.3").shape, (std::vector<int64_t>{8 * 32, 4}));
  EXPECT_EQ(out.entries().size(), 17u + 2 * 163u + 2);
}

TEST_F(ProbeTest, RecomputeModesGiveTheSameBits) {
  ProbeOptions options = Options();
  options.batches = kGolden + "/trajectory.safetensors";
  options.steps = 2;
  ASSERT_TRUE(RunProbe(options).ok());
  const auto content = [](const std::string& path) {
    return *ReadFile(path, 1 << 30, ExitCode::kNoCheckpoint);
  };
  const std::string none = content(options.out);
  for (const char* mode : {"norms", "mixers", "layer"}) {
    options.out = folder_ / mode;
    options.overrides = {"optimizer.lr=3e-3", "optimizer.clip=0.5",
                         std::string("train.recompute=") + mode};
    ASSERT_TRUE(RunProbe(options).ok());
    EXPECT_EQ(content(options.out), none) << mode;
  }
}

TEST_F(ProbeTest, RefusesWhatDoesNotFit) {
  ProbeOptions options = Options();
  options.batches = kGolden + "/forward.safetensors";
  options.steps = 2;
  absl::Status status = RunProbe(options);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig) << status;
  EXPECT_THAT(MessageOf(status), HasSubstr("holds 1 batches"));

  options = Options();
  options.batches = kGolden + "/forward.safetensors";
  for (const char* word : {"parallel.data=2", "parallel.data=3", "parallel.tensor=2",
                           "train.batch_tokens=64", "data.seq_len=36", "model.d_modle=3"}) {
    options.overrides = {word};
    status = RunProbe(options);
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig) << word << ": " << status;
  }

  options = Options();
  options.batches = kGolden + "/model.safetensors";
  EXPECT_EQ(ExitCodeOf(RunProbe(options)), ExitCode::kData);
  options.batches = folder_.Write("broken.safetensors", "not safetensors");
  EXPECT_EQ(ExitCodeOf(RunProbe(options)), ExitCode::kData);

  auto writer =
      SafetensorsWriter::Create(folder_ / "ids", {{"input_ids", DType::kI32, {1, 3}}}, {});
  ASSERT_TRUE(writer.ok());
  const int32_t ids[] = {1, 256, 2};
  ASSERT_TRUE(writer->Write(ids, sizeof(ids)).ok());
  ASSERT_TRUE(writer->Finish().ok());
  options.batches = folder_ / "ids";
  status = RunProbe(options);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kData);
  EXPECT_THAT(MessageOf(status), HasSubstr("element 1 is 256"));
}

}  // namespace
}  // namespace krait
