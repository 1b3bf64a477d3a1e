#include "kernels/cases/op_cases.h"
#include "kernels/cross_entropy.h"
#include "kernels/gemm.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/moe.h"
#include "kernels/swiglu.h"

namespace krait::testing {
namespace {

constexpr OperandType kCompute = OperandType::kCompute, kWide = OperandType::kWide,
                      kF64 = OperandType::kF64, kI32 = OperandType::kI32;

struct Shape {
  int64_t m, outputs, inputs, pad = 0;
};
const Shape kShapes[] = {{0, 3, 5},     {1, 1, 1},       {1, 7, 5, 2},
                         {7, 5, 11, 3}, {33, 64, 40, 8}, {130, 65, 257, 1}};

// An output that is overwritten or added to.
void AddResult(OpCase* c, bool accumulate, const char* name, OperandType type,
               const std::vector<int64_t>& shape, Tolerance tolerance) {
  if (accumulate) {
    c->InOut(name, type, shape, Normal(9), tolerance);
  } else {
    c->Out(name, type, shape, tolerance);
  }
}

std::string With(const std::string& what, bool accumulate) {
  return what + (accumulate ? " accumulated" : "");
}

// Sums of n products of standard normals are as large as 4 sqrt(n) here and there; with one product
// or none the largest element says too little.
Tolerance Products(int64_t n, double scale = 1) {
  return Sum(n + 1, scale * 4 * std::sqrt(static_cast<double>(n + 1)));
}

void AddMatMul(const Shape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.outputs, s.inputs, s.pad});
  for (const bool accumulate : {false, true}) {
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        // Extents of 0 are rows here: a transposed operand without rows has no width.
        if (s.m == 0 && ta) continue;
        const std::string transposes = std::string(ta ? " at" : "") + (tb ? " bt" : "");
        for (const OperandType c_type : {kCompute, kWide}) {
          OpCase c("MatMul",
                   With(what + transposes + (c_type == kWide ? " wide" : ""), accumulate));
          AddResult(&c, accumulate, "c", c_type, {s.m, s.outputs}, Products(s.inputs));
          if (accumulate && c_type == kCompute) c.CudaRoundsWithin();  // the product
          c.Pad(s.pad)
              .In("a", kCompute,
                  ta ? std::vector<int64_t>{s.inputs, s.m} : std::vector<int64_t>{s.m, s.inputs},
                  Normal(1))
              .Pad(2 * s.pad)
              .In("b", kCompute,
                  tb ? std::vector<int64_t>{s.outputs, s.inputs}
                     : std::vector<int64_t>{s.inputs, s.outputs},
                  Normal(2))
              .Pad(s.pad)
              .Call([=](const Operands& t, const Context& ctx) {
                MatMul(t["c"], t["a"], ta, t["b"], tb, accumulate, ctx);
              });
          cases->push_back(c);
        }
      }
    }
  }
}

