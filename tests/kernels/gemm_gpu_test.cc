// The CUDA products against the CPU's in f64 on the same values.
//
// Tolerance of an element: a sum of k products, each off by at most 2^-24 of itself and each
// partial sum rounded (or, by the tensor cores, cut off) to 2^-23 of itself at the worst, is off by
// about sqrt(k) * 2^-24 * S for the sum S of the products' magnitudes, where partial sums are much
// smaller than S; Bound() allows (sqrt(k) + 3) * 2^-24 * S. A product left out or counted twice is
// off by about S / k, which is larger up to k = 10^5. A bf16 output adds one rounding, 2^-8 of it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/gemm.h"
#include "support/gradcheck.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::GpuContext;
using testing::kNaN;
using testing::kUlp;
using testing::OnGpu;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;

// A double copy of a tensor [.., rows, columns], by absolute value if asked for.
Buf Wide(Tensor t, bool absolute = false) {
  Buf wide = t.rank() == 3   ? Buf(kF64, {t.dim(0), t.dim(1), t.dim(2)})
             : t.rank() == 2 ? Buf(kF64, {t.dim(0), t.dim(1)})
                             : Buf(kF64, {t.dim(0)});
  for (int64_t i = 0; i < t.numel(); ++i) {
    Set(wide, i, absolute ? std::fabs(Get(t, i)) : Get(t, i));
  }
  return wide;
}

double Bound(double magnitudes, int64_t k, double expected, DType out) {
  const double sum = (std::sqrt(static_cast<double>(k)) + 3) * kUlp * magnitudes;
  return out == kBF16 ? sum + 0x1p-8 * (std::fabs(expected) + sum) : sum;
}

// `actual` against `expected`, the magnitudes of whose terms add up to `magnitudes`.
void ExpectClose(Tensor actual, Tensor expected, Tensor magnitudes, int64_t k,
                 const std::string& what) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double bound = Bound(Get(magnitudes, i), k, Get(expected, i), actual.dtype());
    if (std::fabs(Get(actual, i) - Get(expected, i)) <= bound) continue;
    if (++wrong == 1) {
      ADD_FAILURE() << what << ": element " << i << " is " << Get(actual, i) << ", not "
                    << Get(expected, i) << " within " << bound;
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << expected.numel() << " elements, " << what;
}

struct Types {
  DType in, out;
};
constexpr Types kTypes[] = {{kF32, kF32}, {kBF16, kBF16}, {kBF16, kF32}};

struct Case {
  int64_t m, n, k;
  int64_t pad = 0, shift = 0;  // elements behind each row and before the first
};

