#include "parallel/collectives.h"

#include <gtest/gtest.h>

#include <vector>

namespace krait {
namespace {

TEST(OneRankCommunicator, GatherCopiesAndReduceKeeps) {
  auto comm = MakeOneRankCommunicator();
  EXPECT_EQ(comm->rank(), 0);
  EXPECT_EQ(comm->size(), 1);
  std::vector<float> in = {1, 2, 3}, out(3);
  const Context ctx;
  const Tensor in_view(in.data(), DType::kF32, Device::kCpu, {3});
  const Tensor out_view(out.data(), DType::kF32, Device::kCpu, {3});
  comm->AllReduceSum(in_view, ctx);
  comm->AllGather(out_view, in_view, ctx);
  EXPECT_EQ(out, (std::vector<float>{1, 2, 3}));
}

}  // namespace
}  // namespace krait
