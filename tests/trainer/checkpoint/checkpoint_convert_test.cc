// Loading under another dtype than saved, and the difference between what does not fit and what is
// damaged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing_checkpoint::Fill;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::State;

class CheckpointConvertTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(dir_); }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  Checkpoint Save(const State& state) {
    const absl::Status status = SaveCheckpoint({dir_, 2, ""}, SmallMeta(1), state.boxes);
    EXPECT_TRUE(status.ok()) << status;
    auto checkpoint = OpenCheckpoint(dir_ + "/" + StepFolderName(1));
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return *std::move(checkpoint);
  }

  const std::string dir_ = testing_checkpoint::TempFolder("krait_checkpoint_convert_test");
};

// Round to nearest, ties to even, from the definition: of the two bf16 around x the nearer one, of
// two as near the one whose last bit is 0. Finite x.
uint16_t NearestBF16(float x) {
  const auto below = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);  // towards zero
  const auto value = [](uint16_t bits) {
    // One step above the largest finite bf16 counts as 2^128 for this purpose.
    if ((bits & 0x7fff) == 0x7f80) return std::copysign(0x1p128, bits & 0x8000 ? -1.0 : 1.0);
    return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16));
  };
  const auto above = static_cast<uint16_t>(below + 1);
  const double down = std::abs(x - value(below)), up = std::abs(value(above) - x);
  if (down != up) return down < up ? below : above;
  return below % 2 == 0 ? below : above;
}

TEST_F(CheckpointConvertTest, F32IsRoundedToTheNearestBF16AndComesBackWidened) {
  // Several pieces of the reader, cut in two ways; random bits, and the values around a tie.
  const std::vector<int64_t> shape = {400, 301};
  State saved;
  saved.Add("weight", "x", DType::kF32, shape, {0, 0}, {400, 77});
  saved.Add("weight", "x", DType::kF32, shape, {0, 77}, {400, 224});
  Fill(1, &saved);
  const uint32_t special[] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x80000000,
                              0x00008000, 0x00018000, 0x7f7fffff, 0xff7f8000, 0x7f800000};
  std::memcpy(saved.boxes[1].data, special, sizeof(special));
  const Checkpoint checkpoint = Save(saved);

  State exact, rounded;
  exact.AddWhole("weight", "x", DType::kF32, shape);
  rounded.Add("weight", "x", DType::kBF16, shape, {0, 0}, {133, 301});
  rounded.Add("weight", "x", DType::kBF16, shape, {133, 0}, {267, 301});
  ASSERT_TRUE(LoadBoxes(checkpoint, exact.boxes).ok());
  const absl::Status status = LoadBoxes(checkpoint, rounded.boxes);
  ASSERT_TRUE(status.ok()) << status;
  std::vector<char> half = rounded.memory[0];
  half.insert(half.end(), rounded.memory[1].begin(), rounded.memory[1].end());
  int64_t finite = 0;
  for (size_t i = 0; i < half.size() / 2; ++i) {
    float x;
    uint16_t got;
    std::memcpy(&x, &exact.memory[0][4 * i], 4);
    std::memcpy(&got, &half[2 * i], 2);
    if (std::isfinite(x)) {
      ++finite;
      ASSERT_EQ(got, NearestBF16(x)) << i << ": " << x;
    } else {
      const float back = std::bit_cast<float>(static_cast<uint32_t>(got) << 16);
      ASSERT_TRUE(std::isnan(x) ? std::isnan(back) : back == x) << i << ": " << x;
    }
  }
  EXPECT_GT(finite, 100000);

  // And the other way round: saved as bf16, wanted as f32, is the bf16 value itself.
  const Checkpoint narrow = Save(rounded);
  ASSERT_TRUE(LoadBoxes(narrow, exact.boxes).ok());
  for (size_t i = 0; i < half.size() / 2; ++i) {
    ASSERT_EQ(std::string(&exact.memory[0][4 * i], 4),
              std::string(2, '\0') + std::string(&half[2 * i], 2));
  }
}

TEST_F(CheckpointConvertTest, WhatDoesNotFitIsNoDamage) {
  State saved;
  saved.AddWhole("weight", "x", DType::kF32, {6});
  saved.AddWhole("weight", "counts", DType::kI64, {6});
  Fill(1, &saved);
  const Checkpoint checkpoint = Save(saved);
  State shape, missing, dtype, integer;
  shape.AddWhole("weight", "x", DType::kF32, {7});
  missing.AddWhole("exp_avg", "x", DType::kF32, {6});
  dtype.AddWhole("weight", "x", DType::kF64, {6});
  integer.AddWhole("weight", "counts", DType::kF32, {6});
  const std::vector<std::pair<const State*, std::string>> misfits = {
      {&shape, "has shape [6]; [7] is needed"},
      {&missing, "'x' (exp_avg) is not in the checkpoint"},
      {&dtype, "has dtype f32; f64 is needed"},
      {&integer, "has dtype i64; f32 is needed"}};
  for (const auto& [wanted, sentence] : misfits) {
    std::vector<PassedOver> passed;
    const auto loaded = LoadNewestWhole(
        *ListCheckpoints(dir_), [&](const Checkpoint& c) { return LoadBoxes(c, wanted->boxes); },
        &passed);
    EXPECT_EQ(ExitCodeOf(loaded.status()), ExitCode::kConfig);
    EXPECT_THAT(MessageOf(loaded.status()),
                AllOf(HasSubstr(sentence), ::testing::Not(HasSubstr("whole"))));
    EXPECT_THAT(passed, IsEmpty());
  }
  // Damage stays what it was.
  State whole;
  whole.AddWhole("weight", "x", DType::kBF16, {6});
  const std::string shard = checkpoint.path + "/rank-00000.h5";
  {
    auto file = File::OpenWrite(shard, ExitCode::kData);
    ASSERT_TRUE(file->WriteAt("!", 1, checkpoint.boxes[0].file_offset).ok());
  }
  EXPECT_EQ(ExitCodeOf(LoadBoxes(checkpoint, whole.boxes)), ExitCode::kNoCheckpoint);
}

}  // namespace
}  // namespace krait
