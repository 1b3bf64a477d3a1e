#include "kernels/moe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/swiglu.h"
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

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kI32 = DType::kI32;

struct Shape {
  int64_t tokens, experts, top_k;
};

std::vector<Shape> Shapes() {
  return {{1, 1, 1}, {1, 4, 2}, {7, 4, 2}, {40, 16, 2}, {5, 3, 3}, {9, 33, 5}, {300, 8, 1}};
}

struct Routing {
  Shape s;
  Buf logits, probs, choice, weight, d_logits;

  Routing(DType type, Shape shape)
      : s(shape),
        logits(type, {s.tokens, s.experts}, 2),
        probs(type, {s.tokens, s.experts}, 1),
        choice(kI32, {s.tokens, s.top_k}),
        weight(type, {s.tokens, s.top_k}, 3),
        d_logits(type, {s.tokens, s.experts}, 4) {
    logits.FillNormal(1, 2);
  }
  // The logits of a token are a shuffle of multiples of 0.3: no two closer than that, so a
  // difference quotient never changes the choice.
  void FillWithGaps() {
    for (int64_t t = 0; t < s.tokens; ++t) {
      const KeyedPermutation order(static_cast<uint64_t>(s.experts), 1, RandomPurpose::kSynthetic,
                                   static_cast<uint64_t>(t));
      for (int64_t e = 0; e < s.experts; ++e) {
        const auto place = static_cast<double>(order(static_cast<uint64_t>(e)));
        testing::Set(logits, t * s.experts + e, 0.3 * (place - static_cast<double>(s.experts) / 2));
      }
    }
  }
  void Forward(bool renormalize, const Context& ctx) {
    MoeRouteForward(probs, choice, weight, logits, renormalize, ctx);
  }
};

// The formulas of the header; the choice by a stable sort.
void Textbook(const Routing& r, bool renormalize, std::vector<double>* probs,
              std::vector<double>* choice, std::vector<double>* weight) {
  for (int64_t t = 0; t < r.s.tokens; ++t) {
    std::vector<double> p;
    for (int64_t e = 0; e < r.s.experts; ++e)
      p.push_back(std::exp(Get(r.logits, t * r.s.experts + e)));
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& value : p) value /= sum;
    probs->insert(probs->end(), p.begin(), p.end());
    std::vector<size_t> order(p.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
    double chosen = 0;
    for (int64_t j = 0; j < r.s.top_k; ++j) chosen += p[order[static_cast<size_t>(j)]];
    for (int64_t j = 0; j < r.s.top_k; ++j) {
      const size_t e = order[static_cast<size_t>(j)];
      choice->push_back(static_cast<double>(e));
      weight->push_back(renormalize ? p[e] / chosen : p[e]);
    }
  }
}

TEST(MoeRoute, AgreesWithTheTextbook) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    for (const bool renormalize : {false, true}) {
      Routing r(kF64, shape);
      r.Forward(renormalize, ctx);
      std::vector<double> probs, choice, weight;
      Textbook(r, renormalize, &probs, &choice, &weight);
      // A softmax of at most 33 terms in double.
      EXPECT_LE(RelativeError(Values(r.probs), probs), 1e-15);
      EXPECT_LE(RelativeError(Values(r.weight), weight), 1e-15);
      EXPECT_EQ(Values(r.choice), choice);
      EXPECT_TRUE(r.probs.PaddingIntact() && r.weight.PaddingIntact());

      Routing f(kF32, shape);
      f.logits.Assign(Values(r.logits));
      f.Forward(renormalize, ctx);
      // The logits are rounded, to within 2^-25 of up to 8; exponential, sum and quotient follow.
      EXPECT_LE(RelativeError(f.probs, r.probs), 8 * 0x1p-24);
      EXPECT_LE(RelativeError(f.weight, r.weight), 8 * 0x1p-24);
    }
  }
}

