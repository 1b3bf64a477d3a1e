#include "trainer/checkpoint/checkpoint_tools.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>

#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing_checkpoint::Fill;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

class CheckpointToolsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = ::testing::TempDir() + "krait_tools_test_" + std::to_string(getpid());
    std::filesystem::remove_all(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  // root/NAME/checkpoints/step-N with the state.
  void Save(const std::string& name, int64_t step, const State& state) {
    const absl::Status status =
        SaveCheckpoint({root_ + "/" + name + "/checkpoints", 2, ""}, SmallMeta(step), state.boxes);
    ASSERT_TRUE(status.ok()) << status;
  }
  std::string Folder(const std::string& name, int64_t step) {
    return root_ + "/" + name + "/checkpoints/" + StepFolderName(step);
  }
  std::string root_;
};

TEST_F(CheckpointToolsTest, Inspect) {
  State state = SmallState();
  Fill(7, &state);
  Save("run", 7, state);
  auto text = InspectCheckpoints({root_ + "/run"}, false);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(text->code, ExitCode::kOk);
  EXPECT_THAT(text->text,
              AllOf(HasSubstr(Folder("run", 7) + "\n  step 7, 7 updates applied, 0 skipped\n"),
                    HasSubstr("slot weight: 3 tensors in 4 boxes, 97 elements, 388 bytes"),
                    HasSubstr("slot exp_avg: 3 tensors in 4 boxes, 97 elements, 194 bytes"),
                    HasSubstr("model.embed_tokens.weight [6, 10] exp_avg:bf16 exp_avg_sq:bf16 "
                              "weight:f32\n")));
  auto as_json = InspectCheckpoints({Folder("run", 7)}, true);
  ASSERT_TRUE(as_json.ok());
  const json parsed = json::parse(as_json->text);
  EXPECT_EQ(parsed["step"], 7);
  EXPECT_EQ(parsed["tokens"], 7 * 512);
  EXPECT_EQ(parsed["config"], SmallMeta(7).config_yaml);
  EXPECT_EQ(parsed["tensors"].size(), 9u);
  EXPECT_EQ(parsed["slots"]["weight"]["bytes"], 388);
  EXPECT_EQ(ExitCodeOf(InspectCheckpoints({root_}, false).status()), ExitCode::kNoCheckpoint);
}

TEST_F(CheckpointToolsTest, Verify) {
  State state = SmallState();
  Fill(1, &state);
  Save("run", 1, state);
  Save("run", 2, state);
  auto good = VerifyCheckpoints({root_ + "/run"}, false);
  ASSERT_TRUE(good.ok());
  EXPECT_EQ(good->code, ExitCode::kOk);
  EXPECT_EQ(good->text, Folder("run", 2) + ": whole\n" + Folder("run", 1) + ": whole\n");

  // Two damages in one file are both named.
  const auto checkpoint = OpenCheckpoint(Folder("run", 2));
  const std::string shard = Folder("run", 2) + "/rank-00000.h5";
  {
    auto file = File::OpenWrite(shard, ExitCode::kData);
    for (const size_t box : {0u, 5u}) {
      char byte;
      ASSERT_TRUE(file->ReadAt(&byte, 1, checkpoint->boxes[box].file_offset).ok());
      byte = static_cast<char>(byte ^ 64);
      ASSERT_TRUE(file->WriteAt(&byte, 1, checkpoint->boxes[box].file_offset).ok());
    }
  }
  auto bad = VerifyCheckpoints({root_ + "/run", Folder("run", 1)}, true);
  ASSERT_TRUE(bad.ok());
  EXPECT_EQ(bad->code, ExitCode::kNo);
  const json parsed = json::parse(bad->text);
  EXPECT_FALSE(parsed["whole"]);
  ASSERT_EQ(parsed["checkpoints"].size(), 3u);
  EXPECT_FALSE(parsed["checkpoints"][0]["whole"]);
  ASSERT_EQ(parsed["checkpoints"][0]["problems"].size(), 2u);
  EXPECT_THAT(parsed["checkpoints"][0]["problems"][1].get<std::string>(),
              AllOf(HasSubstr(shard), HasSubstr("in_proj.weight' (exp_avg)")));
  EXPECT_TRUE(parsed["checkpoints"][1]["whole"]);
  EXPECT_EQ(ExitCodeOf(VerifyCheckpoints({root_ + "/none"}, false).status()),
            ExitCode::kNoCheckpoint);

  // A damaged `latest` is part of the answer, one that is behind only a note.
  std::filesystem::remove_all(Folder("run", 2));
  EXPECT_EQ(VerifyCheckpoints({root_ + "/run"}, false)->code, ExitCode::kNo);
  std::filesystem::remove(root_ + "/run/checkpoints/latest");
  auto note = VerifyCheckpoints({root_ + "/run"}, false);
  EXPECT_EQ(note->code, ExitCode::kOk);
  EXPECT_THAT(note->text, HasSubstr("latest is missing"));
}

