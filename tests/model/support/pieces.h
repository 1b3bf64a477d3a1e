// A step of a TinyModel whose sequences run in pieces.
#ifndef KRAIT_TESTS_MODEL_SUPPORT_PIECES_H_
#define KRAIT_TESTS_MODEL_SUPPORT_PIECES_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/activation.h"
#include "model/support/tiny_model.h"

namespace krait::testing {

// Tokens [begin, begin + count) of every row.
class Piece {
 public:
  Piece(const Batch& whole, int64_t begin, int64_t count)
      : tokens_(DType::kI32, {whole.shape.batch, count}),
        targets_(DType::kI32, {whole.shape.batch, count}),
        doc_start_(DType::kI32, {whole.shape.batch, count}) {
    const int64_t seq_len = whole.shape.seq_len;
    const auto cut = [&](Tensor to, Tensor from) {
      for (int64_t i = 0; i < to.numel(); ++i) {
        Set(to, i, Get(from, i / count * seq_len + begin + i % count));
      }
    };
    cut(tokens_, whole.tokens);
    cut(targets_, whole.targets);
    value_.shape = {whole.shape.batch, count};
    value_.tokens = tokens_;
    value_.targets = targets_;
    if (whole.documents.doc_start.defined()) {
      cut(doc_start_, whole.documents.doc_start);
      value_.documents.doc_start = doc_start_;
    }
  }
  const Batch& value() const { return value_; }

 private:
  Buf tokens_, targets_, doc_start_;
  Batch value_;
};

// The pieces of sequences of seq_len tokens with what they need: activation sets and a state.
class PieceRun {
 public:
  PieceRun(TinyModel* model, int64_t batch, const std::vector<int64_t>& lengths)
      : model_(model), lengths_(lengths), state_arena_("state", Device::kCpu, 1 << 24) {
    int64_t seq_len = 0;
    for (const int64_t length : lengths) {
      seq_len += length;
      arenas_.push_back(std::make_unique<Arena>("piece", Device::kCpu, 1 << 26));
      sets_.push_back(model->model().NewActivations({batch, length}, arenas_.back().get()));
    }
    // Memory that was used before: a state starts from zeros all the same.
    const Tensor used = state_arena_.Alloc(DType::kF64, {1 << 20});
    Fill(used, std::numeric_limits<double>::quiet_NaN(), model->ctx());
    state_arena_.Release(0);
    state_ =
        model->model().NewSequence(batch, seq_len, /*with_grad=*/true, &state_arena_, model->ctx());
  }

  // A whole step; the state may have been used before.
  void Step(const Batch& whole, const ProbeSink* probe = nullptr) {
    model_->BeginStep(whole);
    model_->weights().BeginPass(model_->ctx(), /*first=*/true, /*last=*/true);
    model_->model().Reset(state_.get(), model_->ctx());
    Forward(whole, probe);
    Backward();
  }

  // Its parts, with the state at its start and BeginStep and BeginPass left to the caller.
  void Forward(const Batch& whole, const ProbeSink* probe = nullptr) {
    Cut(whole);
    int64_t position = 0;
    for (size_t i = 0; i < lengths_.size(); ++i) {
      ForwardPiece(i, probe);
      position += lengths_[i];
      EXPECT_EQ(state_->position(), position);
    }
  }
  void Backward() {
    for (size_t i = lengths_.size(); i-- > 0;) BackwardPiece(i);
    EXPECT_EQ(state_->position(), 0);
  }

  // Piece by piece, those of the batch that was cut last.
  void Cut(const Batch& whole) {
    pieces_.clear();
    int64_t begin = 0;
    for (const int64_t length : lengths_) {
      pieces_.push_back(std::make_unique<Piece>(whole, begin, length));
      begin += length;
    }
  }
  void ForwardPiece(size_t i, const ProbeSink* probe = nullptr) {
    model_->model().Forward(pieces_[i]->value(), model_->loss_scale(), model_->sums(),
                            sets_[i].get(), model_->ctx(), probe, state_.get());
  }
  void BackwardPiece(size_t i) {
    model_->model().Backward(pieces_[i]->value(), /*aux_scale=*/1, sets_[i].get(), model_->ctx(),
                             state_.get());
  }

 private:
  TinyModel* model_;
  std::vector<int64_t> lengths_;
  Arena state_arena_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::vector<std::unique_ptr<ActivationSet>> sets_;
  std::vector<std::unique_ptr<Piece>> pieces_;
  std::unique_ptr<SequenceState> state_;
};

}  // namespace krait::testing

#endif  // KRAIT_TESTS_MODEL_SUPPORT_PIECES_H_
