// Attention and rotary embedding on the GPU against the CPU version of the same header.
//
// The reference is the CPU op in f64 on the same values; errors are taken in the norm of a tensor.
// f32: scores are sums of up to 256 products, outputs sums over keys, a gradient is the difference
// of two numbers of the size of its terms: a few dozen units in the last place. bf16: the CPU's
// bf16 mode rounds outputs alone. The GPU also rounds probabilities and the gradients of scores
// before they are multiplied, each by as much as an output: twice the CPU's error is allowed, and a
// little more where few elements make it random.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/random_fill.h"
#include "support/gradcheck.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::Get;
using testing::GpuContext;
using testing::kNaN;
using testing::kUlp;
using testing::OnGpu;
using testing::RelativeError;
using testing::SameBits;
using testing::Set;
using testing::TestContext;
using testing::Values;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kI32 = DType::kI32;

struct Shape {
  int64_t b, t, s, h, g, p;
  int64_t shift = 0;  // elements by which operands are unaligned
  friend std::ostream& operator<<(std::ostream& out, const Shape& s) {
    return out << "B " << s.b << " T " << s.t << " S " << s.s << " H " << s.h << " G " << s.g
               << " P " << s.p << " shift " << s.shift;
  }
};

// The operands of one attention on the CPU. Tokens are strided, as slices of a glued product are;
// keys lie in a cache with room for kRoom tokens more, which hold NaN.
struct Attention {
  static constexpr int64_t kRoom = 3;
  Shape shape;
  int64_t first_key = 0;
  Buf q, y, dy, dq, k, v, dk, dv, lse, doc_start;

  Attention(Shape s, DType dtype, bool padded = true)
      : shape(s),
        q(dtype, {s.b, s.t, s.h * s.p}, padded ? 2 * s.p : 0),
        y(dtype, {s.b, s.t, s.h * s.p}, padded ? s.p : 0),
        dy(dtype, {s.b, s.t, s.h * s.p}, padded ? s.p : 0),
        dq(dtype, {s.b, s.t, s.h * s.p}, padded ? 2 * s.p : 0),
        k(dtype, {s.b, s.s + kRoom, s.g * s.p}, padded ? s.p : 0),
        v(dtype, {s.b, s.s + kRoom, s.g * s.p}, padded ? s.p : 0),
        dk(dtype, {s.b, s.s + kRoom, s.g * s.p}, padded ? s.p : 0),
        dv(dtype, {s.b, s.s + kRoom, s.g * s.p}, padded ? s.p : 0),
        lse(Wide(dtype), {s.b, s.h, s.t}),
        doc_start(kI32, {s.b, s.t}) {
    uint64_t seed = 1;
    for (Buf* x : {&q, &k, &v, &dy}) x->FillNormal(seed++);
    for (Buf* x : {&y, &lse, &dq, &dk, &dv}) x->Fill(kNaN);
    for (Buf* x : {&k, &v}) {
      for (int64_t b = 0; b < s.b; ++b) {
        for (int64_t i = 0; i < kRoom * s.g * s.p; ++i) {
          Set(*x, ((b + 1) * (s.s + kRoom) - kRoom) * s.g * s.p + i, kNaN);
        }
      }
    }
  }
  // The same values in another dtype.
  Attention(const Attention& from, DType dtype) : Attention(from.shape, dtype, false) {
    first_key = from.first_key;
    CopyValues(q, from.q), CopyValues(k, from.k), CopyValues(v, from.v), CopyValues(dy, from.dy);
    CopyValues(y, from.y), CopyValues(lse, from.lse), CopyValues(doc_start, from.doc_start);
  }

  Tensor Heads(Tensor x, int64_t heads, int64_t tokens) const {
    const Tensor all(x.raw(), x.dtype(), x.device(),
                     {x.dim(0), x.dim(1), x.stride(1) / shape.p, shape.p});
    return all.Slice(2, 0, heads).Slice(1, 0, tokens);
  }
  Tensor Queries(Tensor x) const { return Heads(x, shape.h, shape.t); }
  Tensor Keys(Tensor x) const { return Heads(x, shape.g, shape.s); }
  Documents DocumentsOf(Tensor starts) const { return {starts, first_key + shape.s - shape.t}; }