TEST_F(CheckpointToolsTest, Diff) {
  State state = SmallState();
  Fill(1, &state);
  for (size_t b = 0; b < state.boxes.size(); ++b) {  // tame values
    if (state.boxes[b].dtype != DType::kF32) continue;
    for (size_t at = 0; at < state.memory[b].size(); at += 4) {
      const float value = static_cast<float>(at % 13) * 0.25f;
      std::memcpy(&state.memory[b][at], &value, 4);
    }
  }
  Save("a", 1, state);
  Save("b", 2, state);
  auto same = DiffCheckpoints(root_ + "/a", root_ + "/b", "", false);
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_EQ(same->code, ExitCode::kOk);
  EXPECT_THAT(same->text, HasSubstr("all 9 tensors have equal bits"));

  // The same values in other boxes are the same checkpoint.
  State other = SmallState();
  for (size_t b = 0; b < state.boxes.size(); ++b) other.memory[b] = state.memory[b];
  for (size_t b = 0; b < other.boxes.size(); ++b) other.boxes[b].data = other.memory[b].data();
  State joined;
  for (const CheckpointBox& box : state.boxes) {
    if (box.offset[0] == 0) joined.AddWhole(box.slot, box.name, box.dtype, box.shape);
  }
  ASSERT_TRUE(LoadBoxes(*OpenCheckpoint(Folder("a", 1)), joined.boxes).ok());
  Save("joined", 1, joined);
  EXPECT_EQ(DiffCheckpoints(root_ + "/a", root_ + "/joined", "", false)->code, ExitCode::kOk);

  const float half = 0.5f, minus_zero = -0.0f, nan = NAN;
  float first;
  std::memcpy(&first, &other.memory[0][8], 4);
  const float moved = first + half;
  std::memcpy(&other.memory[0][8], &moved, 4);
  std::memcpy(&other.memory[3][0], &minus_zero, 4);  // the norm's first element is 0
  Save("c", 1, other);
  auto differs = DiffCheckpoints(root_ + "/a", root_ + "/c", "", false);
  EXPECT_EQ(differs->code, ExitCode::kNo);
  EXPECT_THAT(differs->text,
              AllOf(HasSubstr("weight model.embed_tokens.weight: max |a-b| 0.5\n"),
                    HasSubstr("weight model.layers.0.input_layernorm.weight: max |a-b| 0\n"),
                    HasSubstr("2 of 9 tensors differ"), Not(HasSubstr("in_proj"))));
  std::memcpy(&other.memory[0][8], &nan, 4);
  Save("d", 1, other);
  const json parsed = json::parse(DiffCheckpoints(root_ + "/a", root_ + "/d", "", true)->text);
  EXPECT_FALSE(parsed["equal"]);
  EXPECT_EQ(parsed["tensors"].size(), 9u);
  int unequal = 0;
  for (const json& tensor : parsed["tensors"]) {
    if (!tensor["equal_bits"]) ++unequal;
    if (tensor["name"] == "model.embed_tokens.weight" && tensor["slot"] == "weight") {
      EXPECT_TRUE(tensor["max_abs_diff"].is_null());
    }
  }
  EXPECT_EQ(unequal, 2);

  State weights;  // only some tensors, one of another shape, one in bf16
  weights.AddWhole("weight", "model.embed_tokens.weight", DType::kBF16, {6, 10});
  weights.AddWhole("weight", "model.layers.0.input_layernorm.weight", DType::kF32, {8});
  for (size_t i = 0; i < 60; ++i)
    std::memcpy(&weights.memory[0][2 * i], &state.memory[0][4 * i + 2], 2);
  Save("e", 1, weights);
  auto odd = DiffCheckpoints(root_ + "/a", root_ + "/e", "", false);
  EXPECT_EQ(odd->code, ExitCode::kNo);
  EXPECT_THAT(odd->text,
              AllOf(HasSubstr("exp_avg model.embed_tokens.weight: only in " + Folder("a", 1)),
                    HasSubstr("input_layernorm.weight: shapes [7] and [8]"),
                    Not(HasSubstr("weight model.embed_tokens.weight: max"))));
}

}  // namespace
}  // namespace krait