TEST(MatMulGpu, AgreesWithTheCpu) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  const TestContext cpu;
  for (const Types types : kTypes) {
    for (const Case& s :
         {Case{1, 1, 1}, Case{7, 5, 11}, Case{1, 4096, 256}, Case{3, 160, 520, 8},
          Case{64, 160, 128}, Case{130, 96, 40, 24}, Case{130, 97, 41, 3}, Case{128, 256, 64, 0, 1},
          Case{256, 384, 320, 8, 8}, Case{65, 72, 1000, 0, 4}, Case{1024, 640, 192}}) {
      for (int transposes = 0; transposes < 4; ++transposes) {
        const bool ta = transposes & 1, tb = transposes & 2;
        const std::string what = std::string(Name(types.in)) + " to " + Name(types.out) + ", m " +
                                 std::to_string(s.m) + " n " + std::to_string(s.n) + " k " +
                                 std::to_string(s.k) + " pad " + std::to_string(s.pad) + " shift " +
                                 std::to_string(s.shift) + " transposes " +
                                 std::to_string(transposes);
        Buf a(types.in, {ta ? s.k : s.m, ta ? s.m : s.k}, s.pad);
        Buf b(types.in, {tb ? s.n : s.k, tb ? s.k : s.n}, s.pad);
        Buf c(types.out, {s.m, s.n}, s.pad), again(types.out, {s.m, s.n}, s.pad);
        a.FillNormal(1);
        b.FillNormal(2);
        c.Fill(kNaN);  // must not be read
        again.Fill(kNaN);
        const OnGpu gpu_a(a, s.shift), gpu_b(b, s.shift);
        OnGpu gpu_c(c, s.shift), gpu_again(again, s.shift);
        MatMul(gpu_c, gpu_a, ta, gpu_b, tb, false, gpu);
        MatMul(gpu_again, gpu_a, ta, gpu_b, tb, false, gpu);
        gpu_c.Download();
        gpu_again.Download();
        EXPECT_TRUE(SameBits(c, again)) << what;
        Buf expected(kF64, {s.m, s.n}), magnitudes(kF64, {s.m, s.n});
        MatMul(expected, Wide(a), ta, Wide(b), tb, false, cpu);
        MatMul(magnitudes, Wide(a, true), ta, Wide(b, true), tb, false, cpu);
        ExpectClose(c, expected, magnitudes, s.k, what);

        // Added to itself: c is a term of its own magnitude, and one more rounding.
        for (int64_t i = 0; i < c.tensor().numel(); ++i) {
          Set(magnitudes, i, Get(magnitudes, i) + std::fabs(Get(c, i)));
          Set(expected, i, Get(expected, i) + Get(c, i));
        }
        MatMul(gpu_c, gpu_a, ta, gpu_b, tb, true, gpu);
        gpu_c.Download();
        ExpectClose(c, expected, magnitudes, s.k, what + ", adding");
        EXPECT_TRUE(c.PaddingIntact()) << what;
      }
    }
  }
}

TEST(MatMulGpu, EmptyExtents) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  Buf none(kBF16, {0, 8}), c(kF32, {8, 8}, 3);
  c.Fill(5);
  const OnGpu gpu_none(none);
  OnGpu gpu_c(c);
  MatMul(gpu_none, gpu_none, false, gpu_c, true, false, gpu);  // no rows
  MatMul(gpu_c, gpu_none, true, gpu_none, false, true, gpu);   // an empty sum
  gpu_c.Download();
  EXPECT_EQ(Get(c, 63), 5);
  MatMul(gpu_c, gpu_none, true, gpu_none, false, false, gpu);
  gpu_c.Download();
  EXPECT_EQ(Get(c, 63), 0);
  EXPECT_TRUE(c.PaddingIntact());
}

TEST(LinearGpu, Bias) {
  KRAIT_NEEDS_GPU();
  GpuContext gpu;
  const TestContext cpu;
  for (const Types types : kTypes) {
    for (const Case& s : {Case{33, 40, 72, 8}, Case{5, 7, 3, 1}, Case{300, 4096, 64}}) {
      const std::string what = std::string(Name(types.in)) + " to " + Name(types.out) + ", m " +
                               std::to_string(s.m) + " n " + std::to_string(s.n);
      Buf x(types.in, {s.m, s.k}, s.pad), w(types.in, {s.n, s.k}), b(types.in, {s.n});
      Buf y(types.out, {s.m, s.n}, s.pad), dy(types.in, {s.m, s.n}, s.pad), db(kF32, {s.n});
      x.FillNormal(1);
      w.FillNormal(2);
      b.FillNormal(3);
      y.Fill(kNaN);
      dy.FillNormal(4);
      db.FillNormal(5);
      Buf expected(kF64, {s.m, s.n}), magnitudes(kF64, {s.m, s.n}), db_expected = Wide(db);
      Buf db_magnitudes = Wide(db, true);
      LinearForward(expected, Wide(x), Wide(w), Wide(b), cpu);
      LinearForward(magnitudes, Wide(x, true), Wide(w, true), Wide(b, true), cpu);
      LinearBackwardBias(db_expected, Wide(dy), cpu);
      LinearBackwardBias(db_magnitudes, Wide(dy, true), cpu);
      const OnGpu gpu_b(b), gpu_dy(dy);
      OnGpu gpu_y(y), gpu_db(db);
      LinearForward(gpu_y, OnGpu(x), OnGpu(w), gpu_b, gpu);
      LinearBackwardBias(gpu_db, gpu_dy, gpu);
      gpu_y.Download();
      gpu_db.Download();
      ExpectClose(y, expected, magnitudes, s.k + 1, what);
      ExpectClose(db, db_expected, db_magnitudes, s.m + 1, what + ", gradient of the bias");

      AddBias(gpu_y, gpu_b, gpu);
      for (int64_t i = 0; i < s.m * s.n; ++i) {
        Set(expected, i, Get(y, i) + Get(b, i % s.n));
        Set(magnitudes, i, std::fabs(Get(y, i)) + std::fabs(Get(b, i % s.n)));
      }
      gpu_y.Download();
      ExpectClose(y, expected, magnitudes, 1, what + ", the bias added again");
      EXPECT_TRUE(y.PaddingIntact()) << what;
    }
  }
}

