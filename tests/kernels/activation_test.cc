#include "kernels/activation.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::Set;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;

TEST(AddInPlace, DenseAndStridedRows) {
  const TestContext ctx;
  for (DType dtype : {kF32, kF64, kBF16}) {
    for (const int64_t pad : {0, 3}) {
      Buf x(dtype, {3, 50, 401}, pad), y(dtype, {3, 50, 401}, 2 * pad);
      // Sums of up to 8 bits: exact in bf16 too.
      x.FillIntegers(1, -100, 100);
      y.FillIntegers(2, -100, 100);
      std::vector<double> expected = Values(y);
      const std::vector<double> added = Values(x);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] += added[i];
      AddInPlace(y, x, ctx);
      EXPECT_EQ(Values(y), expected);
      EXPECT_TRUE(y.PaddingIntact());
    }
  }
}

// The addition is f32 and rounded once: 256 + 1 is a tie in bf16 and goes to the even neighbour,
// and a bf16 summand does not round an f32 sum.
TEST(AddInPlace, BFloat16) {
  const TestContext ctx;
  Buf y(kBF16, {3}), x(kBF16, {3}), wide(kF32, {3});
  y.Assign({256, 256, 258});
  x.Assign({1, 3, 1});
  wide.Assign({256, 0x1p-20, -1});
  AddInPlace(wide, x, ctx);
  AddInPlace(y, x, ctx);
  EXPECT_EQ(Values(y), (std::vector<double>{256, 260, 260}));
  EXPECT_EQ(Values(wide), (std::vector<double>{257, 3 + 0x1p-20, 0}));
}

TEST(Copy, SlicesInEveryDimensionAndAnyType) {
  const TestContext ctx;
  // A key/value cache: rows [b, begin + t] of [B, S, G, P].
  for (DType dtype : {kF32, kF64, kBF16, DType::kI32, DType::kI64}) {
    Buf cache(dtype, {2, 9, 3, 4}), fresh(dtype, {2, 2, 3, 4}, 1), back(dtype, {2, 2, 3, 4});
    fresh.FillIntegers(1, -50, 50);
    Copy(cache.tensor().Slice(1, 5, 2), fresh, ctx);
    Copy(back, cache.tensor().Slice(1, 5, 2), ctx);
    EXPECT_EQ(Values(back), Values(fresh));
    EXPECT_EQ(Get(cache.tensor().Slice(1, 7, 1), 0), 0);
    EXPECT_EQ(Get(cache.tensor().Slice(1, 4, 1), 11), 0);
  }
}

// Between floating types values are rounded to nearest even, dense or with strided rows.
TEST(Copy, ConvertsBetweenFloatingTypes) {
  const TestContext ctx;
  const std::vector<double> values = {1 + 0x1p-8,  1 + 3 * 0x1p-8, 1 + 0x1p-8 + 0x1p-20, -0.0,
                                      0x1p-130,    1 + 0x1p-24,    1 + 3 * 0x1p-24,      INFINITY,
                                      -1 - 0x1p-8, 3e38,           std::nan(""),         1e-42};
  for (const DType from : {kF64, kF32, kBF16}) {
    for (const DType to : {kF64, kF32, kBF16}) {
      for (const int64_t pad : {0, 2}) {
        Buf x(from, {3, 4}, pad), y(to, {3, 4}, 2 * pad);
        x.Assign(values);  // rounds to `from`
        y.Fill(7);
        Copy(y, x, ctx);
        Buf want(to, {3, 4});
        // From double to bf16 by way of float, as the header says of a value computed in f32.
        for (int64_t i = 0; i < 12; ++i) Set(want, i, Get(x, i));
        for (int64_t i = 0; i < 12; ++i) {
          if (std::isnan(Get(want, i))) {
            EXPECT_TRUE(std::isnan(Get(y, i)));
          } else {
            EXPECT_EQ(Get(y, i), Get(want, i)) << i;
            EXPECT_EQ(std::signbit(Get(y, i)), std::signbit(Get(want, i))) << i;
          }
        }
        EXPECT_TRUE(y.PaddingIntact());
      }
    }
  }
}

// Every float rounds to the bf16 of the definition: among all upper halves, one value below, at and
// above the tie.
TEST(Copy, RoundsEveryFloatToTheNearestBFloat16) {
  const TestContext ctx;
  const int64_t n = int64_t{3} << 16;
  Buf x(kF32, {n}), y(kBF16, {n}), back(kF32, {n});
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<uint32_t>(i / 3) << 16 | static_cast<uint32_t>(0x7fff + i % 3);
    std::memcpy(x.tensor().data<float>() + i, &bits, sizeof(bits));
  }
  Copy(y, x, ctx);
  Copy(back, y, ctx);
  for (int64_t i = 0; i < n; ++i) {
    const BF16 want = testing::ToBF16(x.tensor().data<float>()[i]);
    const BF16 got = y.tensor().data<BF16>()[i];
    ASSERT_EQ(got.bits, want.bits) << i;
    const float widened = testing::FromBF16(want);
    ASSERT_EQ(std::memcmp(back.tensor().data<float>() + i, &widened, sizeof(widened)), 0) << i;
  }
}

TEST(Fill, ValuesOfEachTypeStayInsideTheView) {
  const TestContext ctx;
  for (DType dtype : {kF32, kF64, kBF16, DType::kI32, DType::kI64}) {
    Buf y(dtype, {5, 3}, 2), flat(dtype, {100000});
    Fill(y, 7, ctx);
    Fill(flat, -2, ctx);
    EXPECT_EQ(Values(y), std::vector<double>(15, 7));
    EXPECT_EQ(Values(flat), std::vector<double>(100000, -2));
    EXPECT_TRUE(y.PaddingIntact());
  }
  Buf rounded(kBF16, {3}, 1);
  Fill(rounded, 257, ctx);  // a tie between 256 and 258
  EXPECT_EQ(Values(rounded), std::vector<double>(3, 256));
}

// Rows more than 2^31 elements (and 2^32 bytes) apart, in memory that is reserved but never touched
// in between.
TEST(AddInPlace, OffsetsBeyond32Bits) {
  const TestContext ctx;
  const int64_t stride = (int64_t{1} << 31) + 7;
  const size_t bytes = static_cast<size_t>(2 * stride) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const Tensor far = Tensor(memory, kF32, Device::kCpu, {2, stride}).Slice(1, 0, 5);
  Buf x(kF32, {2, 5});
  x.FillNormal(1);
  Copy(far, x, ctx);
  AddInPlace(far, x, ctx);
  std::vector<double> expected = Values(x);
  for (double& value : expected) value *= 2;
  EXPECT_EQ(Values(far), expected);
  EXPECT_EQ(static_cast<float*>(memory)[stride + 4], static_cast<float>(expected[9]));
  EXPECT_EQ(munmap(memory, bytes), 0);
}

}  // namespace
}  // namespace krait
