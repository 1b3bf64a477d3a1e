// Saving and loading: round trips, tilings, retention, replacement, locks, asynchronous saves.
#include "trainer/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "kernels/base/h5.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using testing_checkpoint::Fill;
using testing_checkpoint::Holds;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

class CheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = ::testing::TempDir() + "krait_checkpoint_test_" + std::to_string(getpid());
    std::filesystem::remove_all(root_);
    dir_ = root_ + "/run/checkpoints";
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  absl::Status Save(int64_t step, int64_t keep = 3) {
    State state = SmallState();
    Fill(step, &state);
    return SaveCheckpoint({dir_, keep, ""}, SmallMeta(step), state.boxes, &warnings_);
  }
  std::string Step(int64_t step) { return dir_ + "/" + StepFolderName(step); }
  std::vector<std::string> Names() { return *ListDirectory(dir_, ExitCode::kData); }
  // Loads everything and says which step's content it is; -1 for an error, -2 for a mixture.
  int64_t LoadedStep(const std::string& folder) {
    State state = SmallState();
    auto checkpoint = OpenCheckpoint(folder);
    if (!checkpoint.ok() || !LoadBoxes(*checkpoint, state.boxes).ok()) return -1;
    return Holds(checkpoint->meta.step, state) ? checkpoint->meta.step : -2;
  }
  // Replaces the first occurrence of `from` in the file.
  void Edit(const std::string& path, const std::string& from, const std::string& to) {
    std::string text = *ReadFile(path, 1 << 26, ExitCode::kData);
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos);
    text.replace(at, from.size(), to);
    std::ofstream(path, std::ios::binary) << text;
  }
  std::string root_, dir_;
  std::vector<std::string> warnings_;
};

TEST_F(CheckpointTest, RoundTripKeepsEveryBitAndTheMetaData) {
  ASSERT_TRUE(Save(7).ok());
  EXPECT_THAT(warnings_, IsEmpty());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000007"));
  EXPECT_EQ(*ReadFile(dir_ + "/latest", 100, ExitCode::kData), "step-00000007\n");
  EXPECT_THAT(*ListDirectory(Step(7), ExitCode::kData),
              ElementsAre("manifest.json", "rank-00000.h5"));

  auto checkpoint = OpenCheckpoint(Step(7) + "/");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const CheckpointMeta want = SmallMeta(7);
  EXPECT_EQ(checkpoint->path, Step(7));
  EXPECT_EQ(checkpoint->meta.step, 7);
  EXPECT_EQ(checkpoint->meta.adam_steps, want.adam_steps);
  EXPECT_EQ(checkpoint->meta.sequences, want.sequences);
  EXPECT_EQ(checkpoint->meta.tokens, want.tokens);
  EXPECT_EQ(checkpoint->meta.data_fingerprint, want.data_fingerprint);
  EXPECT_EQ(checkpoint->meta.mix_start, want.mix_start);
  EXPECT_EQ(checkpoint->meta.sources, want.sources);
  EXPECT_EQ(checkpoint->meta.validation, want.validation);
  EXPECT_EQ(checkpoint->meta.config_yaml, want.config_yaml);
  EXPECT_EQ(checkpoint->meta.tokenizer, want.tokenizer);
  EXPECT_TRUE(VerifyCheckpoint(*checkpoint).ok());
  EXPECT_EQ(LoadedStep(Step(7)), 7);

  State other = SmallState();
  Fill(8, &other);
  EXPECT_FALSE(Holds(7, other));  // the check can fail
}

