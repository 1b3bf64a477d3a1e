#include "kernels/causal_conv1d.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "support/gradcheck.h"
#include "support/pieces.h"

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

struct Shape {
  int64_t batch, time, channels, taps;
};

// Tokens of a call begin here in their sequences.
constexpr int64_t kFirst = 40;

struct Conv {
  Shape s;
  Documents documents{Tensor(), kFirst};
  Buf x, w, bias, initial_state, doc_start;
  Buf y, final_state, dx, dw, dbias, d_initial_state;
  Buf dy, d_final_state;  // cotangents

  Conv(DType type, Shape shape)
      : s(shape),
        x(type, {s.batch, s.time, s.channels}, 3),
        w(type, {s.channels, s.taps}),
        bias(type, {s.channels}),
        initial_state(type, {s.batch, s.taps - 1, s.channels}),
        doc_start(DType::kI32, {s.batch, s.time}),
        y(type, {s.batch, s.time, s.channels}, 2),
        final_state(type, {s.batch, s.taps - 1, s.channels}),
        dx(type, {s.batch, s.time, s.channels}, 1),
        dw(type, {s.channels, s.taps}),
        dbias(type, {s.channels}),
        d_initial_state(type, {s.batch, s.taps - 1, s.channels}),
        dy(type, {s.batch, s.time, s.channels}, 4),
        d_final_state(type, {s.batch, s.taps - 1, s.channels}) {
    x.FillNormal(1);
    w.FillNormal(2);
    bias.FillNormal(3);
    initial_state.FillNormal(4);
    dy.FillNormal(5);
    d_final_state.FillNormal(6);
  }
  // Documents begin at these tokens of row 0, one later in row 1; that of the tokens before began
  // `before` tokens before the call.
  void SetDocuments(const std::vector<int64_t>& starts, int64_t before = kFirst) {
    documents.doc_start = doc_start;
    for (int64_t r = 0; r < s.batch; ++r) {
      int64_t start = -before;
      for (int64_t t = 0; t < s.time; ++t) {
        for (int64_t begin : starts) {
          if (t == begin + r % 2) start = t;
        }
        testing::Set(doc_start, r * s.time + t,
                     static_cast<double>(documents.first_position + start));
      }
    }
  }
  // 0: none; 1: several, the first from long before; 2: the first from within the state on; 3: one
  // that begins with the first token.
  void SetDocuments(int kind) {
    if (kind == 1) SetDocuments({2, 3, 8, 129});
    if (kind == 2) SetDocuments({8}, 2);
    if (kind == 3) SetDocuments({3}, 0);
  }
  void Forward(const Context& ctx) {
    CausalConv1dSiluForward(y, final_state, x, w, bias, initial_state, documents, ctx);
  }
  void Backward(const Context& ctx) {
    dw.Fill(0);
    dbias.Fill(0);
    CausalConv1dSiluBackward(dx, dw, dbias, d_initial_state, dy, d_final_state, x, w, bias,
                             initial_state, documents, ctx);
  }
  testing::AlongTime OperandsAlongTime() {
    return {{&x, &dy},    {&y, &dx},        {&dw, &dbias}, &initial_state,
            &final_state, &d_initial_state, &d_final_state};
  }
  std::vector<const Buf*> Outputs() const {
    return {&y, &final_state, &dx, &dw, &dbias, &d_initial_state};
  }
};

// The input that output t of row r sees at position p (negative: the initial state).
double Seen(const Conv& c, int64_t r, int64_t t, int64_t p, int64_t i) {
  if (c.documents.doc_start.defined()) {
    const int64_t last = std::min(t, c.s.time - 1);
    const double start = Get(c.doc_start, r * c.s.time + last);
    if (static_cast<double>(c.documents.first_position + p) < start) return 0;
  }
  if (p >= 0) return Get(c.x, (r * c.s.time + p) * c.s.channels + i);
  return Get(c.initial_state, (r * (c.s.taps - 1) + p + c.s.taps - 1) * c.s.channels + i);
}

