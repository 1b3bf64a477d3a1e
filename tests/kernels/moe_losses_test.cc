// The router's products and the losses of routing statistics.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/moe.h"
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

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kI64 = DType::kI64;

TEST(Router, GradientsInDouble) {
  const TestContext ctx;
  const int64_t experts = 5, d = 7;
  for (const int64_t m : {1, 6}) {
    Buf x(kF64, {m, d}, 2), w(kF64, {experts, d}), logits(kF64, {m, experts}, 1),
        d_logits(kF64, {m, experts}, 3), dx(kF64, {m, d}, 1), dw(kF64, {experts, d});
    x.FillNormal(1), w.FillNormal(2), d_logits.FillNormal(3);
    dx.Fill(std::nan("")), dw.Fill(std::nan(""));
    RouterBackwardInput(dx, d_logits, w, /*accumulate=*/false, ctx);
    RouterBackwardWeight(dw, d_logits, x, /*accumulate=*/false, ctx);
    CheckGradients(
        [&] {
          RouterForward(logits, x, w, ctx);
          return Dot(logits, d_logits);
        },
        {{"x", x, dx}, {"w", w, dw}});
    const std::vector<double> once_x = Values(dx), once_w = Values(dw);
    RouterBackwardInput(dx, d_logits, w, /*accumulate=*/true, ctx);
    RouterBackwardWeight(dw, d_logits, x, /*accumulate=*/true, ctx);
    for (size_t i = 0; i < once_x.size(); ++i) EXPECT_NEAR(Values(dx)[i], 2 * once_x[i], 1e-14);
    for (size_t i = 0; i < once_w.size(); ++i) EXPECT_NEAR(Values(dw)[i], 2 * once_w[i], 1e-14);
    EXPECT_TRUE(logits.PaddingIntact() && dx.PaddingIntact());
  }
}

// x and dx are bf16 between f32 weights, logits and gradients: only dx is rounded, once.
TEST(Router, BFloat16ActivationsAndFloatWeights) {
  const TestContext ctx;
  const int64_t m = 6, experts = 5, d = 40;
  Buf x(kBF16, {m, d}, 2), x32(kF32, {m, d}), w(kF32, {experts, d}), logits(kF32, {m, experts}),
      want(kF32, {m, experts}), d_logits(kF32, {m, experts});
  x.FillNormal(1), w.FillNormal(2), d_logits.FillNormal(3);
  x32.Assign(Values(x));
  RouterForward(logits, x, w, ctx);
  RouterForward(want, x32, w, ctx);
  EXPECT_TRUE(SameBits(logits, want));
  Buf dw(kF32, {experts, d}), dw32(kF32, {experts, d});
  RouterBackwardWeight(dw, d_logits, x, false, ctx);
  RouterBackwardWeight(dw32, d_logits, x32, false, ctx);
  EXPECT_TRUE(SameBits(dw, dw32));
  for (const bool accumulate : {false, true}) {
    Buf dx(kBF16, {m, d}, 1), dx32(kF32, {m, d}), rounded(kBF16, {m, d});
    dx32.Assign(Values(dx.FillNormal(4)));
    RouterBackwardInput(dx, d_logits, w, accumulate, ctx);
    RouterBackwardInput(dx32, d_logits, w, accumulate, ctx);
    EXPECT_TRUE(SameBits(dx, rounded.Assign(Values(dx32)))) << accumulate;
    EXPECT_TRUE(dx.PaddingIntact());
  }
}

// Statistics of J sublayers with E experts over n tokens, k choices each.
struct Losses {
  int64_t sublayers, experts, groups, tokens = 20, top_k = 2;
  Buf prob_sum, choice_count, z_sum, aux, z, imbalance, d_prob;

  Losses(DType dtype, int64_t j, int64_t e, int64_t g = 1)
      : sublayers(j),
        experts(e),
        groups(g),
        prob_sum(dtype, {j * g, e}),
        choice_count(kI64, {j * g, e}),
        z_sum(dtype, {j}),
        aux(kF64, {1}),
        z(kF64, {1}),
        imbalance(kF64, {j}),
        d_prob(dtype, {j * g, e}) {
    prob_sum.FillNormal(1, 1, 20.0 / static_cast<double>(e));
    choice_count.FillIntegers(2, 0, 17);
    z_sum.FillNormal(3, 1, 50);
  }
  MoeLossShape Shape(int64_t pools) const { return {tokens, top_k, pools, groups}; }
  void Forward(int64_t pools, const Context& ctx) {
    MoeLossesForward(aux, z, imbalance, prob_sum, choice_count, z_sum, Shape(pools), ctx);
  }
};