// Experts' segments [offsets[e], offsets[e+1]), of which `rows` hold tokens: the last ones of a
// segment are zero rows, as the permutation leaves them.
struct Routing {
  std::vector<int64_t> rows;
  int64_t spare = 128;  // rows of the buffer behind the last segment
};

void ExpectGrouped(DType in, DType out, int64_t outputs, int64_t inputs, const Routing& routing,
                   int64_t pad) {
  const std::string what = std::string(Name(in)) + " to " + Name(out) + ", " +
                           std::to_string(outputs) + " x " + std::to_string(inputs) + ", pad " +
                           std::to_string(pad) + ", " + std::to_string(routing.rows.size()) +
                           " experts";
  GpuContext gpu;
  const TestContext cpu(int64_t{1} << 30);
  const int64_t experts = static_cast<int64_t>(routing.rows.size());
  Buf offsets(DType::kI64, {experts + 1});
  int64_t used = 0, longest = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t align = ExpertRowAlignment(Device::kCuda), rows = routing.rows[e];
    Set(offsets, e, static_cast<double>(used));
    used += (rows + align - 1) / align * align;
    longest = std::max(longest, rows);
  }
  Set(offsets, experts, static_cast<double>(used));
  const int64_t capacity = used + routing.spare;
  Buf x(in, {capacity, inputs}, pad), dy(in, {capacity, outputs}, pad);
  Buf w(in, {experts, outputs, inputs});
  x.FillNormal(1);
  dy.FillNormal(2);
  w.FillNormal(3);
  for (const Tensor& t : {x.tensor(), dy.tensor()}) {
    const auto fill = [&](int64_t begin, int64_t end, double value) {
      for (int64_t i = begin * t.dim(1); i < end * t.dim(1); ++i) Set(t, i, value);
    };
    for (int64_t e = 0; e < experts; ++e) {
      fill(static_cast<int64_t>(Get(offsets, e)) + routing.rows[e],
           static_cast<int64_t>(Get(offsets, e + 1)), 0);
    }
    fill(used, capacity, kNaN);  // must not be read
  }
  const OnGpu gpu_x(x), gpu_dy(dy), gpu_w(w), gpu_offsets(offsets);
  const Buf wide_x = Wide(x), wide_dy = Wide(dy), wide_w = Wide(w);
  const Buf abs_x = Wide(x, true), abs_dy = Wide(dy, true), abs_w = Wide(w, true);

  // Forward and backward: rows in use, the others untouched (NaN).
  const auto rows_product = [&](const char* name, int64_t columns, int64_t k, const auto& call,
                                Tensor a, Tensor abs_a, Tensor gpu_a) {
    Buf y(out, {capacity, columns}, pad), again(out, {capacity, columns}, pad);
    Buf expected(kF64, {capacity, columns}), magnitudes(kF64, {capacity, columns});
    y.Fill(kNaN);
    again.Fill(kNaN);
    OnGpu gpu_y(y), gpu_again(again);
    call(gpu_y, gpu_a, gpu_w, gpu_offsets, gpu);
    call(gpu_again, gpu_a, gpu_w, gpu_offsets, gpu);
    gpu_y.Download();
    gpu_again.Download();
    EXPECT_TRUE(SameBits(y, again)) << name << ", " << what;
    call(expected, a, wide_w, offsets, cpu);
    call(magnitudes, abs_a, abs_w, offsets, cpu);
    ExpectClose(y.tensor().Slice(0, 0, used), expected.tensor().Slice(0, 0, used),
                magnitudes.tensor().Slice(0, 0, used), k, name + (", " + what));
    for (int64_t i = used * columns; i < capacity * columns; ++i) {
      ASSERT_TRUE(std::isnan(Get(y, i))) << name << " wrote a spare row, " << what;
    }
    EXPECT_TRUE(y.PaddingIntact()) << name << ", " << what;
  };
  rows_product("forward", outputs, inputs, GroupedLinearForward, wide_x, abs_x, gpu_x);
  rows_product("backward", inputs, outputs, GroupedLinearBackwardInput, wide_dy, abs_dy, gpu_dy);

  // Weight gradients: f32 whatever the inputs.
  Buf dw(kF32, {experts, outputs, inputs}), again(kF32, {experts, outputs, inputs});
  Buf expected(kF64, {experts, outputs, inputs}), magnitudes(kF64, {experts, outputs, inputs});
  dw.Fill(kNaN);
  again.Fill(kNaN);
  OnGpu gpu_dw(dw), gpu_again(again);
  GroupedLinearBackwardWeight(expected, wide_dy, wide_x, offsets, false, cpu);
  GroupedLinearBackwardWeight(magnitudes, abs_dy, abs_x, offsets, false, cpu);
  for (const bool accumulate : {false, true}) {
    GroupedLinearBackwardWeight(gpu_dw, gpu_dy, gpu_x, gpu_offsets, accumulate, gpu);
    GroupedLinearBackwardWeight(gpu_again, gpu_dy, gpu_x, gpu_offsets, accumulate, gpu);
    if (accumulate) {
      for (int64_t i = 0; i < dw.tensor().numel(); ++i) {
        Set(expected, i, Get(expected, i) + Get(dw, i));
        Set(magnitudes, i, Get(magnitudes, i) + std::fabs(Get(dw, i)));
      }
    }
    gpu_dw.Download();
    gpu_again.Download();
    EXPECT_TRUE(SameBits(dw, again)) << what;
    ExpectClose(dw, expected, magnitudes, longest + 1,
                what + (accumulate ? ", weights adding" : ", weights overwriting"));
  }
}

