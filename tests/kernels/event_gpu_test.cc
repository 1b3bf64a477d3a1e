// Streams, events, copies on a stream, and the times of a Profile.
#include <gtest/gtest.h>

#include "kernels/activation.h"
#include "kernels/event.h"
#include "kernels/transfer.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Get;
using testing::GpuContext;

TEST(EventGpu, AnotherStreamWaits) {
  KRAIT_NEEDS_GPU();
  GpuContext first, second;
  first.ctx.stream = cuda::CreateStream(), second.ctx.stream = cuda::CreateStream();
  Arena memory("test memory", Device::kCuda, int64_t{2} << 30);
  const Tensor slow = memory.Alloc(DType::kF32, {int64_t{1} << 28});
  const Tensor last = slow.Slice(0, slow.dim(0) - 8, 8);
  const Tensor out = memory.Alloc(DType::kF32, {8});
  Copy(out, last, second);  // the first launch loads the kernel and waits for the device
  Event done;
  done.Wait(second);  // nothing has been recorded: returns, and nothing waits
  for (const bool waits : {false, true}) {
    Fill(slow, 0, first), Fill(out, 0, second);
    cuda::Synchronize();
    for (int i = 1; i <= 20; ++i) Fill(slow, i, first);  // about 5 ms
    done.Record(first);
    if (waits) done.Wait(second);
    Copy(out, last, second);
    const float seen = DownloadFloats(out, second)[0];
    if (waits) {
      EXPECT_EQ(seen, 20);
    } else {
      EXPECT_LT(seen, 20) << "the streams do not run side by side, so that the test shows nothing";
    }
    cuda::Synchronize();
  }
  cuda::DestroyStream(first.ctx.stream), cuda::DestroyStream(second.ctx.stream);
}

TEST(EventGpu, NothingOnTheCpu) {
  testing::TestContext cpu;
  Event event;
  event.Record(cpu);
  event.Wait(cpu);
}

TEST(ProfileGpu, TimesAreThoseOfTheStream) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  Arena memory("test memory", Device::kCuda, int64_t{1} << 30);
  const Tensor y = memory.Alloc(DType::kF32, {int64_t{1} << 28});
  Fill(y, 1, gpu);  // the first launch loads the kernel
  cuda::Synchronize();
  Profile profile;
  gpu.ctx.profile = &profile;
  for (int round = 1; round <= 2; ++round) {
    for (int i = 0; i < 10; ++i) Fill(y, 1, gpu);
    profile.Collect();
    const Profile::Op fill = profile.Total(OpFamily::kOther);
    EXPECT_EQ(fill.calls, 10 * round);
    // 2^30 bytes each, which no memory takes in less than 0.1 ms; a call costs microseconds.
    EXPECT_GT(fill.seconds, round * 10 * 1e-4);
    EXPECT_LT(fill.seconds, round * 10 * 1e-2);
  }
}

TEST(EventGpu, NumbersOfTheHostAreNotWaitedFor) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  const Tensor numbers = gpu.scratch.Alloc(DType::kI64, {1000});
  std::vector<int64_t> values(1000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int64_t>(i * i) - 5;
  const std::vector<int64_t> expected = values;
  UploadNumbers(numbers, values, gpu);
  values.assign(1000, 0);  // the caller's again
  std::vector<int64_t> seen(1000);
  Download(seen.data(), numbers, gpu);
  EXPECT_EQ(seen, expected);
  gpu.scratch.Release(0);
}

}  // namespace
}  // namespace krait
