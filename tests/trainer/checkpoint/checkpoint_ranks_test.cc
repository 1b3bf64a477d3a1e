// Checkpoints that several ranks write and any other number of ranks reads.
#include "trainer/checkpoint/checkpoint_ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "model/support/meshes.h"
#include "support/ranks.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_read.h"
#include "trainer/checkpoint/checkpoint_testing.h"
#include "trainer/checkpoint/checkpoint_tools.h"
#include "trainer/train/optimizer_state.h"

namespace krait::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using testing_checkpoint::Fill;
using testing_checkpoint::Holds;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::State;

// The first ranks of the job as a world of their own.
class PartOfWorld : public World {
 public:
  PartOfWorld(World* world, int size) : World(world->rank(), size, 0, 1, 0), world_(world) {}

 private:
  void Transfer(const std::vector<Message>& sends, const std::vector<Message>& receives,
                const std::function<void(int)>& /*waits_for*/) override {
    world_->Exchange(sends, receives);
  }
  World* world_;
};

// What a rank of a mesh owns, in memory of its own, as many small buckets give it: the moments in
// bf16.
State Owned(const ParamTable& table, const Mesh& mesh) {
  State state;
  const Layout layout(&table, mesh, kSmallBucket);
  for (const OwnedBox& part : layout.Owned()) {
    const Param& param = table.params()[part.box.param];
    const auto add = [&](const char* slot, DType dtype) {
      state.Add(slot, param.name, dtype, param.shape, part.box.offset, part.box.extent);
    };
    add("weight", DType::kF32);
    if (!param.trainable) continue;
    add("exp_avg", DType::kBF16);
    add("exp_avg_sq", DType::kBF16);
  }
  return state;
}

// The same in the memory of weights and optimizer, with masters beside bf16 weights.
class RankState {
 public:
  RankState(const ParamTable& table, const Mesh& mesh)
      : weights_(&table, {.compute = DType::kBF16}, true, &weight_arena_, &grad_arena_, mesh) {
    ctx_.scratch = &scratch_;
    OptimizerConfig config;
    config.moments = MomentDType::kBf16;
    optimizer_.emplace(&weights_, config, &arena_, ctx_);
    state.boxes = StateBoxes(weights_, &*optimizer_);
  }
  State state;

 private:
  Arena weight_arena_{"weights", Device::kCpu, 4 << 20};
  Arena grad_arena_{"gradients", Device::kCpu, 4 << 20};
  Arena arena_{"optimizer", Device::kCpu, 8 << 20};
  Arena scratch_{"scratch", Device::kCpu, 4 << 20};
  Context ctx_;
  Weights weights_;
  std::optional<OptimizerState> optimizer_;
};

class CheckpointRanksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = world_->Broadcast(testing_checkpoint::TempFolder("krait_checkpoint_ranks_test"));
    Remove();
  }
  void TearDown() override { Remove(); }
  void Remove() {
    world_->Barrier();
    if (world_->first()) std::filesystem::remove_all(dir_);
    world_->Barrier();
  }
  int rank() const { return world_->rank(); }
  int size() const { return world_->size(); }
  std::string Step(int64_t step) const { return dir_ + "/" + StepFolderName(step); }
  static std::string FileOf(int rank) { return "rank-0000" + std::to_string(rank) + ".h5"; }
  SaveOptions Options(const std::string& dir) const {
    SaveOptions options{dir, 3, ""};
    options.box_bytes = 4 << 10;
    return options;
  }

  // Rows of two tensors, as many as the rank's number and 3 more; a third of one rank alone.
  State Rows(int64_t scale = 1) const {
    State state;
    const auto rows = [&](int r) { return scale * (r + 3); };
    int64_t before = 0, all = 0;
    for (int r = 0; r < size(); ++r) {
      if (r < rank()) before += rows(r);
      all += rows(r);
    }
    for (const char* slot : {"weight", "exp_avg"}) {
      const DType dtype = slot[0] == 'w' ? DType::kF32 : DType::kBF16;
      state.Add(slot, "a.weight", dtype, {all, 7}, {before, 0}, {rows(rank()), 7});
      state.Add(slot, "b.weight", dtype, {2, all}, {0, before}, {2, rows(rank())});
      if (rank() == size() - 1) state.AddWhole(slot, "c", dtype, {5});
    }
    return state;
  }
  absl::Status Save(int64_t step) {
    State state = Rows();
    Fill(step, &state);
    return SaveCheckpoint(Options(dir_), SmallMeta(step), state.boxes, nullptr, nullptr, world_);
  }
  // The newest whole one, every bit compared; the step, the same on all ranks, or -1.
  int64_t Load(std::vector<PassedOver>* passed, absl::Status* error = nullptr) {
    State state = Rows();
    std::vector<std::string> folders;  // the first rank's count
    if (world_->first()) folders = *ListCheckpoints(dir_);
    const auto loaded = LoadNewestWhole(
        folders, [&](const Checkpoint& c) { return LoadBoxes(c, state.boxes); }, passed, world_);
    if (error != nullptr) *error = loaded.status();
    const int64_t step = loaded.ok() && Holds(loaded->meta.step, state) ? loaded->meta.step : -1;
    for (const int64_t other : world_->AllGather(step)) EXPECT_EQ(other, step);
    return step;
  }
  std::vector<std::string> Names() { return *ListDirectory(dir_, ExitCode::kData); }
  // Flips a bit, on the first rank.
  void Flip(const std::string& path, int64_t at) {
    world_->Barrier();
    if (world_->first()) {
      auto file = File::OpenWrite(path, ExitCode::kData);
      char byte = 0;
      EXPECT_TRUE(file->ReadAt(&byte, 1, at).ok());
      byte = static_cast<char>(byte ^ 4);
      EXPECT_TRUE(file->WriteAt(&byte, 1, at).ok());
    }
    world_->Barrier();
  }

  World* const world_ = TestWorld();
  std::string dir_;
};

