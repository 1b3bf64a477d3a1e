#include "kernels/cases/op_cases.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"

namespace krait::testing {
namespace {

constexpr OperandType kCompute = OperandType::kCompute, kWide = OperandType::kWide,
                      kF64 = OperandType::kF64, kI32 = OperandType::kI32;

// `initial`, with NaN in the columns of padding [used, columns).
Initial WithPadding(Initial initial, int64_t used) {
  return [=](Buf* buf) {
    initial(buf);
    const Tensor t = *buf;
    for (int64_t i = 0; i < t.numel(); ++i) {
      if (i % t.dim(-1) >= used) Set(t, i, std::nan(""));
    }
  };
}

// A slice in the first `slice.used` of `columns` columns.
void AddCrossEntropy(int64_t m, int64_t columns, VocabularySlice slice, int64_t pad,
                     std::vector<OpCase>* cases) {
  const std::string what = Sizes({m, columns, slice.first, slice.used, slice.total});
  const Initial logits = WithPadding(Normal(1, 3), slice.used);
  const Initial targets = Integers(2, -1, slice.total);
  // The results of the whole vocabulary, of which the slice is a part: the maximum is at least the
  // slice's own.
  const std::vector<int64_t> all = {m, columns};
  Buf values(DType::kF64, all), max(DType::kF64, {m}), picked(DType::kF64, {m}),
      sum(DType::kF64, {m}), target(DType::kI32, {m});
  logits(&values);
  targets(&target);
  const TestContext ctx;
  CrossEntropyMax(max, values, slice, ctx);
  for (int64_t i = 0; i < m; ++i) Set(max, i, std::max(Get(max, i), 1.0) + 0.25);
  CrossEntropySum(sum, picked, max, values, target, slice, ctx);
  for (int64_t i = 0; i < m; ++i) {
    Set(sum, i, Get(sum, i) + 0.75);
    if (Get(picked, i) == 0) Set(picked, i, -0.5);  // from another slice
  }
  cases->push_back(OpCase("CrossEntropyMax", what)
                       .Out("max", kWide, {m}, Exact())
                       .In("logits", kCompute, all, logits)
                       .Pad(pad)
                       .Call([slice](const Operands& t, const Context& c) {
                         CrossEntropyMax(t["max"], t["logits"], slice, c);
                       }));
  // exp(x - max): the argument is rounded at a size of up to 16.
  cases->push_back(OpCase("CrossEntropySum", what)
                       .Out("sum", kF64, {m}, Sum(16))
                       .Out("picked", kWide, {m}, Exact())
                       .In("max", kWide, {m}, List(Values(max)))
                       .In("logits", kCompute, all, logits)
                       .Pad(pad)
                       .In("targets", kI32, {m}, targets)
                       .Call([slice](const Operands& t, const Context& c) {
                         CrossEntropySum(t["sum"], t["picked"], t["max"], t["logits"], t["targets"],
                                         slice, c);
                       }));
  for (const bool in_place : {false, true}) {
    OpCase c("CrossEntropyFinish", what + (in_place ? " in place" : ""));
    c.Out("losses", kWide, {m}, Sum(1, 16));
    if (in_place) {
      c.InOut("logits", kCompute, all, logits, Sum(16)).Pad(pad);
    } else {
      c.Out("d_logits", kCompute, all, Sum(16)).Pad(2 * pad);
      c.In("logits", kCompute, all, logits).Pad(pad);
    }
    c.In("max", kWide, {m}, List(Values(max)))
        .In("sum", kF64, {m}, List(Values(sum)))
        .In("picked", kWide, {m}, List(Values(picked)))
        .In("targets", kI32, {m}, targets)
        .In("scale", kF64, {1}, Constant(0.3))
        .Call([=](const Operands& t, const Context& context) {
          CrossEntropyFinish(t["losses"], t[in_place ? "logits" : "d_logits"], t["max"], t["sum"],
                             t["picked"], t["logits"], t["targets"], slice, t["scale"], context);
        });
    cases->push_back(c);
  }
  cases->push_back(OpCase("CrossEntropyFinish", what + " loss alone")
                       .Out("losses", kWide, {m}, Sum(1, 16))
                       .In("logits", kCompute, all, logits)
                       .In("max", kWide, {m}, List(Values(max)))
                       .In("sum", kF64, {m}, List(Values(sum)))
                       .In("picked", kWide, {m}, List(Values(picked)))
                       .In("targets", kI32, {m}, targets)
                       .Call([slice](const Operands& t, const Context& c) {
                         CrossEntropyFinish(t["losses"], Tensor(), t["max"], t["sum"], t["picked"],
                                            t["logits"], t["targets"], slice, Tensor(), c);
                       }));
}

void AddEmbedding(int64_t m, int64_t d, VocabularySlice slice, int64_t pad,
                  std::vector<OpCase>* cases) {
  const std::string what = Sizes({m, d, slice.first, slice.used, slice.total, pad});
  const int64_t rows = slice.used + 2;  // two rows of padding
  cases->push_back(
      OpCase("EmbeddingForward", what)
          .Out("y", kCompute, {m, d}, Exact())
          .Pad(pad)
          .In("tokens", kI32, {m}, Integers(1, 0, slice.total))
          .In("table", kCompute, {rows, d}, WithRows(Normal(2), slice.used, rows, std::nan("")))
          .Call([slice](const Operands& t, const Context& ctx) {
            EmbeddingForward(t["y"], t["tokens"], t["table"], slice, ctx);
          }));
  for (const int64_t pad_token : {kNoPadToken, slice.first + slice.used / 2}) {
    cases->push_back(
        OpCase("EmbeddingBackward", what + (pad_token == kNoPadToken ? "" : ", a padding row"))
            .InOut("dtable", kWide, {rows, d}, WithRows(Normal(3), slice.used, rows, 7), Sum(m))
            .In("dy", kCompute, {m, d}, Normal(4))
            .Pad(pad)
            .In("tokens", kI32, {m}, Integers(1, 0, slice.total))
            .Call([=](const Operands& t, const Context& ctx) {
              EmbeddingBackward(t["dtable"], t["dy"], t["tokens"], slice, pad_token, ctx);
            }));
  }
}

}  // namespace

void AddLossCases(std::vector<OpCase>* cases) {
  AddCrossEntropy(0, 5, WholeVocabulary(5), 0, cases);
  AddCrossEntropy(1, 1, WholeVocabulary(1), 0, cases);
  AddCrossEntropy(1, 131, WholeVocabulary(131), 3, cases);
  AddCrossEntropy(30, 7, {3, 5, 11}, 2, cases);  // a slice with padding, foreign targets
  AddCrossEntropy(9, 4, {11, 0, 11}, 0, cases);  // nothing but padding
  AddCrossEntropy(67, 1000, {1000, 1000, 2500}, 8, cases);
  AddCrossEntropy(3, 5003, WholeVocabulary(5003), 1, cases);
  AddEmbedding(0, 3, WholeVocabulary(5), 0, cases);
  AddEmbedding(1, 1, WholeVocabulary(1), 0, cases);
  AddEmbedding(9, 7, WholeVocabulary(5), 2, cases);
  AddEmbedding(67, 33, {4, 9, 20}, 1, cases);
  AddEmbedding(300, 64, {0, 3, 6}, 8, cases);
  AddEmbedding(5, 1025, {20, 0, 20}, 0, cases);
}

}  // namespace krait::testing