void AddLinear(const Shape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.outputs, s.inputs, s.pad});
  const std::vector<int64_t> x = {s.m, s.inputs}, y = {s.m, s.outputs}, w = {s.outputs, s.inputs};
  for (const bool biased : {false, true}) {
    for (const OperandType y_type : {kCompute, kWide}) {
      // A bias has the dtype of the inputs, and so has y then.
      if (biased && y_type == kWide) continue;
      OpCase c("LinearForward", what + (biased ? " bias" : y_type == kWide ? " wide" : ""));
      if (biased) c.CudaRoundsWithin();  // the product, by kernels for odd widths
      c.Out("y", y_type, y, Products(s.inputs)).Pad(s.pad);
      c.In("x", kCompute, x, Normal(1)).Pad(2 * s.pad).In("w", kCompute, w, Normal(2));
      if (biased) c.In("bias", kCompute, {s.outputs}, Normal(3));
      c.Call([biased](const Operands& t, const Context& ctx) {
        LinearForward(t["y"], t["x"], t["w"], biased ? t["bias"] : Tensor(), ctx);
      });
      cases->push_back(c);
    }
  }
  for (const bool accumulate : {false, true}) {
    OpCase input("LinearBackwardInput", With(what, accumulate));
    AddResult(&input, accumulate, "dx", kCompute, x, Products(s.outputs));
    if (accumulate) input.CudaRoundsWithin();  // the product
    input.Pad(s.pad)
        .In("dy", kCompute, y, Normal(4))
        .Pad(s.pad)
        .In("w", kCompute, w, Normal(2))
        .Call([accumulate](const Operands& t, const Context& ctx) {
          LinearBackwardInput(t["dx"], t["dy"], t["w"], accumulate, ctx);
        });
    cases->push_back(input);
    OpCase weight("LinearBackwardWeight", With(what, accumulate));
    AddResult(&weight, accumulate, "dw", kWide, w, Products(s.m));
    weight.In("dy", kCompute, y, Normal(4))
        .Pad(s.pad)
        .In("x", kCompute, x, Normal(1))
        .Pad(2 * s.pad)
        .Call([accumulate](const Operands& t, const Context& ctx) {
          LinearBackwardWeight(t["dw"], t["dy"], t["x"], accumulate, ctx);
        });
    cases->push_back(weight);
  }
  cases->push_back(
      OpCase("AddBias", what)
          .InOut("y", kCompute, y, Normal(1), Sum(1))
          .Pad(s.pad)
          .In("bias", kCompute, {s.outputs}, Normal(2))
          .Call([](const Operands& t, const Context& ctx) { AddBias(t["y"], t["bias"], ctx); }));
  cases->push_back(OpCase("LinearBackwardBias", what)
                       .InOut("db", kWide, {s.outputs}, Normal(1), Products(s.m))
                       .In("dy", kCompute, y, Normal(2))
                       .Pad(s.pad)
                       .Call([](const Operands& t, const Context& ctx) {
                         LinearBackwardBias(t["db"], t["dy"], ctx);
                       }));
  for (const bool accumulate : {false, true}) {
    OpCase input("RouterBackwardInput", With(what, accumulate));
    AddResult(&input, accumulate, "dx", kCompute, x, Products(s.outputs));
    if (accumulate) input.CudaRoundsWithin();  // the product
    input.Pad(s.pad)
        .In("d_logits", kWide, y, Normal(4))
        .In("w", kWide, w, Normal(2))
        .Call([accumulate](const Operands& t, const Context& ctx) {
          RouterBackwardInput(t["dx"], t["d_logits"], t["w"], accumulate, ctx);
        });
    cases->push_back(input);
    OpCase weight("RouterBackwardWeight", With(what, accumulate));
    AddResult(&weight, accumulate, "dw", kWide, w, Products(s.m));
    weight.In("d_logits", kWide, y, Normal(4))
        .In("x", kCompute, x, Normal(1))
        .Pad(s.pad)
        .Call([accumulate](const Operands& t, const Context& ctx) {
          RouterBackwardWeight(t["dw"], t["d_logits"], t["x"], accumulate, ctx);
        });
    cases->push_back(weight);
  }
  cases->push_back(OpCase("RouterForward", what)
                       .Out("logits", kWide, y, Products(s.inputs))
                       .In("x", kCompute, x, Normal(1))
                       .Pad(s.pad)
                       .In("w", kWide, w, Normal(2))
                       .Call([](const Operands& t, const Context& ctx) {
                         RouterForward(t["logits"], t["x"], t["w"], ctx);
                       }));
}

// Tokens that go to three of four experts, in segments of 128 rows; six rows more are not in use.
void AddGrouped(const SortedRows& sorted, const Shape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.outputs, s.inputs, s.pad});
  const double nan = std::nan("");
  const int64_t rows = sorted.used + 6, experts = sorted.experts;
  const std::vector<int64_t> w = {experts, s.outputs, s.inputs};
  const std::vector<int64_t> begins = {experts + 1};
  const auto written = [&](OpCase* c, const char* name, int64_t width, Tolerance tolerance) {
    // NaN in rows in use, 7 in the others, which are left alone.
    c->InOut(name, kCompute, {rows, width}, WithRows(Constant(nan), sorted.used, rows, 7),
             tolerance);
  };
  OpCase forward("GroupedLinearForward", what);
  written(&forward, "y", s.outputs, Products(s.inputs));
  forward.Pad(s.pad)
      .In("x", kCompute, {rows, s.inputs}, sorted.Rows(Normal(1), nan))
      .In("w", kCompute, w, Normal(2))
      .In("offsets", OperandType::kI64, begins, List(sorted.offsets))
      .Call([](const Operands& t, const Context& ctx) {
        GroupedLinearForward(t["y"], t["x"], t["w"], t["offsets"], ctx);
      });
  cases->push_back(forward);
  OpCase input("GroupedLinearBackwardInput", what);
  written(&input, "dx", s.inputs, Products(s.outputs));
  input.Pad(s.pad)
      .In("dy", kCompute, {rows, s.outputs}, sorted.Rows(Normal(3), nan))
      .In("w", kCompute, w, Normal(2))
      .In("offsets", OperandType::kI64, begins, List(sorted.offsets))
      .Call([](const Operands& t, const Context& ctx) {
        GroupedLinearBackwardInput(t["dx"], t["dy"], t["w"], t["offsets"], ctx);
      });
  cases->push_back(input);
  for (const bool accumulate : {false, true}) {
    OpCase weight("GroupedLinearBackwardWeight", With(what, accumulate));
    AddResult(&weight, accumulate, "dw", kWide, w, Products(s.m));
    weight.In("dy", kCompute, {rows, s.outputs}, sorted.Rows(Normal(3), nan))
        .Pad(s.pad)
        .In("x", kCompute, {rows, s.inputs}, sorted.Rows(Normal(1), nan))
        .In("offsets", OperandType::kI64, begins, List(sorted.offsets))
        .Call([accumulate](const Operands& t, const Context& ctx) {
          GroupedLinearBackwardWeight(t["dw"], t["dy"], t["x"], t["offsets"], accumulate, ctx);
        });
    cases->push_back(weight);
  }
}

