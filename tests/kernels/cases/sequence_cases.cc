#include "kernels/attention.h"
#include "kernels/cases/op_cases.h"
#include "kernels/causal_conv1d.h"
#include "kernels/selective_scan.h"

namespace krait::testing {
namespace {

constexpr OperandType kCompute = OperandType::kCompute, kWide = OperandType::kWide,
                      kI32 = OperandType::kI32;
constexpr int64_t kFirst = 40;  // position of a call's first token

// Document starts [B,T]: one began before the call, one begins at token 1 + b, one at token 5, one
// at the last token; in the second row also at the first token.
std::vector<double> DocStart(int64_t batch, int64_t time) {
  std::vector<double> starts;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t start = b == 1 ? 0 : -2;
    for (int64_t t = 0; t < time; ++t) {
      if (t == 1 + b || t == 5 || t == time - 1) start = t;
      starts.push_back(static_cast<double>(kFirst + start));
    }
  }
  return starts;
}

// Adds the operand doc_start where there are documents.
void AddDocuments(OpCase* c, bool documents, int64_t batch, int64_t time) {
  if (documents) c->In("doc_start", kI32, {batch, time}, List(DocStart(batch, time)));
}
Documents DocumentsOf(const Operands& t, bool documents) {
  return {documents ? t["doc_start"] : Tensor(), kFirst};
}

// [B,T,heads,P] of [B,T,heads*P]: the heads of a token lie together, tokens may be strided by a
// multiple of P.
Tensor Heads(Tensor t, int64_t p) {
  KRAIT_CHECK(t.stride(1) % p == 0);
  return Tensor(t.raw(), t.dtype(), t.device(), {t.dim(0), t.dim(1), t.stride(1) / p, p})
      .Slice(2, 0, t.dim(2) / p);
}

struct AttentionShape {
  int64_t b, t, s, h, g, p, pad = 0;  // pad in heads
};

void AddAttention(const AttentionShape& a, bool documents, std::vector<OpCase>* cases) {
  const std::string what =
      Sizes({a.b, a.t, a.s, a.h, a.g, a.p, a.pad}) + (documents ? " documents" : "");
  const std::vector<int64_t> q = {a.b, a.t, a.h * a.p}, k = {a.b, a.s, a.g * a.p};
  const std::vector<int64_t> lse = {a.b, a.h, a.t};
  const int64_t p = a.p, pad = a.pad * a.p;
  // Scores are sums of P products, outputs means of up to S values.
  const Tolerance mean = Sum(a.p + a.s, 4);
  OpCase forward("AttentionForward", what);
  forward.Out("y", kCompute, q, mean).Pad(pad);
  forward.Out("lse", kWide, lse, Sum(a.p + a.s, 8));
  forward.In("q", kCompute, q, Normal(1)).Pad(2 * pad);
  forward.In("k", kCompute, k, Normal(2)).Pad(pad);
  forward.In("v", kCompute, k, Normal(3)).Pad(pad);
  AddDocuments(&forward, documents, a.b, a.t);
  forward.CudaRoundsWithin();  // the probabilities; backward also the scores' gradients
  forward.Call([=](const Operands& t, const Context& ctx) {
    AttentionForward(Heads(t["y"], p), t["lse"], Heads(t["q"], p), Heads(t["k"], p),
                     Heads(t["v"], p), DocumentsOf(t, documents), ctx);
  });

  // y and lse of the forward.
  Buf exact_y(DType::kF64, q), exact_lse(DType::kF64, lse), exact_q(DType::kF64, q),
      exact_k(DType::kF64, k), exact_v(DType::kF64, k), doc_start(DType::kI32, {a.b, a.t});
  exact_q.FillNormal(1), exact_k.FillNormal(2), exact_v.FillNormal(3);
  doc_start.Assign(DocStart(a.b, a.t));
  AttentionForward(Heads(exact_y, p), exact_lse, Heads(exact_q, p), Heads(exact_k, p),
                   Heads(exact_v, p), {documents ? doc_start.tensor() : Tensor(), kFirst},
                   TestContext());
  // dp - delta is of size sqrt(P); dk and dv add up over queries and heads.
  const Tolerance grad = Sum(a.p + a.s, 4 * std::sqrt(a.p)),
                  sums = Sum(a.p + a.s + a.t, 8 * std::sqrt(a.p * a.h / a.g));
  OpCase backward("AttentionBackward", what);
  backward.Out("dq", kCompute, q, grad).Pad(pad);
  backward.Out("dk", kCompute, k, sums).Pad(pad);
  backward.Out("dv", kCompute, k, sums).Pad(2 * pad);
  backward.In("dy", kCompute, q, Normal(4)).Pad(pad);
  backward.In("y", kCompute, q, List(Values(exact_y)));
  backward.In("lse", kWide, lse, List(Values(exact_lse)));
  backward.In("q", kCompute, q, Normal(1)).Pad(pad);
  backward.In("k", kCompute, k, Normal(2)).Pad(pad);
  backward.In("v", kCompute, k, Normal(3)).Pad(pad);
  AddDocuments(&backward, documents, a.b, a.t);
  backward.CudaRoundsWithin();
  backward.Call([=](const Operands& t, const Context& ctx) {
    AttentionBackward(Heads(t["dq"], p), Heads(t["dk"], p), Heads(t["dv"], p), Heads(t["dy"], p),
                      Heads(t["y"], p), t["lse"], Heads(t["q"], p), Heads(t["k"], p),
                      Heads(t["v"], p), DocumentsOf(t, documents), ctx);
  });
  cases->push_back(forward);
  cases->push_back(backward);

  for (const bool inverse : {false, true}) {
    if (p % 2 != 0) continue;
    OpCase rope("Rope", what + (inverse ? " inverse" : ""));
    rope.InOut("x", kCompute, q, Normal(1), Sum(2)).Pad(pad);
    AddDocuments(&rope, documents, a.b, a.t);
    rope.Call([=](const Operands& t, const Context& ctx) {
      Rope(Heads(t["x"], p), DocumentsOf(t, documents), 1e4, inverse, ctx);
    });
    cases->push_back(rope);
  }
}

struct ConvShape {
  int64_t b, t, i, k, pad = 0;
};

void AddConv(const ConvShape& s, bool documents, bool optional, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.b, s.t, s.i, s.k, s.pad}) + (documents ? " documents" : "") +
                           (optional ? "" : " bare");
  const std::vector<int64_t> x = {s.b, s.t, s.i}, w = {s.i, s.k}, state = {s.b, s.k - 1, s.i};
  const auto add_inputs = [&](OpCase* c) {
    c->In("x", kCompute, x, Normal(1)).Pad(2 * s.pad).In("w", kCompute, w, Normal(2));
    if (optional) {
      c->In("bias", kCompute, {s.i}, Normal(3)).In("initial_state", kCompute, state, Normal(4));
    }
    AddDocuments(c, documents, s.b, s.t);
  };
  const auto given = [optional](const Operands& t, const char* name) {
    return optional ? t[name] : Tensor();
  };
  OpCase forward("CausalConv1dSiluForward", what);
  forward.Out("y", kCompute, x, Sum(s.k)).Pad(s.pad);
  if (optional) forward.Out("final_state", kCompute, state, Exact());
  add_inputs(&forward);
  forward.Call([=](const Operands& t, const Context& ctx) {
    CausalConv1dSiluForward(t["y"], given(t, "final_state"), t["x"], t["w"], given(t, "bias"),
                            given(t, "initial_state"), DocumentsOf(t, documents), ctx);
  });
  cases->push_back(forward);

  const Tolerance sums = Sum(s.b * s.t + s.k, 8 * std::sqrt(s.b * s.t));
  OpCase backward("CausalConv1dSiluBackward", what);
  backward.Out("dx", kCompute, x, Sum(2 * s.k, 8)).Pad(s.pad);
  backward.InOut("dw", kWide, w, Normal(5), sums);
  if (optional) {
    backward.InOut("dbias", kWide, {s.i}, Normal(6), sums);
    backward.Out("d_initial_state", kCompute, state, Sum(2 * s.k, 8));
    backward.In("d_final_state", kCompute, state, Normal(7));
  }
  backward.In("dy", kCompute, x, Normal(8)).Pad(s.pad);
  add_inputs(&backward);
  backward.Call([=](const Operands& t, const Context& ctx) {
    CausalConv1dSiluBackward(t["dx"], t["dw"], given(t, "dbias"), given(t, "d_initial_state"),
                             t["dy"], given(t, "d_final_state"), t["x"], t["w"], given(t, "bias"),
                             given(t, "initial_state"), DocumentsOf(t, documents), ctx);
  });
  cases->push_back(backward);
}