  void Forward(bool documents, const Context& ctx) {
    AttentionForward(Queries(y), lse, Queries(q), Keys(k), Keys(v),
                     DocumentsOf(documents ? doc_start.tensor() : Tensor()), ctx);
  }
  void Backward(bool documents, const Context& ctx) {
    AttentionBackward(Queries(dq), Keys(dk), Keys(dv), Queries(dy), Queries(y), lse, Queries(q),
                      Keys(k), Keys(v), DocumentsOf(documents ? doc_start.tensor() : Tensor()),
                      ctx);
  }
  // On the GPU: y and lse, then the gradients.
  void RunOnGpu(bool documents, const Context& ctx) {
    const auto place = [&](Tensor x) { return OnGpu(x, shape.shift); };
    const OnGpu gq = place(q), gk = place(k), gv = place(v), gdy = place(dy), starts(doc_start);
    OnGpu gy = place(y), gdq = place(dq), gdk = place(dk), gdv = place(dv), glse(lse);
    const Documents docs = DocumentsOf(documents ? starts.tensor() : Tensor());
    AttentionForward(Queries(gy), glse, Queries(gq), Keys(gk), Keys(gv), docs, ctx);
    AttentionBackward(Queries(gdq), Keys(gdk), Keys(gdv), Queries(gdy), Queries(gy), glse,
                      Queries(gq), Keys(gk), Keys(gv), docs, ctx);
    for (OnGpu* x : {&gy, &gdq, &gdk, &gdv, &glse}) x->Download();
  }

  // Rows beyond the keys of the call, and padding, are as they were.
  bool RestIntact() const {
    for (const Buf* x : {&dk, &dv}) {
      for (int64_t b = 0; b < shape.b; ++b) {
        for (int64_t i = 0; i < kRoom * shape.g * shape.p; ++i) {
          const int64_t row = (b + 1) * (shape.s + kRoom) - kRoom;
          if (!std::isnan(Get(*x, row * shape.g * shape.p + i))) return false;
        }
      }
    }
    return y.PaddingIntact() && dq.PaddingIntact() && dk.PaddingIntact() && dv.PaddingIntact();
  }
};

// Documents begin at some places of each sequence, also within the prefix; the first of them began
// before the keys.
void SetDocuments(Attention* a) {
  const Shape& s = a->shape;
  const std::vector<int64_t> starts = {s.s / 3, s.s / 2 + 1, s.s - s.t + 2, s.s - 9};
  for (int64_t b = 0; b < s.b; ++b) {
    int64_t start = a->first_key / 2;
    for (int64_t key = 0; key < s.s; ++key) {
      for (size_t i = static_cast<size_t>(b) % 2; i < starts.size(); ++i) {
        if (starts[i] == key) start = a->first_key + key;
      }
      const int64_t t = key - (s.s - s.t);
      if (t >= 0) Set(a->doc_start, b * s.t + t, static_cast<double>(start));
    }
  }
}

double Norm(Tensor x) {
  double sum = 0;
  for (const double value : Values(x)) sum += value * value;
  return std::sqrt(sum);
}
// ||x - expected||; NaN anywhere gives NaN.
double Distance(Tensor x, Tensor expected) {
  double sum = 0;
  for (int64_t i = 0; i < expected.numel(); ++i) {
    const double d = Get(x, i) - Get(expected, i);
    sum += d * d;
  }
  return std::sqrt(sum);
}

// One token; odd sizes; grouped heads; a prefix; decoding; beyond one tile; heads up to 256.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 8},       {2, 7, 7, 4, 2, 5},         {2, 5, 9, 3, 3, 4},
    {1, 70, 330, 2, 1, 8},    {1, 131, 131, 3, 1, 40},    {2, 65, 600, 4, 2, 128},
    {1, 300, 300, 8, 2, 64},  {1, 100, 100, 2, 1, 256},   {1, 90, 90, 2, 2, 200},
    {1, 1, 3000, 8, 2, 128},  {2, 3, 1000, 12, 4, 96},    {1, 33, 2000, 2, 1, 33},
    {2, 257, 257, 4, 2, 128}, {1, 100, 170, 2, 1, 64, 1}, {1, 1, 700, 16, 1, 128},
    {1, 1, 40, 32, 1, 72},    {2, 150, 600, 4, 2, 128},   {1, 301, 333, 4, 4, 64}};

