// Tests of ops that carry a state along time: packed documents equal separate ones, and a sequence
// cut in two equals the whole, forward and backward.
//
// A Problem is one call of such an op with its backward, for tests/kernels/*_test.cc to define:
//   Problem(DType, Shape)             filled operands; Shape has a member `time`
//   Shape s; Documents documents;     the shape and the documents of the call
//   Buf doc_start;                    [B,T] i32, memory for documents.doc_start
//   SetDocuments(starts)              documents begin at these tokens, the first before the call
//   Forward(ctx), Backward(ctx)       from zeroed gradients of parameters
//   AlongTime OperandsAlongTime()
#ifndef KRAIT_TESTS_SUPPORT_PIECES_H_
#define KRAIT_TESTS_SUPPORT_PIECES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/documents.h"
#include "support/gradcheck.h"

namespace krait::testing {

struct AlongTime {
  std::vector<Buf*> inputs;   // [B,T,X], with the gradient that arrives at the output
  std::vector<Buf*> outputs;  // [B,T,X], with the gradients of inputs
  std::vector<Buf*> sums;     // gradients of parameters: the sum over pieces is that of the whole
  Buf *initial_state, *final_state, *d_initial_state, *d_final_state;
};

// Copies `time` steps of a [B,T,X] (or [B,T]) tensor.
inline void CopySteps(Tensor to, int64_t to_begin, Tensor from, int64_t from_begin, int64_t time) {
  const Tensor target = to.Slice(1, to_begin, time), source = from.Slice(1, from_begin, time);
  for (int64_t i = 0; i < target.numel(); ++i) Set(target, i, Get(source, i));
}

// The steps [begin, begin + time) of `whole` as a problem of their own, from a zero state, with the
// whole's documents where `keep_documents` says so.
template <typename Problem>
Problem PieceOf(Problem& whole, int64_t begin, int64_t time, bool keep_documents) {
  auto shape = whole.s;
  shape.time = time;
  Problem piece(DType::kF32, shape);
  piece.documents.first_position += begin;
  if (keep_documents && whole.documents.doc_start.defined()) {
    CopySteps(piece.doc_start, 0, whole.doc_start, begin, time);
    piece.documents.doc_start = piece.doc_start;
  }
  const AlongTime to = piece.OperandsAlongTime(), from = whole.OperandsAlongTime();
  for (size_t i = 0; i < to.inputs.size(); ++i) {
    CopySteps(*to.inputs[i], 0, *from.inputs[i], begin, time);
  }
  to.initial_state->Fill(0);
  to.d_final_state->Fill(0);
  return piece;
}

// The pieces' results, put together, against those of the whole: 1e-6, the project's bound.
template <typename Problem>
void ExpectPiecesEqualWhole(Problem& whole, const std::vector<Problem*>& pieces) {
  constexpr double kBound = 1e-6;
  const AlongTime want = whole.OperandsAlongTime();
  for (size_t k = 0; k < want.outputs.size(); ++k) {
    const Tensor all = *want.outputs[k];
    Buf joined(all.dtype(), {all.dim(0), all.dim(1), all.dim(2)});
    int64_t begin = 0;
    for (Problem* piece : pieces) {
      CopySteps(joined, begin, *piece->OperandsAlongTime().outputs[k], 0, piece->s.time);
      begin += piece->s.time;
    }
    EXPECT_LE(RelativeError(joined, all), kBound) << "output " << k;
  }
  for (size_t k = 0; k < want.sums.size(); ++k) {
    std::vector<double> sum(static_cast<size_t>(want.sums[k]->tensor().numel()));
    for (Problem* piece : pieces) {
      const std::vector<double> part = Values(*piece->OperandsAlongTime().sums[k]);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
    }
    EXPECT_LE(RelativeError(sum, Values(*want.sums[k])), kBound) << "sum " << k;
  }
  EXPECT_LE(RelativeError(*pieces.back()->OperandsAlongTime().final_state, *want.final_state),
            kBound);
  EXPECT_LE(
      RelativeError(*pieces.front()->OperandsAlongTime().d_initial_state, *want.d_initial_state),
      kBound);
}

// Documents that begin at `starts` (ascending, after 0) in sequences of one row: each alone,
// without knowing of the others, gives what they give packed. The first continues the initial
// state, the last one's state is the final state.
template <typename Problem, typename Shape>
void CheckPackedDocuments(const Shape& shape, const std::vector<int64_t>& starts) {
  const TestContext ctx;
  Problem whole(DType::kF32, shape);
  whole.SetDocuments(starts);
  whole.Forward(ctx);
  whole.Backward(ctx);
  std::vector<Problem> documents;
  int64_t begin = 0;
  std::vector<int64_t> ends = starts;
  ends.push_back(shape.time);
  for (const int64_t end : ends) {
    documents.push_back(PieceOf(whole, begin, end - begin, /*keep_documents=*/false));
    begin = end;
  }
  const AlongTime all = whole.OperandsAlongTime();
  documents.front().OperandsAlongTime().initial_state->Assign(Values(*all.initial_state));
  documents.back().OperandsAlongTime().d_final_state->Assign(Values(*all.d_final_state));
  std::vector<Problem*> pieces;
  for (Problem& document : documents) {
    document.Forward(ctx);
    document.Backward(ctx);
    pieces.push_back(&document);
  }
  ExpectPiecesEqualWhole(whole, pieces);
}

// The state is handed on between the pieces, its gradient back; documents are those of the whole.
template <typename Problem, typename Shape>
void CheckCutInTwo(const Shape& shape, int64_t cut, const std::vector<int64_t>& starts) {
  SCOPED_TRACE("cut at " + std::to_string(cut) + ", documents " + std::to_string(starts.size()));
  const TestContext ctx;
  Problem whole(DType::kF32, shape);
  if (!starts.empty()) whole.SetDocuments(starts);
  whole.Forward(ctx);
  whole.Backward(ctx);
  Problem first = PieceOf(whole, 0, cut, /*keep_documents=*/true);
  Problem second = PieceOf(whole, cut, shape.time - cut, /*keep_documents=*/true);
  const AlongTime all = whole.OperandsAlongTime(), one = first.OperandsAlongTime(),
                  two = second.OperandsAlongTime();
  one.initial_state->Assign(Values(*all.initial_state));
  first.Forward(ctx);
  two.initial_state->Assign(Values(*one.final_state));
  second.Forward(ctx);
  two.d_final_state->Assign(Values(*all.d_final_state));
  second.Backward(ctx);
  one.d_final_state->Assign(Values(*two.d_initial_state));
  first.Backward(ctx);
  ExpectPiecesEqualWhole(whole, {&first, &second});
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_PIECES_H_
