// `krait bench kernels`: every op family at named shapes.
#include <algorithm>
#include <cstring>
#include <memory>

#include "absl/strings/str_format.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/base/parallel_for.h"
#include "kernels/causal_conv1d.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/moe.h"
#include "kernels/optimizer.h"
#include "kernels/rms_norm.h"
#include "kernels/selective_scan.h"
#include "kernels/swiglu.h"
#include "kernels/transfer.h"
#include "nlohmann/json.hpp"
#include "trainer/tools/bench.h"

namespace krait {
namespace {

// B4 T512 with the widths of configs/models/bench-20m.yaml.
constexpr int64_t kB = 4, kT = 512, kM = kB * kT, kD = 320, kI = 640, kN = 16, kK = 4, kF = 768;
constexpr int64_t kHeads = 5, kHeadDim = 64, kExperts = 4, kTopK = 2, kV = 256;
constexpr int64_t kVocabWide = 65536;
constexpr int kRotation = 3;  // sets of operands taken in turn
constexpr int kRepeats = 9;
constexpr int64_t kArenaBytes = int64_t{2} << 30;  // reserved, touched only where used

// Operands of one case. Memory is touched only where it is written.
class Operands {
 public:
  explicit Operands(Arena* arena) : arena_(arena) {}
  Tensor Normal(std::initializer_list<int64_t> shape) {
    const Tensor x = arena_->Alloc(DType::kF32, shape);
    FillNormal(x, stream_++);
    bytes_ += x.bytes();
    return x;
  }
  Tensor Out(std::initializer_list<int64_t> shape) {
    const Tensor x = arena_->Alloc(DType::kF32, shape);
    std::memset(x.raw(), 0, static_cast<size_t>(x.bytes()));
    bytes_ += x.bytes();
    return x;
  }
  // Ids that run through [0, limit) in a scattered order.
  Tensor Ids(std::initializer_list<int64_t> shape, int64_t limit) {
    const Tensor x = arena_->Alloc(DType::kI32, shape);
    std::vector<int32_t> ids(static_cast<size_t>(x.numel()));
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<int32_t>(static_cast<int64_t>(i) * 7919 % limit);
    }
    Upload(x, ids.data(), Context());
    bytes_ += x.bytes();
    return x;
  }
  Tensor I32(std::initializer_list<int64_t> shape) {
    const Tensor x = arena_->Alloc(DType::kI32, shape);
    bytes_ += x.bytes();
    return x;
  }
  Tensor I64(std::initializer_list<int64_t> values) {
    const Tensor x = arena_->Alloc(DType::kI64, {static_cast<int64_t>(values.size())});
    Upload(x, std::data(values), Context());
    return x;
  }
  Tensor F64(std::initializer_list<int64_t> shape) {
    const Tensor x = arena_->Alloc(DType::kF64, shape);
    std::memset(x.raw(), 0, static_cast<size_t>(x.bytes()));
    return x;
  }
  // A table of which an op touches few rows: it does not count as an operand.
  Tensor Uncounted(std::initializer_list<int64_t> shape) {
    const Tensor x = arena_->Alloc(DType::kF32, shape);
    std::memset(x.raw(), 0, static_cast<size_t>(x.bytes()));
    return x;
  }
  int64_t bytes() const { return bytes_; }