struct ScanShape {
  int64_t b, t, i, n, pad = 0;
};

// The states that the forward keeps for the backward are in an order of the device's own, so a case
// of the backward runs both.
void AddScan(const ScanShape& s, bool documents, bool states, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.b, s.t, s.i, s.n, s.pad}) + (documents ? " documents" : "") +
                           (states ? "" : " bare");
  const std::vector<int64_t> x = {s.b, s.t, s.i}, bc = {s.b, s.t, s.n}, a = {s.i, s.n};
  const std::vector<int64_t> state = {s.b, s.i, s.n};
  const auto add_inputs = [&](OpCase* c) {
    c->In("x", kCompute, x, Normal(1)).Pad(2 * s.pad);
    c->In("dt_raw", kCompute, x, Normal(2, 0.7, -0.5)).Pad(s.pad);
    c->In("b", kCompute, bc, Normal(3)).Pad(s.pad);
    c->In("c", kCompute, bc, Normal(4)).Pad(s.pad);
    c->In("z", kCompute, x, Normal(5)).Pad(s.pad);
    c->In("a_log", kWide, a, Normal(6, 0.5));
    c->In("d", kWide, {s.i}, Normal(7));
    c->In("dt_bias", kWide, {s.i}, Normal(8, 0.5, -0.5));
    if (states) c->In("initial_state", kWide, state, Normal(9));
    AddDocuments(c, documents, s.b, s.t);
  };
  const auto inputs = [=](const Operands& t) {
    return SelectiveScanInputs{t["x"],
                               t["dt_raw"],
                               t["b"],
                               t["c"],
                               t["z"],
                               t["a_log"],
                               t["d"],
                               t["dt_bias"],
                               states ? t["initial_state"] : Tensor(),
                               DocumentsOf(t, documents)};
  };
  // y is a sum of N + 1 terms whose states carry the roundings of 1 / (1 - decay) ~ 5 steps.
  const Tolerance output = Sum(s.n + 5), through = Sum(4 * (s.n + 5)),
                  sums = Sum(s.b * s.t + 4 * (s.n + 5));
  // In bf16 CUDA takes approximate exponentials, far below a rounding to bf16, and factors of db
  // and dc in bf16 for the tensor cores; selective_scan_gpu_test holds each result to its own
  // bound.
  OpCase forward("SelectiveScanForward", what);
  forward.CudaRoundsWithin();
  forward.Out("y", kCompute, x, output).Pad(s.pad);
  if (states) forward.Out("final_state", kWide, state, Sum(5));
  add_inputs(&forward);
  forward.Call([=](const Operands& t, const Context& ctx) {
    SelectiveScanForward(t["y"], states ? t["final_state"] : Tensor(), Tensor(), inputs(t), ctx);
  });
  cases->push_back(forward);

  OpCase backward("SelectiveScanBackward", what);
  backward.CudaRoundsWithin();
  backward.Out("forward_y", kCompute, x, output);
  backward.Out("y", kCompute, x, output).Pad(s.pad);
  backward.Out("dx", kCompute, x, through).Pad(s.pad);
  backward.Out("d_dt_raw", kCompute, x, through).Pad(s.pad);
  backward.Out("dz", kCompute, x, through).Pad(2 * s.pad);
  backward.Out("db", kWide, bc, Sum(s.i + 4 * (s.n + 5))).Pad(s.pad);
  backward.Out("dc", kWide, bc, Sum(s.i + 4 * (s.n + 5))).Pad(s.pad);
  backward.InOut("d_a_log", kWide, a, Normal(12), sums);
  backward.InOut("dd", kWide, {s.i}, Normal(13), sums);
  backward.InOut("d_dt_bias", kWide, {s.i}, Normal(14), sums);
  if (states) {
    backward.Out("d_initial_state", kWide, state, through);
    backward.In("d_final_state", kWide, state, Normal(11));
  }
  backward.In("dy", kCompute, x, Normal(10)).Pad(s.pad);
  add_inputs(&backward);
  backward.Call([=](const Operands& t, const Context& ctx) {
    const ArenaScope scope(ctx.scratch);
    const Tensor kept =
        ctx.scratch->Alloc(Wide(t["x"].dtype()), {s.b, ScanStates(ctx.device, s.t), s.i, s.n});
    SelectiveScanForward(t["forward_y"], Tensor(), kept, inputs(t), ctx);
    SelectiveScanBackward({t["dx"], t["d_dt_raw"], t["dz"], t["db"], t["dc"], t["d_a_log"], t["dd"],
                           t["d_dt_bias"], states ? t["d_initial_state"] : Tensor()},
                          t["y"], t["dy"], states ? t["d_final_state"] : Tensor(), kept, inputs(t),
                          ctx);
  });
  cases->push_back(backward);
}

}  // namespace

