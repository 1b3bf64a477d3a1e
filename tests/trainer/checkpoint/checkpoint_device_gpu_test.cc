// Checkpoints of state in device memory: saved through a host copy, loaded in pieces.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "kernels/cuda/runtime.h"
#include "kernels/transfer.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

using testing_checkpoint::Fill;
using testing_checkpoint::Holds;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

// Boxes like those of `host`, in device memory that starts as zeros.
class OnDevice {
 public:
  explicit OnDevice(const State& host) : boxes(host.boxes) {
    for (CheckpointBox& box : boxes) {
      box.data = cuda::Allocate(box.bytes(), "a test box");
      box.device = Device::kCuda;
    }
    ctx.device = Device::kCuda;
  }
  ~OnDevice() {
    for (const CheckpointBox& box : boxes) cuda::Free(box.data);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void From(const State& host) {
    for (size_t i = 0; i < boxes.size(); ++i) Upload(boxes[i].values(), host.boxes[i].data, ctx);
  }
  void To(State* host) const {
    for (size_t i = 0; i < boxes.size(); ++i) Download(host->boxes[i].data, boxes[i].values(), ctx);
  }

  std::vector<CheckpointBox> boxes;
  Context ctx;
};

class CheckpointDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
    std::filesystem::remove_all(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string Step(int64_t step) const { return dir_ + "/" + StepFolderName(step); }

  const std::string dir_ = testing_checkpoint::TempFolder("krait_checkpoint_device_test");
};

TEST_F(CheckpointDeviceTest, SavesACopyAndLoadsBackEveryBit) {
  // Rows enough that a box takes several pieces of the reader.
  State host = SmallState(20000);
  OnDevice device(host);
  std::vector<char> staging(static_cast<size_t>(AsyncSaver::StagingBytes(device.boxes)));
  AsyncSaver saver;
  for (int64_t step = 1; step <= 2; ++step) {
    Fill(step, &host);
    device.From(host);
    const absl::Status started =
        saver.Start({dir_, 2, ""}, SmallMeta(step), device.boxes, staging.data(),
                    static_cast<int64_t>(staging.size()), device.ctx);
    ASSERT_TRUE(started.ok()) << started;
    Fill(99, &host);
    device.From(host);  // the training goes on
  }
  ASSERT_TRUE(saver.Wait().ok());
  for (int64_t step = 1; step <= 2; ++step) {
    auto checkpoint = OpenCheckpoint(Step(step));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ASSERT_TRUE(LoadBoxes(*checkpoint, device.boxes, device.ctx).ok());
    Fill(99, &host);
    device.To(&host);
    EXPECT_TRUE(Holds(step, host)) << step;
    // A host loads the same file.
    Fill(99, &host);
    ASSERT_TRUE(LoadBoxes(*checkpoint, host.boxes).ok());
    EXPECT_TRUE(Holds(step, host)) << step;
  }
}

TEST_F(CheckpointDeviceTest, OtherTilingsAndDtypesLandWhereTheHostsDo) {
  const std::vector<int64_t> shape = {700, 301};
  State saved;
  saved.Add("weight", "x", DType::kF32, shape, {0, 0}, {700, 100});
  saved.Add("weight", "x", DType::kF32, shape, {0, 100}, {700, 201});
  saved.AddWhole("weight", "half", DType::kBF16, shape);
  Fill(1, &saved);
  ASSERT_TRUE(SaveCheckpoint({dir_, 2, ""}, SmallMeta(1), saved.boxes).ok());
  auto checkpoint = OpenCheckpoint(Step(1));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    State host;
    for (const std::string name : {"x", "half"}) {
      host.Add("weight", name, dtype, shape, {0, 0}, {351, 301});
      host.Add("weight", name, dtype, shape, {351, 0}, {349, 150});
    }
    ASSERT_TRUE(LoadBoxes(*checkpoint, host.boxes).ok());
    const std::vector<std::vector<char>> want = host.memory;
    OnDevice device(host);
    ASSERT_TRUE(LoadBoxes(*checkpoint, device.boxes, device.ctx).ok());
    Fill(99, &host);
    device.To(&host);
    EXPECT_EQ(host.memory, want) << Name(dtype);
  }
}

}  // namespace
}  // namespace krait