TEST_F(CheckpointRanksTest, AnyLayoutLoadsWhatAnyOtherSaved) {
  int pairs = 0, number = 0;
  for (const ModelSpec& spec : MeshModels()) {
    std::vector<Mesh> meshes = MeshGrid(spec);
    std::erase_if(meshes, [&](const Mesh& mesh) { return mesh.world() > size(); });
    for (size_t i = 0; i < meshes.size(); ++i) {
      for (size_t j = i; j < meshes.size(); ++j) {
        Mesh a = meshes[i], b = meshes[j];
        // The others are those of fewer ranks. Of the 242 of four ranks every third: it takes a
        // while.
        if (std::max(a.world(), b.world()) < size()) continue;
        if (size() == 4 && number++ % 3 != 0) continue;
        SCOPED_TRACE(MeshName(a) + " to " + MeshName(b));
        ++pairs;
        a.rank = b.rank = rank();
        PartOfWorld world_a(world_, a.world()), world_b(world_, b.world());
        const ParamTable table_a(spec, a.tensor), table_b(spec, b.tensor);
        const std::string first = dir_ + "/first", second = dir_ + "/second";
        std::vector<PassedOver> passed;
        const auto load = [&](const std::string& dir, State* state, World* world) {
          Fill(99, state);
          return LoadNewestWhole(
                     {dir + "/" + StepFolderName(5)},
                     [&](const Checkpoint& c) { return LoadBoxes(c, state->boxes); }, &passed,
                     world)
              .status();
        };
        absl::Status status;
        if (rank() < a.world()) {
          State state = Owned(table_a, a);
          Fill(5, &state);
          status =
              SaveCheckpoint(Options(first), SmallMeta(5), state.boxes, nullptr, nullptr, &world_a);
        }
        ASSERT_TRUE(Agree(world_, status).ok()) << status;
        if (rank() < b.world()) {
          RankState loaded(table_b, b);
          status = load(first, &loaded.state, &world_b);
          EXPECT_TRUE(Holds(5, loaded.state));
          if (status.ok()) {
            status = SaveCheckpoint(Options(second), SmallMeta(5), loaded.state.boxes, nullptr,
                                    nullptr, &world_b);
          }
        }
        ASSERT_TRUE(Agree(world_, status).ok()) << status;
        if (rank() < a.world()) {
          State state = Owned(table_a, a);
          status = load(second, &state, &world_a);
          EXPECT_TRUE(Holds(5, state));
        }
        ASSERT_TRUE(Agree(world_, status).ok()) << status;
        if (!world_->first()) continue;
        const auto same = DiffCheckpoints(first, second, "", false);
        EXPECT_TRUE(same.ok() && same->code == ExitCode::kOk) << same.status();
        EXPECT_EQ(OpenCheckpoint(first + "/" + StepFolderName(5))->ranks, a.world());
      }
    }
  }
  if (world_->first()) std::printf("%d pairs of layouts\n", pairs);
  EXPECT_GE(pairs, size() == 4 ? 12 : 1);
}

