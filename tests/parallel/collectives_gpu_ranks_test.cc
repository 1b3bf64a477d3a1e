// The collectives on CUDA tensors, over NCCL, against the same on CPU tensors, over MPI: equal
// bits.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "kernels/activation.h"
#include "kernels/transfer.h"
#include "parallel/gpu.h"
#include "parallel/groups.h"
#include "parallel/peer_memory.h"
#include "support/gpu_ranks.h"
#include "support/gradcheck.h"
#include "support/on_gpu.h"
#include "support/ranks.h"

namespace krait::testing {
namespace {

class GpuCollectivesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    KRAIT_NEEDS_GPU_PER_RANK();
    gpu_.emplace();
    const Mesh mesh{.data = size(), .rank = rank()};
    on_cpu_.emplace(TestWorld(), mesh, 1.5, Device::kCpu);
    on_gpu_.emplace(TestWorld(), mesh, 1.5, Device::kCuda);
  }
  static int rank() { return TestWorld()->rank(); }
  static int size() { return TestWorld()->size(); }
  static void FillWithRanks(Buf* buf) {
    for (int64_t i = 0; i < buf->tensor().numel(); ++i) {
      Set(*buf, i, std::sin(1 + 7 * rank() + static_cast<double>(i)) * 1000);
    }
  }
  using Call = std::function<void(const Communicator&, Tensor out, Tensor in, const Context&)>;
  // Operands of these shapes through the call on both devices; `out` has values before, too.
  void Compare(DType dtype, const std::vector<int64_t>& out_shape,
               const std::vector<int64_t>& in_shape, const Call& call) {
    Buf expected(dtype, out_shape), actual(dtype, out_shape), in(dtype, in_shape);
    for (Buf* buf : {&expected, &actual, &in}) FillWithRanks(buf);
    // A NaN of the last rank.
    if (dtype == DType::kF32 && rank() == size() - 1) {
      for (Buf* buf : {&expected, &actual, &in}) Set(*buf, 0, std::nan(""));
    }
    {
      const OnGpu in_gpu(in);
      OnGpu out_gpu(actual);
      call(on_cpu_->stage(), expected, in, cpu_);
      call(on_gpu_->stage(), out_gpu, in_gpu, *gpu_);
      out_gpu.Download();
    }
    for (int64_t i = 0; i < expected.tensor().numel(); ++i) {
      const double a = Get(actual, i), e = Get(expected, i);
      ASSERT_TRUE(a == e || (std::isnan(a) && std::isnan(e)))
          << Name(dtype) << " element " << i << ": " << a << ", not " << e;
    }
  }

  TestContext cpu_;
  std::optional<GpuContext> gpu_;
  std::optional<Groups> on_cpu_, on_gpu_;
};

constexpr DType kFloats[] = {DType::kF32, DType::kBF16};

TEST_F(GpuCollectivesTest, SumsHaveTheBitsOfTheCpus) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64, DType::kI64}) {
    for (const int64_t n : {1, 5, 4096, 100003}) {
      Compare(dtype, {n}, {1}, [](const Communicator& ranks, Tensor out, Tensor, const Context& c) {
        ranks.AllReduceSum("sum", out, c);
      });
    }
  }
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t n : {1, 7, 1024}) {
      Compare(dtype, {n, 3}, {size() * n, 3},
              [](const Communicator& ranks, Tensor out, Tensor in, const Context& ctx) {
                ranks.ReduceScatterSum("scattered sum", out, in, ctx);
              });
    }
  }
}

TEST_F(GpuCollectivesTest, TheMaximumKeepsNaN) {
  Compare(DType::kF32, {1000}, {1},
          [](const Communicator& ranks, Tensor out, Tensor, const Context& ctx) {
            ranks.AllReduceMax("maximum", out, ctx);
          });
}

