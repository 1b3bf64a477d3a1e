#include "kernels/transfer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::SameBits;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;

// Contiguous, with padded rows, and slices of every dimension.
TEST(Transfer, RowMajorOrderWhateverTheStrides) {
  const TestContext ctx;
  const auto views = [](const Buf& whole) {
    const Tensor all = whole;
    return std::vector<Tensor>{all,
                               all.Slice(0, 1, 2),
                               all.Slice(1, 2, 3),
                               all.Slice(2, 1, 3),
                               all.Slice(1, 5, 1).Slice(2, 4, 1),
                               all.Slice(0, 2, 0)};
  };
  for (const int64_t pad : {0, 3}) {
    Buf whole(kF32, {4, 6, 5}, pad);
    whole.FillNormal(1);
    for (size_t k = 0; k < views(whole).size(); ++k) {
      const Tensor from = views(whole)[k];
      std::vector<float> values(static_cast<size_t>(from.numel()) + 1, -7);
      Download(values.data(), from, ctx);
      for (int64_t i = 0; i < from.numel(); ++i) {
        EXPECT_EQ(values[static_cast<size_t>(i)], static_cast<float>(Get(from, i)));
      }
      EXPECT_EQ(values.back(), -7);
      // And into the same place of another tensor, of which nothing else is written.
      Buf other(kF32, {4, 6, 5}, pad);
      other.Fill(100);
      const Tensor to = views(other)[k];
      Upload(to, values.data(), ctx);
      EXPECT_TRUE(SameBits(to, from));
      const std::vector<double> all = Values(other);
      EXPECT_EQ(std::count(all.begin(), all.end(), 100), 4 * 6 * 5 - from.numel());
      EXPECT_TRUE(other.PaddingIntact());
    }
  }
}

TEST(Transfer, IntegersAndEmptyTensors) {
  const TestContext ctx;
  Buf y(DType::kI64, {2, 2}, 1), none(kF32, {0, 3});
  const std::vector<int64_t> values = {1, -2, int64_t{1} << 40, 4};
  Upload(y, values.data(), ctx);
  std::vector<int64_t> back(4);
  Download(back.data(), y, ctx);
  EXPECT_EQ(back, values);
  Download(nullptr, none, ctx);
  Upload(none, nullptr, ctx);
}

TEST(Transfer, FloatsAndDoubles) {
  const TestContext ctx;
  const std::vector<double> values = {1.5, -2, 0x1p-20, INFINITY};
  for (const DType dtype : {kF32, kBF16, kF64}) {
    Buf y(dtype, {2, 2}, 1);
    y.Assign(values);
    EXPECT_EQ(DownloadFloats(y, ctx), (std::vector<float>{1.5, -2, 0x1p-20f, INFINITY}));
  }
  Buf y(kF64, {4});
  y.Assign({1 + 0x1p-50, 2, 3, 4});
  EXPECT_EQ(DownloadDoubles(y, ctx), (std::vector<double>{1 + 0x1p-50, 2, 3, 4}));
}

TEST(Transfer, PlanningTouchesNothing) {
  TestContext ctx;
  ctx.get()->planning = true;
  const Tensor t(nullptr, kF32, Device::kCpu, {4});
  float values[4] = {1, 1, 1, 1};
  Download(values, t, ctx);
  Upload(t, values, ctx);
  EXPECT_EQ(values[3], 1);
  EXPECT_EQ(DownloadFloats(t, ctx), std::vector<float>(4, 0));
}

TEST(TransferDeathTest, WrongTypesAreFatal) {
  const TestContext ctx;
  Buf floats(kF32, {1}), integers(DType::kI32, {1});
  EXPECT_DEATH(DownloadDoubles(floats, ctx), "check failed");
  EXPECT_DEATH(DownloadFloats(integers, ctx), "no floats in a tensor of i32");
}

}  // namespace
}  // namespace krait
