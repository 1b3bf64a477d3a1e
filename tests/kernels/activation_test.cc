#include "kernels/activation.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CheckGradients;
using testing::Dot;
using testing::Get;
using testing::RelativeError;
using testing::SameBits;
using testing::TestContext;
using testing::Values;
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64;

TEST(SwiGlu, GradientsInDouble) {
  const TestContext ctx;
  for (const int64_t m : {1, 5}) {
    const int64_t f = 7;
    Buf gate_up(kF64, {m, 2 * f}, 3), y(kF64, {m, f}, 1), cotangent(kF64, {m, f}, 2),
        grad(kF64, {m, 2 * f}, 5);
    gate_up.FillNormal(1, 2);
    cotangent.FillNormal(2);
    SwiGluBackward(grad, Tensor(), cotangent, gate_up, ctx);
    CheckGradients(
        [&] {
          SwiGluForward(y, gate_up, ctx);
          return Dot(y, cotangent);
        },
        {{"gate_up", gate_up, grad}});
    EXPECT_TRUE(y.PaddingIntact() && grad.PaddingIntact());

    // In place, and with the output recomputed.
    Buf again(kF64, {m, f}, 1);
    SwiGluBackward(gate_up, again, cotangent, gate_up, ctx);
    EXPECT_TRUE(SameBits(gate_up, grad));
    EXPECT_LE(RelativeError(again, y), 1e-15);
  }
}

TEST(SwiGlu, FloatAgreesWithDoubleOverTheWholeRange) {
  const TestContext ctx;
  const int64_t m = 3, f = 1000;
  Buf x32(kF32, {m, 2 * f}), x64(kF64, {m, 2 * f}), y32(kF32, {m, f}), y64(kF64, {m, f});
  Buf dy32(kF32, {m, f}), dy64(kF64, {m, f}), dx32(kF32, {m, 2 * f}), dx64(kF64, {m, 2 * f});
  x32.FillNormal(1, 30);
  x64.Assign(Values(x32));
  dy32.FillNormal(2);
  dy64.Assign(Values(dy32));
  SwiGluForward(y32, x32, ctx);
  SwiGluForward(y64, x64, ctx);
  // sigmoid within 2 ulp, then two products.
  EXPECT_LE(RelativeError(y32, y64), 4 * 0x1p-24);
  SwiGluBackward(dx32, y32, dy32, x32, ctx);
  SwiGluBackward(dx64, y64, dy64, x64, ctx);
  // s + g s (1-s): 1 - s is exact above 1/2 and the sum loses nothing near its size.
  EXPECT_LE(RelativeError(dx32, dx64), 10 * 0x1p-24);
  EXPECT_LE(RelativeError(y32, y64), 4 * 0x1p-24);
}

TEST(SwiGlu, NoRowsAndThreads) {
  const TestContext ctx;
  Buf none(kF32, {0, 4}), none2(kF32, {0, 8});
  SwiGluForward(none, none2, ctx);
  SwiGluBackward(none2, none, none, none2, ctx);
  const int64_t m = 50, f = 1001;
  Buf x(kF32, {m, 2 * f}), dy(kF32, {m, f}), one(kF32, {m, 2 * f}), two(kF32, {m, 2 * f});
  x.FillNormal(1);
  dy.FillNormal(2);
  WithThreads(1, [&] { SwiGluBackward(one, Tensor(), dy, x, ctx); });
  WithThreads(2, [&] { SwiGluBackward(two, Tensor(), dy, x, ctx); });
  EXPECT_TRUE(SameBits(one, two));
}

TEST(AddInPlace, DenseAndStridedRows) {
  const TestContext ctx;
  for (DType dtype : {kF32, kF64}) {
    for (const int64_t pad : {0, 3}) {
      Buf x(dtype, {3, 50, 401}, pad), y(dtype, {3, 50, 401}, 2 * pad);
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

TEST(Copy, SlicesInEveryDimensionAndAnyType) {
  const TestContext ctx;
  // A key/value cache: rows [b, begin + t] of [B, S, G, P].
  for (DType dtype : {kF32, kF64, DType::kBF16, DType::kI32, DType::kI64}) {
    Buf cache(dtype, {2, 9, 3, 4}), fresh(dtype, {2, 2, 3, 4}, 1), back(dtype, {2, 2, 3, 4});
    fresh.FillIntegers(1, -50, 50);
    Copy(cache.tensor().Slice(1, 5, 2), fresh, ctx);
    Copy(back, cache.tensor().Slice(1, 5, 2), ctx);
    EXPECT_EQ(Values(back), Values(fresh));
    EXPECT_EQ(Get(cache.tensor().Slice(1, 7, 1), 0), 0);
    EXPECT_EQ(Get(cache.tensor().Slice(1, 4, 1), 11), 0);
  }
}

TEST(Fill, ValuesOfEachTypeStayInsideTheView) {
  const TestContext ctx;
  for (DType dtype : {kF32, kF64, DType::kI32, DType::kI64}) {
    Buf y(dtype, {5, 3}, 2), flat(dtype, {100000});
    Fill(y, 7, ctx);
    Fill(flat, -2, ctx);
    EXPECT_EQ(Values(y), std::vector<double>(15, 7));
    EXPECT_EQ(Values(flat), std::vector<double>(100000, -2));
    EXPECT_TRUE(y.PaddingIntact());
  }
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

TEST(ActivationDeathTest, CudaTensorsAreRefused) {
  const TestContext ctx;
  float value = 0;
  const Tensor t(&value, kF32, Device::kCuda, {1});
  EXPECT_DEATH(AddInPlace(t, t, ctx), "no CUDA version yet");
  EXPECT_DEATH(Fill(t, 0, ctx), "no CUDA version yet");
}

}  // namespace
}  // namespace krait