TEST_F(CheckpointTest, TheShardIsAnHdf5FileWithTheContractedDatasets) {
  State state;
  state.Add("weight", "a", DType::kF32, {6}, {0}, {4});
  state.Add("weight", "a", DType::kF32, {6}, {4}, {2});
  state.AddWhole("exp_avg", "a", DType::kBF16, {6});
  Fill(1, &state);
  ASSERT_TRUE(SaveCheckpoint({dir_, 2, ""}, SmallMeta(1), state.boxes).ok());
  auto h5 = H5File::OpenRead(Step(1) + "/rank-00000.h5", ExitCode::kData);
  ASSERT_TRUE(h5.ok()) << h5.status();
  EXPECT_EQ(*h5->ReadStringAttribute("save_id"), OpenCheckpoint(Step(1))->save_id);
  std::vector<char> data(16);
  ASSERT_TRUE(h5->Read("/weight/a/0", 0, 4, data.data()).ok());
  EXPECT_EQ(data, state.memory[0]);
  data.resize(8);
  ASSERT_TRUE(h5->Read("/weight/a/1", 0, 2, data.data()).ok());
  EXPECT_EQ(data, state.memory[1]);
  EXPECT_EQ(h5->Stat("/exp_avg/a/0")->dtype, DType::kBF16);
  data.resize(12);
  ASSERT_TRUE(h5->Read("/exp_avg/a/0", 0, 6, data.data()).ok());
  EXPECT_EQ(data, state.memory[2]);
}

TEST_F(CheckpointTest, AnyTilingLoadsIntoAnyOther) {
  // Sizes above the reader's piece of 256 KiB in one tensor, odd cuts in all dimensions in the
  // other; a scalar; bf16 read as f32.
  const std::vector<int64_t> cube = {5, 7, 11}, large = {1100, 1031};
  const auto cut = [](State* state, const std::string& name, DType dtype,
                      const std::vector<int64_t>& shape, std::vector<std::vector<int64_t>> cuts) {
    std::vector<size_t> index(shape.size(), 0);
    for (size_t d = 0; d < shape.size(); ++d) {
      cuts[d].insert(cuts[d].begin(), 0);
      cuts[d].push_back(shape[d]);
    }
    for (bool more = true; more;) {
      std::vector<int64_t> offset, extent;
      for (size_t d = 0; d < shape.size(); ++d) {
        offset.push_back(cuts[d][index[d]]);
        extent.push_back(cuts[d][index[d] + 1] - offset.back());
      }
      state->Add("weight", name, dtype, shape, offset, extent);
      more = false;
      for (size_t d = shape.size(); d-- > 0 && !more;) {
        more = ++index[d] < cuts[d].size() - 1;
        if (!more) index[d] = 0;
      }
    }
  };
  const std::vector<std::vector<std::vector<int64_t>>> cube_cuts = {
      {{}, {}, {}}, {{2}, {}, {}}, {{}, {3, 4}, {}}, {{}, {}, {1, 10}}, {{1, 3}, {2}, {5}}};
  const std::vector<std::vector<std::vector<int64_t>>> large_cuts = {
      {{}, {}}, {{17, 1000}, {}}, {{}, {1, 600}}, {{550}, {515}}, {{1}, {1030}}};
  for (size_t from = 0; from < cube_cuts.size(); ++from) {
    State saved;
    cut(&saved, "cube", DType::kF32, cube, cube_cuts[from]);
    cut(&saved, "half", DType::kBF16, cube, cube_cuts[(from + 1) % 5]);
    cut(&saved, "large", DType::kF32, large, large_cuts[from]);
    saved.AddWhole("weight", "scalar", DType::kF32, {});
    Fill(1, &saved);
    ASSERT_TRUE(SaveCheckpoint({dir_, 2, ""}, SmallMeta(1), saved.boxes).ok());
    auto checkpoint = OpenCheckpoint(Step(1));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    for (size_t to = 0; to < cube_cuts.size(); ++to) {
      State wanted;
      cut(&wanted, "cube", DType::kF32, cube, cube_cuts[to]);
      cut(&wanted, "half", DType::kBF16, cube, cube_cuts[to]);
      if ((to + from) % 3 == 0) cut(&wanted, "large", DType::kF32, large, large_cuts[to]);
      wanted.AddWhole("weight", "scalar", DType::kF32, {});
      const absl::Status status = LoadBoxes(*checkpoint, wanted.boxes);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_TRUE(Holds(1, wanted)) << from << " to " << to;
    }
    State part;  // less than everything, and bf16 widened
    part.Add("weight", "cube", DType::kF32, cube, {1, 2, 3}, {3, 4, 5});
    part.Add("weight", "half", DType::kF32, cube, {4, 0, 2}, {1, 7, 3});
    ASSERT_TRUE(LoadBoxes(*checkpoint, part.boxes).ok());
    const std::vector<char> widened = part.memory[1];
    part.boxes.pop_back();
    EXPECT_TRUE(Holds(1, part));
    State half;
    half.Add("weight", "half", DType::kBF16, cube, {4, 0, 2}, {1, 7, 3});
    ASSERT_TRUE(LoadBoxes(*checkpoint, half.boxes).ok());
    for (size_t i = 0; i < 21; ++i) {
      EXPECT_EQ(std::string(&widened[4 * i + 2], 2), std::string(&half.memory[0][2 * i], 2));
      EXPECT_EQ(widened[4 * i] | widened[4 * i + 1], 0);
    }
  }
}

