// Tensors that pass through a save and a load piece by piece, so that none has to fit in memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
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
using testing_checkpoint::Element;
using testing_checkpoint::Fill;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

// The box without its memory.
CheckpointBox Wanted(const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
  return {"weight", name, dtype, shape, std::vector<int64_t>(shape.size()), shape, nullptr};
}

class CheckpointStreamTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(dir_); }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  Checkpoint Save(const State& state) {
    const absl::Status status = SaveCheckpoint({dir_, 2, ""}, SmallMeta(1), state.boxes);
    EXPECT_TRUE(status.ok()) << status;
    return Open();
  }
  Checkpoint Open() {
    auto checkpoint = OpenCheckpoint(dir_ + "/" + StepFolderName(1));
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return *std::move(checkpoint);
  }

  const std::string dir_ = testing_checkpoint::TempFolder("krait_checkpoint_stream_test");
};

// Above a piece, of tensors that were stored whole, in rows and in columns; f32 and rounded.
TEST_F(CheckpointStreamTest, PiecesAreTheTensorInOrder) {
  const std::vector<int64_t> large = {1100, 4000}, small = {5, 4}, narrow = {9}, cube = {3, 5, 7};
  State saved;
  saved.AddWhole("weight", "whole", DType::kF32, small);
  saved.Add("weight", "cut", DType::kF32, large, {400, 0}, {700, 1700});
  saved.Add("weight", "cut", DType::kF32, large, {0, 0}, {400, 4000});
  saved.Add("weight", "cut", DType::kF32, large, {400, 1700}, {700, 2300});
  saved.AddWhole("weight", "narrow", DType::kF32, narrow);
  saved.Add("weight", "cube", DType::kF32, cube, {0, 0, 0}, {3, 2, 7});
  saved.Add("weight", "cube", DType::kF32, cube, {0, 2, 0}, {3, 3, 7});
  Fill(1, &saved);
  const Checkpoint checkpoint = Save(saved);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const std::vector<CheckpointBox> wanted = {
        Wanted("narrow", dtype, narrow), Wanted("cut", dtype, large), Wanted("cube", dtype, cube),
        Wanted("whole", dtype, small)};
    State loaded;  // what LoadBoxes makes of it, whole
    for (const CheckpointBox& box : wanted) loaded.AddWhole("weight", box.name, dtype, box.shape);
    ASSERT_TRUE(LoadBoxes(checkpoint, loaded.boxes).ok());
    size_t last = 0, pieces = 0;
    int64_t done = 0;
    const absl::Status status = StreamTensors(
        checkpoint, wanted, [&](size_t i, int64_t begin, int64_t count, const void* values) {
          EXPECT_TRUE(i == last || i == last + 1);
          if (i != last) done = 0;
          EXPECT_EQ(begin, done);
          EXPECT_LE(count * SizeOf(dtype), 16 << 20);
          const auto at = static_cast<size_t>(begin * SizeOf(dtype));
          EXPECT_EQ(std::memcmp(values, loaded.memory[i].data() + at,
                                static_cast<size_t>(count * SizeOf(dtype))),
                    0);
          last = i;
          done = begin + count;
          ++pieces;
          return absl::OkStatus();
        });
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(last, 3u);
    EXPECT_EQ(done, 20);
    EXPECT_EQ(pieces, dtype == DType::kF32 ? 5u : 4u);
  }
}

TEST_F(CheckpointStreamTest, DamageAndMisfitsAreErrors) {
  State saved = SmallState();
  Fill(1, &saved);
  const Checkpoint checkpoint = Save(saved);
  const auto stream = [&](const CheckpointBox& wanted) {
    return StreamTensors(checkpoint, {wanted},
                         [](size_t, int64_t, int64_t, const void*) { return absl::OkStatus(); });
  };
  const std::string name = "model.layers.0.mamba.in_proj.weight";
  EXPECT_TRUE(stream(Wanted(name, DType::kF32, {6, 5})).ok());
  absl::Status status = stream(Wanted("other", DType::kF32, {6, 5}));
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(status), HasSubstr("'other' (weight) is not in the checkpoint"));
  status = stream(Wanted(name, DType::kF32, {5, 6}));
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  status = StreamTensors(
      checkpoint, {Wanted(name, DType::kF32, {6, 5})},
      [](size_t, int64_t, int64_t, const void*) { return Error(ExitCode::kCannotSave, "full"); });
  EXPECT_EQ(MessageOf(status), "full");

  // One bit of the second box.
  for (const ManifestBox& box : checkpoint.boxes) {
    if (box.slot != "weight" || box.name != name || box.offset[0] == 0) continue;
    std::fstream file(checkpoint.path + "/" + checkpoint.files[0].name,
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(box.file_offset);
    const auto byte = static_cast<char>(file.get() ^ 1);
    file.seekp(box.file_offset);
    file.put(byte);
  }
  status = stream(Wanted(name, DType::kF32, {6, 5}));
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kNoCheckpoint);
  EXPECT_THAT(MessageOf(status), AllOf(HasSubstr(name), HasSubstr("CRC32C")));
}

TEST_F(CheckpointStreamTest, BoxesWithoutMemoryAreAskedForInOrder) {
  // One above a piece of the writer, one of memory between the two.
  State memory;
  memory.AddWhole("weight", "b", DType::kF32, {6});
  Fill(1, &memory);
  std::vector<CheckpointBox> boxes = {Wanted("a", DType::kF32, {700, 301}), memory.boxes[0],
                                      Wanted("c", DType::kBF16, {9})};
  size_t last = 0;
  int64_t next = 0;
  const auto source = [&](size_t i, int64_t begin, int64_t count, void* values) {
    if (i != last) next = 0;
    EXPECT_TRUE(i >= last && i != 1 && begin == next);
    for (int64_t k = 0; k < count; ++k) {
      const uint64_t value = Element(1, "weight", boxes[i].name, begin + k);
      const auto width = static_cast<size_t>(SizeOf(boxes[i].dtype));
      std::memcpy(static_cast<char*>(values) + static_cast<size_t>(k) * width, &value, width);
    }
    last = i;
    next = begin + count;
    return absl::OkStatus();
  };
  CheckpointMeta meta = SmallMeta(1);
  meta.hf_config = R"({"eos_token_id":[2,7],"x":Infinity})";
  meta.hf_generation_config = R"({"temperature":0.5})";
  const absl::Status status = SaveCheckpoint({dir_, 2, ""}, meta, boxes, nullptr, source);
  ASSERT_TRUE(status.ok()) << status;
  const Checkpoint checkpoint = Open();
  EXPECT_TRUE(VerifyCheckpoint(checkpoint).ok());
  EXPECT_EQ(checkpoint.meta.hf_config, meta.hf_config);
  EXPECT_EQ(checkpoint.meta.hf_generation_config, meta.hf_generation_config);
  State loaded;
  for (const CheckpointBox& box : boxes) {
    loaded.AddWhole("weight", box.name, box.dtype, box.shape);
  }
  ASSERT_TRUE(LoadBoxes(checkpoint, loaded.boxes).ok());
  EXPECT_TRUE(testing_checkpoint::Holds(1, loaded));

  // A source that fails leaves what was there.
  const absl::Status failed = SaveCheckpoint(
      {dir_, 2, ""}, meta, boxes, nullptr,
      [](size_t, int64_t, int64_t, void*) { return Error(ExitCode::kNoCheckpoint, "gone"); });
  EXPECT_THAT(MessageOf(failed), HasSubstr("gone"));
  EXPECT_EQ(Open().save_id, checkpoint.save_id);
}

}  // namespace
}  // namespace krait