TEST_F(CheckpointRanksTest, OneProcessReadsWhatTheRanksWrote) {
  ASSERT_TRUE(Save(1).ok());
  if (!world_->first()) return;
  std::vector<std::string> files = {"manifest.json"};
  for (int r = 0; r < size(); ++r) files.push_back(FileOf(r));
  EXPECT_EQ(*ListDirectory(Step(1), ExitCode::kData), files);
  EXPECT_EQ(*ReadFile(dir_ + "/latest", 100, ExitCode::kData), StepFolderName(1) + "\n");
  const auto report = VerifyCheckpoints({dir_}, false);
  EXPECT_EQ(report->code, ExitCode::kOk) << report->text;
  EXPECT_THAT(InspectCheckpoints({dir_}, false)->text,
              HasSubstr(", " + std::to_string(size()) + " rank"));
  const auto checkpoint = OpenCheckpoint(Step(1));
  State whole;
  for (const ManifestBox& box : checkpoint->boxes) {
    if (std::all_of(box.offset.begin(), box.offset.end(), [](int64_t at) { return at == 0; })) {
      whole.AddWhole(box.slot, box.name, box.dtype, box.shape);
    }
  }
  EXPECT_THAT(whole.boxes, SizeIs(6));
  ASSERT_TRUE(LoadBoxes(*checkpoint, whole.boxes).ok());
  EXPECT_TRUE(Holds(1, whole));
  // In pieces, from files that are open one at a time.
  for (CheckpointBox& box : whole.boxes) box.data = nullptr;
  const absl::Status streamed = StreamTensors(
      *checkpoint, whole.boxes, [&](size_t i, int64_t begin, int64_t, const void* values) {
        EXPECT_EQ(begin, 0);
        EXPECT_EQ(std::memcmp(values, whole.memory[i].data(), whole.memory[i].size()), 0);
        return absl::OkStatus();
      });
  EXPECT_TRUE(streamed.ok()) << streamed;
}

TEST_F(CheckpointRanksTest, RanksWithoutBoxesHaveNoFile) {
  State state;
  if (rank() == size() - 1) state.AddWhole("weight", "a", DType::kF32, {9});
  Fill(3, &state);
  ASSERT_TRUE(
      SaveCheckpoint(Options(dir_), SmallMeta(3), state.boxes, nullptr, nullptr, world_).ok());
  EXPECT_THAT(*ListDirectory(Step(3), ExitCode::kData),
              ::testing::ElementsAre("manifest.json", FileOf(size() - 1)));
  State other;  // of the first rank
  if (world_->first()) other.AddWhole("weight", "a", DType::kF32, {9});
  std::vector<PassedOver> passed;
  const auto loaded = LoadNewestWhole(
      {Step(3)}, [&](const Checkpoint& c) { return LoadBoxes(c, other.boxes); }, &passed, world_);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->ranks, size());
  EXPECT_TRUE(Holds(3, other));
}

TEST_F(CheckpointRanksTest, DamageInOneFileIsSeenByAllAndToldOnce) {
  for (int64_t step = 1; step <= 3; ++step) ASSERT_TRUE(Save(step).ok());
  const auto checkpoint = OpenCheckpoint(Step(3), world_);
  ASSERT_TRUE(checkpoint.ok());
  const std::string last = Step(3) + "/" + FileOf(size() - 1);
  // Of a box, which only the rank that reads it sees; of the table, which one rank reads for all;
  // of HDF5's own bytes; of the manifest.
  const std::vector<std::pair<std::string, int64_t>> damages = {
      {last, checkpoint->boxes.back().file_offset},
      {last, checkpoint->files.back().table_at + 30},
      {last, 20},
      {Step(3) + "/manifest.json", 40}};
  for (const auto& [path, at] : damages) {
    SCOPED_TRACE(path + " at " + std::to_string(at));
    Flip(path, at);
    std::vector<PassedOver> passed;
    EXPECT_EQ(Load(&passed), 2);
    ASSERT_THAT(passed, SizeIs(1));
    EXPECT_EQ(passed[0].path, Step(3));
    EXPECT_THAT(passed[0].reason, world_->first() ? HasSubstr(path) : HasSubstr(""));
    std::vector<std::string> notices;
    const auto loaded = LoadNewest(
        {Step(3), Step(1)},
        [&](const Checkpoint& c) {
          State state = Rows();
          return LoadBoxes(c, state.boxes);
        },
        [&](const std::string& line) { notices.push_back(line); }, nullptr, world_);
    EXPECT_EQ(loaded->meta.step, 1);
    EXPECT_THAT(notices, SizeIs(world_->first() ? 1 : 0));
    Flip(path, at);
  }
  std::vector<PassedOver> passed;
  EXPECT_EQ(Load(&passed), 3);
  EXPECT_THAT(passed, IsEmpty());
  // A file that is gone, from all of them: then there is none, with all reasons.
  world_->Barrier();
  if (world_->first()) {
    for (int64_t step = 1; step <= 3; ++step) {
      std::filesystem::remove(Step(step) + "/" + FileOf(size() - 1));
    }
  }
  world_->Barrier();
  absl::Status error;
  EXPECT_EQ(Load(&passed, &error), -1);
  EXPECT_EQ(ExitCodeOf(error), ExitCode::kNoCheckpoint);
  if (world_->first()) {
    EXPECT_THAT(MessageOf(error),
                AllOf(HasSubstr("no checkpoint is whole"), HasSubstr(last + " is missing"),
                      HasSubstr(Step(1) + "/" + FileOf(size() - 1) + " is missing")));
  }
}

