#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/activation.h"
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

struct Shape {
  int64_t b, t, s, h, g, p;
};

// The tensors of one attention, forward and backward. q, k and v are slices of glued products when
// `pad` > 0: a token's heads are followed by foreign (NaN) elements.
struct Attention {
  Shape shape;
  int64_t first_key = 0;  // absolute position of key 0
  Buf q, k, v, y, lse, dy, dq, dk, dv;

  explicit Attention(Shape s, DType dtype = kF64, int64_t pad = 0)
      : shape(s),
        q(dtype, {s.b, s.t, s.h * s.p}, pad),
        k(dtype, {s.b, s.s, s.g * s.p}, 2 * pad),
        v(dtype, {s.b, s.s, s.g * s.p}, pad),
        y(dtype, {s.b, s.t, s.h * s.p}, pad),
        lse(dtype, {s.b, s.h, s.t}),
        dy(dtype, {s.b, s.t, s.h * s.p}, pad),
        dq(dtype, {s.b, s.t, s.h * s.p}, pad),
        dk(dtype, {s.b, s.s, s.g * s.p}, pad),
        dv(dtype, {s.b, s.s, s.g * s.p}, 3 * pad) {
    q.FillNormal(1);
    k.FillNormal(2);
    v.FillNormal(3);
    dy.FillNormal(4);
    for (Buf* out : {&y, &lse, &dq, &dk, &dv}) out->Fill(std::nan(""));  // all overwritten
  }
  // [B,T,heads,P] of [B,T,heads*P]: the heads of a token are contiguous, tokens may be strided.
  Tensor Heads(const Buf& x) const {
    const Tensor t = x;
    const Tensor all(t.raw(), t.dtype(), t.device(),
                     {t.dim(0), t.dim(1), t.stride(1) / shape.p, shape.p});
    KRAIT_CHECK(t.stride(1) % shape.p == 0);
    return all.Slice(2, 0, t.dim(2) / shape.p);
  }
  Documents DocumentsOf(Tensor doc_start) const {
    return {doc_start, first_key + shape.s - shape.t};
  }
  void Forward(Tensor doc_start, const Context& ctx) {
    AttentionForward(Heads(y), lse, Heads(q), Heads(k), Heads(v), DocumentsOf(doc_start), ctx);
  }
  void Backward(Tensor doc_start, const Context& ctx) {
    AttentionBackward(Heads(dq), Heads(dk), Heads(dv), Heads(dy), Heads(y), lse, Heads(q), Heads(k),
                      Heads(v), DocumentsOf(doc_start), ctx);
  }
  bool PaddingIntact() const {
    return y.PaddingIntact() && dq.PaddingIntact() && dk.PaddingIntact() && dv.PaddingIntact();
  }
};

// softmax(q k^T / sqrt(P)) v by the definition, in double; y and lse.
void Reference(const Attention& a, Tensor doc_start, std::vector<double>* y,
               std::vector<double>* lse) {
  const Shape& s = a.shape;
  y->assign(static_cast<size_t>(s.b * s.t * s.h * s.p), 0);
  lse->assign(static_cast<size_t>(s.b * s.h * s.t), 0);
  for (int64_t b = 0; b < s.b; ++b) {
    for (int64_t h = 0; h < s.h; ++h) {
      const int64_t g = h / (s.h / s.g);
      for (int64_t t = 0; t < s.t; ++t) {
        const int64_t first =
            doc_start.defined()
                ? std::max<int64_t>(0,
                                    static_cast<int64_t>(Get(doc_start, b * s.t + t)) - a.first_key)
                : 0;
        double total = 0;
        for (int64_t key = first; key <= s.s - s.t + t; ++key) {
          double score = 0;
          for (int64_t p = 0; p < s.p; ++p) {
            score += Get(a.q, ((b * s.t + t) * s.h + h) * s.p + p) *
                     Get(a.k, ((b * s.s + key) * s.g + g) * s.p + p);
          }
          const double weight = std::exp(score / std::sqrt(static_cast<double>(s.p)));
          total += weight;
          for (int64_t p = 0; p < s.p; ++p) {
            (*y)[static_cast<size_t>(((b * s.t + t) * s.h + h) * s.p + p)] +=
                weight * Get(a.v, ((b * s.s + key) * s.g + g) * s.p + p);
          }
        }
        for (int64_t p = 0; p < s.p; ++p) {
          (*y)[static_cast<size_t>(((b * s.t + t) * s.h + h) * s.p + p)] /= total;
        }
        (*lse)[static_cast<size_t>((b * s.h + h) * s.t + t)] = std::log(total);
      }
    }
  }
}

