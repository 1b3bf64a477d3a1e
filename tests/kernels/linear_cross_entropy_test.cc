#include "kernels/linear_cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cross_entropy.h"
#include "kernels/gemm.h"
#include "support/gradcheck.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CheckGradients;
using testing::Get;
using testing::RelativeError;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kI32 = DType::kI32;
constexpr double kScale = 0.3;

// x [M,D], w [V + padding, D]: the rows of padding hold NaN, in w and in dw.
struct Head {
  int64_t m, d, v, padding;
  Buf x, w, dw, targets, losses, scale;

  Head(DType compute, int64_t rows, int64_t width, int64_t vocabulary, int64_t pad)
      : m(rows),
        d(width),
        v(vocabulary),
        padding(pad),
        x(compute, {m, d}),
        w(compute, {v + padding, d}),
        dw(Wide(compute), {v + padding, d}),
        targets(kI32, {m}),
        losses(Wide(compute), {m}),
        scale(kF64, {1}) {
    x.FillNormal(1);
    w.FillNormal(2);
    targets.FillIntegers(3, -1, v);
    scale.Fill(kScale);
    for (Buf* out : {&dw, &losses}) out->Fill(std::nan(""));
    for (int64_t i = v * d; i < (v + padding) * d; ++i) Set(w, i, std::nan(""));
  }
  Tensor Used(const Buf& t) const { return t.tensor().Slice(0, 0, v); }
  // With weight gradients x turns into its gradient.
  void Run(bool gradients, bool accumulate, const LogitsSink* sink, const Context& ctx) {
    LinearCrossEntropy(losses, x, gradients ? dw.tensor() : Tensor(), accumulate, w, targets,
                       {0, v, v}, scale, sink, ctx);
  }
};

// The ops that it joins, over all rows at once.
struct Composed {
  Buf logits, losses, dx, dw;

  Composed(const Head& h, DType compute, const Context& ctx)
      : logits(compute, {h.m, h.v}),
        losses(Wide(compute), {h.m}),
        dx(compute, {h.m, h.d}),
        dw(Wide(compute), {h.v, h.d}) {
    Buf max(Wide(compute), {h.m}), picked(Wide(compute), {h.m}), sum(kF64, {h.m});
    const VocabularySlice whole = WholeVocabulary(h.v);
    LinearForward(logits, h.x, h.Used(h.w), Tensor(), ctx);
    CrossEntropyMax(max, logits, whole, ctx);
    CrossEntropySum(sum, picked, max, logits, h.targets, whole, ctx);
    CrossEntropyFinish(losses, logits, max, sum, picked, logits, h.targets, whole, h.scale, ctx);
    LinearBackwardWeight(dw, logits, h.x, /*accumulate=*/false, ctx);
    LinearBackwardInput(dx, logits, h.Used(h.w), /*accumulate=*/false, ctx);
  }
};

// One chunk: the same bits as the ops it joins, and nothing of the padding is read or written.
TEST(LinearCrossEntropy, IsTheOpsItJoins) {
  const TestContext ctx;
  for (const DType compute : {kF32, kF64, kBF16}) {
    for (const int64_t padding : {0, 3}) {
      Head head(compute, 17, 9, 131, padding);
      const Composed want(head, compute, ctx);
      head.Run(false, false, nullptr, ctx);
      EXPECT_TRUE(SameBits(head.losses, want.losses));
      head.losses.Fill(std::nan(""));
      head.Run(true, false, nullptr, ctx);
      EXPECT_TRUE(SameBits(head.losses, want.losses));
      EXPECT_TRUE(SameBits(head.x, want.dx));
      EXPECT_TRUE(SameBits(head.Used(head.dw), want.dw));
      for (int64_t i = head.v * head.d; i < (head.v + padding) * head.d; ++i) {
        EXPECT_TRUE(std::isnan(Get(head.dw, i)));
      }
    }
  }
}

TEST(LinearCrossEntropy, GradientsInDouble) {
  const TestContext ctx;
  for (const int64_t m : {1, 6}) {
    Head head(kF64, m, 5, 11, 2);
    Set(head.targets, 0, 3);
    Head gradient(kF64, m, 5, 11, 2);
    Set(gradient.targets, 0, 3);
    gradient.Run(true, false, nullptr, ctx);
    CheckGradients(
        [&] {
          head.Run(false, false, nullptr, ctx);
          double sum = 0;
          for (const double loss : Values(head.losses)) sum += kScale * loss;
          return sum;
        },
        {{"x", head.x, gradient.x}, {"w", head.Used(head.w), gradient.Used(gradient.dw)}});
    // Without gradients x stays as it was.
    Head untouched(kF64, m, 5, 11, 2);
    EXPECT_TRUE(SameBits(head.x, untouched.x));
  }
}