TEST_F(CheckpointRanksTest, WhatDoesNotFitOneRankEndsTheSearchOfAll) {
  ASSERT_TRUE(Save(1).ok());
  std::vector<PassedOver> passed;
  const auto load = [&](const Checkpoint& c) {
    State state = Rows();
    if (rank() == size() - 1) state.AddWhole("weight", "d", DType::kF32, {1});
    return LoadBoxes(c, state.boxes);
  };
  const auto loaded = LoadNewestWhole({Step(1)}, load, &passed, world_);
  EXPECT_EQ(ExitCodeOf(loaded.status()), ExitCode::kConfig);
  EXPECT_THAT(passed, IsEmpty());
  EXPECT_THAT(MessageOf(loaded.status()),
              HasSubstr(world_->first() ? "'d' (weight) is not in" : ""));
  // One rank that cannot read is no damage for any.
  const absl::Status agreed =
      AgreeOnReading(world_, rank() == size() - 1 ? Unreadable("cannot read x") : absl::OkStatus());
  EXPECT_TRUE(IsUnreadable(agreed));
}

TEST_F(CheckpointRanksTest, TheWordOfTheFirstRankIsThatOfAll) {
  const auto paths =
      PathsOfFirst(world_, world_->first() ? std::vector<std::string>{"a\nb", "", "c"}
                                           : std::vector<std::string>{"other"});
  EXPECT_THAT(*paths, ::testing::ElementsAre("a\nb", "", "c"));
  EXPECT_TRUE(
      StatusOfFirst(world_, rank() == 0 ? absl::OkStatus() : Error(ExitCode::kData, "unheard"))
          .ok());
  const absl::Status all =
      StatusOfFirst(world_, rank() == 0 ? Error(ExitCode::kData, "x") : absl::OkStatus());
  EXPECT_EQ(ExitCodeOf(all), ExitCode::kData);
  EXPECT_EQ(MessageOf(all), rank() == 0 ? "x" : "");
}

TEST_F(CheckpointRanksTest, AFailedWriteOfOneRankFailsTheSaveOfAll) {
  ASSERT_TRUE(Save(1).ok());
  State state = Rows(200);
  std::vector<char> staging(static_cast<size_t>(AsyncSaver::StagingBytes(state.boxes)));
  for (const bool background : {false, true}) {
    for (int r = 0; r < size(); ++r) {
      SCOPED_TRACE("rank " + std::to_string(r) + (background ? ", in the background" : ""));
      rlimit before;
      ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
      rlimit small = before;
      // Above a manifest, below a rank's file.
      if (rank() == r) small.rlim_cur = 8000;
      ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
      absl::Status status;
      if (background) {
        AsyncSaver saver(world_);
        status = saver.Start(Options(dir_), SmallMeta(2), state.boxes, staging.data(),
                             static_cast<int64_t>(staging.size()));
        EXPECT_TRUE(status.ok());
        std::optional<absl::Status> ended;
        while (!(ended = saver.Poll()).has_value()) usleep(1000);
        status = *ended;
        EXPECT_FALSE(saver.busy());
      } else {
        status = SaveCheckpoint(Options(dir_), SmallMeta(2), state.boxes, nullptr, nullptr, world_);
      }
      ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
      EXPECT_EQ(ExitCodeOf(status), ExitCode::kCannotSave);
      if (world_->first()) {
        EXPECT_THAT(MessageOf(status),
                    AllOf(HasSubstr("cannot save " + Step(2) + ": "), HasSubstr(FileOf(r)),
                          HasSubstr("File too large"), HasSubstr("bytes needed")));
      }
      EXPECT_THAT(Names(), ::testing::ElementsAre("latest", StepFolderName(1)));
      std::vector<PassedOver> passed;
      EXPECT_EQ(Load(&passed), 1);
    }
  }
  ASSERT_TRUE(Save(2).ok());
  std::vector<PassedOver> passed;
  EXPECT_EQ(Load(&passed), 2);
}

