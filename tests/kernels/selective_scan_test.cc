#include "kernels/selective_scan.h"

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
  int64_t batch, time, channels, states;
};

// Tokens of a call begin here in their sequences.
constexpr int64_t kFirst = 40;

// All operands of the scan, filled with values a trained model could have: time steps around
// softplus(-1), decays from exp(-dt/2) down. Rows of the data tensors are padded (strided).
struct Scan {
  Shape s;
  Documents documents{Tensor(), kFirst};
  Buf x, dt_raw, b, c, z, a_log, d, dt_bias, initial_state, doc_start;
  Buf y, final_state, kept_states;
  Buf dx, d_dt_raw, db, dc, dz, d_a_log, dd, d_dt_bias, d_initial_state;
  Buf dy, d_final_state;  // cotangents

  Scan(DType type, Shape shape)
      : s(shape),
        x(type, {s.batch, s.time, s.channels}, 3),
        dt_raw(type, {s.batch, s.time, s.channels}, 1),
        b(type, {s.batch, s.time, s.states}, 2),
        c(type, {s.batch, s.time, s.states}, 5),
        z(type, {s.batch, s.time, s.channels}, 4),
        a_log(type, {s.channels, s.states}),
        d(type, {s.channels}),
        dt_bias(type, {s.channels}),
        initial_state(type, {s.batch, s.channels, s.states}),
        doc_start(DType::kI32, {s.batch, s.time}),
        y(type, {s.batch, s.time, s.channels}, 2),
        final_state(type, {s.batch, s.channels, s.states}),
        kept_states(type, {s.batch, ScanStates(Device::kCpu, s.time), s.channels, s.states}),
        dx(type, {s.batch, s.time, s.channels}, 1),
        d_dt_raw(type, {s.batch, s.time, s.channels}, 2),
        db(type, {s.batch, s.time, s.states}, 3),
        dc(type, {s.batch, s.time, s.states}, 4),
        dz(type, {s.batch, s.time, s.channels}, 5),
        d_a_log(type, {s.channels, s.states}),
        dd(type, {s.channels}),
        d_dt_bias(type, {s.channels}),
        d_initial_state(type, {s.batch, s.channels, s.states}),
        dy(type, {s.batch, s.time, s.channels}, 1),
        d_final_state(type, {s.batch, s.channels, s.states}) {
    x.FillNormal(1);
    dt_raw.FillNormal(2, 0.7, -0.5);
    b.FillNormal(3);
    c.FillNormal(4);
    z.FillNormal(5);
    a_log.FillNormal(6, 0.5);
    d.FillNormal(7);
    dt_bias.FillNormal(8, 0.5, -0.5);
    initial_state.FillNormal(9);
    dy.FillNormal(10);
    d_final_state.FillNormal(11);
  }
  // Documents begin at these tokens of every row; a row's last one is one later in odd rows, so
  // that rows differ. That of the tokens before the first began before the call.
  void SetDocuments(const std::vector<int64_t>& starts) {
    documents.doc_start = doc_start;
    for (int64_t r = 0; r < s.batch; ++r) {
      int64_t start = -1;
      for (int64_t t = 0; t < s.time; ++t) {
        for (size_t k = 0; k < starts.size(); ++k) {
          if (t == starts[k] + (k + 1 == starts.size() ? r % 2 : 0)) start = t;
        }
        testing::Set(doc_start, r * s.time + t,
                     static_cast<double>(documents.first_position + start));
      }
    }
  }
  SelectiveScanInputs Inputs() const {
    return {x, dt_raw, b, c, z, a_log, d, dt_bias, initial_state, documents};
  }
  SelectiveScanGradients Gradients() const {
    return {dx, d_dt_raw, dz, db, dc, d_a_log, dd, d_dt_bias, d_initial_state};
  }
  void Forward(const Context& ctx) {
    SelectiveScanForward(y, final_state, kept_states, Inputs(), ctx);
  }
  // From zeroed parameter gradients.
  void Backward(const Context& ctx) {
    for (Buf* buf : {&d_a_log, &dd, &d_dt_bias}) buf->Fill(0);
    SelectiveScanBackward(Gradients(), Tensor(), dy, d_final_state, kept_states, Inputs(), ctx);
  }
  testing::AlongTime OperandsAlongTime() {
    return {{&x, &dt_raw, &b, &c, &z, &dy},
            {&y, &dx, &d_dt_raw, &db, &dc, &dz},
            {&d_a_log, &dd, &d_dt_bias},
            &initial_state,
            &final_state,
            &d_initial_state,
            &d_final_state};
  }
  std::vector<const Buf*> Outputs() const {
    return {&y,       &final_state, &dx,        &d_dt_raw,       &db, &dc, &dz,
            &d_a_log, &dd,          &d_dt_bias, &d_initial_state};
  }
  bool PaddingIntact() const {
    for (const Buf* buf : Outputs()) {
      if (!buf->PaddingIntact()) return false;
    }
    return true;
  }
};

