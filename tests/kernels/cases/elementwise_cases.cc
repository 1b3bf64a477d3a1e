#include "kernels/activation.h"
#include "kernels/cases/op_cases.h"
#include "kernels/optimizer.h"
#include "kernels/parts.h"
#include "kernels/random_fill.h"
#include "kernels/swiglu.h"

namespace krait::testing {
namespace {

constexpr OperandType kCompute = OperandType::kCompute, kWide = OperandType::kWide,
                      kF64 = OperandType::kF64, kI32 = OperandType::kI32, kI64 = OperandType::kI64;

struct Shape {
  int64_t rows, columns, pad = 0;
};
// One element; odd widths; strided rows with and without 16-byte alignment; several pieces of work.
const Shape kShapes[] = {{0, 5}, {1, 1}, {1, 7, 2}, {5, 33}, {3, 64, 8}, {67, 31, 5}, {9, 4099, 1}};

void AddAddFillCopy(std::vector<OpCase>* cases) {
  for (const Shape& s : kShapes) {
    const std::vector<int64_t> shape = {s.rows, s.columns};
    const std::string what = Sizes({s.rows, s.columns, s.pad});
    cases->push_back(
        OpCase("AddInPlace", what)
            .InOut("y", kCompute, shape, Normal(1), Sum(1))
            .Pad(s.pad)
            .In("x", kCompute, shape, Normal(2))
            .Pad(2 * s.pad)
            .Call([](const Operands& t, const Context& ctx) { AddInPlace(t["y"], t["x"], ctx); }));
    cases->push_back(
        OpCase("AddInPlace", what + " wide")
            .InOut("y", kWide, shape, Normal(1), Sum(1))
            .Pad(s.pad)
            .In("x", kCompute, shape, Normal(2))
            .Call([](const Operands& t, const Context& ctx) { AddInPlace(t["y"], t["x"], ctx); }));
    for (const OperandType y : {kCompute, kWide}) {
      cases->push_back(OpCase("AddScaled", what + (y == kWide ? " wide" : ""))
                           .InOut("y", y, shape, Normal(1), Sum(1))
                           .Pad(s.pad)
                           .In("x", kCompute, shape, Normal(2))
                           .Pad(2 * s.pad)
                           .Call([](const Operands& t, const Context& ctx) {
                             AddScaled(t["y"], t["x"], -0.375, ctx);
                           }));
    }
    cases->push_back(
        OpCase("Fill", what)
            .Out("y", kCompute, shape, Exact())
            .Pad(s.pad)
            .Call([](const Operands& t, const Context& ctx) { Fill(t["y"], -1.5, ctx); }));
    for (const auto& [to, from] :
         {std::pair(kCompute, kCompute), std::pair(kCompute, kWide), std::pair(kWide, kCompute)}) {
      cases->push_back(
          OpCase("Copy", what + (to == from    ? ""
                                 : to == kWide ? " widened"
                                               : " rounded"))
              .Out("y", to, shape, Exact())
              .Pad(s.pad)
              .In("x", from, shape, Normal(1))
              .Pad(3 * s.pad)
              .Call([](const Operands& t, const Context& ctx) { Copy(t["y"], t["x"], ctx); }));
    }
  }
}

// One to five parts of any length, and more than one launch takes; the bits of a fixed order.
void AddParts(std::vector<OpCase>* cases) {
  for (const auto& [n, count] : {std::pair<int64_t, int>(1, 1), {7, 2}, {4096, 3}, {33333, 5}}) {
    const std::string what = Sizes({n, count});
    for (const auto& [to, from] :
         {std::pair(kCompute, kCompute), std::pair(kWide, kWide), std::pair(kWide, kCompute)}) {
      const int parts = count;
      cases->push_back(
          OpCase("SumParts", what + (to == from ? "" : " widened") + (from == kWide ? " wide" : ""))
              .Out("out", to, {n}, Sum(count))
              .In("all", from, {count * n}, Normal(1))
              .Call([parts](const Operands& t, const Context& ctx) {
                SumParts(t["out"], EqualParts(t["all"], parts), ctx);
              }));
    }
    const int parts = count;
    cases->push_back(OpCase("MaxParts", what)
                         .Out("out", kWide, {n}, Exact())
                         .In("all", kWide, {count * n}, Normal(1))
                         .Call([parts](const Operands& t, const Context& ctx) {
                           MaxParts(t["out"], EqualParts(t["all"], parts), ctx);
                         }));
    cases->push_back(OpCase("SumParts", what + " counts")
                         .Out("out", kI64, {n}, Exact())
                         .In("all", kI64, {count * n}, Integers(1, -50, 50))
                         .Call([parts](const Operands& t, const Context& ctx) {
                           SumParts(t["out"], EqualParts(t["all"], parts), ctx);
                         }));
  }
  // One of the parts is the output.
  cases->push_back(OpCase("SumParts", "in place")
                       .InOut("out", kWide, {1000}, Normal(2), Sum(3))
                       .In("all", kWide, {2000}, Normal(1))
                       .Call([](const Operands& t, const Context& ctx) {
                         std::vector<Tensor> parts = EqualParts(t["all"], 2);
                         parts.insert(parts.begin() + 1, t["out"]);
                         SumParts(t["out"], parts, ctx);
                       }));
  cases->push_back(OpCase("SumParts", "300 parts")
                       .Out("out", kWide, {12}, Sum(300))
                       .In("all", kCompute, {3600}, Normal(1))
                       .Call([](const Operands& t, const Context& ctx) {
                         SumParts(t["out"], EqualParts(t["all"], 300), ctx);
                       }));
}

void AddSwiGlu(std::vector<OpCase>* cases) {
  for (const Shape& s : kShapes) {
    const int64_t m = s.rows, f = s.columns;
    const std::string what = Sizes({m, f, s.pad});
    // A sigmoid within 2 ulp and a few products.
    cases->push_back(OpCase("SwiGluForward", what)
                         .Out("product", kCompute, {m, f}, Sum(1))
                         .Pad(s.pad)
                         .In("gate_up", kCompute, {m, 2 * f}, Normal(1, 2))
                         .Pad(2 * s.pad)
                         .Call([](const Operands& t, const Context& ctx) {
                           SwiGluForward(t["product"], t["gate_up"], ctx);
                         }));
    cases->push_back(OpCase("SwiGluBackward", what)
                         .Out("d_gate_up", kCompute, {m, 2 * f}, Sum(1))
                         .Pad(s.pad)
                         .Out("product", kCompute, {m, f}, Sum(1))
                         .Pad(2 * s.pad)
                         .In("d_product", kCompute, {m, f}, Normal(2))
                         .In("gate_up", kCompute, {m, 2 * f}, Normal(1, 2))
                         .Pad(s.pad)
                         .Call([](const Operands& t, const Context& ctx) {
                           SwiGluBackward(t["d_gate_up"], t["product"], t["d_product"],
                                          t["gate_up"], ctx);
                         }));
    cases->push_back(OpCase("SwiGluBackward", what + " in place")
                         .InOut("gate_up", kCompute, {m, 2 * f}, Normal(1, 2), Sum(1))
                         .Pad(s.pad)
                         .In("d_product", kCompute, {m, f}, Normal(2))
                         .Call([](const Operands& t, const Context& ctx) {
                           SwiGluBackward(t["gate_up"], Tensor(), t["d_product"], t["gate_up"],
                                          ctx);
                         }));
    // Every third row is padding; the others are choices in descending order. One choice more has
    // no row, and its gradient is not written.
    std::vector<double> source;
    int64_t choices = 1;
    for (int64_t r = 0; r < m; ++r) choices += r % 3 != 1;
    for (int64_t r = 0, next = choices - 1; r < m; ++r) {
      source.push_back(r % 3 == 1 ? -1 : static_cast<double>(--next));
    }
    cases->push_back(
        OpCase("WeightedSwiGluBackward", what)
            .Out("d_gate_up", kCompute, {m, 2 * f}, Sum(1))
            .Pad(s.pad)
            .Out("product", kCompute, {m, f}, Sum(1))
            .InOut("d_weight", kWide, {choices, 1}, Constant(9), Sum(f, 4 * std::sqrt(f)))
            .In("weight", kWide, {choices, 1}, Normal(3))
            .In("source", kI32, {m}, List(source))
            .In("d_product", kCompute, {m, f}, Normal(2))
            .Pad(2 * s.pad)
            .In("gate_up", kCompute, {m, 2 * f}, Normal(1, 2))
            .Pad(s.pad)
            .Call([](const Operands& t, const Context& ctx) {
              WeightedSwiGluBackward(t["d_gate_up"], t["product"],
                                     {t["weight"], t["d_weight"], t["source"]}, t["d_product"],
                                     t["gate_up"], ctx);
            }));
  }
}

void AddRandom(std::vector<OpCase>* cases) {
  for (const Shape& s : kShapes) {
    const std::string what = Sizes({s.rows, s.columns, s.pad});
    const int64_t step = s.columns + 3;
    cases->push_back(OpCase("FillNormal", what)
                         .Out("y", kCompute, {s.rows, s.columns}, Sum(1))
                         .Pad(s.pad)
                         .Call([step](const Operands& t, const Context& ctx) {
                           const RandomStream stream(5, RandomPurpose::kInit, 77);
                           FillNormal(t["y"], stream, 1000, step, 0.02, ctx);
                         }));
    cases->push_back(OpCase("FillUniform", what)
                         .Out("y", kCompute, {s.rows, s.columns}, Sum(1))
                         .Pad(s.pad)
                         .Call([step](const Operands& t, const Context& ctx) {
                           const RandomStream stream(5, RandomPurpose::kInit, 77);
                           FillUniform(t["y"], stream, 1000, step, 0.5, ctx);
                         }));
  }
}

const AdamWSettings kSettings{
    .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-3, .weight_decay = 0.1, .clip = 2};

void AddOptimizer(std::vector<OpCase>* cases) {
  for (const int64_t n : {0, 1, 7, 16385, 100003}) {
    const std::string what = Sizes({n});
    const double count = static_cast<double>(n);
    // In double: the f32 tolerance of one rounding leaves room for any order.
    for (const OperandType x : {kWide, kCompute}) {
      cases->push_back(OpCase("AddSumOfSquares", what + (x == kCompute ? " compute" : ""))
                           .InOut("sum", kF64, {1}, Constant(3), Sum(1))
                           .In("x", x, {n}, Normal(1))
                           .Call([](const Operands& t, const Context& ctx) {
                             AddSumOfSquares(t["sum"], t["x"], ctx);
                           }));
    }
    cases->push_back(
        OpCase("AddSum", what)
            .InOut("sum", kF64, {1}, Constant(3), Sum(1))
            .In("x", kWide, {n}, Normal(1))
            .Call([](const Operands& t, const Context& ctx) { AddSum(t["sum"], t["x"], ctx); }));
    // steps, norm, applied, gradient scale, step size, root scale.
    for (const bool applied : {true, false}) {
      cases->push_back(OpCase("AdamW", what + (applied ? "" : " skipped"))
                           .InOut("weight", kCompute, {n}, Constant(0.5), Sum(4))
                           .InOut("master", kWide, {n}, Normal(1), Sum(4))
                           .InOut("m", kWide, {n}, Normal(2, 0.1), Sum(4))
                           .InOut("v", kWide, {n}, Normal(3, 0.1, 1), Sum(4))
                           .In("grad", kWide, {n}, Normal(4))
                           .In("decay_ranges", kI64, {2, 2},
                               List({0, std::floor(count / 3), std::floor(count / 2), count}))
                           .In("control", kF64, {kAdamWControlSize},
                               List({3, 4, applied ? 1.0 : 0.0, 0.5, 0.0369, 2.648}))
                           .Call([](const Operands& t, const Context& ctx) {
                             AdamW(t["weight"], t["master"], t["m"], t["v"], t["grad"],
                                   t["decay_ranges"], t["control"], kSettings, ctx);
                           }));
    }
  }
  cases->push_back(OpCase("AdamW", "5001 with scaled steps")
                       .InOut("w", kWide, {5001}, Normal(1), Sum(4))
                       .InOut("m", kWide, {5001}, Normal(2, 0.1), Sum(4))
                       .InOut("v", kWide, {5001}, Normal(3, 0.1, 1), Sum(4))
                       .In("grad", kWide, {5001}, Normal(4))
                       .In("decay_ranges", kI64, {1, 2}, List({7, 2500}))
                       .In("step_ranges", kI64, {2, 2}, List({3, 9, 9, 5000}))
                       .In("step_scales", kF64, {2}, List({0.5, 0.0625}))
                       .In("control", kF64, {kAdamWControlSize}, List({3, 4, 1, 1, 0.0369, 2.648}))
                       .Call([](const Operands& t, const Context& ctx) {
                         AdamW(t["w"], t["w"], t["m"], t["v"], t["grad"], t["decay_ranges"],
                               {t["step_ranges"], t["step_scales"]}, t["control"], kSettings, ctx);
                       }));
  cases->push_back(OpCase("AdamW", "1001 in place without decay")
                       .InOut("w", kWide, {1001}, Normal(1), Sum(4))
                       .InOut("m", kWide, {1001}, Normal(2, 0.1), Sum(4))
                       .InOut("v", kWide, {1001}, Normal(3, 0.1, 1), Sum(4))
                       .In("grad", kWide, {1001}, Normal(4))
                       .In("control", kF64, {kAdamWControlSize}, List({3, 4, 1, 1, 0.0369, 2.648}))
                       .Call([](const Operands& t, const Context& ctx) {
                         AdamW(t["w"], t["w"], t["m"], t["v"], t["grad"], Tensor(), t["control"],
                               kSettings, ctx);
                       }));
  const std::pair<const char*, std::vector<double>> steps[] = {
      {"clipped", {25, 1, 2, 3}},
      {"within the norm", {1, 1, 2, 3}},
      {"infinite norm", {INFINITY, 1, 2, 3}},
      {"infinite loss", {25, 1, INFINITY, 3}}};
  for (const auto& [what, values] : steps) {
    cases->push_back(
        OpCase("AdamWPrepare", what)
            .InOut("control", kF64, {kAdamWControlSize}, List({2, 0.5, 1, 0.25, 0.3, 0.2}), Sum(1))
            .In("sum_of_squares", kF64, {1}, List({values[0]}))
            .In("losses", kF64, {3}, List({values[1], values[2], values[3]}))
            .Call([](const Operands& t, const Context& ctx) {
              AdamWPrepare(t["control"], t["sum_of_squares"], t["losses"], kSettings, ctx);
            }));
  }
}

}  // namespace

void AddElementwiseCases(std::vector<OpCase>* cases) {
  AddAddFillCopy(cases);
  AddParts(cases);
  AddSwiGlu(cases);
  AddRandom(cases);
  AddOptimizer(cases);
}

}  // namespace krait::testing