TEST(LinearCrossEntropy, AccumulatesOrOverwrites) {
  const TestContext ctx;
  for (const DType compute : {kF32, kBF16}) {
    Head once(compute, 17, 9, 23, 1), added(compute, 17, 9, 23, 1);
    once.Run(true, false, nullptr, ctx);  // over NaN
    added.dw.Fill(2);
    added.Run(true, true, nullptr, ctx);
    for (int64_t i = 0; i < 23 * 9; ++i) {
      // Sums of 17 terms of size 0.3 begun at 2.
      EXPECT_NEAR(Get(added.dw, i), 2 + Get(once.dw, i), 17 * 0x1p-24 * 8);
    }
    for (int64_t i = 23 * 9; i < 24 * 9; ++i) EXPECT_EQ(Get(added.dw, i), 2);
  }
}

// Several chunks: 32 MiB hold 3 rows of logits over a little more than 2 Mi ids. The sink sees
// every row once, in order, unrounded.
TEST(LinearCrossEntropy, ChunksAndSink) {
  TestContext ctx;
  const int64_t v = (int64_t{2} << 20) + 4, m = 7;
  ASSERT_EQ(LogitRows(Device::kCpu, kF32, m, v), 3);
  Head head(kF32, m, 2, v, 4);
  const Composed want(head, kF32, ctx);
  Buf logits(kF32, {m, v});
  LinearForward(logits, head.x, head.Used(head.w), Tensor(), ctx);
  int64_t rows = 0;
  std::vector<int64_t> chunks;
  const LogitsSink sink = [&](Tensor chunk) {
    ASSERT_EQ(chunk.dim(1), v);
    EXPECT_LE(RelativeError(chunk, logits.tensor().Slice(0, rows, chunk.dim(0))), 0x1p-24);
    rows += chunk.dim(0);
    chunks.push_back(chunk.dim(0));
  };
  head.Run(true, false, &sink, ctx);
  EXPECT_EQ(rows, m);
  EXPECT_EQ(chunks, (std::vector<int64_t>{3, 3, 1}));
  // Products of other numbers of rows may be cut elsewhere: rounding of sums, not more.
  EXPECT_LE(RelativeError(head.losses, want.losses), 2 * 0x1p-24);
  EXPECT_LE(RelativeError(head.x, want.dx), 4 * 0x1p-24);
  EXPECT_LE(RelativeError(head.Used(head.dw), want.dw), 4 * 0x1p-24);
}

// Under bf16 the loss sees rounded logits, the sink those before rounding.
TEST(LinearCrossEntropy, SinkOfBFloat16IsUnrounded) {
  const TestContext ctx;
  Head head(kBF16, 5, 33, 19, 2), silent(kBF16, 5, 33, 19, 2);
  Buf want(kF32, {5, 19}), seen(kF32, {5, 19});
  LinearForward(want, head.x, head.Used(head.w), Tensor(), ctx);
  int64_t calls = 0;
  const LogitsSink sink = [&](Tensor chunk) {
    ASSERT_EQ(chunk.dtype(), kF32);
    seen.Assign(Values(chunk));
    ++calls;
  };
  head.Run(true, false, &sink, ctx);
  silent.Run(true, false, nullptr, ctx);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(SameBits(seen, want));
  EXPECT_TRUE(SameBits(head.losses, silent.losses) && SameBits(head.x, silent.x));
  Buf rounded(kBF16, {5, 19});
  EXPECT_FALSE(RelativeError(rounded.Assign(Values(want)), want) == 0);  // rounding would show
}

TEST(LinearCrossEntropy, NoRows) {
  const TestContext ctx;
  Head head(kF32, 0, 3, 5, 0);
  head.dw.Fill(4);
  head.Run(true, true, nullptr, ctx);
  EXPECT_EQ(Values(head.dw), std::vector<double>(15, 4));
}

TEST(LinearCrossEntropy, RowsOfAChunk) {
  EXPECT_EQ(LogitRows(Device::kCpu, kF32, 4096, 65536), 128);
  EXPECT_EQ(LogitRows(Device::kCpu, kBF16, 4096, 65536), 128);
  EXPECT_EQ(LogitRows(Device::kCpu, kF64, 4096, 65536), 64);
  EXPECT_EQ(LogitRows(Device::kCpu, kF32, 100, 65536), 100);
  EXPECT_EQ(LogitRows(Device::kCpu, kF32, 100, int64_t{1} << 30), 1);
  EXPECT_EQ(LogitRows(Device::kCuda, kBF16, 1 << 20, 65536), 4096);
  EXPECT_EQ(LogitRows(Device::kCuda, kBF16, 5, 65536), 5);
  EXPECT_EQ(LogitRows(Device::kCpu, kF32, 0, 131), 1);
}

TEST(LinearCrossEntropy, PlanningTakesTheSameScratch) {
  for (const DType compute : {kF32, kBF16}) {
    Head head(compute, 40, 9, 131, 3);
    Arena measured("measured");
    Context plan;
    plan.planning = true;
    plan.scratch = &measured;
    const LogitsSink sink = [](Tensor) {};
    const std::vector<double> before = Values(head.x);
    head.Run(true, false, &sink, plan);
    EXPECT_EQ(Values(head.x), before);
    TestContext ctx(measured.high_water());
    head.Run(true, false, &sink, ctx);
    EXPECT_EQ(ctx.scratch()->high_water(), measured.high_water());
  }
}

}  // namespace
}  // namespace krait