TEST_F(CheckpointTest, WhatDoesNotFitIsNamedAtOnce) {
  ASSERT_TRUE(Save(1).ok());
  auto checkpoint = OpenCheckpoint(Step(1));
  State wanted;
  wanted.AddWhole("weight", "model.none", DType::kF32, {1});
  wanted.AddWhole("exp_avg_cube", "model.embed_tokens.weight", DType::kF32, {6, 10});
  wanted.AddWhole("weight", "model.embed_tokens.weight", DType::kF32, {10, 6});
  wanted.AddWhole("weight", "model.layers.0.input_layernorm.weight", DType::kI32, {7});
  const absl::Status status = LoadBoxes(*checkpoint, wanted.boxes);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  EXPECT_THAT(
      MessageOf(status),
      AllOf(HasSubstr(Step(1) + ": tensor 'model.none' (weight) is not in the checkpoint\n"),
            HasSubstr("'model.embed_tokens.weight' (exp_avg_cube) is not in"),
            HasSubstr("has shape [6, 10]; [10, 6] is needed"),
            HasSubstr("has dtype f32; i32 is needed")));
}

TEST_F(CheckpointTest, KeepsTheNewestAndNeverFewerWholeOnes) {
  for (int64_t step = 1; step <= 5; ++step) ASSERT_TRUE(Save(step, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000004", "step-00000005"));
  // A damaged one does not count: manifest gone from 5, so 4 and 6 are the two whole ones.
  ASSERT_TRUE(RemoveFile(Step(5) + "/manifest.json", ExitCode::kData).ok());
  ASSERT_TRUE(Save(6, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000004", "step-00000005", "step-00000006"));
  ASSERT_TRUE(Save(7, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000006", "step-00000007"));
  // Written behind newer ones: kept all the same.
  ASSERT_TRUE(Save(3, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000003", "step-00000006", "step-00000007"));
  // Newest by number, not by text.
  ASSERT_TRUE(Save(123456789, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000007", "step-123456789"));
  EXPECT_THAT(*ListCheckpoints(dir_), ElementsAre(Step(123456789), Step(7)));
}

TEST_F(CheckpointTest, MilestonesStay) {
  for (int64_t step = 1; step <= 9; ++step) {
    State state = SmallState();
    Fill(step, &state);
    const SaveOptions options = {.dir = dir_, .keep = 2, .name = "", .keep_every = 3};
    ASSERT_TRUE(SaveCheckpoint(options, SmallMeta(step), state.boxes, &warnings_).ok());
  }
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000003", "step-00000006", "step-00000008",
                                   "step-00000009"));
}

TEST_F(CheckpointTest, TheSameStepIsReplaced) {
  ASSERT_TRUE(Save(5).ok());
  const std::string first = OpenCheckpoint(Step(5))->save_id;
  ASSERT_TRUE(Save(5).ok());
  EXPECT_NE(OpenCheckpoint(Step(5))->save_id, first);
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000005"));
  // A damaged one too.
  ASSERT_TRUE(RemoveFile(Step(5) + "/rank-00000.h5", ExitCode::kData).ok());
  EXPECT_EQ(LoadedStep(Step(5)), -1);
  ASSERT_TRUE(Save(5).ok());
  EXPECT_EQ(LoadedStep(Step(5)), 5);
}

TEST_F(CheckpointTest, OneMovedAsideStillCountsUntilReplaced) {
  // What a kill between the two renames of a replacement leaves.
  ASSERT_TRUE(Save(5).ok());
  const std::string id(32, 'a'), aside = dir_ + "/old-step-00000005." + id;
  ASSERT_TRUE(Rename(Step(5), aside, ExitCode::kData).ok());
  EXPECT_THAT(*ListCheckpoints(dir_), ElementsAre(aside));
  EXPECT_EQ(LoadedStep(aside), 5);
  // A later save keeps it as the second whole one ...
  ASSERT_TRUE(Save(6, 2).ok());
  EXPECT_THAT(*ListCheckpoints(dir_), ElementsAre(Step(6), aside));
  // ... and it goes by retention, or once its step is there again.
  ASSERT_TRUE(Save(7, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000006", "step-00000007"));
  ASSERT_TRUE(Rename(Step(7), dir_ + "/old-step-00000007." + id, ExitCode::kData).ok());
  ASSERT_TRUE(Save(7, 2).ok());
  ASSERT_TRUE(Save(8, 2).ok());
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000007", "step-00000008"));
}

TEST_F(CheckpointTest, LeftoversGoAndForeignFilesStay) {
  const std::string id(32, '0');
  const std::vector<std::string> leftovers = {"step-00000003." + id + ".tmp",
                                              "trash-step-00000001." + id,
                                              "trash-old-step-00000001." + id + "." + id};
  const std::vector<std::string> foreign = {
      "step-00000003.tmp", "step-3." + id + ".tmp", "notes.tmp",          "trash",
      "trash-mine." + id,  "old-best." + id,        "best." + id + ".tmp"};
  for (const auto& list : {leftovers, foreign}) {
    for (const std::string& name : list) {
      ASSERT_TRUE(MakeDirectories(dir_ + "/" + name + "/sub", ExitCode::kData).ok());
    }
  }
  ASSERT_TRUE(Save(4).ok());
  for (const std::string& name : leftovers) EXPECT_FALSE(Exists(dir_ + "/" + name)) << name;
  for (const std::string& name : foreign) EXPECT_TRUE(Exists(dir_ + "/" + name)) << name;
  EXPECT_THAT(*ListCheckpoints(dir_), ElementsAre(Step(4)));
}

TEST_F(CheckpointTest, ASingleCheckpointUnderAnyName) {
  ASSERT_TRUE(MakeDirectories(root_ + "/mine/valuable", ExitCode::kData).ok());
  State state = SmallState();
  Fill(0, &state);
  const auto save = [&](const std::string& name) {
    return SaveCheckpoint({root_, 0, name}, SmallMeta(0), state.boxes);
  };
  ASSERT_TRUE(save("imported").ok());
  EXPECT_EQ(LoadedStep(root_ + "/imported"), 0);
  ASSERT_TRUE(save("imported").ok());
  EXPECT_THAT(*ListDirectory(root_, ExitCode::kData), ElementsAre("imported", "mine"));
  // Anything but a checkpoint is not replaced.
  const absl::Status refused = save("mine");
  EXPECT_EQ(ExitCodeOf(refused), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(refused), HasSubstr("exists and is not a checkpoint"));
  EXPECT_TRUE(Exists(root_ + "/mine/valuable"));
}

TEST_F(CheckpointTest, FindsWhatAUsersPathStandsFor) {
  ASSERT_TRUE(Save(1).ok());
  ASSERT_TRUE(Save(2).ok());
  for (const std::string& path : {dir_, root_ + "/run", root_ + "/run/", dir_ + "/latest"}) {
    auto found = FindCheckpoints(path);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_THAT(*found, SizeIs(2)) << path;
    EXPECT_EQ(LoadedStep(found->front()), 2);
  }
  EXPECT_THAT(*FindCheckpoints(Step(1) + "/"), ElementsAre(Step(1)));
  for (const std::string& path : {root_, root_ + "/none", Step(1) + "/manifest.json"}) {
    EXPECT_EQ(ExitCodeOf(FindCheckpoints(path).status()), ExitCode::kNoCheckpoint) << path;
  }
}

TEST_F(CheckpointTest, TheNewestWholeOneIsLoadedAndTheOthersNamed) {
  const auto load = [](const Checkpoint& checkpoint) {
    State state = SmallState();
    return LoadBoxes(checkpoint, state.boxes);
  };
  std::vector<PassedOver> passed;
  EXPECT_THAT(*ListCheckpoints(dir_), IsEmpty());
  for (int64_t step = 1; step <= 3; ++step) ASSERT_TRUE(Save(step).ok());
  Edit(Step(3) + "/manifest.json", "\"step\":3", "\"step\":4");
  const std::string shard = Step(2) + "/rank-00000.h5";
  const int64_t at = OpenCheckpoint(Step(2))->boxes[4].file_offset;
  {
    auto file = File::OpenWrite(shard, ExitCode::kData);
    char byte;
    ASSERT_TRUE(file->ReadAt(&byte, 1, at).ok());
    byte = static_cast<char>(byte ^ 1);
    ASSERT_TRUE(file->WriteAt(&byte, 1, at).ok());
  }
  auto loaded = LoadNewestWhole(*ListCheckpoints(dir_), load, &passed);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->meta.step, 1);
  ASSERT_THAT(passed, SizeIs(2));
  EXPECT_EQ(passed[0].path, Step(3));
  EXPECT_THAT(passed[0].reason, HasSubstr("manifest.json does not match its own CRC32C"));
  EXPECT_EQ(passed[1].path, Step(2));
  EXPECT_THAT(passed[1].reason,
              AllOf(HasSubstr(shard), HasSubstr("'model.embed_tokens.weight' (exp_avg)")));

  // Another error than damage ends the search.
  const auto misfit = LoadNewestWhole(
      *ListCheckpoints(dir_),
      [](const Checkpoint&) { return Error(ExitCode::kConfig, "other model"); }, &passed);
  EXPECT_EQ(ExitCodeOf(misfit.status()), ExitCode::kConfig);

  ASSERT_TRUE(RemoveFile(Step(1) + "/manifest.json", ExitCode::kData).ok());
  const auto none = LoadNewestWhole(*ListCheckpoints(dir_), load, &passed);
  EXPECT_EQ(ExitCodeOf(none.status()), ExitCode::kNoCheckpoint);
  EXPECT_THAT(MessageOf(none.status()),
              AllOf(HasSubstr("no checkpoint is whole"), HasSubstr(Step(1) + "/manifest.json is "
                                                                             "missing")));
}

TEST_F(CheckpointTest, FilesOfOtherSavesDoNotFit) {
  ASSERT_TRUE(Save(1).ok());
  const std::string copy = root_ + "/copy.h5";
  std::filesystem::copy_file(Step(1) + "/rank-00000.h5", copy);
  ASSERT_TRUE(Save(1).ok());  // the same tensors, another save
  std::filesystem::copy_file(copy, Step(1) + "/rank-00000.h5",
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_THAT(MessageOf(OpenCheckpoint(Step(1)).status()),
              HasSubstr("rank-00000.h5: its table of boxes"));
  // Its table may be the right one: HDF5's own bytes carry the save's id too.
  ASSERT_TRUE(Save(1).ok());
  const auto checkpoint = OpenCheckpoint(Step(1));
  ASSERT_TRUE(checkpoint.ok());
  const ManifestFile entry = checkpoint->files[0];
  std::vector<char> table(static_cast<size_t>(entry.table_size));
  ASSERT_TRUE(File::OpenRead(Step(1) + "/rank-00000.h5", ExitCode::kData)
                  ->ReadAt(table.data(), table.size(), entry.table_at)
                  .ok());
  ASSERT_TRUE(File::OpenWrite(copy, ExitCode::kData)
                  ->WriteAt(table.data(), table.size(), entry.table_at)
                  .ok());
  std::filesystem::copy_file(copy, Step(1) + "/rank-00000.h5",
                             std::filesystem::copy_options::overwrite_existing);
  ASSERT_TRUE(OpenCheckpoint(Step(1)).ok());
  EXPECT_THAT(MessageOf(VerifyCheckpoint(*checkpoint)), HasSubstr("outside tensors"));
  EXPECT_EQ(LoadedStep(Step(1)), -1);
  // A folder under another step's name.
  ASSERT_TRUE(Save(2).ok());
  std::filesystem::rename(Step(2), Step(9));
  EXPECT_THAT(MessageOf(OpenCheckpoint(Step(9)).status()), HasSubstr("is of step 2"));
  // Links are not followed.
  std::filesystem::rename(Step(9), Step(2));
  std::filesystem::rename(Step(2) + "/rank-00000.h5", root_ + "/moved.h5");
  std::filesystem::create_symlink(root_ + "/moved.h5", Step(2) + "/rank-00000.h5");
  EXPECT_THAT(MessageOf(OpenCheckpoint(Step(2)).status()), HasSubstr("symbolic link"));
}

TEST_F(CheckpointTest, TheHintLatest) {
  bool damaged = true;
  EXPECT_EQ(CheckLatest(dir_, &damaged), "");
  ASSERT_TRUE(Save(1).ok());
  ASSERT_TRUE(Save(2).ok());
  EXPECT_EQ(CheckLatest(dir_, &damaged), "");
  EXPECT_FALSE(damaged);
  Edit(dir_ + "/latest", "2\n", "1\n");
  EXPECT_THAT(CheckLatest(dir_, &damaged), HasSubstr("older"));
  EXPECT_FALSE(damaged);
  Edit(dir_ + "/latest", "1\n", "1");
  EXPECT_THAT(CheckLatest(dir_, &damaged), HasSubstr("does not name"));
  EXPECT_TRUE(damaged);
  std::filesystem::remove(dir_ + "/latest");
  EXPECT_THAT(CheckLatest(dir_, &damaged), HasSubstr("missing"));
  EXPECT_FALSE(damaged);
}

TEST_F(CheckpointTest, TheHintIsMendedWhenItsFolderIsMovedAway) {
  ASSERT_TRUE(Save(1).ok() && Save(2).ok());
  std::filesystem::rename(Step(2), dir_ + "/damaged-step-00000002");
  EXPECT_NE(CheckLatest(dir_), "");
  ASSERT_TRUE(MendLatest(dir_).ok());
  EXPECT_EQ(CheckLatest(dir_), "");
  std::filesystem::rename(Step(1), dir_ + "/damaged-step-00000001");
  ASSERT_TRUE(MendLatest(dir_).ok());
  EXPECT_EQ(CheckLatest(dir_), "");
  EXPECT_FALSE(Exists(dir_ + "/latest"));
}

TEST_F(CheckpointTest, ALoadCountsItsBytesAndEndsWhenToldTo) {
  ASSERT_TRUE(Save(1).ok());
  const auto checkpoint = OpenCheckpoint(Step(1));
  State state = SmallState();
  int64_t bytes = 0, calls = 0, last = -1;
  for (const CheckpointBox& box : state.boxes) bytes += box.bytes();
  const auto count = [&](int64_t done, int64_t total) {
    EXPECT_EQ(total, bytes);
    EXPECT_GT(done, last);
    last = done;
    return ++calls < 5 ? absl::OkStatus() : Error(ExitCode::kStopped, "enough");
  };
  EXPECT_EQ(ExitCodeOf(LoadBoxes(*checkpoint, state.boxes, Context(), count)), ExitCode::kStopped);
  EXPECT_EQ(calls, 5);
  // A search does not take it for damage.
  std::vector<PassedOver> passed;
  const auto load = [&](const Checkpoint& c) {
    last = -1;
    return LoadBoxes(c, state.boxes, Context(), count);
  };
  EXPECT_EQ(ExitCodeOf(LoadNewestWhole(*ListCheckpoints(dir_), load, &passed).status()),
            ExitCode::kStopped);
}

TEST_F(CheckpointTest, AFailedSaveHarmsNothingAndNamesSpace) {
  ASSERT_TRUE(Save(1).ok());
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 3000;  // below the size of the shard
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = Save(2);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(status), AllOf(HasSubstr("cannot save " + Step(2)),
                                       HasSubstr("bytes needed"), HasSubstr("free)")));
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000001"));
  EXPECT_EQ(LoadedStep(Step(1)), 1);

  // More than any disk holds: refused before anything is written.
  State huge;
  huge.AddWhole("weight", "x", DType::kF32, {1});
  huge.boxes[0].shape = huge.boxes[0].extent = {int64_t{1} << 55};
  const absl::Status full = SaveCheckpoint({dir_, 2, ""}, SmallMeta(3), huge.boxes);
  EXPECT_EQ(ExitCodeOf(full), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(full), HasSubstr("not enough space"));
  EXPECT_EQ(ExitCodeOf(CheckCanSave(dir_, int64_t{1} << 60)), ExitCode::kCannotSave);
  EXPECT_TRUE(CheckCanSave(root_ + "/new/folder", 1000).ok());
  EXPECT_THAT(*ListDirectory(root_ + "/new/folder", ExitCode::kData), IsEmpty());
  EXPECT_EQ(ExitCodeOf(CheckCanSave(dir_ + "/latest/x", 1)), ExitCode::kCannotSave);

  // Boxes that leave a hole are a bug, found before anything is published.
  State hole;
  hole.Add("weight", "x", DType::kF32, {4}, {0}, {3});
  const absl::Status bug = SaveCheckpoint({dir_, 2, ""}, SmallMeta(4), hole.boxes);
  EXPECT_EQ(ExitCodeOf(bug), ExitCode::kInternal);
  EXPECT_THAT(Names(), ElementsAre("latest", "step-00000001"));
}

TEST_F(CheckpointTest, RunLockRefusesASecondProcess) {
  auto lock = RunLock::Acquire(root_ + "/run");
  ASSERT_TRUE(lock.ok()) << lock.status();
  const pid_t child = fork();
  if (child == 0) {
    const auto second = RunLock::Acquire(root_ + "/run");
    const bool named =
        MessageOf(second.status()).find("pid " + std::to_string(getppid())) != std::string::npos;
    _exit(!second.ok() && ExitCodeOf(second.status()) == ExitCode::kConfig && named ? 0 : 1);
  }
  int result = 1;
  ASSERT_EQ(waitpid(child, &result, 0), child);
  EXPECT_EQ(result, 0);
  // Free again when the holder is gone.
  *lock = RunLock();
  EXPECT_TRUE(RunLock::Acquire(root_ + "/run").ok());
  EXPECT_EQ(ExitCodeOf(RunLock::Acquire("/proc/none").status()), ExitCode::kCannotSave);
}

TEST_F(CheckpointTest, AsynchronousSavesWriteACopyAndNeverInterleave) {
  State state = SmallState(200);
  std::vector<char> staging(static_cast<size_t>(AsyncSaver::StagingBytes(state.boxes)));
  AsyncSaver saver;
  EXPECT_FALSE(saver.Poll().has_value());
  EXPECT_TRUE(saver.Wait().ok());
  for (int64_t step = 1; step <= 4; ++step) {
    Fill(step, &state);
    const absl::Status started = saver.Start({dir_, 4, ""}, SmallMeta(step), state.boxes,
                                             staging.data(), static_cast<int64_t>(staging.size()));
    ASSERT_TRUE(started.ok()) << started;
    Fill(99, &state);  // the training goes on
  }
  EXPECT_TRUE(saver.busy());
  std::optional<absl::Status> result;
  while (!(result = saver.Poll()).has_value()) usleep(1000);
  EXPECT_TRUE(result->ok()) << *result;
  EXPECT_FALSE(saver.busy());
  for (int64_t step = 1; step <= 4; ++step) {
    auto checkpoint = OpenCheckpoint(Step(step));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ASSERT_TRUE(LoadBoxes(*checkpoint, state.boxes).ok());
    EXPECT_TRUE(Holds(step, state));
  }
  // A failure that shows while writing comes out of the next call, which starts nothing.
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 3000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto start = [&](const std::string& dir, int64_t step) {
    return saver.Start({dir, 4, ""}, SmallMeta(step), state.boxes, staging.data(),
                       static_cast<int64_t>(staging.size()));
  };
  const absl::Status started = start(dir_, 5);
  while (!saver.ready()) usleep(1000);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_TRUE(started.ok()) << started;
  const absl::Status failed = start(dir_, 6);
  EXPECT_EQ(ExitCodeOf(failed), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(failed), HasSubstr("cannot save " + Step(5)));
  EXPECT_FALSE(saver.busy());
  EXPECT_FALSE(Exists(Step(6)));
  // One that shows before is Start's own.
  EXPECT_EQ(ExitCodeOf(start(dir_ + "/latest", 7)), ExitCode::kCannotSave);
  EXPECT_FALSE(saver.busy());
  EXPECT_TRUE(start(dir_, 8).ok() && saver.Wait().ok());
  EXPECT_EQ(OpenCheckpoint(Step(8))->save_id, saver.save_id());
}

}  // namespace
}  // namespace krait