// The formulas of the header, one element at a time.
void Textbook(const Conv& c, std::vector<double>* y, std::vector<double>* state) {
  const Shape s = c.s;
  for (int64_t r = 0; r < s.batch; ++r) {
    for (int64_t t = 0; t < s.time; ++t) {
      for (int64_t i = 0; i < s.channels; ++i) {
        double u = Get(c.bias, i);
        for (int64_t k = 0; k < s.taps; ++k) {
          u += Get(c.w, i * s.taps + k) * Seen(c, r, t, t - s.taps + 1 + k, i);
        }
        y->push_back(u / (1 + std::exp(-u)));
      }
    }
    for (int64_t p = s.time - s.taps + 1; p < s.time; ++p) {
      for (int64_t i = 0; i < s.channels; ++i) state->push_back(Seen(c, r, s.time, p, i));
    }
  }
}

std::vector<Shape> Shapes() {
  std::vector<Shape> shapes = {
      {1, 1, 1, 4}, {2, 2, 3, 4}, {2, 20, 129, 4}, {2, 130, 20, 4}, {1, 257, 3, 7}};
  for (int64_t taps = 1; taps <= 8; ++taps) shapes.push_back({2, 11, 5, taps});
  return shapes;
}

TEST(CausalConv1d, AgreesWithTheTextbook) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    for (const int documents : {0, 1, 2, 3}) {
      Conv c(kF64, shape);
      c.SetDocuments(documents);
      c.Forward(ctx);
      std::vector<double> y, state;
      Textbook(c, &y, &state);
      // Sums of at most 9 terms of order one in double.
      EXPECT_LE(RelativeError(Values(c.y), y), 1e-15);
      EXPECT_EQ(Values(c.final_state), state);
      EXPECT_TRUE(c.y.PaddingIntact());
    }
  }
}

TEST(CausalConv1d, UndefinedOperandsAreZeros) {
  const TestContext ctx;
  const Shape shape{2, 7, 5, 4};
  Conv c(kF64, shape), d(kF64, shape);
  c.bias.Fill(0);
  c.initial_state.Fill(0);
  c.d_final_state.Fill(0);
  c.Forward(ctx);
  c.Backward(ctx);
  CausalConv1dSiluForward(d.y, Tensor(), d.x, d.w, Tensor(), Tensor(), {}, ctx);
  EXPECT_TRUE(SameBits(d.y, c.y));
  d.dw.Fill(1);
  CausalConv1dSiluBackward(d.dx, d.dw, Tensor(), Tensor(), d.dy, Tensor(), d.x, d.w, Tensor(),
                           Tensor(), {}, ctx);
  EXPECT_TRUE(SameBits(d.dx, c.dx));
  for (int64_t i = 0; i < d.dw.tensor().numel(); ++i) EXPECT_EQ(Get(d.dw, i), 1 + Get(c.dw, i));
}

TEST(CausalConv1d, GradientsInDouble) {
  const TestContext ctx;
  // Thousands of tiny calls: one thread spares them the start of a team.
  WithThreads(1, [&] {
    for (const Shape shape : Shapes()) {
      for (const int documents : {0, 1, 2, 3}) {
        SCOPED_TRACE(std::to_string(shape.taps) + " taps, " + std::to_string(shape.time) +
                     " steps, documents " + std::to_string(documents));
        Conv c(kF64, shape);
        c.SetDocuments(documents);
        c.Backward(ctx);
        testing::GradientCheckOptions options;
        options.max_elements = 24;
        CheckGradients(
            [&] {
              c.Forward(ctx);
              return Dot(c.y, c.dy) + Dot(c.final_state, c.d_final_state);
            },
            {{"x", c.x, c.dx},
             {"w", c.w, c.dw},
             {"bias", c.bias, c.dbias},
             {"initial_state", c.initial_state, c.d_initial_state}},
            options);
        EXPECT_TRUE(c.dx.PaddingIntact());
      }
    }
  });
}