// Document starts [B,T], from the boundaries of at least B rows; both count from `origin`, and
// `prefix` positions come before the first token. What comes before the first boundary began
// before `origin`.
void SetDocuments(Buf* doc_start, int64_t prefix,
                  const std::vector<std::vector<int64_t>>& boundaries, int64_t origin = 0) {
  const int64_t t = doc_start->tensor().dim(1);
  const auto rows = static_cast<size_t>(doc_start->tensor().dim(0));
  for (size_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < t; ++i) {
      int64_t start = origin / 2;
      for (const int64_t boundary : boundaries[b]) {
        if (boundary <= prefix + i) start = origin + boundary;
      }
      Set(*doc_start, static_cast<int64_t>(b) * t + i, static_cast<double>(start));
    }
  }
}

// Sizes: one token; odd; grouped heads; a prefix; lengths beyond one tile of queries and of keys.
const Shape kShapes[] = {{1, 1, 1, 1, 1, 3},   {2, 7, 7, 4, 2, 5},    {2, 5, 9, 3, 3, 4},
                         {1, 1, 6, 6, 2, 2},   {1, 70, 330, 2, 1, 8}, {1, 131, 131, 3, 1, 4},
                         {1, 65, 600, 1, 1, 2}};

TEST(Attention, ForwardIsTheFormula) {
  const TestContext ctx;
  for (const Shape& shape : kShapes) {
    // Without documents; with; with key 0 somewhere within a longer sequence.
    for (const auto& [documents, first_key] :
         {std::pair<bool, int64_t>{false, 0}, {true, 0}, {true, 1000}, {false, 1000}}) {
      Attention a(shape, kF64, 2 * shape.p);
      a.first_key = first_key;
      Buf doc_start(kI32, {shape.b, shape.t});
      SetDocuments(&doc_start, shape.s - shape.t,
                   {{2, 3, shape.s / 2, shape.s - 1}, {shape.s - shape.t + 1}}, first_key);
      const Tensor docs = documents ? doc_start.tensor() : Tensor();
      a.Forward(docs, ctx);
      std::vector<double> y, lse;
      Reference(a, docs, &y, &lse);
      EXPECT_LE(RelativeError(Values(a.y), y), 1e-14);
      EXPECT_LE(RelativeError(Values(a.lse), lse), 1e-14);
      EXPECT_TRUE(a.PaddingIntact());
    }
  }
}

TEST(Attention, GradientsInDouble) {
  const TestContext ctx;
  for (const Shape& shape : kShapes) {
    for (const auto& [documents, first_key] :
         {std::pair<bool, int64_t>{false, 0}, {true, 0}, {true, 1000}}) {
      Attention a(shape, kF64, 2 * shape.p);
      a.first_key = first_key;
      Buf doc_start(kI32, {shape.b, shape.t});
      SetDocuments(&doc_start, shape.s - shape.t, {{2, 3, shape.s / 2}, {shape.s - shape.t + 1}},
                   first_key);
      const Tensor docs = documents ? doc_start.tensor() : Tensor();
      a.Forward(docs, ctx);
      a.Backward(docs, ctx);
      // Large cases: a sample of the elements.
      CheckGradients(
          [&] {
            a.Forward(docs, ctx);
            return Dot(a.y, a.dy);
          },
          {{"q", a.q, a.dq}, {"k", a.k, a.dk}, {"v", a.v, a.dv}}, {.max_elements = 60});
      EXPECT_TRUE(a.PaddingIntact());
      // Keys that nobody sees get exact zeros, not what was there before.
      if (documents && shape.s > shape.t + 4) {
        EXPECT_EQ(Get(a.dk, 0), 0);
        EXPECT_EQ(Get(a.dv, 0), 0);
      }
    }
  }
}

