// The CUDA convolution against the CPU version of the same header; tolerances: support/on_gpu.h.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/causal_conv1d.h"
#include "support/on_gpu.h"

namespace krait {
namespace {

using testing::Buf;
using testing::CopyValues;
using testing::ExpectMatches;
using testing::ExpectNear;
using testing::kNaN;
using testing::kUlp;
using testing::MaxAbs;
using testing::OnGpu;
using testing::SameBits;
using testing::Set;

struct Shape {
  int64_t batch, time, channels, taps;
  int64_t pad = 0, shift = 0;
  bool documents = false, states = false, bias = true;
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B " << s.batch << " T " << s.time << " I " << s.channels << " K " << s.taps
             << " pad " << s.pad << " shift " << s.shift << (s.documents ? " documents" : "")
             << (s.states ? " states" : "") << (s.bias ? "" : " no bias");
}

std::vector<Shape> Shapes() {
  std::vector<Shape> all;
  // One token; pieces of 64 tokens and blocks of 512, with and without a rest; channels beyond a
  // warp's 256; fewer tokens than taps; padded rows, with and without 16-byte alignment.
  for (Shape s : {Shape{1, 1, 8, 4}, Shape{2, 5, 24, 4}, Shape{1, 70, 40, 3}, Shape{2, 600, 136, 4},
                  Shape{1, 130, 16, 8}, Shape{3, 17, 7, 4}, Shape{1, 3, 16, 1}, Shape{2, 2, 16, 8},
                  Shape{1, 1030, 24, 2}, Shape{1, 67, 1032, 4}, Shape{2, 70, 64, 4, 64},
                  Shape{2, 70, 64, 4, 3}, Shape{1, 9, 16, 5, 0, 1}, Shape{1, 64, 8, 6}}) {
    for (int variant = 0; variant < 4; ++variant) {
      s.documents = variant % 2 == 1, s.states = variant >= 2, s.bias = variant != 2;
      all.push_back(s);
    }
  }
  return all;
}

constexpr int64_t kFirstPosition = 1000;

// Everything that a call takes and gives, in one dtype.
struct Conv {
  Buf x, w, bias, initial_state, doc_start, dy, d_final_state;
  Buf y, final_state, dx, dw, dbias, d_initial_state;

