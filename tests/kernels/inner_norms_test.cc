#include "kernels/inner_norms.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/rms_norm.h"
#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CheckGradients;
using testing::Dot;
using testing::Get;
using testing::RelativeError;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16;
constexpr double kEps = 0.1;

// Rank R of dt, N states: projected [M, R+2N], its rows padded.
struct Norms {
  int64_t m, r, n;
  Buf projected, normed, rstd, w_dt, w_b, w_c;
  Buf d_normed, d_projected, dw_dt, dw_b, dw_c;

  Norms(DType compute, int64_t rows, int64_t rank, int64_t states)
      : m(rows),
        r(rank),
        n(states),
        projected(Wide(compute), {m, r + 2 * n}, 3),
        normed(compute, {m, r + 2 * n}, 1),
        rstd(Wide(compute), {3, m}),
        w_dt(Wide(compute), {r}),
        w_b(Wide(compute), {n}),
        w_c(Wide(compute), {n}),
        d_normed(Wide(compute), {m, r + 2 * n}, 2),
        d_projected(compute, {m, r + 2 * n}, 4),
        dw_dt(Wide(compute), {r}),
        dw_b(Wide(compute), {n}),
        dw_c(Wide(compute), {n}) {
    projected.FillNormal(1, 1, 3);
    w_dt.FillNormal(2), w_b.FillNormal(3), w_c.FillNormal(4);
    d_normed.FillNormal(5);
    for (Buf* out : {&normed, &rstd, &d_projected}) out->Fill(std::nan(""));
  }
  InnerNormWeights Weights() const { return {w_dt, w_b, w_c}; }
  InnerNormWeights Gradients() const { return {dw_dt, dw_b, dw_c}; }
  void Forward(const Context& ctx) {
    InnerNormsForward(normed, rstd, projected, Weights(), kEps, ctx);
  }
  void Backward(const Context& ctx) {
    InnerNormsBackward(d_projected, Gradients(), d_normed, projected, rstd, Weights(), ctx);
  }
  bool PaddingIntact() const { return normed.PaddingIntact() && d_projected.PaddingIntact(); }
};

TEST(InnerNorms, AreThreeNormsOverColumns) {
  const TestContext ctx;
  for (const DType compute : {kF32, kF64}) {
    Norms s(compute, 5, 4, 3);
    s.Forward(ctx);
    s.Backward(ctx);
    int64_t begin = 0, part = 0;
    for (const auto& [w, dw] :
         {std::pair(&s.w_dt, &s.dw_dt), std::pair(&s.w_b, &s.dw_b), std::pair(&s.w_c, &s.dw_c)}) {
      const int64_t columns = w->tensor().dim(0);
      Buf y(compute, {s.m, columns}), rstd(compute, {s.m}), dx(compute, {s.m, columns}),
          gradient(compute, {columns});
      const auto of = [&](const Buf& x) { return x.tensor().Slice(1, begin, columns); };
      RmsNormForward(y, rstd, of(s.projected), *w, kEps, ctx);
      RmsNormBackward(dx, gradient, of(s.d_normed), of(s.projected), rstd, *w, false, ctx);
      EXPECT_TRUE(SameBits(of(s.normed), y));
      EXPECT_TRUE(SameBits(s.rstd.tensor().Slice(0, part, 1), rstd));
      EXPECT_TRUE(SameBits(of(s.d_projected), dx));
      EXPECT_TRUE(SameBits(*dw, gradient));
      begin += columns;
      ++part;
    }
    EXPECT_TRUE(s.PaddingIntact());
  }
}

TEST(InnerNorms, GradientsInDouble) {
  const TestContext ctx;
  for (const auto& [m, r, n] : {std::array<int64_t, 3>{1, 1, 1}, {5, 4, 3}, {67, 5, 2}}) {
    Norms s(kF64, m, r, n);
    s.Forward(ctx);
    s.Backward(ctx);
    CheckGradients(
        [&] {
          s.Forward(ctx);
          return Dot(s.normed, s.d_normed);
        },
        {{"projected", s.projected, s.d_projected},
         {"w_dt", s.w_dt, s.dw_dt},
         {"w_b", s.w_b, s.dw_b},
         {"w_c", s.w_c, s.dw_c}});
    // Weight gradients are added to, d_projected is overwritten.
    const std::vector<double> once = Values(s.dw_b), once_x = Values(s.d_projected);
    s.Backward(ctx);
    for (size_t i = 0; i < once.size(); ++i) EXPECT_NEAR(Values(s.dw_b)[i], 2 * once[i], 1e-12);
    EXPECT_EQ(Values(s.d_projected), once_x);
    EXPECT_TRUE(s.PaddingIntact());
  }
}

// bf16 is what leaves the op, rounded once from the f32 results: inputs stay f32.
TEST(InnerNorms, BFloat16IsTheRoundedFloat) {
  const TestContext ctx;
  Norms narrow(kBF16, 9, 5, 16), wide(kF32, 9, 5, 16);
  for (Norms* s : {&narrow, &wide}) s->Forward(ctx), s->Backward(ctx);
  Buf rounded(kBF16, {9, 5 + 32});
  EXPECT_TRUE(SameBits(narrow.normed, rounded.Assign(Values(wide.normed))));
  EXPECT_TRUE(SameBits(narrow.d_projected, rounded.Assign(Values(wide.d_projected))));
  EXPECT_TRUE(SameBits(narrow.rstd, wide.rstd) && SameBits(narrow.dw_dt, wide.dw_dt) &&
              SameBits(narrow.dw_c, wide.dw_c));
  EXPECT_TRUE(narrow.PaddingIntact());
}

TEST(InnerNorms, WithoutWeightsValuesAreOnlyRounded) {
  const TestContext ctx;
  for (const DType compute : {kF32, kF64, kBF16}) {
    Norms s(compute, 5, 4, 3);
    InnerNormsForward(s.normed, Tensor(), s.projected, {}, kEps, ctx);
    InnerNormsBackward(s.d_projected, {}, s.d_normed, s.projected, Tensor(), {}, ctx);
    Buf rounded(compute, {5, 10});
    EXPECT_TRUE(SameBits(s.normed, rounded.Assign(Values(s.projected))));
    EXPECT_TRUE(SameBits(s.d_projected, rounded.Assign(Values(s.d_normed))));
    EXPECT_TRUE(s.PaddingIntact());
  }
}

TEST(InnerNorms, PlanningTakesTheSameScratch) {
  for (const DType compute : {kF32, kBF16}) {
    Norms s(compute, 300, 5, 16);
    Arena measured("measured");
    Context plan;
    plan.planning = true;
    plan.scratch = &measured;
    s.Forward(plan);
    s.Backward(plan);
    EXPECT_TRUE(std::isnan(Get(s.normed, 0)) && std::isnan(Get(s.d_projected, 0)));
    TestContext ctx(measured.high_water());
    s.Forward(ctx);
    s.Backward(ctx);
    EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
  }
}

}  // namespace
}  // namespace krait