const char* const kOutputNames[] = {
    "y",       "final_state", "dx",        "d_dt_raw",       "db", "dc", "dz",
    "d_a_log", "dd",          "d_dt_bias", "d_initial_state"};

double SoftplusOf(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// The formulas of the header, one element at a time.
void Textbook(const Scan& p, std::vector<double>* y, std::vector<double>* state) {
  const Shape s = p.s;
  *state = Values(p.initial_state);
  y->clear();
  for (int64_t r = 0; r < s.batch; ++r) {
    for (int64_t t = 0; t < s.time; ++t) {
      for (int64_t i = 0; i < s.channels; ++i) {
        const int64_t at = (r * s.time + t) * s.channels + i;
        const double dt = SoftplusOf(Get(p.dt_raw, at) + Get(p.dt_bias, i));
        const double x = Get(p.x, at), z = Get(p.z, at);
        double sum = Get(p.d, i) * x;
        for (int64_t n = 0; n < s.states; ++n) {
          double& h = (*state)[static_cast<size_t>((r * s.channels + i) * s.states + n)];
          if (p.documents.doc_start.defined() &&
              Get(p.doc_start, r * s.time + t) ==
                  static_cast<double>(p.documents.first_position + t)) {
            h = 0;
          }
          const double a = -std::exp(Get(p.a_log, i * s.states + n));
          const int64_t bc = (r * s.time + t) * s.states + n;
          h = std::exp(dt * a) * h + dt * Get(p.b, bc) * x;
          sum += Get(p.c, bc) * h;
        }
        y->push_back(sum * z / (1 + std::exp(-z)));
      }
    }
  }
}

TEST(SelectiveScan, AgreesWithTheTextbook) {
  const TestContext ctx;
  for (const Shape shape : {Shape{2, 70, 5, 3}, Shape{1, 1, 130, 1}, Shape{3, 64, 64, 5},
                            Shape{1, 129, 65, 16}, Shape{1, 2, 3, 64}}) {
    Scan p(kF64, shape);
    std::vector<double> y, state;
    // The third list begins a document at the first token: what came before is cut off.
    for (const std::vector<int64_t>& starts :
         std::vector<std::vector<int64_t>>{{}, {3, 4, 64, 66}, {0, 64, 69}}) {
      if (!starts.empty()) p.SetDocuments(starts);
      p.Forward(ctx);
      Textbook(p, &y, &state);
      // Both in double, sums of at most 64 + 1 terms of order one and decays from two exponentials:
      // a few hundred roundings of 1.1e-16 at worst.
      EXPECT_LE(RelativeError(Values(p.y), y), 1e-14);
      EXPECT_LE(RelativeError(Values(p.final_state), state), 1e-14);
      EXPECT_TRUE(p.y.PaddingIntact());
    }

    // Without the optional operands.
    p.initial_state.Fill(0);
    p.documents = {};
    Textbook(p, &y, &state);
    SelectiveScanInputs in = p.Inputs();
    in.initial_state = Tensor();
    SelectiveScanForward(p.y, Tensor(), Tensor(), in, ctx);
    EXPECT_LE(RelativeError(Values(p.y), y), 1e-14);
  }
}

TEST(SelectiveScan, GradientsInDouble) {
  const TestContext ctx;
  // Thousands of tiny calls: one thread spares them the start of a team.
  WithThreads(1, [&] {
    for (const Shape shape : {Shape{2, 7, 3, 5}, Shape{1, 1, 2, 16}, Shape{1, 2, 66, 64},
                              Shape{2, 66, 65, 1}, Shape{1, 131, 4, 16}}) {
      SCOPED_TRACE(std::to_string(shape.time) + " steps, " + std::to_string(shape.channels) +
                   " channels, " + std::to_string(shape.states) + " states");
      Scan p(kF64, shape);
      p.SetDocuments({2, 3, 65});
      p.Forward(ctx);
      p.Backward(ctx);
      testing::GradientCheckOptions options;
      options.max_elements = 60;
      CheckGradients(
          [&] {
            p.Forward(ctx);
            return Dot(p.y, p.dy) + Dot(p.final_state, p.d_final_state);
          },
          {{"x", p.x, p.dx},
           {"dt_raw", p.dt_raw, p.d_dt_raw},
           {"b", p.b, p.db},
           {"c", p.c, p.dc},
           {"z", p.z, p.dz},
           {"a_log", p.a_log, p.d_a_log},
           {"d", p.d, p.dd},
           {"dt_bias", p.dt_bias, p.d_dt_bias},
           {"initial_state", p.initial_state, p.d_initial_state}},
          options);
      EXPECT_TRUE(p.PaddingIntact());
    }
  });
}

// Optional operands left out, outputs over their inputs, parameter gradients added to, and the
// output recomputed.
TEST(SelectiveScan, BackwardVariants) {
  const TestContext ctx;
  const Shape shape{2, 70, 67, 5};
  Scan p(kF64, shape);
  p.d_final_state.Fill(0);
  SelectiveScanForward(p.y, Tensor(), p.kept_states, p.Inputs(), ctx);
  p.Backward(ctx);

  Scan q(kF64, shape);
  for (Buf* buf : {&q.d_a_log, &q.dd, &q.d_dt_bias}) buf->Fill(1);
  SelectiveScanBackward({q.x, q.dt_raw, q.z, q.db, q.dc, q.d_a_log, q.dd, q.d_dt_bias, Tensor()},
                        q.dy, q.dy, Tensor(), p.kept_states, q.Inputs(), ctx);
  EXPECT_TRUE(SameBits(q.x, p.dx));
  EXPECT_TRUE(SameBits(q.dt_raw, p.d_dt_raw));
  EXPECT_TRUE(SameBits(q.z, p.dz));
  EXPECT_TRUE(SameBits(q.db, p.db));
  EXPECT_TRUE(SameBits(q.dc, p.dc));
  EXPECT_LE(RelativeError(q.dy, p.y), 1e-15);
  for (auto [added, alone] : {std::pair(&q.d_a_log, &p.d_a_log), std::pair(&q.dd, &p.dd),
                              std::pair(&q.d_dt_bias, &p.d_dt_bias)}) {
    for (int64_t i = 0; i < added->tensor().numel(); ++i) {
      EXPECT_EQ(Get(*added, i), 1 + Get(*alone, i));
    }
  }
}

// Float against double on the same values. y is a sum of N + 1 terms whose states carry the
// roundings of 1 / (1 - decay) ~ 5 steps; a gradient passes through the recurrence twice.
TEST(SelectiveScan, FloatAgreesWithDouble) {
  const TestContext ctx;
  const Shape shape{2, 300, 70, 16};
  Scan p32(kF32, shape), p64(kF64, shape);
  for (auto [from, to] :
       {std::pair(&p32.x, &p64.x), std::pair(&p32.dt_raw, &p64.dt_raw), std::pair(&p32.b, &p64.b),
        std::pair(&p32.c, &p64.c), std::pair(&p32.z, &p64.z), std::pair(&p32.a_log, &p64.a_log),
        std::pair(&p32.d, &p64.d), std::pair(&p32.dt_bias, &p64.dt_bias),
        std::pair(&p32.initial_state, &p64.initial_state), std::pair(&p32.dy, &p64.dy),
        std::pair(&p32.d_final_state, &p64.d_final_state)}) {
    to->Assign(Values(*from));
  }
  for (Scan* p : {&p32, &p64}) {
    p->SetDocuments({100, 101, 250});
    p->Forward(ctx);
    p->Backward(ctx);
  }
  for (size_t k = 0; k < p32.Outputs().size(); ++k) {
    EXPECT_LE(RelativeError(*p32.Outputs()[k], *p64.Outputs()[k]), 8 * 0x1p-24) << kOutputNames[k];
  }
}

TEST(SelectiveScan, ThreadsDoNotChangeABit) {
  const TestContext ctx;
  const Shape shape{2, 130, 200, 16};
  Scan one(kF32, shape), two(kF32, shape);
  WithThreads(1, [&] { one.Forward(ctx), one.Backward(ctx); });
  WithThreads(2, [&] { two.Forward(ctx), two.Backward(ctx); });
  for (size_t k = 0; k < one.Outputs().size(); ++k) {
    EXPECT_TRUE(SameBits(*one.Outputs()[k], *two.Outputs()[k])) << kOutputNames[k];
  }
}

TEST(SelectiveScan, PackedDocumentsEqualSeparateOnes) {
  testing::CheckPackedDocuments<Scan>(Shape{1, 150, 70, 16}, {20, 21, 85});
}

TEST(SelectiveScan, SequenceCutInTwoEqualsTheWhole) {
  const Shape shape{2, 150, 70, 16};
  for (const int64_t cut : {1, 64, 100}) testing::CheckCutInTwo<Scan>(shape, cut, {});
  // Documents across the cut, one that begins at it, one at token 0.
  testing::CheckCutInTwo<Scan>(shape, 64, {60, 90});
  testing::CheckCutInTwo<Scan>(shape, 100, {100, 120});
  testing::CheckCutInTwo<Scan>(shape, 1, {0, 149});
}

TEST(SelectiveScan, ADocumentAtTheFirstTokenIgnoresTheState) {
  const TestContext ctx;
  const Shape shape{1, 70, 5, 3};
  Scan p(kF64, shape), zero(kF64, shape);
  p.SetDocuments({0});
  zero.initial_state.Fill(0);
  for (Scan* scan : {&p, &zero}) scan->Forward(ctx), scan->Backward(ctx);
  for (size_t k = 0; k + 1 < p.Outputs().size(); ++k) {
    EXPECT_LE(RelativeError(*p.Outputs()[k], *zero.Outputs()[k]), 1e-14) << kOutputNames[k];
  }
  EXPECT_EQ(Values(p.d_initial_state), std::vector<double>(15, 0));
}

// The scratch memory that the plan measures is what a run takes.
TEST(SelectiveScan, PlanningTakesTheSameScratch) {
  Scan p(kF32, {2, 70, 67, 5});
  Arena measured("measured");
  Context plan;
  plan.planning = true;
  plan.scratch = &measured;
  p.y.Fill(7);
  p.Forward(plan);
  p.Backward(plan);
  EXPECT_EQ(Get(p.y, 0), 7);
  TestContext ctx(measured.high_water());
  p.Forward(ctx);
  p.Backward(ctx);
  EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
}

}  // namespace
}  // namespace krait