TEST(MoeRoute, TiesGoToTheLowerExpert) {
  const TestContext ctx;
  Routing r(kF32, {3, 5, 3});
  r.logits.Assign({1, 1, 1, 1, 1,  //
                   0, 2, 1, 2, 1,  //
                   3, 0, 3, 0, 3});
  r.Forward(false, ctx);
  EXPECT_EQ(Values(r.choice), (std::vector<double>{0, 1, 2, 1, 3, 2, 0, 2, 4}));
}

// Rows that are no numbers still choose experts that exist, each once: the step is skipped later
// by its non-finite loss, and nothing may be overwritten until then.
TEST(MoeRoute, NonFiniteLogitsChooseExistingExperts) {
  const TestContext ctx;
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = INFINITY;
  Routing r(kF32, {4, 3, 2});
  r.logits.Assign({nan, nan, nan, 1, nan, 2, inf, inf, 0, -inf, -inf, -inf});
  r.Forward(true, ctx);
  for (int64_t t = 0; t < 4; ++t) {
    const double a = Get(r.choice, 2 * t), b = Get(r.choice, 2 * t + 1);
    EXPECT_TRUE(a >= 0 && a < 3 && b >= 0 && b < 3 && a != b) << a << " " << b;
  }
}

TEST(MoeRoute, GradientsInDouble) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    for (const bool renormalize : {false, true}) {
      for (const int losses : {0, 1, 2, 3}) {  // bit 0: aux loss, bit 1: z-loss
        // One chosen weight, renormalised, is 1: without another loss the gradient is zero, which
        // has no relative error.
        if ((shape.experts == 1 || (renormalize && shape.top_k == 1)) && losses < 2) continue;
        SCOPED_TRACE(std::to_string(shape.experts) + " experts, " + std::to_string(shape.top_k) +
                     " chosen, renormalize " + std::to_string(renormalize) + ", losses " +
                     std::to_string(losses));
        Routing r(kF64, shape);
        r.FillWithGaps();
        Buf d_weight(kF64, {shape.tokens, shape.top_k}), d_prob(kF64, {1, shape.experts});
        d_weight.FillNormal(2);
        d_prob.FillNormal(3);
        const bool aux = (losses & 1) != 0;
        const double z_scale = (losses & 2) != 0 ? 0.3 : 0;
        r.Forward(renormalize, ctx);
        MoeRouteBackward(r.d_logits, d_weight, aux ? d_prob.tensor() : Tensor(), z_scale, r.probs,
                         r.choice, r.weight, r.logits, renormalize, ctx);
        testing::GradientCheckOptions options;
        options.max_elements = 60;
        CheckGradients(
            [&] {
              r.Forward(renormalize, ctx);
              double loss = Dot(r.weight, d_weight);
              for (int64_t t = 0; t < shape.tokens; ++t) {
                double sum = 0;
                for (int64_t e = 0; e < shape.experts; ++e) {
                  const int64_t at = t * shape.experts + e;
                  if (aux) loss += Get(r.probs, at) * Get(d_prob, e);
                  sum += std::exp(Get(r.logits, at));
                }
                loss += z_scale * std::log(sum) * std::log(sum);
              }
              return loss;
            },
            {{"logits", r.logits, r.d_logits}}, options);
        EXPECT_TRUE(r.d_logits.PaddingIntact());
      }
    }
  }
}