// What two joined ops hand over is a tensor of the compute dtype.
void AddLinearSwiGlu(const Shape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.outputs, s.inputs, s.pad});
  const int64_t m = s.m, f = s.outputs, d = s.inputs;
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  cases->push_back(OpCase("LinearSwiGluForward", what)
                       .Out("product", kCompute, {m, f}, Sum(d, 16))
                       .Pad(s.pad)
                       .Out("gate_up", kCompute, {m, 2 * f}, Sum(d, 4))
                       .In("x", kCompute, {m, d}, Normal(1))
                       .Pad(s.pad)
                       .In("w", kCompute, {2 * f, d}, Normal(2, scale))
                       .Call([](const Operands& t, const Context& ctx) {
                         LinearSwiGluForward(t["product"], t["gate_up"], t["x"], t["w"], ctx);
                       })
                       .CallWithRoundings([](const Operands& t, const Context& ctx) {
                         LinearForward(t["gate_up"], t["x"], t["w"], Tensor(), ctx);
                         RoundToBF16(t["gate_up"], ctx);
                         SwiGluForward(t["product"], t["gate_up"], ctx);
                       }));
  cases->push_back(OpCase("SwiGluLinearBackward", what)
                       .Out("d_gate_up", kCompute, {m, 2 * f}, Sum(d, 32))
                       .Pad(s.pad)
                       .Out("product", kCompute, {m, f}, Sum(1))
                       .In("dy", kCompute, {m, d}, Normal(3))
                       .In("w_down", kCompute, {d, f}, Normal(4, scale))
                       .In("gate_up", kCompute, {m, 2 * f}, Normal(5, 2))
                       .Pad(s.pad)
                       .Call([](const Operands& t, const Context& ctx) {
                         SwiGluLinearBackward(t["d_gate_up"], t["product"], t["dy"], t["w_down"],
                                              t["gate_up"], ctx);
                       })
                       .CallWithRoundings([m, f](const Operands& t, const Context& ctx) {
                         Buf d_product(t["dy"].dtype(), {m, f});
                         LinearBackwardInput(d_product, t["dy"], t["w_down"], false, ctx);
                         RoundToBF16(d_product, ctx);
                         SwiGluBackward(t["d_gate_up"], t["product"], d_product, t["gate_up"], ctx);
                       }));
}