// E * sum_e P_e * sum_j f_je with means over the tokens of a pool in a group; the mean over both.
double TextbookAux(const Losses& l, int64_t pools) {
  const int64_t per_pool = l.sublayers / pools;
  const auto n = static_cast<double>(l.tokens / l.groups * per_pool);
  const auto parts = static_cast<double>(pools * l.groups);
  double aux = 0;
  for (int64_t pool = 0; pool < pools; ++pool) {
    for (int64_t g = 0; g < l.groups; ++g) {
      for (int64_t e = 0; e < l.experts; ++e) {
        double prob = 0, count = 0;
        for (int64_t j = pool * per_pool; j < (pool + 1) * per_pool; ++j) {
          prob += Get(l.prob_sum, (j * l.groups + g) * l.experts + e);
          count += Get(l.choice_count, (j * l.groups + g) * l.experts + e);
        }
        aux += static_cast<double>(l.experts) * prob / n * count / n / parts;
      }
    }
  }
  return aux;
}

TEST(MoeLosses, AreTheFormulasAndAreAddedTo) {
  const TestContext ctx;
  for (const DType dtype : {kF32, kF64}) {
    for (const auto& [sublayers, experts, groups] :
         {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {1, 5, 1}, {3, 6, 1}, {3, 6, 4}}) {
      for (const int64_t pools : {int64_t{1}, sublayers}) {
        Losses l(dtype, sublayers, experts, groups);
        l.aux.Fill(2), l.z.Fill(3), l.imbalance.Fill(4);
        l.Forward(pools, ctx);
        EXPECT_NEAR(Get(l.aux, 0), 2 + TextbookAux(l, pools), 1e-13);
        double z = 0;
        for (const double sum : Values(l.z_sum)) {
          z += sum / static_cast<double>(l.tokens * sublayers);
        }
        EXPECT_NEAR(Get(l.z, 0), 3 + z, 1e-13);
        for (int64_t j = 0; j < sublayers; ++j) {
          std::vector<double> counts(static_cast<size_t>(experts));
          for (int64_t i = 0; i < groups * experts; ++i) {
            counts[static_cast<size_t>(i % experts)] +=
                Get(l.choice_count, j * groups * experts + i);
          }
          // The mean count is that of all choices: k n / E.
          const double mean =
              static_cast<double>(l.tokens * l.top_k) / static_cast<double>(experts);
          EXPECT_NEAR(Get(l.imbalance, j),
                      4 + *std::max_element(counts.begin(), counts.end()) / mean, 1e-13);
        }
      }
    }
  }
}

// Perfectly even routing has aux = k and imbalance 1, whatever the pools.
TEST(MoeLosses, EvenRouting) {
  const TestContext ctx;
  for (const int64_t pools : {1, 3}) {
    Losses l(kF32, 3, 5);
    l.prob_sum.Fill(4), l.choice_count.Fill(8), l.z_sum.Fill(0);  // 20 tokens / 5, 40 choices / 5
    l.Forward(pools, ctx);
    EXPECT_NEAR(Get(l.aux, 0), 2, 1e-14);
    EXPECT_EQ(Get(l.z, 0), 0);
    EXPECT_EQ(Values(l.imbalance), std::vector<double>(3, 1));
  }
}

// d_prob is the derivative with respect to one token's p_e, which enters prob_sum[j,e] as it is.
TEST(MoeLosses, BackwardIsTheDerivative) {
  const TestContext ctx;
  const double scale = 0.7;
  for (const auto& [pools, groups] : {std::pair{1, 1}, {3, 1}, {1, 4}, {3, 4}}) {
    Losses l(kF64, 3, 5, groups);
    l.d_prob.Fill(std::nan(""));
    MoeLossesBackward(l.d_prob, l.choice_count, scale, l.Shape(pools), ctx);
    CheckGradients(
        [&] {
          l.aux.Fill(0);
          l.Forward(pools, ctx);
          return scale * Get(l.aux, 0);
        },
        {{"prob_sum", l.prob_sum, l.d_prob}});
    Losses f(kF32, 3, 5, groups);
    MoeLossesBackward(f.d_prob, f.choice_count, scale, f.Shape(pools), ctx);
    EXPECT_LE(RelativeError(f.d_prob, l.d_prob), 0x1p-24);  // rounded once
  }
}

TEST(MoeLosses, PlanningTouchesNothing) {
  TestContext ctx;
  ctx.get()->planning = true;
  Losses l(kF32, 3, 5);
  l.aux.Fill(2), l.d_prob.Fill(3);
  l.Forward(1, ctx);
  MoeLossesBackward(l.d_prob, l.choice_count, 1, l.Shape(1), ctx);
  EXPECT_EQ(Get(l.aux, 0), 2);
  EXPECT_EQ(Get(l.d_prob, 0), 3);
}

}  // namespace
}  // namespace krait