// Groups of tokens are what their tokens are alone, bit for bit; z is that of all.
TEST(MoeStatistics, GroupsAreThoseOfTheirTokens) {
  const TestContext ctx;
  const Shape shape{600, 5, 2};
  Routing r(kF32, shape);
  r.Forward(false, ctx);
  for (const int64_t groups : {1, 3, 4, 600}) {
    const int64_t rows = shape.tokens / groups;
    Buf prob_sum(kF32, {groups, 5}), count(DType::kI64, {groups, 5}), z_sum(kF32, {1});
    prob_sum.Fill(1), count.Fill(2), z_sum.Fill(3);
    MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, ctx);
    double z = 3;
    for (int64_t g = 0; g < groups; ++g) {
      Buf own(kF32, {1, 5}), own_count(DType::kI64, {1, 5}), own_z(kF32, {1});
      own.Fill(1), own_count.Fill(2);
      const auto part = [&](const Buf& all) { return all.tensor().Slice(0, g * rows, rows); };
      MoeStatistics(own, own_count, own_z, part(r.probs), part(r.choice), part(r.logits), ctx);
      EXPECT_EQ(Values(prob_sum.tensor().Slice(0, g, 1)), Values(own)) << g << " of " << groups;
      EXPECT_EQ(Values(count.tensor().Slice(0, g, 1)), Values(own_count)) << g << " of " << groups;
      z += Get(own_z, 0);
    }
    EXPECT_NEAR(Get(z_sum, 0), z, 1e-5 * z);
  }
}

// Each group's tokens get the gradient of their own statistics.
TEST(MoeRoute, BackwardTakesTheGroupsGradient) {
  const TestContext ctx;
  const Shape shape{12, 5, 2};
  Routing r(kF64, shape);
  r.Forward(true, ctx);
  Buf d_weight(kF64, {12, 2}), d_prob(kF64, {3, 5});
  d_weight.FillNormal(2), d_prob.FillNormal(3);
  MoeRouteBackward(r.d_logits, d_weight, d_prob, 0.1, r.probs, r.choice, r.weight, r.logits, true,
                   ctx);
  const std::vector<double> together = Values(r.d_logits);
  std::vector<double> apart;
  for (int64_t g = 0; g < 3; ++g) {
    const auto part = [&](const Buf& all) { return all.tensor().Slice(0, g * 4, 4); };
    MoeRouteBackward(part(r.d_logits), part(d_weight), d_prob.tensor().Slice(0, g, 1), 0.1,
                     part(r.probs), part(r.choice), part(r.weight), part(r.logits), true, ctx);
    const std::vector<double> values = Values(part(r.d_logits));
    apart.insert(apart.end(), values.begin(), values.end());
  }
  EXPECT_EQ(together, apart);
}

TEST(MoeStatistics, AddsSumsOverTokens) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    for (const DType type : {kF32, kF64}) {
      Routing r(type, shape);
      r.Forward(false, ctx);
      Buf prob_sum(type, {1, shape.experts}), count(DType::kI64, {1, shape.experts}),
          z_sum(type, {1});
      prob_sum.Fill(1);
      count.Fill(2);
      z_sum.Fill(3);
      MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, ctx);
      std::vector<double> want_prob(static_cast<size_t>(shape.experts), 1),
          want_count(want_prob.size(), 2);
      double want_z = 3;
      for (int64_t t = 0; t < shape.tokens; ++t) {
        double sum = 0;
        for (int64_t e = 0; e < shape.experts; ++e) {
          want_prob[static_cast<size_t>(e)] += Get(r.probs, t * shape.experts + e);
          sum += std::exp(Get(r.logits, t * shape.experts + e));
        }
        want_z += std::log(sum) * std::log(sum);
        for (int64_t j = 0; j < shape.top_k; ++j) {
          want_count[static_cast<size_t>(Get(r.choice, t * shape.top_k + j))] += 1;
        }
      }
      // Summed in double; a float result is rounded twice (the sum, the addition), and each
      // log-sum-exp of floats has an absolute error of some 2^-24 against values of order 2.
      const double bound = type == kF32 ? 4 * 0x1p-24 : 1e-14;
      EXPECT_LE(RelativeError(Values(prob_sum), want_prob), bound);
      EXPECT_EQ(Values(count), want_count);
      EXPECT_LE(RelativeError(Values(z_sum), {want_z}), bound);
    }
  }
}

// The choices of `choice` sorted by expert, into buffers with `spare` rows more than are in use.
struct Sorted {
  Buf row_of, source, offsets;