class AttentionGpu : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    KRAIT_NEEDS_GPU();
    gpu_.emplace(int64_t{256} << 20);
  }
  DType dtype() const { return GetParam(); }
  const Context& gpu() const { return *gpu_; }

  // `a` has what the GPU made of its inputs; compares with the CPU.
  void Compare(const Attention& a, bool documents) const {
    const TestContext cpu;
    Attention exact(a, kF64), rounded(a, dtype());
    exact.Backward(documents, cpu);  // from the GPU's y and lse
    exact.Forward(documents, cpu);
    rounded.Backward(documents, cpu);
    rounded.Forward(documents, cpu);
    struct Line {
      const char* name;
      Tensor gpu, cpu, exact;
      double ulps;
    };
    const Line lines[] = {
        {"y", a.Queries(a.y), rounded.Queries(rounded.y), exact.Queries(exact.y), 16},
        {"lse", a.lse, rounded.lse, exact.lse, 16},
        {"dq", a.Queries(a.dq), rounded.Queries(rounded.dq), exact.Queries(exact.dq), 32},
        {"dk", a.Keys(a.dk), rounded.Keys(rounded.dk), exact.Keys(exact.dk), 32},
        {"dv", a.Keys(a.dv), rounded.Keys(rounded.dv), exact.Keys(exact.dv), 32}};
    for (const Line& line : lines) {
      // Where all terms cancel (a document of one token) there is rounding alone, of terms of the
      // size of dy v.
      const auto count = static_cast<double>(line.exact.numel());
      const double floor = 16 * kUlp * std::sqrt(count);
      const double error = Distance(line.gpu, line.exact);
      const bool by_ulps = dtype() == kF32 || line.gpu.dtype() == kF32;
      const double bound =
          by_ulps ? line.ulps * kUlp * Norm(line.exact) + floor
                  : 2 * (1 + 3 / std::sqrt(count)) * Distance(line.cpu, line.exact) + floor;
      EXPECT_LE(error, bound) << line.name;
      worst_ = std::max(worst_, error / bound);
    }
    EXPECT_TRUE(a.RestIntact());
  }
  void TearDown() override {
    if (worst_ > 0) RecordProperty("worst_share_of_bound", std::to_string(worst_));
  }

  std::optional<GpuContext> gpu_;
  mutable double worst_ = 0;
};

TEST_P(AttentionGpu, AgreesWithTheCpu) {
  for (const Shape& shape : kShapes) {
    // Without documents; with them, and key 0 within a longer sequence.
    for (const auto& [documents, first_key] : {std::pair<bool, int64_t>{false, 0}, {true, 1000}}) {
      SCOPED_TRACE(::testing::Message() << shape << " documents " << documents << ' ' << first_key);
      Attention a(shape, dtype());
      a.first_key = first_key;
      SetDocuments(&a);
      a.RunOnGpu(documents, gpu());
      Compare(a, documents);
    }
  }
}

// The sequence in two calls, the second with the first one's keys before its own.
TEST_P(AttentionGpu, PiecesAgreeWithTheCpu) {
  Attention whole({1, 400, 400, 4, 2, 64}, dtype());
  for (int64_t t = 0; t < 400; ++t) Set(whole.doc_start, t, t < 50 ? 0 : t < 170 ? 50 : 170);
  for (const int64_t cut : {int64_t{147}, int64_t{170}}) {
    for (const auto& [begin, n] : {std::pair<int64_t, int64_t>{0, cut}, {cut, 400 - cut}}) {
      SCOPED_TRACE(::testing::Message() << begin << ", " << n);
      Attention piece({1, n, begin + n, 4, 2, 64}, dtype());
      for (const auto& [to, from] : {std::pair{&piece.q, &whole.q}, {&piece.dy, &whole.dy}}) {
        CopyValues(*to, from->tensor().Slice(1, begin, n));
      }
      for (const auto& [to, from] : {std::pair{&piece.k, &whole.k}, {&piece.v, &whole.v}}) {
        CopyValues(to->tensor().Slice(1, 0, begin + n), from->tensor().Slice(1, 0, begin + n));
      }
      CopyValues(piece.doc_start, whole.doc_start.tensor().Slice(1, begin, n));
      piece.RunOnGpu(true, gpu());
      Compare(piece, true);
    }
  }
}