TEST_F(GpuCollectivesTest, GathersAndRows) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI64}) {
    Compare(dtype, {size() * 5, 3}, {5, 3},
            [](const Communicator& ranks, Tensor out, Tensor in, const Context& ctx) {
              ranks.AllGather("gather", out, in, ctx);
            });
  }
  const auto [sends, receives, sent, received] = UnevenRows();
  Compare(DType::kBF16, {received + 1, 9}, {sent + 1, 9},
          [&](const Communicator& ranks, Tensor out, Tensor in, const Context& ctx) {
            ranks.ExchangeRows("rows", out, receives, in, sends, ctx);
          });
}

// Two streams and two communicators at once, each rank with other delays: no hang, right values.
TEST_F(GpuCollectivesTest, TrafficOnTwoStreams) {
  std::vector<int> all;
  for (int r = 0; r < size(); ++r) all.push_back(r);
  const Communicator beside = on_gpu_->Of(all);
  Context second = gpu_->ctx;
  second.stream = cuda::CreateStream(/*urgent=*/true);
  const int64_t n = 1 << 20;
  Buf ones(DType::kF32, {n});
  ones.Fill(1);
  OnGpu a(ones);
  Buf more(DType::kF32, {n});
  more.Fill(rank());
  OnGpu b(more);
  Arena scratch("scratch of the second stream", Device::kCuda, int64_t{64} << 20);
  second.scratch = &scratch;
  for (int i = 0; i < 10; ++i) {
    // Work that differs by rank, in front of one of the two.
    for (int k = 0; k < (rank() + i) % size() * 20; ++k) {
      cuda::Zero(gpu_->scratch.Alloc(DType::kU8, {1 << 20}).raw(), 1 << 20, gpu_->ctx.stream);
      gpu_->scratch.Release(0);
    }
    on_gpu_->expert().AllGather("nothing", a.tensor().Slice(0, 0, 1), a.tensor().Slice(0, 0, 1),
                                *gpu_);
    on_gpu_->stage().AllReduceSum("first", a, *gpu_);
    beside.AllReduceSum("second", b, second);
  }
  cuda::Synchronize();
  a.Download();
  b.Download();
  EXPECT_EQ(Get(ones, n - 1), std::pow(size(), 10));
  EXPECT_EQ(Get(more, 0), size() * (size() - 1) / 2.0 * std::pow(size(), 9));
  cuda::DestroyStream(second.stream);
}

// Ranks rewrite what others read, in turns that only the meetings keep apart.
TEST_F(GpuCollectivesTest, RanksReadEachOthersMemory) {
  const int64_t n = 1 << 18;
  Arena segment("a segment", Device::kCuda, int64_t{4} << 20);
  const Tensor unused = segment.Alloc(DType::kF32, {100 * (rank() + 1)});  // other offsets
  const Tensor region = segment.Alloc(DType::kF32, {n});
  std::vector<int> all;
  for (int r = 0; r < size(); ++r) all.push_back(r);
  PeerMemory peers(TestWorld(), {&segment}, {Tensor(), region, unused});
  if (!peers.Reaches(all)) GTEST_SKIP() << "these GPUs do not reach each other's memory";
  EXPECT_TRUE(peers.Reaches({rank()}));
  const Tensor seen = gpu_->scratch.Alloc(DType::kF32, {n});
  Buf host(DType::kF32, {n});
  for (int turn = 0; turn < 20; ++turn) {
    for (int k = 0; k < (rank() + turn) % size() * 10; ++k) Fill(seen, k, *gpu_);  // delays
    Fill(region, 100 * turn + rank(), *gpu_);
    peers.Meet(all, *gpu_);
    const int other = (rank() + 1 + turn) % size();
    if (other != rank()) {
      peers.Read(seen.raw(), other, 1, 0, region.bytes(), gpu_->ctx.stream);
    } else {
      Copy(seen, region, *gpu_);
    }
    peers.Meet(all, *gpu_);
    Download(host.tensor().raw(), seen, *gpu_);
    for (const int64_t i : {int64_t{0}, n / 2, n - 1}) {
      ASSERT_EQ(Get(host, i), 100 * turn + other) << "turn " << turn;
    }
  }
  gpu_->scratch.Release(0);
}

}  // namespace
}  // namespace krait::testing