 private:
  Arena* arena_;
  uint64_t stream_ = 0;
  int64_t bytes_ = 0;
};

using Op = std::function<void(const Context&)>;
struct Case {
  const char* name;
  OpFamily family;
  const char* direction;
  std::string shape;
  double flops;  // 0: memory is the limit
  std::function<Op(Operands*)> make;
};

double Flops(int64_t m, int64_t n, int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

void AddLinear(std::vector<Case>* cases) {
  struct Size {
    const char* name;
    int64_t m, o, i;
  };
  for (const Size& s : {Size{"linear_in_proj", kM, 2 * kI, kD}, Size{"linear_out_proj", kM, kD, kI},
                        Size{"linear_wide", 2048, 4096, 1024}}) {
    const std::string shape = absl::StrFormat("M%d O%d I%d", s.m, s.o, s.i);
    const double flops = Flops(s.m, s.o, s.i);
    cases->push_back(
        {s.name, OpFamily::kGemm, "forward", shape, flops, [s](Operands* t) -> Op {
           auto y = t->Out({s.m, s.o}), x = t->Normal({s.m, s.i}), w = t->Normal({s.o, s.i});
           return [=](const Context& ctx) { LinearForward(y, x, w, Tensor(), ctx); };
         }});
    cases->push_back(
        {s.name, OpFamily::kGemm, "backward", shape, 2 * flops, [s](Operands* t) -> Op {
           auto dx = t->Out({s.m, s.i}), dw = t->Out({s.o, s.i}), dy = t->Normal({s.m, s.o}),
                x = t->Normal({s.m, s.i}), w = t->Normal({s.o, s.i});
           return [=](const Context& ctx) {
             LinearBackwardInput(dx, dy, w, /*accumulate=*/false, ctx);
             LinearBackwardWeight(dw, dy, x, /*accumulate=*/true, ctx);
           };
         }});
  }
  // Experts of unequal load: half of the rows go to the first one.
  const int64_t rows = kM * kTopK;
  const std::string shape = absl::StrFormat("E%d rows%d O%d I%d", kExperts, rows, 2 * kF, kD);
  static_assert(kExperts == 4);
  const auto skewed = [rows](Operands* o) {
    return o->I64({0, rows / 2, rows * 3 / 4, rows * 7 / 8, rows});
  };
  const double flops = Flops(rows, 2 * kF, kD);
  cases->push_back(
      {"grouped_linear", OpFamily::kGemm, "forward", shape, flops, [=](Operands* t) -> Op {
         auto y = t->Out({rows, 2 * kF}), x = t->Normal({rows, kD}),
              w = t->Normal({kExperts, 2 * kF, kD}), offsets = skewed(t);
         return [=](const Context& ctx) { GroupedLinearForward(y, x, w, offsets, ctx); };
       }});
  cases->push_back(
      {"grouped_linear", OpFamily::kGemm, "backward", shape, 2 * flops, [=](Operands* t) -> Op {
         auto dx = t->Out({rows, kD}), dw = t->Out({kExperts, 2 * kF, kD}),
              dy = t->Normal({rows, 2 * kF}), x = t->Normal({rows, kD}),
              w = t->Normal({kExperts, 2 * kF, kD}), offsets = skewed(t);
         return [=](const Context& ctx) {
           GroupedLinearBackwardInput(dx, dy, w, offsets, ctx);
           GroupedLinearBackwardWeight(dw, dy, x, offsets, /*accumulate=*/true, ctx);
         };
       }});
}

void AddAttention(std::vector<Case>* cases) {
  const int64_t b = kB, t = kT, h = kHeads, p = kHeadDim;
  const std::string shape = absl::StrFormat("B%d T%d H%d G%d P%d", b, t, h, h, p);
  // Two products forward, five backward, causal halved.
  const double flops = Flops(b * h * t, t, p) / 2;
  const auto heads = [=](Operands* o) { return o->Normal({b, t, h, p}); };
  cases->push_back(
      {"attention", OpFamily::kAttention, "forward", shape, 2 * flops, [=](Operands* o) -> Op {
         auto q = heads(o), k = heads(o), v = heads(o), y = o->Out({b, t, h, p}),
              lse = o->Out({b, h, t});
         return [=](const Context& ctx) { AttentionForward(y, lse, q, k, v, Documents(), ctx); };
       }});
  cases->push_back(
      {"attention", OpFamily::kAttention, "backward", shape, 5 * flops, [=](Operands* o) -> Op {
         auto q = heads(o), k = heads(o), v = heads(o), dy = heads(o), y = o->Out({b, t, h, p}),
              lse = o->Out({b, h, t}), dq = o->Out({b, t, h, p}), dk = o->Out({b, t, h, p}),
              dv = o->Out({b, t, h, p});
         return [=, ready = std::make_shared<bool>(false)](const Context& ctx) {
           if (!*ready) AttentionForward(y, lse, q, k, v, Documents(), ctx);
           *ready = true;
           AttentionBackward(dq, dk, dv, dy, y, lse, q, k, v, Documents(), ctx);
         };
       }});
}

SelectiveScanInputs ScanInputs(Operands* o) {
  SelectiveScanInputs in;
  in.x = o->Normal({kB, kT, kI});
  in.dt_raw = o->Normal({kB, kT, kI});
  in.z = o->Normal({kB, kT, kI});
  in.b = o->Normal({kB, kT, kN});
  in.c = o->Normal({kB, kT, kN});
  in.a_log = o->Normal({kI, kN});
  in.d = o->Normal({kI});
  in.dt_bias = o->Normal({kI});
  return in;
}

void AddMamba(std::vector<Case>* cases) {
  const std::string scan = absl::StrFormat("B%d T%d I%d N%d", kB, kT, kI, kN);
  cases->push_back(
      {"selective_scan", OpFamily::kScan, "forward", scan, 0, [](Operands* o) -> Op {
         const SelectiveScanInputs in = ScanInputs(o);
         auto y = o->Out({kB, kT, kI}), states = o->Out({kB, ScanStates(Device::kCpu, kT), kI, kN});
         return [=](const Context& ctx) { SelectiveScanForward(y, Tensor(), states, in, ctx); };
       }});
  cases->push_back({"selective_scan", OpFamily::kScan, "backward", scan, 0, [](Operands* o) -> Op {
                      const SelectiveScanInputs in = ScanInputs(o);
                      auto y = o->Out({kB, kT, kI}),
                           states = o->Out({kB, ScanStates(Device::kCpu, kT), kI, kN}),
                           dy = o->Normal({kB, kT, kI});
                      SelectiveScanGradients grad;
                      grad.dx = o->Out({kB, kT, kI});
                      grad.d_dt_raw = o->Out({kB, kT, kI});
                      grad.dz = o->Out({kB, kT, kI});
                      grad.db = o->Out({kB, kT, kN});
                      grad.dc = o->Out({kB, kT, kN});
                      grad.d_a_log = o->Out({kI, kN});
                      grad.dd = o->Out({kI});
                      grad.d_dt_bias = o->Out({kI});
                      return [=, ready = std::make_shared<bool>(false)](const Context& ctx) {
                        if (!*ready) SelectiveScanForward(y, Tensor(), states, in, ctx);
                        *ready = true;
                        SelectiveScanBackward(grad, y, dy, Tensor(), states, in, ctx);
                      };
                    }});
  const std::string conv = absl::StrFormat("B%d T%d I%d K%d", kB, kT, kI, kK);
  cases->push_back(
      {"causal_conv1d_silu", OpFamily::kConv, "forward", conv, 0, [](Operands* o) -> Op {
         auto y = o->Out({kB, kT, kI}), x = o->Normal({kB, kT, kI}), w = o->Normal({kI, kK}),
              bias = o->Normal({kI});
         return [=](const Context& ctx) {
           CausalConv1dSiluForward(y, Tensor(), x, w, bias, Tensor(), Documents(), ctx);
         };
       }});
  cases->push_back(
      {"causal_conv1d_silu", OpFamily::kConv, "backward", conv, 0, [](Operands* o) -> Op {
         auto dx = o->Out({kB, kT, kI}), dw = o->Out({kI, kK}), dbias = o->Out({kI}),
              dy = o->Normal({kB, kT, kI}), x = o->Normal({kB, kT, kI}), w = o->Normal({kI, kK}),
              bias = o->Normal({kI});
         return [=](const Context& ctx) {
           CausalConv1dSiluBackward(dx, dw, dbias, Tensor(), dy, Tensor(), x, w, bias, Tensor(),
                                    Documents(), ctx);
         };
       }});
}

void AddNormAndActivation(std::vector<Case>* cases) {
  const std::string norm = absl::StrFormat("M%d D%d", kM, kD);
  cases->push_back(
      {"residual_rms_norm", OpFamily::kNorm, "forward", norm, 0, [](Operands* o) -> Op {
         auto h = o->Out({kM, kD}), y = o->Out({kM, kD}), rstd = o->Out({kM}),
              r = o->Normal({kM, kD}), d = o->Normal({kM, kD}), w = o->Normal({kD});
         return [=](const Context& ctx) { ResidualRmsNormForward(h, y, rstd, r, d, w, 1e-6, ctx); };
       }});
  cases->push_back(
      {"residual_rms_norm", OpFamily::kNorm, "backward", norm, 0, [](Operands* o) -> Op {
         auto dh = o->Out({kM, kD}), dw = o->Out({kD}), dy = o->Normal({kM, kD}),
              h = o->Normal({kM, kD}), rstd = o->Normal({kM}), w = o->Normal({kD});
         return
             [=](const Context& ctx) { ResidualRmsNormBackward(dh, dw, dy, dh, h, rstd, w, ctx); };
       }});
  const std::string glu = absl::StrFormat("M%d F%d", kM, kF);
  cases->push_back({"swiglu", OpFamily::kActivation, "forward", glu, 0, [](Operands* o) -> Op {
                      auto y = o->Out({kM, kF}), x = o->Normal({kM, 2 * kF});
                      return [=](const Context& ctx) { SwiGluForward(y, x, ctx); };
                    }});
  cases->push_back({"swiglu", OpFamily::kActivation, "backward", glu, 0, [](Operands* o) -> Op {
                      auto dx = o->Out({kM, 2 * kF}), y = o->Out({kM, kF}),
                           dy = o->Normal({kM, kF}), x = o->Normal({kM, 2 * kF});
                      return [=](const Context& ctx) { SwiGluBackward(dx, y, dy, x, ctx); };
                    }});
}

// Routing, sorting, moving rows to the experts and back, without the experts' products.
struct MoeOperands {
  explicit MoeOperands(Operands* o)
      : logits(o->Normal({kM, kExperts})),
        probs(o->Out({kM, kExperts})),
        weight(o->Out({kM, kTopK})),
        choice(o->I32({kM, kTopK})),
        row_of(o->I32({kM, kTopK})),
        source(o->I32({kM * kTopK})),
        offsets(o->I64(std::initializer_list<int64_t>{0, 0, 0, 0, 0})),
        x(o->Normal({kM, kD})),
        rows(o->Out({kM * kTopK, kD})),
        y(o->Out({kM, kD})) {}
  void Forward(const Context& ctx) const {
    MoeRouteForward(probs, choice, weight, logits, /*renormalize=*/false, ctx);
    MoeSort(row_of, source, offsets, choice, ctx);
    MoePermute(rows, x, source, kTopK, ctx);
    MoeCombine(y, rows, weight, row_of, ctx);
  }
  Tensor logits, probs, weight, choice, row_of, source, offsets, x, rows, y;
};

void AddMoe(std::vector<Case>* cases) {
  const std::string shape = absl::StrFormat("M%d D%d E%d k%d", kM, kD, kExperts, kTopK);
  cases->push_back({"moe", OpFamily::kMoe, "forward", shape, 0, [](Operands* o) -> Op {
                      const MoeOperands moe(o);
                      return [=](const Context& ctx) { moe.Forward(ctx); };
                    }});
  cases->push_back({"moe", OpFamily::kMoe, "backward", shape, 0, [](Operands* o) -> Op {
                      const MoeOperands moe(o);
                      auto dy = o->Normal({kM, kD}), dx = o->Out({kM, kD}),
                           d_rows = o->Out({kM * kTopK, kD}), d_weight = o->Out({kM, kTopK}),
                           d_logits = o->Out({kM, kExperts});
                      return [=, ready = std::make_shared<bool>(false)](const Context& ctx) {
                        if (!*ready) moe.Forward(ctx);
                        *ready = true;
                        MoePermute(d_rows, dy, moe.source, kTopK, ctx);
                        MoePermuteBackward(dx, d_rows, moe.row_of, /*accumulate=*/false, ctx);
                        MoeRouteBackward(d_logits, d_weight, Tensor(), 0, moe.probs, moe.choice,
                                         moe.weight, moe.logits, /*renormalize=*/false, ctx);
                      };
                    }});
}

void AddVocabulary(std::vector<Case>* cases) {
  const std::string embed = absl::StrFormat("M%d D%d V%d", kM, kD, kVocabWide);
  cases->push_back({"embedding", OpFamily::kEmbedding, "forward", embed, 0, [](Operands* o) -> Op {
                      auto y = o->Out({kM, kD}), ids = o->Ids({kM}, kVocabWide);
                      auto table = o->Uncounted({kVocabWide, kD});
                      return [=](const Context& ctx) {
                        EmbeddingForward(y, ids, table, WholeVocabulary(kVocabWide), ctx);
                      };
                    }});
  cases->push_back({"embedding", OpFamily::kEmbedding, "backward", embed, 0, [](Operands* o) -> Op {
                      auto dy = o->Normal({kM, kD}), ids = o->Ids({kM}, kVocabWide);
                      auto dtable = o->Uncounted({kVocabWide, kD});
                      return [=](const Context& ctx) {
                        EmbeddingBackward(dtable, dy, ids, WholeVocabulary(kVocabWide), ctx);
                      };
                    }});
  for (int64_t v : {kV, int64_t{16384}}) {
    const std::string shape = absl::StrFormat("M%d V%d", kM, v);
    for (const bool backward : {false, true}) {
      cases->push_back({"cross_entropy", OpFamily::kLoss, backward ? "backward" : "forward", shape,
                        0, [v, backward](Operands* o) -> Op {
                          auto losses = o->Out({kM}), logits = o->Normal({kM, v}),
                               ids = o->Ids({kM}, v), max = o->Out({kM}), picked = o->Out({kM}),
                               sum = o->F64({kM}), scale = o->F64({1});
                          const Tensor d_logits = backward ? o->Out({kM, v}) : Tensor();
                          return [=](const Context& ctx) {
                            const VocabularySlice slice = WholeVocabulary(v);
                            CrossEntropyMax(max, logits, slice, ctx);
                            CrossEntropySum(sum, picked, max, logits, ids, slice, ctx);
                            CrossEntropyFinish(losses, d_logits, max, sum, picked, logits, ids,
                                               slice, scale, ctx);
                          };
                        }});
    }
  }
}

void AddOptimizer(std::vector<Case>* cases) {
  constexpr int64_t kParams = 4 << 20;
  const std::string shape = absl::StrFormat("n%d", kParams);
  cases->push_back({"adamw", OpFamily::kOptimizer, "update", shape, 0, [](Operands* o) -> Op {
                      auto w = o->Normal({kParams}), m = o->Out({kParams}), v = o->Out({kParams}),
                           grad = o->Normal({kParams});
                      auto control = o->F64({kAdamWControlSize});
                      double c[kAdamWControlSize] = {};
                      c[kAdamWApplied] = c[kAdamWGradScale] = c[kAdamWRootScale] = 1;
                      c[kAdamWStepSize] = 1e-3;
                      Upload(control, c, Context());
                      auto decay = o->I64({0, kParams}).View({1, 2});
                      const AdamWSettings settings = {.lr = 1e-3, .weight_decay = 0.1};
                      return [=](const Context& ctx) {
                        AdamW(w, w, m, v, grad, decay, control, settings, ctx);
                      };
                    }});
  cases->push_back(
      {"sum_of_squares", OpFamily::kOptimizer, "update", shape, 0, [](Operands* o) -> Op {
         auto x = o->Normal({kParams}), sum = o->F64({1});
         return [=](const Context& ctx) { AddSumOfSquares(sum, x, ctx); };
       }});
}

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  AddLinear(&cases);
  AddAttention(&cases);
  AddMamba(&cases);
  AddNormAndActivation(&cases);
  AddMoe(&cases);
  AddVocabulary(&cases);
  AddOptimizer(&cases);
  return cases;
}

KernelBench Measure(const Case& c, double sgemm_flops, double copy_bytes) {
  Arena arena("bench operands", Device::kCpu, kArenaBytes);
  Arena scratch("scratch", Device::kCpu, kArenaBytes);
  Context ctx;
  ctx.scratch = &scratch;
  std::vector<Op> rotation;
  int64_t bytes = 0;
  for (int i = 0; i < kRotation; ++i) {
    Operands operands(&arena);
    rotation.push_back(c.make(&operands));
    bytes = operands.bytes();
  }
  for (const Op& op : rotation) op(ctx);  // pages, and what backward needs of forward
  const double seconds =
      Median(TimeCalls(kRepeats, [&](int call) { rotation[call % kRotation](ctx); }));
  KernelBench bench{.name = c.name,
                    .family = c.family,
                    .direction = c.direction,
                    .shape = c.shape,
                    .ms = seconds * 1000};
  if (c.flops > 0) {
    bench.tflops = c.flops / seconds / 1e12;
    bench.of_limit = c.flops / seconds / sgemm_flops;
  } else {
    bench.gbytes_per_s = static_cast<double>(bytes) / seconds / 1e9;
    bench.of_limit = static_cast<double>(bytes) / seconds / copy_bytes;
  }
  return bench;
}

}  // namespace