// A document that begins at the first token of a piece sees nothing of the prefix.
TEST_P(AttentionGpu, ADocumentAtTheFirstTokenIgnoresThePrefix) {
  for (const int64_t prefix : {int64_t{3}, int64_t{64}, int64_t{500}}) {
    Attention a({1, 5, prefix + 5, 2, 1, 64}, dtype());
    a.first_key = 96;
    a.doc_start.Fill(static_cast<double>(96 + prefix));
    for (Buf* x : {&a.k, &a.v}) {
      for (int64_t i = 0; i < prefix * 64; ++i) Set(*x, i, kNaN);
    }
    a.RunOnGpu(true, gpu());
    Compare(a, true);
    for (int64_t i = 0; i < prefix * 64; ++i) ASSERT_EQ(Get(a.dk, i), 0) << i;
  }
}

TEST_P(AttentionGpu, LargeScoresDoNotOverflow) {
  Attention a({1, 300, 300, 1, 1, 8}, dtype());
  a.q.FillNormal(1, 30), a.k.FillNormal(2, 30);
  a.RunOnGpu(false, gpu());
  Attention exact(a, kF64);
  exact.Forward(false, TestContext());
  // Scores of up to 10^4, off by as many units in the last place: the relative error of p.
  const double error = RelativeError(a.Queries(a.y), exact.Queries(exact.y));
  EXPECT_LE(error, 1e4 * kUlp + (dtype() == kBF16 ? 0x1p-8 : 0));
}

TEST_P(AttentionGpu, TwoRunsGiveTheSameBits) {
  for (const Shape& shape : {Shape{2, 513, 513, 8, 2, 128}, {1, 1, 5000, 8, 2, 128}}) {
    for (const bool documents : {false, true}) {
      Attention one(shape, dtype()), two(shape, dtype());
      SetDocuments(&one), SetDocuments(&two);
      one.RunOnGpu(documents, gpu());
      two.RunOnGpu(documents, gpu());
      for (const auto& [x, z] : {std::pair{&one.y, &two.y},
                                 {&one.lse, &two.lse},
                                 {&one.dq, &two.dq},
                                 {&one.dk, &two.dk},
                                 {&one.dv, &two.dv}}) {
        EXPECT_TRUE(SameBits(*x, *z)) << shape << documents;
      }
    }
  }
}

TEST_P(AttentionGpu, NotDeterministicAgreesWithTheCpu) {
  Context ctx = gpu();
  ctx.deterministic = false;
  for (const bool documents : {false, true}) {
    Attention a({2, 257, 257, 4, 2, 128}, dtype());
    SetDocuments(&a);
    a.RunOnGpu(documents, ctx);
    Compare(a, documents);
  }
}

TEST_P(AttentionGpu, NoQueriesNoKeys) {
  Attention a({1, 1, 1, 1, 1, 8}, dtype());
  const OnGpu gq(a.q), gk(a.k), glse(a.lse);
  const Tensor none = a.Queries(gq).Slice(1, 0, 0), no_lse = glse.tensor().Slice(2, 0, 0);
  const Tensor keys = a.Keys(gk).Slice(1, 0, 0);
  AttentionForward(none, no_lse, none, keys, keys, {}, gpu());
  AttentionBackward(none, keys, keys, none, none, no_lse, none, keys, keys, {}, gpu());
}

TEST_P(AttentionGpu, RopeAgreesWithTheCpu) {
  const TestContext cpu;
  struct RopeShape {
    int64_t b, t, h, p, first, shift;
  };
  for (const auto& [b, t, h, p, first, shift] : {RopeShape{2, 5, 3, 6, 7, 0},
                                                 {1, 1, 1, 2, 0, 1},
                                                 {1, 300, 8, 128, 1 << 20, 0},
                                                 {2, 33, 2, 256, 4000, 0},
                                                 {1, 3, 5, 130, 1 << 20, 1}}) {
    for (const bool documents : {false, true}) {
      for (const bool inverse : {false, true}) {
        SCOPED_TRACE(::testing::Message() << t << ", " << p << documents << inverse);
        Buf x(dtype(), {b, t, h * p}, p), exact(kF64, {b, t, h * p}), starts(kI32, {b, t});
        x.FillNormal(1);
        CopyValues(exact, x);
        for (int64_t i = 0; i < b * t; ++i) {
          Set(starts, i, static_cast<double>(i % t < 4 ? first / 3 : first + 4));
        }
        const auto heads = [&](Tensor z) {
          return Tensor(z.raw(), z.dtype(), z.device(), {b, t, z.stride(1) / p, p}).Slice(2, 0, h);
        };
        {
          OnGpu gx(x, shift);
          const OnGpu gstarts(starts);
          Rope(heads(gx), {documents ? gstarts.tensor() : Tensor(), first}, 1e4, inverse, gpu());
          gx.Download();
        }
        Rope(heads(exact), {documents ? starts.tensor() : Tensor(), first}, 1e4, inverse, cpu);
        EXPECT_TRUE(x.PaddingIntact());
        // Sine and cosine are rounded to f32, then three roundings.
        if (dtype() == kF32) {
          EXPECT_LE(RelativeError(x, exact), 2 * kUlp);
        } else {
          EXPECT_LE(RelativeError(x, exact), 0x1p-9);
        }
      }
    }
  }
}