void AddSequenceCases(std::vector<OpCase>* cases) {
  for (const bool documents : {false, true}) {
    for (const AttentionShape& a :
         {AttentionShape{1, 1, 1, 1, 1, 2}, AttentionShape{2, 7, 7, 4, 2, 5, 1},
          AttentionShape{2, 9, 20, 6, 3, 16, 2}, AttentionShape{1, 70, 130, 2, 1, 32},
          AttentionShape{1, 131, 131, 3, 1, 64, 1}, AttentionShape{1, 5, 300, 2, 2, 128}}) {
      AddAttention(a, documents, cases);
    }
    for (const bool optional : {false, true}) {
      for (const ConvShape& s :
           {ConvShape{1, 1, 1, 4}, ConvShape{2, 2, 3, 4, 1}, ConvShape{2, 11, 5, 1, 3},
            ConvShape{2, 20, 129, 4, 2}, ConvShape{1, 130, 64, 3, 8}, ConvShape{1, 257, 8, 8}}) {
        AddConv(s, documents, optional, cases);
      }
      for (const ScanShape& s :
           {ScanShape{1, 1, 1, 1}, ScanShape{2, 7, 3, 5, 1}, ScanShape{2, 70, 67, 16, 3},
            ScanShape{1, 130, 64, 16, 8}, ScanShape{1, 33, 5, 64}}) {
        AddScan(s, documents, optional, cases);
      }
    }
  }
}

}  // namespace krait::testing