  Sorted(const Buf& choice, int64_t experts, int64_t spare, const Context& ctx)
      : row_of(kI32, {choice.tensor().dim(0), choice.tensor().dim(1)}),
        source(kI32, {choice.tensor().numel() + spare}),
        offsets(DType::kI64, {experts + 1}) {
    for (Buf* out : {&row_of, &source, &offsets}) out->Fill(-7);
    MoeSort(row_of, source, offsets, choice, ctx);
  }
};

void ExpectSorted(const Buf& choice, int64_t experts, int64_t spare) {
  const TestContext ctx;
  const Sorted s(choice, experts, spare, ctx);
  const std::vector<double> expert = Values(choice);
  std::vector<double> order(expert.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](double a, double b) {
    return expert[static_cast<size_t>(a)] < expert[static_cast<size_t>(b)];
  });
  for (size_t row = 0; row < order.size(); ++row) {
    EXPECT_EQ(Get(s.row_of, static_cast<int64_t>(order[row])), static_cast<double>(row));
  }
  order.resize(order.size() + static_cast<size_t>(spare), -1);  // rows that nobody uses
  EXPECT_EQ(Values(s.source), order);
  for (int64_t e = 0; e <= experts; ++e) {
    const auto below = std::count_if(expert.begin(), expert.end(), [e](double chosen) {
      return chosen < static_cast<double>(e);
    });
    EXPECT_EQ(Get(s.offsets, e), static_cast<double>(below));
  }
}

TEST(MoeSort, IsAStableSortByExpert) {
  for (const int64_t spare : {0, 5}) {
    for (const Shape shape : Shapes()) {
      const TestContext ctx;
      Routing r(kF32, shape);
      r.Forward(false, ctx);
      ExpectSorted(r.choice, shape.experts, spare);
    }
    Buf one_expert(kI32, {50, 1}), some_empty(kI32, {20, 2}), none(kI32, {0, 2});
    one_expert.Fill(3);
    ExpectSorted(one_expert, 5, spare);
    for (int64_t i = 0; i < 40; ++i) testing::Set(some_empty, i, i % 2 == 0 ? 1 : 6);
    ExpectSorted(some_empty, 8, spare);
    ExpectSorted(none, 4, spare);
  }
}

TEST(MoeSort, RowsOfMemoryHoldTheAlignmentOfEachExpert) {
  EXPECT_EQ(ExpertRows(40, 2, 16, Device::kCpu), 80);
  EXPECT_EQ(ExpertRows(40, 2, 16, Device::kCuda), 80 + 127 * 16);
}

TEST(MoeSortDeathTest, ChoicesOutsideAreFatal) {
  const TestContext ctx;
  Buf choice(kI32, {2, 1});
  choice.Assign({0, 3});
  EXPECT_DEATH(Sorted(choice, 3, 0, ctx), "check failed");
  choice.Assign({-1, 0});
  EXPECT_DEATH(Sorted(choice, 3, 0, ctx), "check failed");
}

// The path of tokens through experts that are feed-forwards: permute, two products with SwiGLU
// between, combine; and back.
struct Path {
  Shape s;
  int64_t d, f, rows;
  Buf x, w, w_down, weight, dy;
  Buf permuted, gate_up, product, outputs, y;
  Buf dx, dw, dw_down, d_weight, d_rows, d_outputs, d_gate_up, weighted;
  Sorted sorted;