  Conv(DType type, DType wide, const Shape& s)
      : x(type, {s.batch, s.time, s.channels}, s.pad),
        w(type, {s.channels, s.taps}),
        bias(type, {s.channels}),
        initial_state(type, {s.batch, s.taps - 1, s.channels}),
        doc_start(DType::kI32, {s.batch, s.time}),
        dy(type, {s.batch, s.time, s.channels}, s.pad),
        d_final_state(type, {s.batch, s.taps - 1, s.channels}),
        y(type, {s.batch, s.time, s.channels}, s.pad),
        final_state(type, {s.batch, s.taps - 1, s.channels}),
        dx(type, {s.batch, s.time, s.channels}, s.pad),
        dw(wide, {s.channels, s.taps}),
        dbias(wide, {s.channels}),
        d_initial_state(type, {s.batch, s.taps - 1, s.channels}) {
    for (Buf* out : {&y, &final_state, &dx, &d_initial_state}) out->Fill(kNaN);
  }
  void FillInputs(const Shape& s) {
    x.FillNormal(1), w.FillNormal(2), bias.FillNormal(3), initial_state.FillNormal(4);
    dy.FillNormal(5), d_final_state.FillNormal(6), dw.FillNormal(7), dbias.FillNormal(8);
    // Row 0 continues a document that began two positions before the call, row 1 begins one with
    // the call, row 2 one long before; further ones begin at these tokens.
    for (int64_t b = 0; b < s.batch; ++b) {
      int64_t start = b == 0 ? -2 : (b == 1 ? 0 : -500);
      for (int64_t t = 0; t < s.time; ++t) {
        for (const int64_t begins : {1, 2, 6, 15, 62, 64, 66, 127, 511, 512, 1029}) {
          if (t == begins + b) start = t;
        }
        Set(doc_start, b * s.time + t, static_cast<double>(kFirstPosition + start));
      }
    }
  }
  void CopyInputs(const Conv& from) {
    CopyValues(x, from.x), CopyValues(w, from.w), CopyValues(bias, from.bias);
    CopyValues(initial_state, from.initial_state), CopyValues(doc_start, from.doc_start);
    CopyValues(dy, from.dy), CopyValues(d_final_state, from.d_final_state);
    CopyValues(dw, from.dw), CopyValues(dbias, from.dbias);
  }
};

// Both passes; T is Buf or OnGpu.
template <typename T>
void BothPasses(const Shape& s, T& x, T& w, T& bias, T& initial_state, T& doc_start, T& dy,
                T& d_final_state, T& y, T& final_state, T& dx, T& dw, T& dbias, T& d_initial_state,
                const Context& ctx) {
  const auto given = [](bool yes, T& t) { return yes ? Tensor(t) : Tensor(); };
  const Documents documents{given(s.documents, doc_start), s.documents ? kFirstPosition : 0};
  const bool states = s.states;
  CausalConv1dSiluForward(y, given(states, final_state), x, w, given(s.bias, bias),
                          given(states, initial_state), documents, ctx);
  CausalConv1dSiluBackward(dx, dw, given(s.bias, dbias), given(states, d_initial_state), dy,
                           given(states, d_final_state), x, w, given(s.bias, bias),
                           given(states, initial_state), documents, ctx);
}

void RunOnGpu(const Shape& s, Conv& c, const Context& ctx) {
  OnGpu x(c.x, s.shift), w(c.w), bias(c.bias), initial_state(c.initial_state);
  OnGpu doc_start(c.doc_start), dy(c.dy, s.shift), d_final_state(c.d_final_state);
  OnGpu y(c.y, s.shift), final_state(c.final_state), dx(c.dx, s.shift), dw(c.dw), dbias(c.dbias);
  OnGpu d_initial_state(c.d_initial_state);
  BothPasses(s, x, w, bias, initial_state, doc_start, dy, d_final_state, y, final_state, dx, dw,
             dbias, d_initial_state, ctx);
  for (OnGpu* out : {&y, &final_state, &dx, &dw, &dbias, &d_initial_state}) out->Download();
}

class CausalConv1dGpu : public testing::GpuOpTest {};

TEST_P(CausalConv1dGpu, ForwardAndBackward) {
  for (const Shape& s : Shapes()) {
    SCOPED_TRACE(::testing::Message() << s);
    Conv c(dtype(), DType::kF32, s), r(ref(), ref_wide(), s);
    c.FillInputs(s);
    r.CopyInputs(c);
    RunOnGpu(s, c, *gpu_);
    BothPasses(s, r.x, r.w, r.bias, r.initial_state, r.doc_start, r.dy, r.d_final_state, r.y,
               r.final_state, r.dx, r.dw, r.dbias, r.d_initial_state, *cpu_);
    for (const Buf* b : {&c.y, &c.dx}) EXPECT_TRUE(b->PaddingIntact());

    // u is a sum of K + 1 terms; silu and its derivative have slopes below 1.1, and the sigmoid is
    // off by 2^-23 |u| and a few units in the last place.
    const double terms = MaxAbs(r.x) * MaxAbs(r.w) * static_cast<double>(s.taps) + MaxAbs(r.bias);
    const double u_error = Bound(s.taps) * MaxAbs(r.x) * MaxAbs(r.w);
    const double sigmoid_error = (8 + 2 * terms) * kUlp;
    const double y_error = 1.1 * u_error + terms * sigmoid_error;
    ExpectMatches("y", c.y, r.y, y_error, Share(s.taps));
    const double du_error = MaxAbs(r.dy) * (1.1 * u_error + (1 + terms) * sigmoid_error);
    const double dx_error =
        static_cast<double>(s.taps) * MaxAbs(r.w) * (du_error + 2 * MaxAbs(r.dy) * Bound(s.taps)) +
        4 * kUlp;
    ExpectMatches("dx", c.dx, r.dx, dx_error, Share(s.taps));
    const int64_t tokens = s.batch * s.time;
    const double count = static_cast<double>(tokens);
    const double dw_error =
        Bound(tokens) * (std::sqrt(count) * MaxAbs(r.dy) * 5 + 4) + count * 5 * du_error;
    ExpectNear("dw", c.dw, r.dw, dw_error);
    if (s.bias) ExpectNear("dbias", c.dbias, r.dbias, dw_error);
    if (s.states && s.taps > 1) {
      for (int64_t i = 0; i < c.final_state.tensor().numel(); ++i) {
        ASSERT_EQ(testing::Get(c.final_state, i), testing::Get(r.final_state, i)) << i;
      }
      ExpectMatches("d_initial_state", c.d_initial_state, r.d_initial_state, dx_error,
                    Share(s.taps));
    }
  }
}

TEST_P(CausalConv1dGpu, TwoRunsGiveTheSameBits) {
  for (const Shape s : {Shape{2, 1100, 264, 4, 8, 0, true, true}, Shape{1, 700, 33, 7}}) {
    std::vector<Conv> runs;
    for (int run = 0; run < 2; ++run) {
      runs.emplace_back(dtype(), DType::kF32, s);
      runs.back().FillInputs(s);
      RunOnGpu(s, runs.back(), *gpu_);
    }
    EXPECT_TRUE(SameBits(runs[0].y, runs[1].y)) << s;
    EXPECT_TRUE(SameBits(runs[0].dx, runs[1].dx)) << s;
    EXPECT_TRUE(SameBits(runs[0].dw, runs[1].dw)) << s;
    EXPECT_TRUE(SameBits(runs[0].dbias, runs[1].dbias)) << s;
  }
}

// A sequence in two pieces, the second with the first's final state and a later position.
TEST_P(CausalConv1dGpu, PiecesGiveTheWholesBits) {
  const Shape whole{2, 150, 40, 4, 0, 0, true, true};
  Conv c(dtype(), DType::kF32, whole);
  c.FillInputs(whole);
  OnGpu x(c.x), w(c.w), bias(c.bias), initial_state(c.initial_state), y(c.y);
  OnGpu final_state(c.final_state);
  const Documents documents{Tensor(), kFirstPosition};
  CausalConv1dSiluForward(y, final_state, x, w, bias, initial_state, documents, *gpu_);
  y.Download();
  for (const int64_t cut : {1, 2, 64, 77, 149}) {
    Conv p(dtype(), DType::kF32, whole);
    OnGpu pieces(p.y), between(p.final_state), last(p.d_initial_state);
    const auto part = [&](const OnGpu& t, bool second) {
      return second ? t.tensor().Slice(1, cut, whole.time - cut) : t.tensor().Slice(1, 0, cut);
    };
    CausalConv1dSiluForward(part(pieces, false), between, part(x, false), w, bias, initial_state,
                            documents, *gpu_);
    CausalConv1dSiluForward(part(pieces, true), last, part(x, true), w, bias, between,
                            {Tensor(), kFirstPosition + cut}, *gpu_);
    pieces.Download();
    EXPECT_TRUE(SameBits(p.y, c.y)) << "cut at " << cut;
  }
}

INSTANTIATE_TEST_SUITE_P(, CausalConv1dGpu, testing::kGpuDTypes, testing::DTypeName);

}  // namespace
}  // namespace krait
