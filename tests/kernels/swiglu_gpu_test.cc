// The CUDA SwiGLU against the CPU version of the same header; tolerances: support/on_gpu.h.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/swiglu.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::ExpectMatches;
using testing::ExpectNear;
using testing::Get;
using testing::kNaN;
using testing::kUlp;
using testing::MaxAbs;
using testing::OnGpu;
using testing::SameBits;
using testing::Set;

struct Shape {
  int64_t rows, f, pad = 0, shift = 0;
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "M " << s.rows << " F " << s.f << " pad " << s.pad << " shift " << s.shift;
}
const std::vector<Shape> kShapes = {{1, 1},    {3, 7},     {5, 64},    {33, 1000}, {2, 12},
                                    {3, 9000}, {4, 64, 8}, {4, 64, 3}, {2, 5632},  {3, 64, 0, 1}};

class SwiGluGpu : public testing::GpuOpTest {
 protected:
  // A product of at most four factors up to 6 with a sigmoid off by 2^-23 |g| + 8 units.
  static double Error() { return 24 * kUlp * 64; }
  static constexpr double kShare = 0.02;
};

TEST_P(SwiGluGpu, ForwardAndBackward) {
  for (const Shape& s : kShapes) {
    for (const bool in_place : {false, true}) {
      SCOPED_TRACE(::testing::Message() << s << " in place " << in_place);
      const auto narrow = [&](DType type) { return Buf(type, {s.rows, s.f}, s.pad); };
      const auto wide = [&](DType type) { return Buf(type, {s.rows, 2 * s.f}, s.pad); };
      Buf gate_up = wide(dtype()), d_gate_up = wide(dtype()), again = narrow(dtype());
      Buf product = narrow(dtype()), d_product = narrow(dtype());
      gate_up.FillNormal(1, 1.5), d_product.FillNormal(2);
      for (Buf* b : {&d_gate_up, &product, &again}) b->Fill(kNaN);
      Buf rin = wide(ref()), rd_in = wide(ref()), rproduct = narrow(ref()), rd = narrow(ref());
      CopyValues(rin, gate_up), CopyValues(rd, d_product);
      SwiGluForward(rproduct, rin, *cpu_);
      SwiGluBackward(rd_in, Tensor(), rd, rin, *cpu_);

      OnGpu gin(gate_up, s.shift), gd_in(d_gate_up, s.shift), gproduct(product, s.shift);
      OnGpu gd(d_product, s.shift), gagain(again, s.shift);
      SwiGluForward(gproduct, gin, *gpu_);
      SwiGluBackward(in_place ? gin : gd_in, in_place ? Tensor() : gagain.tensor(), gd, gin, *gpu_);
      for (OnGpu* t : {&gin, &gd_in, &gproduct, &gagain}) t->Download();
      const Tensor gradient = in_place ? gate_up.tensor() : d_gate_up.tensor();
      EXPECT_TRUE(gate_up.PaddingIntact() && d_gate_up.PaddingIntact() && product.PaddingIntact());
      ExpectMatches("product", product, rproduct, Error(), kShare);
      ExpectMatches("d_gate_up", gradient, rd_in, Error(), kShare);
      if (!in_place) {
        EXPECT_TRUE(SameBits(again, product));
      }
    }
  }
}

TEST_P(SwiGluGpu, WeightedBackward) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::Message() << s);
    const int64_t choices = s.rows + 2;
    const auto narrow = [&](DType type) { return Buf(type, {s.rows, s.f}, s.pad); };
    const auto wide = [&](DType type) { return Buf(type, {s.rows, 2 * s.f}, s.pad); };
    Buf gate_up = wide(dtype()), d_gate_up = wide(dtype()), product = narrow(dtype());
    Buf d_product = narrow(dtype()), weight(DType::kF32, {choices, 1});
    Buf d_weight(DType::kF32, {choices, 1}), source(DType::kI32, {s.rows});
    gate_up.FillNormal(1, 1.5), d_product.FillNormal(2), weight.FillNormal(3, 0.2, 0.5);
    d_gate_up.Fill(kNaN), product.Fill(kNaN), d_weight.Fill(7);
    // Rows stand for choices in reverse order; every third row is padding.
    for (int64_t r = 0; r < s.rows; ++r) {
      Set(source, r, static_cast<double>(r % 3 == 2 ? -1 : choices - 1 - r));
    }
    Buf rin = wide(ref()), rd_in = wide(ref()), rproduct = narrow(ref()), rd = narrow(ref());
    Buf rweight(ref_wide(), {choices, 1}), rd_weight(ref_wide(), {choices, 1});
    CopyValues(rin, gate_up), CopyValues(rd, d_product), CopyValues(rweight, weight);
    rd_weight.Fill(7);
    WeightedSwiGluBackward(rd_in, rproduct, {rweight, rd_weight, source}, rd, rin, *cpu_);

    std::vector<std::vector<double>> bits;
    for (int run = 0; run < 2; ++run) {
      d_weight.Fill(7);
      OnGpu gin(gate_up, s.shift), gd_in(d_gate_up, s.shift), gproduct(product, s.shift);
      OnGpu gd(d_product, s.shift), gweight(weight), gd_weight(d_weight), gsource(source);
      WeightedSwiGluBackward(gd_in, gproduct, {gweight, gd_weight, gsource}, gd, gin, *gpu_);
      for (OnGpu* t : {&gd_in, &gproduct, &gd_weight}) t->Download();
      bits.push_back(testing::Values(d_weight));
    }
    EXPECT_EQ(bits[0], bits[1]);
    EXPECT_TRUE(d_gate_up.PaddingIntact() && product.PaddingIntact());
    ExpectMatches("product", product, rproduct, Error(), kShare);
    ExpectMatches("d_gate_up", d_gate_up, rd_in, Error(), kShare);
    // A sum of F products of about silu * up * d.
    const double terms = std::sqrt(static_cast<double>(s.f)) * 20 + 20;
    ExpectNear("d_weight", d_weight, rd_weight, Bound(s.f) * terms);
    for (int64_t r = 2; r < s.rows; r += 3) {
      for (int64_t j = 0; j < 2 * s.f; ++j) ASSERT_EQ(Get(d_gate_up, r * 2 * s.f + j), 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, SwiGluGpu, testing::kGpuDTypes, testing::DTypeName);

}  // namespace
}  // namespace krait