  Path(DType type, Shape shape, int64_t width, int64_t spare, const Buf& choice, const Context& ctx)
      : s(shape),
        d(width),
        f(width / 2 + 1),
        rows(s.tokens * s.top_k + spare),
        x(type, {s.tokens, d}, 2),
        w(type, {s.experts, 2 * f, d}),
        w_down(type, {s.experts, d, f}),
        weight(Wide(type), {s.tokens, s.top_k}),
        dy(type, {s.tokens, d}, 4),
        permuted(type, {rows, d}, 3),
        gate_up(type, {rows, 2 * f}, 2),
        product(type, {rows, f}, 1),
        outputs(type, {rows, d}, 2),
        y(type, {s.tokens, d}, 1),
        dx(type, {s.tokens, d}, 5),
        dw(Wide(type), {s.experts, 2 * f, d}),
        dw_down(Wide(type), {s.experts, d, f}),
        d_weight(Wide(type), {s.tokens, s.top_k}),
        d_rows(type, {rows, d}, 1),
        d_outputs(type, {rows, d}, 2),
        d_gate_up(type, {rows, 2 * f}, 3),
        weighted(type, {rows, f}, 4),
        sorted(choice, s.experts, spare, ctx) {
    x.FillNormal(1);
    weight.FillNormal(2);
    dy.FillNormal(3);
    w.FillNormal(4, 1 / std::sqrt(static_cast<double>(d)));
    w_down.FillNormal(5, 1 / std::sqrt(static_cast<double>(f)));
    // Outputs are overwritten where rows are in use.
    for (Buf* out : {&permuted, &gate_up, &product, &outputs, &y, &dx, &dw, &dw_down, &d_rows,
                     &d_outputs, &d_gate_up, &weighted}) {
      out->Fill(std::numeric_limits<double>::quiet_NaN());
    }
  }
  void Forward(const Context& ctx) {
    MoePermute(permuted, x, sorted.source, s.top_k, ctx);
    GroupedLinearSwiGluForward(product, gate_up, permuted, w, sorted.offsets, ctx);
    GroupedLinearForward(outputs, product, w_down, sorted.offsets, ctx);
    MoeCombine(y, outputs, weight, sorted.row_of, ctx);
  }
  void Backward(bool accumulate, const Context& ctx) {
    MoePermute(d_outputs, dy, sorted.source, s.top_k, ctx);
    GroupedSwiGluLinearBackward(d_gate_up, weighted, {weight, d_weight, sorted.source}, d_outputs,
                                w_down, gate_up, sorted.offsets, ctx);
    GroupedLinearBackwardWeight(dw_down, d_outputs, weighted, sorted.offsets, accumulate, ctx);
    GroupedLinearBackwardWeight(dw, d_gate_up, permuted, sorted.offsets, accumulate, ctx);
    GroupedLinearBackwardInput(d_rows, d_gate_up, w, sorted.offsets, ctx);
    MoePermuteBackward(dx, d_rows, sorted.row_of, accumulate, ctx);
  }
  bool PaddingIntact() const {
    for (const Buf* out : {&permuted, &gate_up, &product, &outputs, &y, &dx, &d_rows, &d_outputs,
                           &d_gate_up, &weighted}) {
      if (!out->PaddingIntact()) return false;
    }
    return true;
  }
};

// y[t] = sum over the choices of weight * expert(x[t]), from the formulas alone.
std::vector<double> TextbookExperts(const Path& p, const Buf& choice) {
  std::vector<double> y;
  for (int64_t t = 0; t < p.s.tokens; ++t) {
    std::vector<double> sum(static_cast<size_t>(p.d));
    for (int64_t j = 0; j < p.s.top_k; ++j) {
      const int64_t at = t * p.s.top_k + j;
      const auto e = static_cast<int64_t>(Get(choice, at));
      for (int64_t k = 0; k < p.f; ++k) {
        double gate = 0, up = 0;
        for (int64_t i = 0; i < p.d; ++i) {
          gate += Get(p.x, t * p.d + i) * Get(p.w, ((e * 2 * p.f) + k) * p.d + i);
          up += Get(p.x, t * p.d + i) * Get(p.w, ((e * 2 * p.f) + p.f + k) * p.d + i);
        }
        const double product = gate / (1 + std::exp(-gate)) * up;
        for (int64_t i = 0; i < p.d; ++i) {
          sum[static_cast<size_t>(i)] +=
              Get(p.weight, at) * product * Get(p.w_down, (e * p.d + i) * p.f + k);
        }
      }
    }
    y.insert(y.end(), sum.begin(), sum.end());
  }
  return y;
}

