// What stands in the files: the cut of large boxes, and the format before the present one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "paths.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_json.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;
using testing_checkpoint::Fill;
using testing_checkpoint::Holds;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

class CheckpointFormatTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(dir_); }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string Step(int64_t step) const { return dir_ + "/" + StepFolderName(step); }

  const std::string dir_ = testing_checkpoint::TempFolder("krait_checkpoint_format_test");
};

TEST_F(CheckpointFormatTest, LargeBoxesAreCut) {
  // At rows, inside rows, and not at all; from memory and from a source.
  State state;
  state.AddWhole("weight", "rows", DType::kF32, {10, 3, 4});  // rows of 48 bytes
  state.Add("weight", "inside", DType::kBF16, {4, 90}, {0, 0}, {3, 90});
  state.Add("weight", "inside", DType::kBF16, {4, 90}, {3, 0}, {1, 90});
  state.AddWhole("weight", "small", DType::kF32, {25});
  state.AddWhole("weight", "scalar", DType::kF32, {});
  Fill(1, &state);
  SaveOptions options{dir_, 2, ""};
  options.box_bytes = 100;
  const std::vector<CheckpointBox> boxes = state.boxes;
  const auto source = [&](size_t box, int64_t begin, int64_t count, void* values) {
    const int64_t width = SizeOf(boxes[box].dtype);
    std::memcpy(values, static_cast<const char*>(boxes[box].data) + begin * width,
                static_cast<size_t>(count * width));
    return absl::OkStatus();
  };
  std::vector<CheckpointBox> bare = boxes;
  for (CheckpointBox& box : bare) box.data = nullptr;
  for (const bool from_memory : {true, false}) {
    const absl::Status saved = from_memory
                                   ? SaveCheckpoint(options, SmallMeta(1), boxes)
                                   : SaveCheckpoint(options, SmallMeta(1), bare, nullptr, source);
    ASSERT_TRUE(saved.ok()) << saved;
    const auto checkpoint = OpenCheckpoint(Step(1));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_TRUE(VerifyCheckpoint(*checkpoint).ok());
    std::map<std::string, std::vector<std::vector<int64_t>>> extents;
    for (const ManifestBox& box : checkpoint->boxes) {
      EXPECT_LE(box.bytes(), 100);
      extents[box.name].push_back(box.extent);
    }
    EXPECT_EQ(extents["rows"], (std::vector<std::vector<int64_t>>(5, {2, 3, 4})));
    EXPECT_THAT(extents["inside"], SizeIs(8));  // 50 and 40 columns of each row
    EXPECT_THAT(extents["small"], SizeIs(1));
    EXPECT_THAT(extents["scalar"], SizeIs(1));
    State loaded = std::move(state);
    for (auto& memory : loaded.memory) std::fill(memory.begin(), memory.end(), 0);
    ASSERT_TRUE(LoadBoxes(*checkpoint, loaded.boxes).ok());
    EXPECT_TRUE(Holds(1, loaded));
    state = std::move(loaded);
  }
}

TEST_F(CheckpointFormatTest, TheFirstFormatStillLoads) {
  const std::string folder = KRAIT_TEST_GOLDEN "/checkpoint-format-1/" + StepFolderName(7);
  const auto checkpoint = OpenCheckpoint(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->format_version, 1);
  EXPECT_EQ(checkpoint->ranks, 1);
  EXPECT_EQ(checkpoint->meta.sources, SmallMeta(7).sources);
  EXPECT_EQ(ReadManifest(folder)->save_id, checkpoint->save_id);
  EXPECT_TRUE(VerifyCheckpoint(*checkpoint).ok());
  State loaded = SmallState();
  ASSERT_TRUE(LoadBoxes(*checkpoint, loaded.boxes).ok());
  EXPECT_TRUE(Holds(7, loaded));
  // Its boxes are checked as those of a table.
  const std::string copy = dir_ + "/copy";
  std::filesystem::create_directories(dir_);
  std::filesystem::copy(folder, copy);
  const std::string good = *ReadFile(copy + "/manifest.json", 1 << 20, ExitCode::kData);
  const auto refused = [&](const std::string& from, const std::string& to) {
    std::string text = good.substr(0, good.rfind("\"crc32c\""));
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    Seal(&text);
    std::ofstream(copy + "/manifest.json", std::ios::binary) << text;
    return MessageOf(OpenCheckpoint(copy).status());
  };
  EXPECT_EQ(refused("\"rank-", "\"rank-"), "");
  EXPECT_THAT(refused("\"offset\":[3,0]", "\"offset\":[2,0]"), HasSubstr("do not tile"));
  EXPECT_THAT(refused("\"file\":0", "\"file\":1"), HasSubstr("not one of the files"));
  EXPECT_THAT(refused("\"at\":2048", "\"at\":20480"), HasSubstr("not inside its file"));
  EXPECT_THAT(refused("\"boxes\"", "\"boxen\""), HasSubstr("'boxes' is missing"));
  EXPECT_THAT(refused("\"crc32c\":711196512", "\"crc32c\":-1"), HasSubstr("'crc32c' is not"));
  // One more save beside it is of the present format.
  State state = SmallState();
  ASSERT_TRUE(SaveCheckpoint({dir_, 2, ""}, SmallMeta(8), state.boxes).ok());
  EXPECT_EQ(OpenCheckpoint(Step(8))->format_version, 2);
}

}  // namespace
}  // namespace krait
