// Saving against a plain write and fsync of the same bytes, loading against a plain read, in turn
// in one run: absolute speeds of a disk swing, their ratio says more.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

template <typename Fn>
double Seconds(const Fn& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

TEST(CheckpointSpeedTest, LongAgainstPlainWriteAndRead) {
  const std::string root = ::testing::TempDir() + "krait_speed_" + std::to_string(getpid());
  std::filesystem::create_directories(root);
  testing_checkpoint::State state;
  for (int layer = 0; layer < 24; ++layer) {  // 3 slots of 24 x 16 MiB and small ones: 1.1 GiB
    for (const char* slot : {"weight", "exp_avg", "exp_avg_sq"}) {
      const std::string name = "model.layers." + std::to_string(layer);
      state.AddWhole(slot, name + ".feed_forward.up_proj.weight", DType::kF32, {2048, 2048});
      state.AddWhole(slot, name + ".input_layernorm.weight", DType::kF32, {1024});
    }
  }
  for (auto& memory : state.memory) std::fill(memory.begin(), memory.end(), 'x');
  const int64_t bytes = AsyncSaver::StagingBytes(state.boxes);

  std::vector<double> plain_write, save, plain_read, load;
  int64_t on_disk = 0;
  for (int round = 0; round < 5; ++round) {
    const std::string path = root + "/plain";
    plain_write.push_back(Seconds([&] {
      auto file = File::Create(path, false, ExitCode::kCannotSave);
      int64_t at = 0;
      for (const auto& memory : state.memory) {
        ASSERT_TRUE(file->WriteAt(memory.data(), memory.size(), at).ok());
        at += static_cast<int64_t>(memory.size());
      }
      ASSERT_TRUE(file->Sync().ok());
    }));
    plain_read.push_back(Seconds([&] {
      auto file = File::OpenRead(path, ExitCode::kData);
      int64_t at = 0;
      for (auto& memory : state.memory) {
        ASSERT_TRUE(file->ReadAt(memory.data(), memory.size(), at).ok());
        at += static_cast<int64_t>(memory.size());
      }
    }));
    std::filesystem::remove(path);
    const std::string dir = root + "/checkpoints";
    save.push_back(Seconds([&] {
      const absl::Status status =
          SaveCheckpoint({dir, 2, ""}, testing_checkpoint::SmallMeta(1), state.boxes);
      ASSERT_TRUE(status.ok()) << status;
    }));
    const auto checkpoint = OpenCheckpoint(dir + "/" + StepFolderName(1));
    ASSERT_TRUE(checkpoint.ok());
    load.push_back(Seconds([&] { ASSERT_TRUE(LoadBoxes(*checkpoint, state.boxes).ok()); }));
    on_disk = checkpoint->files[0].size;
    std::filesystem::remove_all(dir);
  }
  std::filesystem::remove_all(root);
  const double gb = static_cast<double>(bytes) * 1e-9;
  std::printf(
      "%.3f GB in %zu boxes, medians of 5:\n"
      "  save %.2f GB/s, plain write + fsync %.2f GB/s, ratio %.2f\n"
      "  load %.2f GB/s, plain read %.2f GB/s (page cache), ratio %.2f\n"
      "  size of the file over the payload: %.4f\n",
      gb, state.boxes.size(), gb / Median(save), gb / Median(plain_write),
      Median(plain_write) / Median(save), gb / Median(load), gb / Median(plain_read),
      Median(plain_read) / Median(load), static_cast<double>(on_disk) / static_cast<double>(bytes));
  EXPECT_LT(static_cast<double>(on_disk) / static_cast<double>(bytes), 1.01);
}

}  // namespace
}  // namespace krait