TEST(MoePath, OutputAndGradientsInDouble) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    for (const int64_t spare : {0, 3}) {
      Routing r(kF64, shape);
      r.Forward(false, ctx);
      Path p(kF64, shape, 5, spare, r.choice, ctx);
      p.Forward(ctx);
      EXPECT_LE(RelativeError(Values(p.y), TextbookExperts(p, r.choice)), 2e-15);
      p.Backward(false, ctx);
      testing::GradientCheckOptions options;
      options.max_elements = 40;
      CheckGradients(
          [&] {
            p.Forward(ctx);
            return Dot(p.y, p.dy);
          },
          {{"x", p.x, p.dx},
           {"w", p.w, p.dw},
           {"w_down", p.w_down, p.dw_down},
           {"weight", p.weight, p.d_weight}},
          options);

      // Without the forward's product, and SwiGLU's gradient over gate_up.
      Path q(kF64, shape, 5, spare, r.choice, ctx);
      MoePermute(q.permuted, q.x, q.sorted.source, shape.top_k, ctx);
      GroupedLinearSwiGluForward(Tensor(), q.gate_up, q.permuted, q.w, q.sorted.offsets, ctx);
      MoePermute(q.d_outputs, q.dy, q.sorted.source, shape.top_k, ctx);
      GroupedSwiGluLinearBackward(q.gate_up, q.weighted, {q.weight, q.d_weight, q.sorted.source},
                                  q.d_outputs, q.w_down, q.gate_up, q.sorted.offsets, ctx);
      EXPECT_TRUE(SameBits(q.d_weight, p.d_weight));
      const auto same_rows = [&](Tensor one, Tensor two) {
        const int64_t used = shape.tokens * shape.top_k;
        return SameBits(one.Slice(0, 0, used), two.Slice(0, 0, used));
      };
      EXPECT_TRUE(same_rows(q.gate_up, p.d_gate_up) && same_rows(q.weighted, p.weighted));
      q.dx.Fill(1);
      MoePermuteBackward(q.dx, p.d_rows, q.sorted.row_of, true, ctx);
      std::vector<double> sum = Values(p.dx);
      for (double& value : sum) value += 1;
      // Added before the others instead of after: another order of at most k + 1 terms.
      EXPECT_LE(RelativeError(Values(q.dx), sum), 1e-15);
      EXPECT_TRUE(p.PaddingIntact() && q.PaddingIntact());
    }
  }
}

// Rows with source -1 are written as zeros by the ops that fill rows, so that padding between
// experts takes no part in any sum.
TEST(MoePath, RowsOfPaddingAreZero) {
  const TestContext ctx;
  Buf source(kI32, {4}), x(kF64, {2, 3}), rows(kF64, {4, 3}, 1);
  source.Assign({1, -1, 0, -1});
  x.FillNormal(1);
  rows.Fill(std::numeric_limits<double>::quiet_NaN());
  MoePermute(rows, x, source, 1, ctx);
  const std::vector<double> got = Values(rows);
  EXPECT_EQ(got, (std::vector<double>{Get(x, 3), Get(x, 4), Get(x, 5), 0, 0, 0, Get(x, 0),
                                      Get(x, 1), Get(x, 2), 0, 0, 0}));
}