TEST_F(CheckpointRanksTest, WhatCannotBeginIsAnErrorOfAll) {
  if (world_->first()) {
    std::filesystem::create_directories(dir_);
    ASSERT_TRUE(WriteFileAtomic(dir_ + "/file", "", ExitCode::kData).ok());
  }
  State state = Rows();
  const absl::Status status =
      SaveCheckpoint(Options(dir_ + "/file"), SmallMeta(2), state.boxes, nullptr, nullptr, world_);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kCannotSave);
  // Together more than the disk has, though no rank alone may have.
  State huge;
  huge.Add("weight", "x", DType::kF32, {size()}, {rank()}, {1});
  huge.boxes[0].shape = {size() * (int64_t{1} << 50)};
  huge.boxes[0].extent = {int64_t{1} << 50};
  const absl::Status full =
      SaveCheckpoint(Options(dir_), SmallMeta(3), huge.boxes, nullptr, nullptr, world_);
  EXPECT_EQ(ExitCodeOf(full), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(full), HasSubstr(world_->first() ? "not enough space" : ""));
  // Boxes that two ranks write are found before anything is published.
  State twice;
  twice.AddWhole("weight", "x", DType::kF32, {4});
  const absl::Status bug =
      SaveCheckpoint(Options(dir_), SmallMeta(4), twice.boxes, nullptr, nullptr, world_);
  EXPECT_EQ(bug.ok(), size() == 1);
  if (size() == 1) return;
  EXPECT_EQ(ExitCodeOf(bug), ExitCode::kInternal);
  EXPECT_THAT(Names(), ::testing::ElementsAre("file"));
}

TEST_F(CheckpointRanksTest, SavesInTheBackground) {
  State state = Rows(300);
  std::vector<char> staging(static_cast<size_t>(AsyncSaver::StagingBytes(state.boxes)));
  AsyncSaver saver(world_);
  EXPECT_FALSE(saver.Poll().has_value());
  EXPECT_TRUE(saver.Wait().ok());
  const auto start = [&](int64_t step) {
    Fill(step, &state);
    const absl::Status status = saver.Start(Options(dir_), SmallMeta(step), state.boxes,
                                            staging.data(), static_cast<int64_t>(staging.size()));
    Fill(99, &state);  // the training goes on
    return status;
  };
  const auto holds = [&](int64_t step) {
    const auto checkpoint = OpenCheckpoint(Step(step), world_);
    return checkpoint.ok() && LoadBoxes(*checkpoint, state.boxes).ok() && Holds(step, state);
  };
  // One after the other, each waited for by the next.
  for (int64_t step = 1; step <= 3; ++step) ASSERT_TRUE(start(step).ok());
  EXPECT_TRUE(saver.busy());
  // Nothing is in place before the ranks have met, however long ago they were ready.
  if (size() > 1) {
    while (!saver.ready()) usleep(1000);
    world_->Barrier();
    EXPECT_FALSE(Exists(Step(3)));
  }
  world_->Barrier();
  std::optional<absl::Status> ended;
  while (!(ended = saver.Poll()).has_value()) usleep(1000);
  EXPECT_TRUE(ended->ok()) << *ended;
  EXPECT_FALSE(saver.busy());
  for (int64_t step = 1; step <= 3; ++step) EXPECT_TRUE(holds(step)) << step;
  EXPECT_EQ(ReadManifest(Step(3))->save_id, saver.save_id());
  // By a flag word of the caller's own.
  ASSERT_TRUE(start(4).ok());
  int boundaries = 0;
  for (ended.reset(); !ended.has_value(); ++boundaries) {
    const std::vector<int64_t> all = world_->AllGather(int64_t{saver.ready()});
    if (*std::min_element(all.begin(), all.end()) == 1) ended = saver.Advance();
    usleep(1000);
  }
  EXPECT_TRUE(ended->ok()) << *ended;
  EXPECT_GE(boundaries, size() > 1 ? 2 : 1);
  EXPECT_TRUE(holds(4));
  ASSERT_TRUE(start(5).ok());
  EXPECT_TRUE(saver.Wait().ok());
  EXPECT_TRUE(holds(5));
  EXPECT_THAT(Names(), ::testing::ElementsAre("latest", StepFolderName(3), StepFolderName(4),
                                              StepFolderName(5)));
}

}  // namespace
}  // namespace krait::testing