TEST(Attention, FloatAgreesWithDouble) {
  const TestContext ctx;
  const Shape shape{2, 200, 300, 4, 2, 32};
  Attention a32(shape, kF32, 32), a64(shape, kF64);
  for (const auto& [from, to] : {std::pair<Buf*, Buf*>{&a32.q, &a64.q},
                                 {&a32.k, &a64.k},
                                 {&a32.v, &a64.v},
                                 {&a32.dy, &a64.dy}}) {
    to->Assign(Values(*from));
  }
  a32.Forward(Tensor(), ctx);
  a64.Forward(Tensor(), ctx);
  a32.Backward(Tensor(), ctx);
  a64.Backward(Tensor(), ctx);
  // Scores are dot products of 32 and means over up to 300 keys: a few roundings each, their errors
  // random. The gradient subtracts delta from dp, both of size sqrt(32), for values of size one.
  constexpr double u = 0x1p-24;
  EXPECT_LE(RelativeError(a32.y, a64.y), 8 * u);
  EXPECT_LE(RelativeError(a32.lse, a64.lse), 8 * u);
  EXPECT_LE(RelativeError(a32.dq, a64.dq), 16 * u);
  EXPECT_LE(RelativeError(a32.dk, a64.dk), 16 * u);
  EXPECT_LE(RelativeError(a32.dv, a64.dv), 16 * u);
}

TEST(Attention, LargeScoresDoNotOverflow) {
  const TestContext ctx;
  const Shape shape{1, 300, 300, 1, 1, 4};
  Attention a(shape, kF32), exact(shape, kF64);
  a.q.FillNormal(1, 30);
  a.k.FillNormal(2, 30);
  exact.q.Assign(Values(a.q));
  exact.k.Assign(Values(a.k));
  exact.v.Assign(Values(a.v));
  a.Forward(Tensor(), ctx);
  exact.Forward(Tensor(), ctx);
  // Scores of up to 5000 with error 5000 u: that is the relative error of their exponentials.
  EXPECT_LE(RelativeError(a.y, exact.y), 5000 * 0x1p-24);
}

TEST(Attention, PackedDocumentsEqualSeparateOnes) {
  const TestContext ctx;
  const std::vector<int64_t> starts = {0, 1, 70, 71, 150, 420};
  const int64_t t = 431, heads = 2, g = 1, p = 8;
  Attention packed({1, t, t, heads, g, p});
  Buf doc_start(kI32, {1, t});
  SetDocuments(&doc_start, 0, {starts});
  packed.Forward(doc_start, ctx);
  packed.Backward(doc_start, ctx);
  for (size_t d = 0; d < starts.size(); ++d) {
    const int64_t begin = starts[d], n = (d + 1 < starts.size() ? starts[d + 1] : t) - begin;
    Attention alone({1, n, n, heads, g, p});
    const auto part = [&](const Buf& x) { return x.tensor().Slice(1, begin, n); };
    for (const auto& [to, from] : {std::pair<Buf*, Buf*>{&alone.q, &packed.q},
                                   {&alone.k, &packed.k},
                                   {&alone.v, &packed.v},
                                   {&alone.dy, &packed.dy}}) {
      Copy(*to, part(*from), ctx);
    }
    alone.Forward(Tensor(), ctx);
    alone.Backward(Tensor(), ctx);
    EXPECT_LE(RelativeError(alone.y, part(packed.y)), 1e-14);
    // A document of one token has dq = dk = 0 but for rounding, hence the absolute bound.
    for (const auto& [one, other] : {std::pair<Buf*, Buf*>{&alone.dq, &packed.dq},
                                     {&alone.dk, &packed.dk},
                                     {&alone.dv, &packed.dv}}) {
      const std::vector<double> x = Values(*one), z = Values(part(*other));
      for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], z[i], 1e-13);
    }
  }
}

