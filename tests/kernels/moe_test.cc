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
        Buf d_weight(kF64, {shape.tokens, shape.top_k}), d_prob_mean(kF64, {shape.experts});
        d_weight.FillNormal(2);
        d_prob_mean.FillNormal(3);
        const bool aux = (losses & 1) != 0;
        const double z_scale = (losses & 2) != 0 ? 0.3 : 0;
        r.Forward(renormalize, ctx);
        MoeRouteBackward(r.d_logits, d_weight, aux ? d_prob_mean.tensor() : Tensor(), z_scale,
                         r.probs, r.choice, r.weight, r.logits, renormalize, ctx);
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
                  if (aux) loss += Get(r.probs, at) * Get(d_prob_mean, e);
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

TEST(MoeStatistics, AddsSumsOverTokens) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    for (const DType type : {kF32, kF64}) {
      Routing r(type, shape);
      r.Forward(false, ctx);
      Buf prob_sum(type, {shape.experts}), count(DType::kI64, {shape.experts}), z_sum(type, {1});
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

struct Sorted {
  Buf row_of, source;
  std::vector<int64_t> offsets;

  Sorted(const Buf& choice, int64_t experts, const Context& ctx)
      : row_of(kI32, {choice.tensor().dim(0), choice.tensor().dim(1)}),
        source(kI32, {choice.tensor().numel()}),
        offsets(static_cast<size_t>(experts) + 1, -1) {
    MoeSort(row_of, source, offsets.data(), choice, experts, ctx);
  }
};

void ExpectSorted(const Buf& choice, int64_t experts) {
  const TestContext ctx;
  const Sorted s(choice, experts, ctx);
  const std::vector<double> expert = Values(choice);
  std::vector<double> order(expert.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](double a, double b) {
    return expert[static_cast<size_t>(a)] < expert[static_cast<size_t>(b)];
  });
  EXPECT_EQ(Values(s.source), order);
  for (size_t row = 0; row < order.size(); ++row) {
    EXPECT_EQ(Get(s.row_of, static_cast<int64_t>(order[row])), static_cast<double>(row));
  }
  for (int64_t e = 0; e <= experts; ++e) {
    const auto below = std::count_if(expert.begin(), expert.end(), [e](double chosen) {
      return chosen < static_cast<double>(e);
    });
    EXPECT_EQ(s.offsets[static_cast<size_t>(e)], below);
  }
}

TEST(MoeSort, IsAStableSortByExpert) {
  for (const Shape shape : Shapes()) {
    const TestContext ctx;
    Routing r(kF32, shape);
    r.Forward(false, ctx);
    ExpectSorted(r.choice, shape.experts);
  }
  Buf one_expert(kI32, {50, 1}), some_empty(kI32, {20, 2}), none(kI32, {0, 2});
  one_expert.Fill(3);
  ExpectSorted(one_expert, 5);
  for (int64_t i = 0; i < 40; ++i) testing::Set(some_empty, i, i % 2 == 0 ? 1 : 6);
  ExpectSorted(some_empty, 8);
  ExpectSorted(none, 4);
}

// y = combine(scale(permute(x))), the path of a token through experts that scale by a number each.
struct Path {
  Shape s;
  Buf x, rows, y, weight, dy, dx, d_rows, d_weight;
  Sorted sorted;

  Path(DType type, Shape shape, int64_t width, const Buf& choice, const Context& ctx)
      : s(shape),
        x(type, {s.tokens, width}, 2),
        rows(type, {s.tokens * s.top_k, width}, 3),
        y(type, {s.tokens, width}, 1),
        weight(type, {s.tokens, s.top_k}),
        dy(type, {s.tokens, width}, 4),
        dx(type, {s.tokens, width}, 5),
        d_rows(type, {s.tokens * s.top_k, width}),
        d_weight(type, {s.tokens, s.top_k}),
        sorted(choice, s.experts, ctx) {
    x.FillNormal(1);
    weight.FillNormal(2);
    dy.FillNormal(3);
  }
  void Scale(const Buf& target) const {
    for (int64_t e = 0; e < s.experts; ++e) {
      for (int64_t r = sorted.offsets[static_cast<size_t>(e)];
           r < sorted.offsets[static_cast<size_t>(e) + 1]; ++r) {
        const Tensor row = target.tensor().Slice(0, r, 1);
        for (int64_t i = 0; i < row.numel(); ++i) {
          testing::Set(row, i, Get(row, i) * (1.5 + static_cast<double>(e)));
        }
      }
    }
  }
  void Forward(const Context& ctx) {
    MoePermute(rows, x, sorted.source, s.top_k, ctx);
    Scale(rows);
    MoeCombine(y, rows, weight, sorted.row_of, ctx);
  }
  void Backward(bool accumulate, const Context& ctx) {
    MoeCombineBackward(d_rows, d_weight, dy, rows, weight, sorted.row_of, ctx);
    Scale(d_rows);
    MoePermuteBackward(dx, d_rows, sorted.row_of, accumulate, ctx);
  }
};