// The deterministic backward is cut into calls for part of the sequences, of the key heads or of
// the queries, also of unequal size; the other one is a single call. The reference is the f32
// kernel on the same values.
TEST(AttentionGpuCalls, CutIntoCallsStaysWithinTheBound) {
  KRAIT_NEEDS_GPU();
  struct Case {
    int64_t b, t, h, g;
  };
  for (const auto& [b, t, h, g] : {Case{3, 4096, 32, 8}, {1, 8192, 20, 5}, {1, 9000, 16, 1}}) {
    constexpr int64_t kP = 64;
    GpuContext gpu(int64_t{3} << 30);
    Arena memory("operands", Device::kCuda, int64_t{3} << 30);
    const auto heads_of = [&](int64_t heads, DType dtype) {
      return memory.Alloc(dtype, {b, t, heads, kP});
    };
    Tensor q[2], k[2], v[2], dy[2], y[2], dq[2], dk[2], dv[2];  // bf16; the same values in f32
    uint64_t seed = 0;
    for (Tensor* x : {q, k, v, dy, y, dq, dk, dv}) {
      const int64_t heads = x == k || x == v || x == dk || x == dv ? g : h;
      x[0] = heads_of(heads, kBF16), x[1] = heads_of(heads, kF32);
      FillNormal(x[0], RandomStream(1, RandomPurpose::kSynthetic, seed++), 0, kP, 1, gpu.ctx);
    }
    const Tensor lse = memory.Alloc(kF32, {b, h, t});
    AttentionForward(y[0], lse, q[0], k[0], v[0], {}, gpu);
    for (Tensor* x : {q, k, v, dy, y}) Copy(x[1], x[0], gpu);
    AttentionBackward(dq[1], dk[1], dv[1], dy[1], y[1], lse, q[1], k[1], v[1], {}, gpu);
    for (const bool deterministic : {true, false}) {
      gpu.ctx.deterministic = deterministic;
      for (const Tensor* x : {dq, dk, dv}) Fill(x[0], kNaN, gpu);
      AttentionBackward(dq[0], dk[0], dv[0], dy[0], y[0], lse, q[0], k[0], v[0], {}, gpu);
      for (const Tensor* x : {dq, dk, dv}) {
        const int64_t n = x[0].numel();
        std::vector<BF16> got(static_cast<size_t>(n));
        std::vector<float> exact(static_cast<size_t>(n));
        cuda::CopyToHost(got.data(), x[0].raw(), x[0].bytes());
        cuda::CopyToHost(exact.data(), x[1].raw(), x[1].bytes());
        double error = 0, rounding = 0;
        for (size_t i = 0; i < exact.size(); ++i) {
          const double e = exact[i];
          error += std::pow(testing::FromBF16(got[i]) - e, 2);
          rounding += std::pow(testing::FromBF16(testing::ToBF16(exact[i])) - e, 2);
        }
        // Blocks of queries round dk and dv once more.
        const double roundings = deterministic && t == 9000 && x != dq ? 2.2 : 2;
        EXPECT_LE(std::sqrt(error), roundings * std::sqrt(rounding)) << "T " << t
                                                                     << (x == dq   ? " dq "
                                                                         : x == dk ? " dk "
                                                                                   : " dv ")
                                                                     << deterministic;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, AttentionGpu, ::testing::Values(kF32, kBF16),
                         [](const auto& dtype) { return std::string(Name(dtype.param)); });

}  // namespace
}  // namespace krait