// Experts without rows at either end and between, one row, whole tiles, an odd number of tiles.
const Routing kRouting = {{0, 1, 0, 250, 128, 0}};

TEST(GroupedLinearGpu, AgreesWithTheCpu) {
  KRAIT_NEEDS_GPU();
  ExpectGrouped(kBF16, kBF16, 264, 200, kRouting, 0);
  ExpectGrouped(kBF16, kBF16, 128, 72, kRouting, 8);
  ExpectGrouped(kBF16, kBF16, 8, 520, {{300, 5}, 0}, 16);
  ExpectGrouped(kBF16, kBF16, 16, 8, {{0, 0, 0}}, 0);
}

// Every cluster works on several tiles, and the ring goes round many times.
TEST(GroupedLinearGpu, ManyTiles) {
  KRAIT_NEEDS_GPU();
  ExpectGrouped(kBF16, kBF16, 1600, 776, {{900, 0, 77, 1024, 3000}}, 0);
  // Rows enough for weight gradients of large tiles.
  ExpectGrouped(kBF16, kBF16, 1300, 776, {{6200, 0, 3100}}, 0);
}

// Rows that the copy engine refuses, f32, and f32 outputs of bf16.
TEST(GroupedLinearGpu, PlainKernel) {
  KRAIT_NEEDS_GPU();
  ExpectGrouped(kF32, kF32, 70, 33, kRouting, 3);
  ExpectGrouped(kBF16, kF32, 72, 40, kRouting, 0);
  ExpectGrouped(kBF16, kBF16, 37, 90, kRouting, 1);
  ExpectGrouped(kBF16, kBF16, 64, 128, {{0, 0}, 0}, 0);
}

}  // namespace
}  // namespace krait
