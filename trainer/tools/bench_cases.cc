#include "trainer/tools/bench_cases.h"

#include <memory>

#include "absl/strings/str_format.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/causal_conv1d.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/inner_norms.h"
#include "kernels/moe.h"
#include "kernels/optimizer.h"
#include "kernels/rms_norm.h"
#include "kernels/selective_scan.h"
#include "kernels/swiglu.h"

namespace krait {
namespace {

constexpr int64_t kLossRows = 4096;  // of logits at a time

void AddLinear(const Shapes& z, std::vector<Case>* cases) {
  struct Size {
    const char* name;
    int64_t m, o, i;
  };
  for (const Size& s :
       {Size{"linear_in_proj", z.m(), 2 * z.i, z.d}, Size{"linear_out_proj", z.m(), z.d, z.i},
        Size{"linear_gate_up", z.m(), 2 * z.f, z.d},
        Size{"linear_head", kLossRows, z.vocabulary, z.d}}) {
    const std::string shape = absl::StrFormat("M%d O%d I%d", s.m, s.o, s.i);
    cases->push_back(
        {s.name, OpFamily::kGemm, "forward", shape, [s](Operands* t) -> Op {
           auto y = t->Out({s.m, s.o}), x = t->Normal({s.m, s.i}), w = t->Normal({s.o, s.i});
           return [=](const Context& ctx) { LinearForward(y, x, w, Tensor(), ctx); };
         }});
    cases->push_back(
        {s.name, OpFamily::kGemm, "backward", shape, [s](Operands* t) -> Op {
           auto dx = t->Out({s.m, s.i}), dy = t->Normal({s.m, s.o}), w = t->Normal({s.o, s.i});
           return [=](const Context& ctx) {
             LinearBackwardInput(dx, dy, w, /*accumulate=*/false, ctx);
           };
         }});
    for (const bool accumulate : {false, true}) {
      cases->push_back({s.name, OpFamily::kGemm, accumulate ? "weight+" : "weight", shape,
                        [s, accumulate](Operands* t) -> Op {
                          auto dw = t->WideOut({s.o, s.i}), dy = t->Normal({s.m, s.o}),
                               x = t->Normal({s.m, s.i});
                          return [=](const Context& ctx) {
                            LinearBackwardWeight(dw, dy, x, accumulate, ctx);
                          };
                        }});
    }
  }
}

// Experts of unequal load: half of the rows go to the first one, each next one gets half of what is
// left. Offsets are multiples of `alignment`, so that no row is padding.
std::vector<int64_t> SkewedOffsets(int64_t rows, int64_t experts, int64_t alignment) {
  std::vector<int64_t> offsets = {0};
  for (int64_t e = 1; e < experts; ++e) {
    const int64_t share = (rows - offsets.back()) / 2;
    offsets.push_back(offsets.back() + share / alignment * alignment);
  }
  offsets.push_back(rows);
  return offsets;
}

void AddExperts(const Shapes& z, std::vector<Case>* cases) {
  const int64_t rows = z.m() * z.top_k, experts = z.experts;
  const auto offsets_of = [=, device = z.device](Operands* t) {
    return t->I64(SkewedOffsets(rows, experts, ExpertRowAlignment(device)));
  };
  struct Size {
    const char* name;
    int64_t o, i;
  };
  for (const Size& s : {Size{"grouped_gate_up", 2 * z.f, z.d}, Size{"grouped_down", z.d, z.f}}) {
    const std::string shape = absl::StrFormat("E%d rows%d O%d I%d", experts, rows, s.o, s.i);
    cases->push_back({s.name, OpFamily::kGemm, "forward", shape, [=](Operands* t) -> Op {
                        auto y = t->Out({rows, s.o}), x = t->Normal({rows, s.i}),
                             w = t->Normal({experts, s.o, s.i}), offsets = offsets_of(t);
                        return [=](const Context& ctx) {
                          GroupedLinearForward(y, x, w, offsets, ctx);
                        };
                      }});
    cases->push_back({s.name, OpFamily::kGemm, "backward", shape, [=](Operands* t) -> Op {
                        auto dx = t->Out({rows, s.i}), dy = t->Normal({rows, s.o}),
                             w = t->Normal({experts, s.o, s.i}), offsets = offsets_of(t);
                        return [=](const Context& ctx) {
                          GroupedLinearBackwardInput(dx, dy, w, offsets, ctx);
                        };
                      }});
    for (const bool accumulate : {false, true}) {
      cases->push_back({s.name, OpFamily::kGemm, accumulate ? "weight+" : "weight", shape,
                        [=](Operands* t) -> Op {
                          auto dw = t->WideOut({experts, s.o, s.i}), dy = t->Normal({rows, s.o}),
                               x = t->Normal({rows, s.i}), offsets = offsets_of(t);
                          return [=](const Context& ctx) {
                            GroupedLinearBackwardWeight(dw, dy, x, offsets, accumulate, ctx);
                          };
                        }});
    }
  }
}

void AddAttention(const Shapes& z, std::vector<Case>* cases) {
  const int64_t b = z.batch, t = z.t, h = z.heads, g = z.kv_heads, p = z.head_dim;
  const std::string shape = absl::StrFormat("B%d T%d H%d G%d P%d", b, t, h, g, p);
  const auto q_heads = [=](Operands* o) { return o->Normal({b, t, h, p}); };
  const auto kv_heads = [=](Operands* o) { return o->Normal({b, t, g, p}); };
  cases->push_back({"attention", OpFamily::kAttention, "forward", shape, [=](Operands* o) -> Op {
                      auto q = q_heads(o), k = kv_heads(o), v = kv_heads(o),
                           y = o->Out({b, t, h, p}), lse = o->WideOut({b, h, t});
                      return [=](const Context& ctx) {
                        AttentionForward(y, lse, q, k, v, Documents(), ctx);
                      };
                    }});
  cases->push_back({"attention", OpFamily::kAttention, "backward", shape, [=](Operands* o) -> Op {
                      auto q = q_heads(o), k = kv_heads(o), v = kv_heads(o), dy = q_heads(o),
                           y = o->Out({b, t, h, p}), lse = o->WideOut({b, h, t}),
                           dq = o->Out({b, t, h, p}), dk = o->Out({b, t, g, p}),
                           dv = o->Out({b, t, g, p});
                      return [=, ready = std::make_shared<bool>(false)](const Context& ctx) {
                        if (!*ready) AttentionForward(y, lse, q, k, v, Documents(), ctx);
                        *ready = true;
                        AttentionBackward(dq, dk, dv, dy, y, lse, q, k, v, Documents(), ctx);
                      };
                    }});
}

SelectiveScanInputs ScanInputs(const Shapes& z, Operands* o) {
  SelectiveScanInputs in;
  in.x = o->Normal({z.batch, z.t, z.i});
  in.dt_raw = o->Normal({z.batch, z.t, z.i});
  in.z = o->Normal({z.batch, z.t, z.i});
  in.b = o->Normal({z.batch, z.t, z.n});
  in.c = o->Normal({z.batch, z.t, z.n});
  in.a_log = o->WideNormal({z.i, z.n});
  in.d = o->WideNormal({z.i});
  in.dt_bias = o->WideNormal({z.i});
  return in;
}

void AddMamba(const Shapes& z, std::vector<Case>* cases) {
  const int64_t b = z.batch, t = z.t, i = z.i, n = z.n, k = z.k;
  const auto states_of = [z](Operands* o) {
    return o->WideOut({z.batch, ScanStates(z.device, z.t), z.i, z.n});
  };
  const std::string scan = absl::StrFormat("B%d T%d I%d N%d", b, t, i, n);
  cases->push_back({"selective_scan", OpFamily::kScan, "forward", scan, [=](Operands* o) -> Op {
                      const SelectiveScanInputs in = ScanInputs(z, o);
                      auto y = o->Out({b, t, i}), states = states_of(o);
                      return [=](const Context& ctx) {
                        SelectiveScanForward(y, Tensor(), states, in, ctx);
                      };
                    }});
  cases->push_back({"selective_scan", OpFamily::kScan, "backward", scan, [=](Operands* o) -> Op {
                      const SelectiveScanInputs in = ScanInputs(z, o);
                      auto y = o->Out({b, t, i}), states = states_of(o), dy = o->Normal({b, t, i});
                      SelectiveScanGradients grad;
                      grad.dx = o->Out({b, t, i});
                      grad.d_dt_raw = o->Out({b, t, i});
                      grad.dz = o->Out({b, t, i});
                      grad.db = o->WideOut({b, t, n});
                      grad.dc = o->WideOut({b, t, n});
                      grad.d_a_log = o->WideOut({i, n});
                      grad.dd = o->WideOut({i});
                      grad.d_dt_bias = o->WideOut({i});
                      return [=, ready = std::make_shared<bool>(false)](const Context& ctx) {
                        if (!*ready) SelectiveScanForward(y, Tensor(), states, in, ctx);
                        *ready = true;
                        SelectiveScanBackward(grad, y, dy, Tensor(), states, in, ctx);
                      };
                    }});
  const std::string conv = absl::StrFormat("B%d T%d I%d K%d", b, t, i, k);
  cases->push_back({"causal_conv1d_silu", OpFamily::kConv, "forward", conv, [=](Operands* o) -> Op {
                      auto y = o->Out({b, t, i}), x = o->Normal({b, t, i}), w = o->Normal({i, k}),
                           bias = o->Normal({i});
                      return [=](const Context& ctx) {
                        CausalConv1dSiluForward(y, Tensor(), x, w, bias, Tensor(), Documents(),
                                                ctx);
                      };
                    }});
  cases->push_back(
      {"causal_conv1d_silu", OpFamily::kConv, "backward", conv, [=](Operands* o) -> Op {
         auto dx = o->Out({b, t, i}), dw = o->WideOut({i, k}), dbias = o->WideOut({i}),
              dy = o->Normal({b, t, i}), x = o->Normal({b, t, i}), w = o->Normal({i, k}),
              bias = o->Normal({i});
         return [=](const Context& ctx) {
           CausalConv1dSiluBackward(dx, dw, dbias, Tensor(), dy, Tensor(), x, w, bias, Tensor(),
                                    Documents(), ctx);
         };
       }});
  const int64_t m = z.m(), r = z.r;
  const std::string inner = absl::StrFormat("M%d R%d N%d", m, r, n);
  const auto weights_of = [=](Operands* o) {
    return InnerNormWeights{o->WideNormal({r}), o->WideNormal({n}), o->WideNormal({n})};
  };
  cases->push_back({"inner_norms", OpFamily::kNorm, "forward", inner, [=](Operands* o) -> Op {
                      auto normed = o->Out({m, r + 2 * n}), rstd = o->WideOut({3, m}),
                           projected = o->WideNormal({m, r + 2 * n});
                      auto w = weights_of(o);
                      return [=](const Context& ctx) {
                        InnerNormsForward(normed, rstd, projected, w, 1e-6, ctx);
                      };
                    }});
  cases->push_back({"inner_norms", OpFamily::kNorm, "backward", inner, [=](Operands* o) -> Op {
                      auto d_projected = o->Out({m, r + 2 * n}), rstd = o->WideNormal({3, m}),
                           d_normed = o->WideNormal({m, r + 2 * n}),
                           projected = o->WideNormal({m, r + 2 * n});
                      auto w = weights_of(o), dw = weights_of(o);
                      return [=](const Context& ctx) {
                        InnerNormsBackward(d_projected, dw, d_normed, projected, rstd, w, ctx);
                      };
                    }});
}

void AddNormAndActivation(const Shapes& z, std::vector<Case>* cases) {
  const int64_t m = z.m(), d = z.d, f = z.f;
  const std::string norm = absl::StrFormat("M%d D%d", m, d);
  cases->push_back({"residual_rms_norm", OpFamily::kNorm, "forward", norm, [=](Operands* o) -> Op {
                      auto h = o->Out({m, d}), y = o->Out({m, d}), rstd = o->WideOut({m}),
                           residual = o->Normal({m, d}), delta = o->Normal({m, d}),
                           w = o->WideNormal({d});
                      return [=](const Context& ctx) {
                        ResidualRmsNormForward(h, y, rstd, residual, delta, w, 1e-6, ctx);
                      };
                    }});
  cases->push_back({"residual_rms_norm", OpFamily::kNorm, "backward", norm, [=](Operands* o) -> Op {
                      auto dh = o->Out({m, d}), dw = o->WideOut({d}), dy = o->Normal({m, d}),
                           d_residual = o->Normal({m, d}), h = o->Normal({m, d}),
                           rstd = o->WideNormal({m}), w = o->WideNormal({d});
                      return [=](const Context& ctx) {
                        ResidualRmsNormBackward(dh, dw, dy, d_residual, h, rstd, w, ctx);
                      };
                    }});
  const std::string glu = absl::StrFormat("M%d F%d", m, f);
  cases->push_back({"swiglu", OpFamily::kActivation, "forward", glu, [=](Operands* o) -> Op {
                      auto y = o->Out({m, f}), x = o->Normal({m, 2 * f});
                      return [=](const Context& ctx) { SwiGluForward(y, x, ctx); };
                    }});
  cases->push_back({"swiglu", OpFamily::kActivation, "backward", glu, [=](Operands* o) -> Op {
                      auto dx = o->Out({m, 2 * f}), y = o->Out({m, f}), dy = o->Normal({m, f}),
                           x = o->Normal({m, 2 * f});
                      return [=](const Context& ctx) { SwiGluBackward(dx, y, dy, x, ctx); };
                    }});
}

// Routing, sorting, moving rows to the experts and back, without the experts' products.
struct MoeOperands {
  MoeOperands(const Shapes& z, Operands* o)
      : top_k(z.top_k),
        logits(o->WideNormal({z.m(), z.experts})),
        probs(o->WideOut({z.m(), z.experts})),
        weight(o->WideOut({z.m(), z.top_k})),
        choice(o->I32({z.m(), z.top_k})),
        row_of(o->I32({z.m(), z.top_k})),
        source(o->I32({ExpertRows(z.m(), z.top_k, z.experts, z.device)})),
        offsets(o->I64(std::vector<int64_t>(static_cast<size_t>(z.experts + 1)))),
        x(o->Normal({z.m(), z.d})),
        rows(o->Out({source.dim(0), z.d})),
        y(o->Out({z.m(), z.d})) {}
  void Forward(const Context& ctx) const {
    MoeRouteForward(probs, choice, weight, logits, /*renormalize=*/false, ctx);
    MoeSort(row_of, source, offsets, choice, ctx);
    MoePermute(rows, x, source, top_k, ctx);
    MoeCombine(y, rows, weight, row_of, ctx);
  }
  int64_t top_k;
  Tensor logits, probs, weight, choice, row_of, source, offsets, x, rows, y;
};

void AddMoe(const Shapes& z, std::vector<Case>* cases) {
  const std::string shape = absl::StrFormat("M%d D%d E%d k%d", z.m(), z.d, z.experts, z.top_k);
  cases->push_back({"moe", OpFamily::kMoe, "forward", shape, [z](Operands* o) -> Op {
                      const MoeOperands moe(z, o);
                      return [=](const Context& ctx) { moe.Forward(ctx); };
                    }});
  cases->push_back({"moe", OpFamily::kMoe, "backward", shape, [z](Operands* o) -> Op {
                      const MoeOperands moe(z, o);
                      auto dy = o->Normal({z.m(), z.d}), dx = o->Out({z.m(), z.d}),
                           d_rows = o->Out({moe.source.dim(0), z.d}),
                           d_weight = o->WideOut({z.m(), z.top_k}),
                           d_logits = o->WideOut({z.m(), z.experts});
                      return [=, ready = std::make_shared<bool>(false)](const Context& ctx) {
                        if (!*ready) moe.Forward(ctx);
                        *ready = true;
                        MoePermute(d_rows, dy, moe.source, moe.top_k, ctx);
                        MoePermuteBackward(dx, d_rows, moe.row_of, /*accumulate=*/false, ctx);
                        MoeRouteBackward(d_logits, d_weight, Tensor(), 0, moe.probs, moe.choice,
                                         moe.weight, moe.logits, /*renormalize=*/false, ctx);
                      };
                    }});
}

void AddVocabulary(const Shapes& z, std::vector<Case>* cases) {
  const int64_t m = z.m(), d = z.d, v = z.vocabulary;
  const std::string embed = absl::StrFormat("M%d D%d V%d", m, d, v);
  cases->push_back({"embedding", OpFamily::kEmbedding, "forward", embed, [=](Operands* o) -> Op {
                      auto y = o->Out({m, d}), ids = o->Ids({m}, v), table = o->Out({v, d});
                      return [=](const Context& ctx) {
                        EmbeddingForward(y, ids, table, WholeVocabulary(v), ctx);
                      };
                    }});
  cases->push_back(
      {"embedding", OpFamily::kEmbedding, "backward", embed, [=](Operands* o) -> Op {
         auto dy = o->Normal({m, d}), ids = o->Ids({m}, v), dtable = o->WideOut({v, d});
         return [=](const Context& ctx) {
           EmbeddingBackward(dtable, dy, ids, WholeVocabulary(v), kNoPadToken, ctx);
         };
       }});
  const std::string shape = absl::StrFormat("M%d V%d", kLossRows, v);
  for (const bool backward : {false, true}) {
    cases->push_back({"cross_entropy", OpFamily::kLoss, backward ? "backward" : "forward", shape,
                      [=](Operands* o) -> Op {
                        auto losses = o->WideOut({kLossRows}), logits = o->Normal({kLossRows, v}),
                             ids = o->Ids({kLossRows}, v), max = o->WideOut({kLossRows}),
                             picked = o->WideOut({kLossRows}), scale = o->F64({1.0}),
                             sum = o->F64(std::vector<double>(size_t{kLossRows}));
                        const Tensor d_logits = backward ? o->Out({kLossRows, v}) : Tensor();
                        return [=](const Context& ctx) {
                          const VocabularySlice slice = WholeVocabulary(v);
                          CrossEntropyMax(max, logits, slice, ctx);
                          CrossEntropySum(sum, picked, max, logits, ids, slice, ctx);
                          CrossEntropyFinish(losses, d_logits, max, sum, picked, logits, ids, slice,
                                             scale, ctx);
                        };
                      }});
  }
}

void AddOptimizer(const Shapes& z, std::vector<Case>* cases) {
  const int64_t n = z.params;
  const std::string shape = absl::StrFormat("n%d", n);
  cases->push_back({"adamw", OpFamily::kOptimizer, "update", shape, [=](Operands* o) -> Op {
                      auto master = o->WideNormal({n}), m = o->WideOut({n}), v = o->WideOut({n}),
                           grad = o->WideNormal({n});
                      // Without a master of its own the weight is the master.
                      auto weight = z.dtype == z.wide() ? master : o->Out({n});
                      std::vector<double> control(kAdamWControlSize, 0.0);
                      control[kAdamWApplied] = control[kAdamWGradScale] = 1;
                      control[kAdamWRootScale] = 1, control[kAdamWStepSize] = 1e-3;
                      auto controls = o->F64(control);
                      auto decay = o->I64({0, n}).View({1, 2});
                      const AdamWSettings settings = {.lr = 1e-3, .weight_decay = 0.1};
                      return [=](const Context& ctx) {
                        AdamW(weight, master, m, v, grad, decay, controls, settings, ctx);
                      };
                    }});
  cases->push_back(
      {"sum_of_squares", OpFamily::kOptimizer, "update", shape, [=](Operands* o) -> Op {
         auto x = o->WideNormal({n}), sum = o->F64({0.0});
         return [=](const Context& ctx) { AddSumOfSquares(sum, x, ctx); };
       }});
}

}  // namespace

std::vector<Case> AllCases(const Shapes& shapes) {
  std::vector<Case> cases;
  AddLinear(shapes, &cases);
  AddExperts(shapes, &cases);
  AddAttention(shapes, &cases);
  AddMamba(shapes, &cases);
  AddNormAndActivation(shapes, &cases);
  AddMoe(shapes, &cases);
  AddVocabulary(shapes, &cases);
  AddOptimizer(shapes, &cases);
  return cases;
}

}  // namespace krait