TEST(CausalConv1d, FloatAgreesWithDouble) {
  const TestContext ctx;
  const Shape shape{2, 300, 150, 4};
  Conv a(kF32, shape), b(kF64, shape);
  for (auto [from, to] : {std::pair(&a.x, &b.x), std::pair(&a.w, &b.w), std::pair(&a.bias, &b.bias),
                          std::pair(&a.initial_state, &b.initial_state), std::pair(&a.dy, &b.dy),
                          std::pair(&a.d_final_state, &b.d_final_state)}) {
    to->Assign(Values(*from));
  }
  for (Conv* c : {&a, &b}) {
    c->SetDocuments({100, 101, 250});
    c->Forward(ctx);
    c->Backward(ctx);
  }
  // Five roundings in u, three ulp of silu and as many of silu'. The parameter gradients are sums
  // over 128 tokens at a time: half the root of 128 roundings more.
  for (size_t k = 0; k < a.Outputs().size(); ++k) {
    EXPECT_LE(RelativeError(*a.Outputs()[k], *b.Outputs()[k]), 10 * 0x1p-24) << "output " << k;
  }
}

TEST(CausalConv1d, ThreadsDoNotChangeABit) {
  const TestContext ctx;
  const Shape shape{2, 130, 300, 4};
  Conv one(kF32, shape), two(kF32, shape);
  WithThreads(1, [&] { one.Forward(ctx), one.Backward(ctx); });
  WithThreads(2, [&] { two.Forward(ctx), two.Backward(ctx); });
  for (size_t k = 0; k < one.Outputs().size(); ++k) {
    EXPECT_TRUE(SameBits(*one.Outputs()[k], *two.Outputs()[k])) << "output " << k;
  }
}

// The last document is shorter than the K-1 kept inputs: the rest of the final state is zero and of
// no document.
TEST(CausalConv1d, PackedDocumentsEqualSeparateOnes) {
  testing::CheckPackedDocuments<Conv>(Shape{1, 200, 35, 4}, {20, 21, 198});
}

TEST(CausalConv1d, SequenceCutInTwoEqualsTheWhole) {
  const Shape shape{2, 200, 35, 4};
  for (const int64_t cut : {1, 2, 100, 199}) testing::CheckCutInTwo<Conv>(shape, cut, {});
  // A document that ends within the taps behind the cut, one that begins at it, one at token 0.
  testing::CheckCutInTwo<Conv>(shape, 100, {98, 101});
  testing::CheckCutInTwo<Conv>(shape, 100, {100, 150});
  testing::CheckCutInTwo<Conv>(shape, 1, {0});
}

TEST(CausalConv1d, ADocumentAtTheFirstTokenIgnoresTheState) {
  const TestContext ctx;
  const Shape shape{1, 9, 5, 4};
  Conv c(kF64, shape), zero(kF64, shape);
  c.SetDocuments({}, 0);
  c.initial_state.Fill(std::nan(""));
  zero.initial_state.Fill(0);
  for (Conv* conv : {&c, &zero}) conv->Forward(ctx), conv->Backward(ctx);
  for (size_t k = 0; k + 1 < c.Outputs().size(); ++k) {
    EXPECT_TRUE(SameBits(*c.Outputs()[k], *zero.Outputs()[k])) << "output " << k;
  }
  EXPECT_EQ(Values(c.d_initial_state), std::vector<double>(15, 0));
}

TEST(CausalConv1d, PlanningTakesTheSameScratch) {
  Conv c(kF32, {2, 7, 67, 4});
  Arena measured("measured");
  Context plan;
  plan.planning = true;
  plan.scratch = &measured;
  c.y.Fill(7);
  c.Forward(plan);
  c.Backward(plan);
  EXPECT_EQ(Get(c.y, 0), 7);
  TestContext ctx(measured.high_water());
  c.Forward(ctx);
  c.Backward(ctx);
  EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
}

}  // namespace
}  // namespace krait
