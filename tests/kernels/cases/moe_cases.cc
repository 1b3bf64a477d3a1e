#include <algorithm>

#include "kernels/cases/op_cases.h"
#include "kernels/moe.h"

namespace krait::testing {
namespace {

constexpr OperandType kCompute = OperandType::kCompute, kWide = OperandType::kWide,
                      kF64 = OperandType::kF64, kI32 = OperandType::kI32, kI64 = OperandType::kI64;

struct Shape {
  int64_t tokens, experts, top_k;
};

void AddRouting(const Shape& s, int64_t groups, std::vector<OpCase>* cases) {
  const std::vector<int64_t> all = {s.tokens, s.experts}, chosen = {s.tokens, s.top_k};
  for (const bool renormalize : {false, true}) {
    const std::string what =
        Sizes({s.tokens, s.experts, s.top_k, groups}) + (renormalize ? " renormalised" : "");
    cases->push_back(OpCase("MoeRouteForward", what)
                         .Out("probs", kWide, all, Sum(s.experts))
                         .Pad(1)
                         .Out("choice", kI32, chosen, Exact())
                         .Out("weight", kWide, chosen, Sum(s.experts))
                         .In("logits", kWide, all, Normal(1, 2))
                         .Pad(2)
                         .Call([renormalize](const Operands& t, const Context& ctx) {
                           MoeRouteForward(t["probs"], t["choice"], t["weight"], t["logits"],
                                           renormalize, ctx);
                         }));
    // What the forward says of the same logits.
    Buf logits(DType::kF64, all), probs(DType::kF64, all), choice(DType::kI32, chosen),
        weight(DType::kF64, chosen);
    logits.FillNormal(1, 2);
    MoeRouteForward(probs, choice, weight, logits, renormalize, TestContext());
    for (const bool losses : {false, true}) {
      OpCase c("MoeRouteBackward", what + (losses ? " with losses" : ""));
      c.Out("d_logits", kWide, all, Sum(s.experts, 8)).Pad(3);
      c.In("d_weight", kWide, chosen, Normal(2));
      if (losses) c.In("d_prob", kWide, {groups, s.experts}, Normal(3));
      c.In("probs", kWide, all, List(Values(probs)))
          .In("choice", kI32, chosen, List(Values(choice)))
          .In("weight", kWide, chosen, List(Values(weight)))
          .In("logits", kWide, all, Normal(1, 2))
          .Call([=](const Operands& t, const Context& ctx) {
            MoeRouteBackward(t["d_logits"], t["d_weight"], losses ? t["d_prob"] : Tensor(),
                             losses ? 0.3 : 0, t["probs"], t["choice"], t["weight"], t["logits"],
                             renormalize, ctx);
          });
      cases->push_back(c);
    }
    if (renormalize) continue;
    cases->push_back(OpCase("MoeStatistics", what)
                         .InOut("prob_sum", kWide, {groups, s.experts}, Constant(1), Sum(4))
                         .InOut("choice_count", kI64, {groups, s.experts}, Constant(2), Exact())
                         .InOut("z_sum", kWide, {1}, Constant(3), Sum(s.experts))
                         .In("probs", kWide, all, List(Values(probs)))
                         .Pad(2)
                         .In("choice", kI32, chosen, List(Values(choice)))
                         .In("logits", kWide, all, Normal(1, 2))
                         .Call([](const Operands& t, const Context& ctx) {
                           MoeStatistics(t["prob_sum"], t["choice_count"], t["z_sum"], t["probs"],
                                         t["choice"], t["logits"], ctx);
                         }));
    // Rows are dense on the CPU.
    cases->push_back(OpCase("MoeSort", what)
                         .Out("row_of", kI32, chosen, Exact())
                         .Out("source", kI32, {s.tokens * s.top_k + 5}, Exact())
                         .Out("offsets", kI64, {s.experts + 1}, Exact())
                         .In("choice", kI32, chosen, List(Values(choice)))
                         .Call([](const Operands& t, const Context& ctx) {
                           MoeSort(t["row_of"], t["source"], t["offsets"], t["choice"], ctx);
                         })
                         .CpuOnly("rows are aligned on CUDA: MoeSortGpu checks that"));
  }
}

void AddLosses(int64_t sublayers, int64_t experts, int64_t groups, std::vector<OpCase>* cases) {
  const std::vector<int64_t> all = {sublayers * groups, experts};
  for (int64_t pools = 1; pools <= sublayers; pools += std::max<int64_t>(1, sublayers - 1)) {
    const std::string what =
        Sizes({sublayers, experts, groups}) + " pools " + std::to_string(pools);
    const MoeLossShape shape{20 * groups, 2, pools, groups};
    cases->push_back(OpCase("MoeLossesForward", what)
                         .InOut("aux", kF64, {1}, Constant(1), Sum(1))
                         .InOut("z", kF64, {1}, Constant(2), Sum(1))
                         .InOut("imbalance", kF64, {sublayers}, Constant(3), Sum(1))
                         .In("prob_sum", kWide, all, Normal(1, 1, 4))
                         .In("choice_count", kI64, all, Integers(2, 0, 17))
                         .In("z_sum", kWide, {sublayers}, Normal(3, 1, 50))
                         .Call([shape](const Operands& t, const Context& ctx) {
                           MoeLossesForward(t["aux"], t["z"], t["imbalance"], t["prob_sum"],
                                            t["choice_count"], t["z_sum"], shape, ctx);
                         }));
    cases->push_back(OpCase("MoeLossesBackward", what)
                         .Out("d_prob", kWide, all, Sum(1))
                         .In("choice_count", kI64, all, Integers(2, 0, 17))
                         .Call([shape](const Operands& t, const Context& ctx) {
                           MoeLossesBackward(t["d_prob"], t["choice_count"], 0.7, shape, ctx);
                         }));
  }
}

void AddPath(const SortedRows& s, int64_t d, int64_t pad, std::vector<OpCase>* cases) {
  const std::string what = Sizes({s.tokens, s.top_k, d, pad});
  // Five rows that are not in use.
  const int64_t rows = s.used + 5, top_k = s.top_k;
  std::vector<double> source = s.source;
  source.resize(static_cast<size_t>(rows), -1);
  const std::vector<int64_t> tokens = {s.tokens, d}, chosen = {s.tokens, s.top_k};
  cases->push_back(OpCase("MoePermute", what)
                       .Out("rows", kCompute, {rows, d}, Exact())
                       .Pad(pad)
                       .In("x", kCompute, tokens, Normal(1))
                       .Pad(2 * pad)
                       .In("source", kI32, {rows}, List(source))
                       .Call([top_k](const Operands& t, const Context& ctx) {
                         MoePermute(t["rows"], t["x"], t["source"], top_k, ctx);
                       }));
  for (const bool accumulate : {false, true}) {
    OpCase c("MoePermuteBackward", what + (accumulate ? " accumulated" : ""));
    if (accumulate) {
      c.InOut("dx", kCompute, tokens, Normal(4), Sum(top_k + 1));
    } else {
      c.Out("dx", kCompute, tokens, Sum(top_k));
    }
    c.Pad(pad)
        .In("d_rows", kCompute, {rows, d}, s.Rows(Normal(2), std::nan("")))
        .In("row_of", kI32, chosen, List(s.row_of))
        .Call([accumulate](const Operands& t, const Context& ctx) {
          MoePermuteBackward(t["dx"], t["d_rows"], t["row_of"], accumulate, ctx);
        });
    cases->push_back(c);
  }
  cases->push_back(OpCase("MoeCombine", what)
                       .Out("y", kCompute, tokens, Sum(top_k))
                       .Pad(pad)
                       .In("rows", kCompute, {rows, d}, s.Rows(Normal(2), std::nan("")))
                       .In("weight", kWide, chosen, Normal(3))
                       .In("row_of", kI32, chosen, List(s.row_of))
                       .Call([](const Operands& t, const Context& ctx) {
                         MoeCombine(t["y"], t["rows"], t["weight"], t["row_of"], ctx);
                       }));
}

}  // namespace

SortedRows::SortedRows(int64_t tokens_in, int64_t top_k_in) : tokens(tokens_in), top_k(top_k_in) {
  constexpr int64_t kAlignment = 128;
  const int64_t n = tokens * top_k;
  const int64_t with_rows[] = {0, 2, 3};  // expert 1 gets none
  for (int64_t i = 0; i < n; ++i) {
    choice.push_back(static_cast<double>(with_rows[(i / top_k * 7 + i % top_k) % 3]));
  }
  row_of.resize(static_cast<size_t>(n));
  for (int64_t e = 0; e < experts; ++e) {
    offsets.push_back(static_cast<double>(source.size()));
    for (int64_t i = 0; i < n; ++i) {
      if (choice[static_cast<size_t>(i)] != static_cast<double>(e)) continue;
      row_of[static_cast<size_t>(i)] = static_cast<double>(source.size());
      source.push_back(static_cast<double>(i));
    }
    while (source.size() % kAlignment != 0) source.push_back(-1);
  }
  used = static_cast<int64_t>(source.size());
  offsets.push_back(static_cast<double>(used));
}

Initial SortedRows::Rows(Initial initial, double unused) const {
  return [initial = std::move(initial), unused, source = source](Buf* buf) {
    initial(buf);
    const Tensor t = *buf;
    for (int64_t i = 0; i < t.numel(); ++i) {
      const auto row = static_cast<size_t>(i / t.dim(-1));
      if (row >= source.size()) Set(t, i, unused);
      if (row < source.size() && source[row] < 0) Set(t, i, 0);
    }
  };
}

void AddMoeCases(std::vector<OpCase>* cases) {
  for (const auto& [rows, used] : {std::pair<int64_t, int64_t>(1, 0), {5, 5}, {1000, 77}}) {
    cases->push_back(OpCase("MoeRowNumbers", Sizes({rows, used}))
                         .Out("numbers", kI32, {rows}, Exact())
                         .Call([used = used](const Operands& t, const Context& ctx) {
                           MoeRowNumbers(t["numbers"], used, ctx);
                         }));
  }
  for (const Shape& s : {Shape{0, 3, 2}, Shape{1, 1, 1}, Shape{1, 4, 2}, Shape{7, 5, 3},
                         Shape{40, 16, 2}, Shape{9, 33, 5}, Shape{300, 8, 1}}) {
    AddRouting(s, /*groups=*/1, cases);
  }
  AddRouting({40, 16, 2}, /*groups=*/8, cases);
  AddRouting({900, 8, 1}, /*groups=*/3, cases);
  AddLosses(1, 1, /*groups=*/1, cases);
  AddLosses(3, 6, /*groups=*/1, cases);
  AddLosses(3, 6, /*groups=*/4, cases);
  AddLosses(70, 3, /*groups=*/2, cases);  // more pools than a block has threads
  AddPath(SortedRows(1, 1), 3, 2, cases);
  AddPath(SortedRows(13, 2), 33, 1, cases);
  AddPath(SortedRows(50, 3), 64, 8, cases);
  AddPath(SortedRows(3, 2), 1025, 0, cases);
}

}  // namespace krait::testing
