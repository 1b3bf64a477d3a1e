// What checkpoint_speed_test measures, with several ranks at once: the state of a model of 100M
// parameters, and where each rank has a GPU a save of one of 1B from there. By hand:
//   mpirun -n 4 trainer_checkpoint_checkpoint_speed_ranks_test
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/arena.h"
#include "kernels/base/file.h"
#include "kernels/cuda/runtime.h"
#include "model/layout.h"
#include "support/gpu_ranks.h"
#include "support/ranks.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"
#include "trainer/config/config.h"

namespace krait::testing {
namespace {

constexpr char kModel[] = R"(
model:
  vocab_size: 32000
  d_model: 768
  n_layers: 8
  mixer: {ratio: "1:7"}
  attention: {heads: 12}
  mlp: {d_ff: 2816}
data: {train: [{path: x.h5}]}
train: {steps: 10000}
)";
// Of 1B parameters, as changes to the one above.
const std::vector<std::string> kLarge = {"model.d_model=2048", "model.n_layers=16",
                                         "model.attention.heads=16", "model.mlp.d_ff=5632"};

// What the rank of a mesh owns.
testing_checkpoint::State Owned(const ParamTable& table, const Mesh& mesh) {
  testing_checkpoint::State state;
  const Layout layout(&table, mesh);
  for (const char* slot : {"weight", "exp_avg", "exp_avg_sq"}) {
    for (const OwnedBox& part : layout.Owned()) {
      const Param& param = table.params()[part.box.param];
      state.Add(slot, param.name, DType::kF32, param.shape, part.box.offset, part.box.extent);
    }
  }
  for (auto& memory : state.memory) std::fill(memory.begin(), memory.end(), 'x');
  return state;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Has the system read a file from the disk again.
void DropFromCache(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0) << path;
  EXPECT_EQ(fdatasync(fd), 0);
  EXPECT_EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
  close(fd);
}

class CheckpointSpeedRanksTest : public ::testing::Test {
 protected:
  // Of the slowest rank, from a common start.
  template <typename Fn>
  double Seconds(const Fn& fn) {
    world_->Barrier();
    const auto start = std::chrono::steady_clock::now();
    fn();
    const auto taken = std::chrono::steady_clock::now() - start;
    const std::vector<int64_t> all = world_->AllGather(
        int64_t{std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count()});
    return static_cast<double>(*std::max_element(all.begin(), all.end())) * 1e-9;
  }
  World* const world_ = TestWorld();
};

TEST_F(CheckpointSpeedRanksTest, AgainstPlainWriteReadAndCopy) {
  const auto config = ParseConfig(kModel, "model", {}, ConfigUse::kPlan, world_->size());
  ASSERT_TRUE(config.ok()) << config.status();
  Mesh mesh{.data = world_->size(), .rank = world_->rank()};
  const ParamTable table(config->model, mesh.tensor);
  testing_checkpoint::State state = Owned(table, mesh);
  // Another layout of as many ranks.
  Mesh other{.tensor = world_->size(), .rank = world_->rank()};
  const ParamTable other_table(config->model, other.tensor);
  testing_checkpoint::State elsewhere = Owned(other_table, other);
  const std::string root =
      world_->Broadcast(::testing::TempDir() + "krait_speed_ranks_" + std::to_string(getpid()));
  if (world_->first()) std::filesystem::create_directories(root);
  world_->Barrier();
  const int64_t bytes = AsyncSaver::StagingBytes(state.boxes);
  int64_t total = 0;
  for (const int64_t of_rank : world_->AllGather(bytes)) total += of_rank;
  std::vector<char> staging(static_cast<size_t>(bytes), 0);
  const std::string plain = root + "/plain-" + std::to_string(world_->rank());
  const std::string dir = root + "/checkpoints";
  const CheckpointMeta meta = testing_checkpoint::SmallMeta(1);

  std::vector<double> plain_write, save, plain_read, plain_cold, open, load, load_cold, load_other,
      copy, stall;
  int64_t touched = 0;  // bytes that this rank reads under the other layout
  for (int round = 0; round < 5; ++round) {
    plain_write.push_back(Seconds([&] {
      auto file = File::Create(plain, false, ExitCode::kCannotSave);
      int64_t at = 0;
      for (const auto& memory : state.memory) {
        ASSERT_TRUE(file->WriteAt(memory.data(), memory.size(), at).ok());
        at += static_cast<int64_t>(memory.size());
      }
      ASSERT_TRUE(file->Sync().ok());
    }));
    const auto read_plain = [&] {
      auto file = File::OpenRead(plain, ExitCode::kData);
      int64_t at = 0;
      for (auto& memory : state.memory) {
        ASSERT_TRUE(file->ReadAt(memory.data(), memory.size(), at).ok());
        at += static_cast<int64_t>(memory.size());
      }
    };
    plain_read.push_back(Seconds(read_plain));
    DropFromCache(plain);
    plain_cold.push_back(Seconds(read_plain));
    std::filesystem::remove(plain);
    save.push_back(Seconds([&] {
      const absl::Status status =
          SaveCheckpoint({dir, 2, ""}, meta, state.boxes, nullptr, nullptr, world_);
      ASSERT_TRUE(status.ok()) << status;
    }));
    const auto read = [&](testing_checkpoint::State* into) {
      const auto checkpoint = OpenCheckpoint(dir + "/" + StepFolderName(1), world_);
      ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
      const Progress count = [&](int64_t, int64_t all_bytes) {
        touched = all_bytes;
        return absl::OkStatus();
      };
      ASSERT_TRUE(LoadBoxes(*checkpoint, into->boxes, Context(), count).ok());
    };
    open.push_back(
        Seconds([&] { ASSERT_TRUE(OpenCheckpoint(dir + "/" + StepFolderName(1), world_).ok()); }));
    load.push_back(Seconds([&] { read(&state); }));
    world_->Barrier();
    if (world_->first()) {
      for (const auto& entry : std::filesystem::recursive_directory_iterator(dir)) {
        if (entry.is_regular_file()) DropFromCache(entry.path());
      }
    }
    load_cold.push_back(Seconds([&] { read(&state); }));
    load_other.push_back(Seconds([&] { read(&elsewhere); }));
    copy.push_back(Seconds([&] {
      char* to = staging.data();
      for (const auto& memory : state.memory) {
        std::memcpy(to, memory.data(), memory.size());
        to += memory.size();
      }
    }));
    AsyncSaver saver(world_);
    stall.push_back(Seconds([&] {
      ASSERT_TRUE(saver.Start({dir, 2, ""}, meta, state.boxes, staging.data(), bytes).ok());
    }));
    ASSERT_TRUE(saver.Wait().ok());
    world_->Barrier();
    if (world_->first()) std::filesystem::remove_all(dir);
  }
  int64_t all_touched = 0;
  for (const int64_t of_rank : world_->AllGather(touched)) all_touched += of_rank;
  if (!world_->first()) return;
  std::filesystem::remove_all(root);
  const double gb = static_cast<double>(total) * 1e-9;
  absl::PrintF(
      "%d ranks, %.3f GB of %.1fM parameters, medians of 5:\n"
      "  save %.2f GB/s, plain write + fsync %.2f GB/s, ratio %.2f\n"
      "  load %.2f GB/s, under another layout (which reads %.2f times the "
      "bytes) %.2f GB/s, plain read %.2f GB/s (page cache), ratios "
      "%.2f, %.2f; opening takes %.1f ms of it\n"
      "  load from the disk %.2f GB/s, plain read %.2f GB/s, ratio %.2f\n"
      "  stall of a save in the background %.1f ms, plain copy %.1f ms, ratio %.2f\n",
      world_->size(), gb, static_cast<double>(table.total()) * 1e-6, gb / Median(save),
      gb / Median(plain_write), Median(plain_write) / Median(save), gb / Median(load),
      static_cast<double>(all_touched) / static_cast<double>(total), gb / Median(load_other),
      gb / Median(plain_read), Median(plain_read) / Median(load),
      Median(plain_read) / Median(load_other), 1e3 * Median(open), gb / Median(load_cold),
      gb / Median(plain_cold), Median(plain_cold) / Median(load_cold), 1e3 * Median(stall),
      1e3 * Median(copy), Median(stall) / Median(copy));
}

// The stall of a save from the GPUs against the copy to pinned memory alone, and the save against
// a plain write of as many bytes.
TEST_F(CheckpointSpeedRanksTest, FromGpus) {
  KRAIT_NEEDS_GPU_PER_RANK();
  const auto config = ParseConfig(kModel, "model", kLarge, ConfigUse::kPlan, world_->size());
  ASSERT_TRUE(config.ok()) << config.status();
  const Mesh mesh{.data = world_->size(), .rank = world_->rank()};
  const ParamTable table(config->model, mesh.tensor);
  testing_checkpoint::State state = Owned(table, mesh);
  const int64_t bytes = AsyncSaver::StagingBytes(state.boxes);
  Arena device("state", Device::kCuda, bytes + 256 * static_cast<int64_t>(state.boxes.size()));
  std::vector<CheckpointBox> boxes = state.boxes;
  for (CheckpointBox& box : boxes) {
    const Tensor there = device.Alloc(DType::kU8, {box.bytes()});
    cuda::CopyToDevice(there.raw(), box.data, box.bytes());
    box.data = there.raw();
    box.device = Device::kCuda;
  }
  Context ctx;
  ctx.device = Device::kCuda;
  std::vector<char> staging(static_cast<size_t>(bytes), 0);
  const cuda::PinnedHost pinned(staging.data(), bytes);
  EXPECT_TRUE(pinned.pinned());
  const std::string root =
      world_->Broadcast(::testing::TempDir() + "krait_speed_gpus_" + std::to_string(getpid()));
  if (world_->first()) std::filesystem::create_directories(root);
  world_->Barrier();
  const std::string plain = root + "/plain-" + std::to_string(world_->rank());
  const std::string dir = root + "/checkpoints";
  std::vector<double> copy, stall, save, plain_write;
  int64_t total = 0;
  for (const int64_t of_rank : world_->AllGather(bytes)) total += of_rank;
  for (int round = 0; round < 2; ++round) {
    copy.push_back(Seconds([&] {
      cuda::CopyToHost(staging.data(), boxes.front().data, std::min(bytes, device.capacity()));
    }));
    plain_write.push_back(Seconds([&] {
      auto file = File::Create(plain, false, ExitCode::kCannotSave);
      ASSERT_TRUE(file->WriteAt(staging.data(), staging.size(), 0).ok());
      ASSERT_TRUE(file->Sync().ok());
    }));
    std::filesystem::remove(plain);
    AsyncSaver saver(world_);
    save.push_back(Seconds([&] {
      stall.push_back(Seconds([&] {
        ASSERT_TRUE(saver
                        .Start({dir, 2, ""}, testing_checkpoint::SmallMeta(1), boxes,
                               staging.data(), bytes, ctx)
                        .ok());
      }));
      ASSERT_TRUE(saver.Wait().ok());
    }));
    world_->Barrier();
    if (world_->first()) std::filesystem::remove_all(dir);
    world_->Barrier();
  }
  if (!world_->first()) return;
  std::filesystem::remove_all(root);
  const double gb = static_cast<double>(total) * 1e-9;
  absl::PrintF(
      "%d GPUs, %.3f GB of %.1fM parameters, the second of two rounds:\n"
      "  stall of a save in the background %.0f ms, copy to pinned memory %.0f ms (%.1f GB/s "
      "each), "
      "ratio %.2f\n"
      "  the save, copy included, %.2f GB/s, plain write + fsync %.2f GB/s; write alone against it "
      "%.2f\n",
      world_->size(), gb, static_cast<double>(table.total()) * 1e-6, 1e3 * Median(stall),
      1e3 * Median(copy), static_cast<double>(bytes) * 1e-9 / Median(copy),
      Median(stall) / Median(copy), gb / Median(save), gb / Median(plain_write),
      Median(plain_write) / (Median(save) - Median(stall)));
}

}  // namespace
}  // namespace krait::testing