TEST(Attention, SequenceCutInTwoEqualsTheWhole) {
  const TestContext ctx;
  const int64_t t = 400, cut = 147, heads = 4, g = 2, p = 8;
  Buf doc_start(kI32, {1, t});
  SetDocuments(&doc_start, 0, {{0, 50, 140, 300}});
  for (const bool documents : {false, true}) {
    const auto docs = [&](int64_t begin, int64_t n) {
      return documents ? doc_start.tensor().Slice(1, begin, n) : Tensor();
    };
    Attention whole({1, t, t, heads, g, p}), first({1, cut, cut, heads, g, p}),
        second({1, t - cut, t, heads, g, p});
    const auto copy = [&](const Buf& to, const Buf& from, int64_t begin) {
      Copy(to, from.tensor().Slice(1, begin, to.tensor().dim(1)), ctx);
    };
    copy(first.q, whole.q, 0);
    copy(first.k, whole.k, 0);
    copy(first.v, whole.v, 0);
    copy(first.dy, whole.dy, 0);
    copy(second.q, whole.q, cut);
    copy(second.k, whole.k, 0);
    copy(second.v, whole.v, 0);
    copy(second.dy, whole.dy, cut);
    whole.Forward(docs(0, t), ctx);
    whole.Backward(docs(0, t), ctx);
    first.Forward(docs(0, cut), ctx);
    first.Backward(docs(0, cut), ctx);
    second.Forward(docs(cut, t - cut), ctx);
    second.Backward(docs(cut, t - cut), ctx);
    EXPECT_LE(RelativeError(first.y, whole.y.tensor().Slice(1, 0, cut)), 1e-14);
    EXPECT_LE(RelativeError(second.y, whole.y.tensor().Slice(1, cut, t - cut)), 1e-14);
    EXPECT_LE(RelativeError(first.dq, whole.dq.tensor().Slice(1, 0, cut)), 1e-13);
    EXPECT_LE(RelativeError(second.dq, whole.dq.tensor().Slice(1, cut, t - cut)), 1e-13);
    // The prefix keys collect gradients from both parts.
    AddInPlace(second.dk.tensor().Slice(1, 0, cut), first.dk, ctx);
    AddInPlace(second.dv.tensor().Slice(1, 0, cut), first.dv, ctx);
    EXPECT_LE(RelativeError(second.dk, whole.dk), 1e-13);
    EXPECT_LE(RelativeError(second.dv, whole.dv), 1e-13);
  }
}

// A document that begins at the first token of the second piece sees nothing of the prefix.
TEST(Attention, ADocumentAtTheFirstTokenIgnoresThePrefix) {
  const TestContext ctx;
  const int64_t t = 5, prefix = 4;
  Attention a({1, t, prefix + t, 2, 1, 4}), alone({1, t, t, 2, 1, 4});
  a.first_key = 96;
  Buf doc_start(kI32, {1, t});
  doc_start.Fill(100);
  for (Buf* kv : {&a.k, &a.v}) {
    for (int64_t i = 0; i < prefix * 4; ++i) Set(*kv, i, std::nan(""));
  }
  Copy(alone.q, a.q, ctx);
  Copy(alone.k, a.k.tensor().Slice(1, prefix, t), ctx);
  Copy(alone.v, a.v.tensor().Slice(1, prefix, t), ctx);
  a.Forward(doc_start, ctx);
  alone.Forward(Tensor(), ctx);
  EXPECT_LE(RelativeError(a.y, alone.y), 1e-15);
  EXPECT_LE(RelativeError(a.lse, alone.lse), 1e-15);
}

TEST(Attention, TheSameForAnyNumberOfThreads) {
  for (const Shape& shape : {Shape{2, 300, 300, 4, 2, 16}, Shape{1, 40, 700, 1, 1, 64}}) {
    Attention one(shape, kF32), two(shape, kF32);
    WithThreads(1, [&] {
      const TestContext ctx;
      one.Forward(Tensor(), ctx);
      one.Backward(Tensor(), ctx);
    });
    WithThreads(2, [&] {
      const TestContext ctx;
      two.Forward(Tensor(), ctx);
      two.Backward(Tensor(), ctx);
    });
    EXPECT_TRUE(SameBits(one.y, two.y) && SameBits(one.lse, two.lse));
    EXPECT_TRUE(SameBits(one.dq, two.dq) && SameBits(one.dk, two.dk) && SameBits(one.dv, two.dv));
  }
}

TEST(Attention, PlanningTakesTheScratchOfTheRealCall) {
  TestContext ctx;
  const Shape shape{1, 70, 70, 2, 1, 4};
  Attention a(shape);
  a.Forward(Tensor(), ctx);
  a.Backward(Tensor(), ctx);
  const int64_t used = ctx.scratch()->high_water();
  TestContext planning;
  planning.get()->planning = true;
  Attention untouched(shape);
  untouched.Forward(Tensor(), planning);
  untouched.Backward(Tensor(), planning);
  EXPECT_EQ(planning.scratch()->high_water(), used);
  EXPECT_TRUE(std::isnan(Get(untouched.y, 0)) && std::isnan(Get(untouched.dq, 0)));
}