TEST(MoePath, OutputAndGradientsInDouble) {
  const TestContext ctx;
  for (const Shape shape : Shapes()) {
    Routing r(kF64, shape);
    r.Forward(false, ctx);
    Path p(kF64, shape, 5, r.choice, ctx);
    p.Forward(ctx);
    std::vector<double> want;
    for (int64_t t = 0; t < shape.tokens; ++t) {
      for (int64_t i = 0; i < 5; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < shape.top_k; ++j) {
          const int64_t at = t * shape.top_k + j;
          sum += Get(p.weight, at) * (1.5 + Get(r.choice, at)) * Get(p.x, t * 5 + i);
        }
        want.push_back(sum);
      }
    }
    EXPECT_LE(RelativeError(Values(p.y), want), 1e-15);

    p.Backward(false, ctx);
    testing::GradientCheckOptions options;
    options.max_elements = 60;
    CheckGradients(
        [&] {
          p.Forward(ctx);
          return Dot(p.y, p.dy);
        },
        {{"x", p.x, p.dx}, {"weight", p.weight, p.d_weight}}, options);

    // In place and added to.
    Path q(kF64, shape, 5, r.choice, ctx);
    q.Forward(ctx);
    MoeCombineBackward(q.rows, q.d_weight, q.dy, q.rows, q.weight, q.sorted.row_of, ctx);
    EXPECT_TRUE(SameBits(q.d_weight, p.d_weight));
    q.Scale(q.rows);
    EXPECT_TRUE(SameBits(q.rows, p.d_rows));
    q.dx.Fill(1);
    MoePermuteBackward(q.dx, q.rows, q.sorted.row_of, true, ctx);
    std::vector<double> sum = Values(p.dx);
    for (double& value : sum) value += 1;
    // Added before the others instead of after: another order of at most k + 1 terms.
    EXPECT_LE(RelativeError(Values(q.dx), sum), 1e-15);
    EXPECT_TRUE(p.y.PaddingIntact() && p.rows.PaddingIntact() && p.dx.PaddingIntact() &&
                q.rows.PaddingIntact());
  }
}

TEST(MoePath, FloatAgreesWithDouble) {
  const TestContext ctx;
  const Shape shape{40, 16, 2};
  Routing r(kF64, shape);
  r.Forward(false, ctx);
  Path a(kF32, shape, 1000, r.choice, ctx), b(kF64, shape, 1000, r.choice, ctx);
  for (auto [from, to] :
       {std::pair(&a.x, &b.x), std::pair(&a.weight, &b.weight), std::pair(&a.dy, &b.dy)}) {
    to->Assign(Values(*from));
  }
  for (Path* p : {&a, &b}) p->Forward(ctx), p->Backward(false, ctx);
  for (auto [got, want] :
       {std::pair(&a.y, &b.y), std::pair(&a.dx, &b.dx), std::pair(&a.d_rows, &b.d_rows)}) {
    EXPECT_LE(RelativeError(*got, *want), 3 * 0x1p-24);  // three products and a sum
  }
  // Dot products of 1000 values in at least 4 lanes: half the root of 250 roundings.
  EXPECT_LE(RelativeError(a.d_weight, b.d_weight), 8 * 0x1p-24);
}

TEST(Moe, ThreadsDoNotChangeABit) {
  const TestContext ctx;
  const Shape shape{700, 8, 2};
  const auto run = [&](int threads, std::vector<Buf>* out) {
    WithThreads(threads, [&] {
      Routing r(kF32, shape);
      r.Forward(true, ctx);
      Path p(kF32, shape, 130, r.choice, ctx);
      p.Forward(ctx);
      p.Backward(false, ctx);
      Buf prob_sum(kF32, {shape.experts}), count(DType::kI64, {shape.experts}), z_sum(kF32, {1});
      MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, ctx);
      MoeRouteBackward(r.d_logits, p.d_weight, prob_sum, 0.1, r.probs, r.choice, r.weight, r.logits,
                       true, ctx);
      for (Buf* buf :
           {&r.probs, &r.weight, &r.d_logits, &p.y, &p.dx, &p.d_weight, &prob_sum, &z_sum}) {
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
  Buf prob_sum(kF32, {4}), count(DType::kI64, {4}), z_sum(kF32, {1});
  Arena measured("measured");
  Context plan;
  plan.planning = true;
  plan.scratch = &measured;
  r.probs.Fill(7);
  r.Forward(false, plan);
  MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, plan);
  EXPECT_EQ(Get(r.probs, 0), 7);
  EXPECT_EQ(Get(z_sum, 0), 0);
  TestContext ctx(measured.high_water());
  r.Forward(false, ctx);
  MoeStatistics(prob_sum, count, z_sum, r.probs, r.choice, r.logits, ctx);
  EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
}

}  // namespace
}  // namespace krait