TEST(MoePath, FloatAgreesWithDouble) {
  const TestContext ctx;
  const Shape shape{40, 16, 2};
  Routing r(kF64, shape);
  r.Forward(false, ctx);
  Path a(kF32, shape, 300, 0, r.choice, ctx), b(kF64, shape, 300, 0, r.choice, ctx);
  for (auto [from, to] :
       {std::pair(&a.x, &b.x), std::pair(&a.weight, &b.weight), std::pair(&a.dy, &b.dy),
        std::pair(&a.w, &b.w), std::pair(&a.w_down, &b.w_down)}) {
    to->Assign(Values(*from));
  }
  for (Path* p : {&a, &b}) p->Forward(ctx), p->Backward(false, ctx);
  // Two products in a row over 300 and 151 terms, each off by a few roundings of its result
  // (sums in at least 8 lanes: half the root of 40), and SwiGLU between; backward as many again.
  for (auto [got, want] : {std::pair(&a.y, &b.y), std::pair(&a.dx, &b.dx),
                           std::pair(&a.d_rows, &b.d_rows), std::pair(&a.d_weight, &b.d_weight),
                           std::pair(&a.dw, &b.dw), std::pair(&a.dw_down, &b.dw_down)}) {
    EXPECT_LE(RelativeError(*got, *want), 16 * 0x1p-24);
  }
  // Moving rows is exact: two products and a sum.
  Buf outputs(kF64, {a.rows, a.d}), y(kF64, {shape.tokens, a.d});
  outputs.Assign(Values(a.outputs));
  MoeCombine(y, outputs, b.weight, b.sorted.row_of, ctx);
  EXPECT_LE(RelativeError(a.y, y), 3 * 0x1p-24);
}

TEST(Moe, ThreadsDoNotChangeABit) {
  const TestContext ctx;
  const Shape shape{700, 8, 2};
  const auto run = [&](int threads, std::vector<Buf>* out) {
    WithThreads(threads, [&] {
      Routing r(kF32, shape);
      r.Forward(true, ctx);
      Path p(kF32, shape, 130, 0, r.choice, ctx);
      // The products of experts are CBLAS's, whose bits may depend on the number of threads.
      p.product.FillNormal(6), p.gate_up.FillNormal(7), p.outputs.FillNormal(8);
      MoePermute(p.permuted, p.x, p.sorted.source, shape.top_k, ctx);
      MoeCombine(p.y, p.outputs, p.weight, p.sorted.row_of, ctx);
      WeightedSwiGluBackward(p.d_gate_up, p.weighted, {p.weight, p.d_weight, p.sorted.source},
                             p.product, p.gate_up, ctx);
      MoePermuteBackward(p.dx, p.outputs, p.sorted.row_of, false, ctx);
      Buf prob_sum(kF32, {1, shape.experts}), count(DType::kI64, {1, shape.experts}),
          z_sum(kF32, {1});
      MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, ctx);
      MoeRouteBackward(r.d_logits, p.d_weight, prob_sum, 0.1, r.probs, r.choice, r.weight, r.logits,
                       true, ctx);
      for (Buf* buf : {&r.probs, &r.weight, &r.d_logits, &p.y, &p.dx, &p.d_weight, &p.d_gate_up,
                       &p.weighted, &p.permuted, &prob_sum, &z_sum}) {
        out->push_back(std::move(*buf));
      }
    });
  };
  std::vector<Buf> one, two;
  run(1, &one);
  run(2, &two);
  for (size_t k = 0; k < one.size(); ++k) EXPECT_TRUE(SameBits(one[k], two[k])) << "output " << k;
}

TEST(Moe, PlanningTakesTheSameScratchAndTouchesNothing) {
  const Shape shape{300, 4, 2};
  Routing r(kF32, shape);
  Buf prob_sum(kF32, {1, 4}), count(DType::kI64, {1, 4}), z_sum(kF32, {1});
  Arena measured("measured");
  Context plan;
  plan.planning = true;
  plan.scratch = &measured;
  r.probs.Fill(7);
  r.Forward(false, plan);
  MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, plan);
  EXPECT_EQ(Get(r.probs, 0), 7);
  EXPECT_EQ(Get(z_sum, 0), 0);
  const TestContext real;
  r.Forward(false, real);
  Path p(kF32, shape, 10, 0, r.choice, real);
  p.Forward(plan);
  p.Backward(false, plan);
  EXPECT_TRUE(std::isnan(Get(p.y, 0)) && std::isnan(Get(p.dx, 0)));
  TestContext ctx(measured.high_water());
  r.Forward(false, ctx);
  MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, ctx);
  p.Forward(ctx);
  p.Backward(false, ctx);
  EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
}

}  // namespace
}  // namespace krait
