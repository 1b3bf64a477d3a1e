// CUDA elementwise ops and random fills against the CPU versions of the same headers.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/random_fill.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::Get;
using testing::GpuContext;
using testing::kNaN;
using testing::OnGpu;
using testing::SameBits;
using testing::TestContext;

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;

struct Shape {
  int64_t outer, rows, cols, pad = 0, shift = 0;
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.outer << " x " << s.rows << " x " << s.cols << " pad " << s.pad << " shift "
             << s.shift;
}
const std::vector<Shape> kShapes = {{1, 1, 1},        {2, 3, 7},       {2, 3, 64, 8},
                                    {2, 3, 64, 3},    {3, 50, 5000},   {2, 70000, 8, 8},
                                    {1, 9, 33, 0, 1}, {2, 5, 4096, 16}};

TEST(ActivationGpu, AddAndCopy) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  TestContext cpu;
  for (const Shape& s : kShapes) {
    for (const DType to : {kF32, kBF16}) {
      for (const DType from : {kF32, kBF16}) {
        SCOPED_TRACE(::testing::Message() << s << " " << Name(from) << " to " << Name(to));
        Buf y(to, {s.outer, s.rows, s.cols}, s.pad), x(from, {s.outer, s.rows, s.cols}, s.pad);
        Buf copy(to, {s.outer, s.rows, s.cols}), ry(to, {s.outer, s.rows, s.cols});
        Buf rcopy(to, {s.outer, s.rows, s.cols});
        y.FillNormal(1), x.FillNormal(2), copy.Fill(kNaN), rcopy.Fill(kNaN);
        CopyValues(ry, y);
        OnGpu gy(y, s.shift), gx(x, s.shift), gcopy(copy);
        AddInPlace(gy, gx, gpu), Copy(gcopy, gx, gpu);
        gy.Download(), gcopy.Download();
        AddInPlace(ry, x, cpu), Copy(rcopy, x, cpu);
        EXPECT_TRUE(SameBits(y, ry)) << "one addition, rounded once";
        EXPECT_TRUE(SameBits(copy, rcopy));
        EXPECT_TRUE(y.PaddingIntact());
      }
    }
  }
}

TEST(ActivationGpu, CopyAndFillOfEveryDType) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  for (const DType dtype : {kF32, kBF16, DType::kF64, DType::kI32, DType::kI64}) {
    for (const int64_t pad : {0, 3, 8}) {
      for (const double value : {0.0, 1.0, -3.0}) {
        SCOPED_TRACE(::testing::Message() << Name(dtype) << " pad " << pad << " value " << value);
        Buf x(dtype, {5, 3, 40}, pad), y(dtype, {5, 3, 40}), filled(dtype, {5, 3, 40}, pad);
        x.FillIntegers(1, -100, 100), filled.Fill(9), y.Fill(9);
        OnGpu gx(x), gy(y), gfilled(filled);
        // Rows of an inner dimension left out: strides that do not flatten.
        Copy(gy.tensor().Slice(1, 1, 2), gx.tensor().Slice(1, 0, 2), gpu);
        Fill(gfilled, value, gpu);
        gy.Download(), gfilled.Download();
        EXPECT_TRUE(filled.PaddingIntact());
        for (int64_t i = 0; i < 5 * 3 * 40; ++i) {
          ASSERT_EQ(Get(filled, i), value) << i;
          ASSERT_EQ(Get(y, i), i / 40 % 3 == 0 ? 9 : Get(x, i - 40)) << i;
        }
      }
    }
  }
}

// Values are those of the CPU, but where a unit in the last place of a double moves a rounding
// boundary across them: 2^-53 of the value against the 2^-24 of a float.
TEST(RandomFillGpu, ValuesAreTheCpus) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  TestContext cpu;
  const RandomStream stream(7, RandomPurpose::kSynthetic, 3);
  for (const DType dtype : {kF32, kBF16}) {
    for (const bool normal : {true, false}) {
      SCOPED_TRACE(::testing::Message() << Name(dtype) << (normal ? " normal" : " uniform"));
      Buf y(dtype, {1000, 101}, 3), expected(dtype, {1000, 101});
      y.Fill(kNaN);
      OnGpu gy(y);
      const int64_t first = (int64_t{1} << 33) + 5, row_step = 257;
      const auto fill = normal ? FillNormal : FillUniform;
      fill(gy, stream, first, row_step, 0.02, gpu);
      fill(expected, stream, first, row_step, 0.02, cpu);
      gy.Download();
      EXPECT_TRUE(y.PaddingIntact());
      int64_t different = 0;
      for (int64_t i = 0; i < expected.tensor().numel(); ++i) {
        const double a = Get(y, i), e = Get(expected, i);
        different += a != e;
        ASSERT_LE(std::fabs(a - e), (dtype == kF32 ? 0x1p-23 : 0x1p-7) * std::fabs(e)) << i;
      }
      EXPECT_LE(different, 2);
    }
  }
}

}  // namespace
}  // namespace krait