void AddGroupedSwiGlu(const SortedRows& sorted, const Shape& s, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.m, s.outputs, s.inputs, s.pad});
  const int64_t rows = sorted.used, f = s.outputs, d = s.inputs, experts = sorted.experts;
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  const std::vector<int64_t> choices = {sorted.tokens, sorted.top_k}, begins = {experts + 1};
  cases->push_back(OpCase("GroupedLinearSwiGluForward", what)
                       .Out("product", kCompute, {rows, f}, Sum(d, 16))
                       .Pad(s.pad)
                       .Out("gate_up", kCompute, {rows, 2 * f}, Sum(d, 4))
                       .In("x", kCompute, {rows, d}, sorted.Rows(Normal(1), 0))
                       .In("w", kCompute, {experts, 2 * f, d}, Normal(2, scale))
                       .In("offsets", OperandType::kI64, begins, List(sorted.offsets))
                       .Call([](const Operands& t, const Context& ctx) {
                         GroupedLinearSwiGluForward(t["product"], t["gate_up"], t["x"], t["w"],
                                                    t["offsets"], ctx);
                       })
                       .CallWithRoundings([](const Operands& t, const Context& ctx) {
                         GroupedLinearForward(t["gate_up"], t["x"], t["w"], t["offsets"], ctx);
                         RoundToBF16(t["gate_up"], ctx);
                         SwiGluForward(t["product"], t["gate_up"], ctx);
                       }));
  cases->push_back(
      OpCase("GroupedSwiGluLinearBackward", what)
          .Out("d_gate_up", kCompute, {rows, 2 * f}, Sum(d, 64))
          .Pad(s.pad)
          .Out("product", kCompute, {rows, f}, Sum(1))
          .Out("d_weight", kWide, choices, Sum(d + f, 32 * std::sqrt(f)))
          .In("weight", kWide, choices, Normal(6))
          .In("source", kI32, {rows}, List(sorted.source))
          .In("dy", kCompute, {rows, d}, sorted.Rows(Normal(3), 0))
          .In("w_down", kCompute, {experts, d, f}, Normal(4, scale))
          .In("gate_up", kCompute, {rows, 2 * f}, sorted.Rows(Normal(5, 2), 0))
          .In("offsets", OperandType::kI64, begins, List(sorted.offsets))
          .Call([](const Operands& t, const Context& ctx) {
            GroupedSwiGluLinearBackward(t["d_gate_up"], t["product"],
                                        {t["weight"], t["d_weight"], t["source"]}, t["dy"],
                                        t["w_down"], t["gate_up"], t["offsets"], ctx);
          })
          .CallWithRoundings([rows, f](const Operands& t, const Context& ctx) {
            Buf d_product(t["dy"].dtype(), {rows, f});
            GroupedLinearBackwardInput(d_product, t["dy"], t["w_down"], t["offsets"], ctx);
            RoundToBF16(d_product, ctx);
            WeightedSwiGluBackward(t["d_gate_up"], t["product"],
                                   {t["weight"], t["d_weight"], t["source"]}, d_product,
                                   t["gate_up"], ctx);
          }));
}

// The logits and their gradient between the products are of the compute dtype.
void AddLinearCrossEntropy(int64_t m, int64_t v, int64_t d, std::vector<OpCase>* cases) {
  const VocabularySlice whole = WholeVocabulary(v);
  for (const bool accumulate : {false, true}) {
    OpCase c("LinearCrossEntropy", With(Sizes({m, v, d}), accumulate));
    c.Out("losses", kWide, {m}, Sum(d, 16)).InOut("x", kCompute, {m, d}, Normal(1), Sum(d + v, 8));
    AddResult(&c, accumulate, "dw", kWide, {v, d}, Sum(d + m, 8));
    c.In("w", kCompute, {v, d}, Normal(2, 2 / std::sqrt(static_cast<double>(d))))
        .In("targets", kI32, {m}, Integers(3, -1, v))
        .In("scale", kF64, {1}, Constant(0.3))
        .Call([=](const Operands& t, const Context& ctx) {
          LinearCrossEntropy(t["losses"], t["x"], t["dw"], accumulate, t["w"], t["targets"], whole,
                             t["scale"], nullptr, ctx);
        })
        .CallWithRoundings([=](const Operands& t, const Context& ctx) {
          const DType f32 = DType::kF32;
          Buf logits(f32, {m, v}), max(f32, {m}), picked(f32, {m}), sum(DType::kF64, {m});
          LinearForward(logits, t["x"], t["w"], Tensor(), ctx);
          RoundToBF16(logits, ctx);
          CrossEntropyMax(max, logits, whole, ctx);
          CrossEntropySum(sum, picked, max, logits, t["targets"], whole, ctx);
          CrossEntropyFinish(t["losses"], logits, max, sum, picked, logits, t["targets"], whole,
                             t["scale"], ctx);
          RoundToBF16(logits, ctx);
          LinearBackwardWeight(t["dw"], logits, t["x"], accumulate, ctx);
          LinearBackwardInput(t["x"], logits, t["w"], false, ctx);
        });
    cases->push_back(c);
  }
}

}  // namespace

void AddProductCases(std::vector<OpCase>* cases) {
  for (const Shape& s : kShapes) {
    AddMatMul(s, cases);
    AddLinear(s, cases);
    AddLinearSwiGlu(s, cases);
  }
  const SortedRows few(1, 1), some(13, 2), many(300, 2);
  for (const Shape& s : {Shape{1, 5, 3, 2}, Shape{1, 64, 40, 8}}) {
    AddGrouped(few, s, cases);
    AddGroupedSwiGlu(few, s, cases);
  }
  AddGrouped(some, {13, 33, 7, 1}, cases);
  AddGroupedSwiGlu(some, {13, 33, 7, 1}, cases);
  AddGrouped(many, {300, 16, 24}, cases);
  AddGroupedSwiGlu(many, {300, 16, 24}, cases);
  AddLinearCrossEntropy(1, 11, 5, cases);
  AddLinearCrossEntropy(17, 131, 33, cases);
  AddLinearCrossEntropy(130, 257, 64, cases);
}

}  // namespace krait::testing
