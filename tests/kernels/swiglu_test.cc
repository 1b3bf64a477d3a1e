#include "kernels/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/gemm.h"
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
using testing::WithThreads;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kI32 = DType::kI32;

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

// The routing weights of nine rows, of which rows 2 and 8 are padding: choices of four tokens (of
// which one does not occur) in some order.
struct Weighted {
  int64_t f = 5, rows = 9, choices = 8;
  Buf weight, d_weight, source, gate_up, d_product, d_gate_up, product;

  explicit Weighted(DType dtype)
      : weight(Wide(dtype), {4, 2}),
        d_weight(Wide(dtype), {4, 2}),
        source(kI32, {rows}),
        gate_up(dtype, {rows, 2 * f}, 3),
        d_product(dtype, {rows, f}, 2),
        d_gate_up(dtype, {rows, 2 * f}, 1),
        product(dtype, {rows, f}, 4) {
    source.Assign({3, 0, -1, 7, 1, 2, 6, 4, -1});
    weight.FillNormal(1);
    gate_up.FillNormal(2, 2);
    d_product.FillNormal(3);
    for (Buf* out : {&d_gate_up, &product}) out->Fill(std::nan(""));
    d_weight.Fill(9);
  }
  RowWeights Rows() const { return {weight, d_weight, source}; }
};

// The loss is the sum over rows of p * product . d_product: what the combination of expert outputs
// makes of it.
TEST(WeightedSwiGlu, GradientsInDouble) {
  const TestContext ctx;
  Weighted s(kF64);
  WeightedSwiGluBackward(s.d_gate_up, s.product, s.Rows(), s.d_product, s.gate_up, ctx);
  EXPECT_EQ(Get(s.d_weight, 5), 9);  // no row: not written
  Set(s.d_weight, 5, 0);
  Buf plain(kF64, {s.rows, s.f});
  CheckGradients(
      [&] {
        SwiGluForward(plain, s.gate_up, ctx);
        double loss = 0;
        for (int64_t r = 0; r < s.rows; ++r) {
          const auto choice = static_cast<int64_t>(Get(s.source, r));
          if (choice < 0) continue;
          loss += Get(s.weight, choice) *
                  Dot(plain.tensor().Slice(0, r, 1), s.d_product.tensor().Slice(0, r, 1));
        }
        return loss;
      },
      {{"gate_up", s.gate_up, s.d_gate_up}, {"weight", s.weight, s.d_weight}});
  EXPECT_TRUE(s.d_gate_up.PaddingIntact() && s.product.PaddingIntact());
  // The product carries the weight; rows of padding are zero, not what was there.
  for (int64_t r = 0; r < s.rows; ++r) {
    const auto choice = static_cast<int64_t>(Get(s.source, r));
    for (int64_t i = 0; i < s.f; ++i) {
      const double want = choice < 0 ? 0 : Get(s.weight, choice) * Get(plain, r * s.f + i);
      EXPECT_NEAR(Get(s.product, r * s.f + i), want, 1e-15);
    }
    for (int64_t i = 0; i < 2 * s.f && choice < 0; ++i) {
      EXPECT_EQ(Get(s.d_gate_up, r * 2 * s.f + i), 0);
    }
  }
  // In place.
  Weighted t(kF64);
  WeightedSwiGluBackward(t.gate_up, t.product, t.Rows(), t.d_product, t.gate_up, ctx);
  EXPECT_TRUE(SameBits(t.gate_up, s.d_gate_up) && SameBits(t.product, s.product));
}

TEST(WeightedSwiGlu, FloatAgreesWithDouble) {
  const TestContext ctx;
  Weighted a(kF32), b(kF64);
  for (auto [from, to] : {std::pair(&a.weight, &b.weight), std::pair(&a.gate_up, &b.gate_up),
                          std::pair(&a.d_product, &b.d_product)}) {
    to->Assign(Values(*from));
  }
  for (Weighted* s : {&a, &b}) {
    WeightedSwiGluBackward(s->d_gate_up, s->product, s->Rows(), s->d_product, s->gate_up, ctx);
  }
  // As SwiGlu's, and one product more; the weight's gradient is a dot product of five.
  EXPECT_LE(RelativeError(a.d_gate_up, b.d_gate_up), 11 * 0x1p-24);
  EXPECT_LE(RelativeError(a.product, b.product), 5 * 0x1p-24);
  EXPECT_LE(RelativeError(a.d_weight, b.d_weight), 10 * 0x1p-24);
}

// A feed-forward y = swiglu(x w^T) w_down^T; each joined op is the product beside SwiGLU.
TEST(LinearSwiGlu, GradientsInDouble) {
  const TestContext ctx;
  for (const int64_t m : {1, 6}) {
    const int64_t d = 4, f = 3;
    Buf x(kF64, {m, d}, 1), w(kF64, {2 * f, d}), w_down(kF64, {d, f}), gate_up(kF64, {m, 2 * f}, 2),
        product(kF64, {m, f}, 3), y(kF64, {m, d}), dy(kF64, {m, d}, 2);
    Buf dx(kF64, {m, d}), dw(kF64, {2 * f, d}), dw_down(kF64, {d, f}), d_gate_up(kF64, {m, 2 * f}),
        again(kF64, {m, f}, 1);
    x.FillNormal(1), w.FillNormal(2), w_down.FillNormal(3), dy.FillNormal(4);
    const auto loss = [&] {
      LinearSwiGluForward(product, gate_up, x, w, ctx);
      LinearForward(y, product, w_down, Tensor(), ctx);
      return Dot(y, dy);
    };
    loss();
    SwiGluLinearBackward(d_gate_up, again, dy, w_down, gate_up, ctx);
    EXPECT_LE(RelativeError(again, product), 1e-15);
    LinearBackwardWeight(dw_down, dy, again, /*accumulate=*/false, ctx);
    LinearBackwardWeight(dw, d_gate_up, x, /*accumulate=*/false, ctx);
    LinearBackwardInput(dx, d_gate_up, w, /*accumulate=*/false, ctx);
    CheckGradients(loss, {{"x", x, dx}, {"w", w, dw}, {"w_down", w_down, dw_down}});

    // Without the product, and over gate_up.
    Buf only(kF64, {m, 2 * f}, 2);
    LinearSwiGluForward(Tensor(), only, x, w, ctx);
    EXPECT_TRUE(SameBits(only, gate_up));
    SwiGluLinearBackward(only, Tensor(), dy, w_down, only, ctx);
    EXPECT_TRUE(SameBits(only, d_gate_up));
    EXPECT_TRUE(gate_up.PaddingIntact() && product.PaddingIntact() && only.PaddingIntact());
  }
}

TEST(LinearSwiGlu, PlanningTakesTheSameScratch) {
  Arena measured("measured");
  Context plan;
  plan.planning = true;
  plan.scratch = &measured;
  const int64_t m = 70, d = 33, f = 17;
  Buf x(kF32, {m, d}), w(kF32, {2 * f, d}), w_down(kF32, {d, f}), gate_up(kF32, {m, 2 * f}),
      product(kF32, {m, f});
  const auto run = [&](const Context& ctx) {
    LinearSwiGluForward(product, gate_up, x, w, ctx);
    SwiGluLinearBackward(gate_up, product, x, w_down, gate_up, ctx);
  };
  product.Fill(7);
  run(plan);
  EXPECT_EQ(Get(product, 0), 7);
  TestContext ctx(measured.high_water());
  run(ctx);
  EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
  EXPECT_GE(measured.high_water(), m * f * 4);
}

}  // namespace
}  // namespace krait