// A plan of a CUDA run is made with documents and all rows of a pass.
TEST(Attention, PlanOnCudaHoldsWithoutDocumentsAndForFewerSequences) {
  const auto planned = [](int64_t b, int64_t t, int64_t heads, int64_t g, bool documents) {
    Arena scratch("scratch", Device::kCuda), memory("operands", Device::kCuda);
    Context ctx;
    ctx.device = Device::kCuda;
    ctx.scratch = &scratch;
    ctx.planning = true;
    const auto heads_of = [&](int64_t n) { return memory.Alloc(DType::kBF16, {b, t, n, 128}); };
    const Tensor q = heads_of(heads), k = heads_of(g), lse = memory.Alloc(kF32, {b, heads, t});
    const Documents docs{documents ? memory.Alloc(kI32, {b, t}) : Tensor()};
    AttentionForward(q, lse, q, k, k, docs, ctx);
    AttentionBackward(q, k, k, q, q, lse, q, k, k, docs, ctx);
    return scratch.high_water();
  };
  for (const auto t : std::initializer_list<int64_t>{100, 4096, 8192, 16384, 65536}) {
    int64_t fewer = 0;
    for (int64_t b = 1; b <= 5; ++b) {
      const int64_t with = planned(b, t, 32, 8, true), without = planned(b, t, 32, 8, false);
      EXPECT_GE(with, without) << t << ' ' << b;
      EXPECT_GE(with, fewer) << t << ' ' << b;
      fewer = with;
      // The workspace, the mask, statistics, and sums of blocks of queries.
      EXPECT_LE(without, (int64_t{2304} << 20) + (int64_t{300} << 20)) << t << ' ' << b;
    }
  }
}

TEST(Rope, RotatesPairsByPositionTimesFrequency) {
  const TestContext ctx;
  const int64_t b = 2, t = 5, h = 3, p = 6, first = 7;
  const double theta = 100;
  Buf x(kF64, {b, t, h, p}, 6), before(kF64, {b, t, h, p}), doc_start(kI32, {b, t});
  x.FillNormal(1);
  before.FillNormal(1);
  SetDocuments(&doc_start, first, {{3, 9}, {0, 11}});
  for (const bool documents : {false, true}) {
    x.FillNormal(1);
    const Tensor docs = documents ? doc_start.tensor() : Tensor();
    Rope(x, {docs, first}, theta, false, ctx);
    for (int64_t row = 0; row < b * t; ++row) {
      const double position =
          static_cast<double>(first + row % t) - (documents ? Get(docs, row) : 0);
      for (int64_t head = 0; head < h; ++head) {
        for (int64_t i = 0; i < p / 2; ++i) {
          const int64_t low = (row * h + head) * p + i, high = low + p / 2;
          const double angle =
              position * std::pow(theta, -2 * static_cast<double>(i) / static_cast<double>(p));
          const double c = std::cos(angle), s = std::sin(angle);
          EXPECT_NEAR(Get(x, low), Get(before, low) * c - Get(before, high) * s, 1e-14);
          EXPECT_NEAR(Get(x, high), Get(before, high) * c + Get(before, low) * s, 1e-14);
        }
      }
    }
    EXPECT_TRUE(x.PaddingIntact());
    Rope(x, {docs, first}, theta, true, ctx);
    EXPECT_LE(RelativeError(x, before), 1e-15);
  }
}

TEST(Rope, InverseIsTheGradient) {
  const TestContext ctx;
  Buf x(kF64, {1, 3, 2, 130}), y(kF64, {1, 3, 2, 130}), cotangent(kF64, {1, 3, 2, 130}),
      dx(kF64, {1, 3, 2, 130});
  x.FillNormal(1);
  cotangent.FillNormal(2);
  dx.Assign(Values(cotangent));
  Rope(dx, {Tensor(), 4}, 1e4, true, ctx);
  CheckGradients(
      [&] {
        Copy(y, x, ctx);
        Rope(y, {Tensor(), 4}, 1e4, false, ctx);
        return Dot(y, cotangent);
      },
      {{"x", x, dx}});
}

TEST(Rope, FloatKeepsItsAccuracyFarOut) {
  const TestContext ctx;
  Buf x32(kF32, {1, 4, 2, 64}), x64(kF64, {1, 4, 2, 64});
  x64.Assign(Values(x32.FillNormal(1)));
  Rope(x32, {Tensor(), 262140}, 1e4, false, ctx);
  Rope(x64, {Tensor(), 262140}, 1e4, false, ctx);
  // Angles are computed in double: what is left is the rounding of sine, cosine and products.
  EXPECT_LE(RelativeError(x32, x64), 2 * 0x1p-24);
}

}  // namespace
}  // namespace krait