absl::StatusOr<KernelBenches> RunKernelBench(const std::string& only) {
  std::vector<Case> cases = AllCases();
  std::erase_if(cases, [&](const Case& c) { return !std::string(c.name).starts_with(only); });
  if (cases.empty()) {
    std::string names;
    for (const Case& c : AllCases()) {
      if (names.find(c.name) == std::string::npos)
        names += (names.empty() ? "" : ", ") + std::string(c.name);
    }
    return Error(ExitCode::kConfig, "--only " + only + ": no such op; there are " + names);
  }
  SgemmMeter sgemm;
  sgemm.Measure(5);
  const double copy = CopyBytesPerSecond();
  KernelBenches benches;
  benches.sgemm_tflops = sgemm.FlopsPerSecond() / 1e12;
  benches.copy_gbytes_per_s = copy / 1e9;
  for (const Case& c : cases) benches.kernels.push_back(Measure(c, sgemm.FlopsPerSecond(), copy));
  return benches;
}

std::string KernelBenchJson(const KernelBenches& benches) {
  nlohmann::ordered_json kernels = nlohmann::ordered_json::array();
  for (const KernelBench& k : benches.kernels) {
    nlohmann::ordered_json entry = {{"name", k.name},           {"family", Name(k.family)},
                                    {"direction", k.direction}, {"shape", k.shape},
                                    {"dtype", "f32"},           {"ms", k.ms}};
    if (k.tflops > 0) {
      entry["tflops"] = k.tflops;
    } else {
      entry["gbytes_per_s"] = k.gbytes_per_s;
    }
    entry["of_limit"] = k.of_limit;
    kernels.push_back(entry);
  }
  const nlohmann::ordered_json json = {{"device", "cpu"},
                                       {"threads", MaxThreads()},
                                       {"sgemm_tflops", benches.sgemm_tflops},
                                       {"copy_gbytes_per_s", benches.copy_gbytes_per_s},
                                       {"kernels", kernels}};
  return json.dump(2) + "\n";
}

std::string KernelBenchText(const KernelBenches& benches) {
  std::string text = absl::StrFormat(
      "limits: matrix product 2048^3 %.4f TFLOP/s, copy %.1f GB/s (read + write), %d threads\n"
      "%-20s %-9s %-26s %9s %18s %9s\n",
      benches.sgemm_tflops, benches.copy_gbytes_per_s, MaxThreads(), "op", "", "shape", "ms",
      "rate", "of limit");
  for (const KernelBench& k : benches.kernels) {
    const std::string rate = k.tflops > 0 ? absl::StrFormat("%.4f TFLOP/s", k.tflops)
                                          : absl::StrFormat("%.2f GB/s", k.gbytes_per_s);
    text += absl::StrFormat("%-20s %-9s %-26s %9.3f %18s %8.1f%%\n", k.name, k.direction, k.shape,
                            k.ms, rate, k.of_limit * 100);
  }
  return text;
}

}  // namespace krait
