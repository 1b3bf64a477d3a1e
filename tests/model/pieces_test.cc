// Sequences that run in pieces, forward and backward, give what whole ones give.
#include "model/support/pieces.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::PieceRun;
using testing::RelativeError;
using testing::TestBatch;
using testing::TinyModel;
using testing::Values;

constexpr int64_t kBatch = 2, kTokens = 73;  // more than one chunk of kept scan states
using Lengths = std::vector<int64_t>;

// Every kind of sublayer; a convolution that reads across pieces of one token; more query heads
// than key/value heads.
ModelSpec PiecesSpec(const std::string& pattern = "m aE mE") {
  ModelSpec spec = testing::TinySpec(pattern, 3);
  spec.attention = {.heads = 4, .kv_heads = 2, .head_dim = 4, .rope_theta = 0};
  spec.mamba.d_conv = 4;
  spec.moe.aux_loss = 0.1;
  spec.moe.z_loss = 0.05;
  return spec;
}

// Documents that begin at cuts of the pieces below, lie across them, and end within them.
TestBatch DocumentBatch(const ModelSpec& spec, uint64_t seed = 1) {
  return TestBatch(kBatch, kTokens, spec.vocab_size, seed, {{5, 20, 33}, {11, 40}});
}
const std::vector<Lengths> kCuts = {
    {33, 40},                   // row 0 begins a document at the cut, row 1's lies across
    {1, 39, 33},                // row 1 begins one at the second cut
    {3, 1, 1, 15, 20, 1, 32}};  // shorter than the convolution reaches

struct Result {
  double loss = 0;
  PassSums sums;
  std::vector<double> logits;  // [B,T,V]
  std::vector<std::vector<double>> gradients;
};

// Collects logits, which come in chunks of rows of pieces of `lengths`.
class Logits {
 public:
  explicit Logits(int64_t vocab)
      : vocab_(vocab), probe_{[this](const std::string& name, Tensor value) {
          if (name != "logits") return;
          const auto rows = Values(value);
          rows_.insert(rows_.end(), rows.begin(), rows.end());
        }} {}
  Logits(const Logits&) = delete;
  const ProbeSink* probe() const { return &probe_; }
  std::vector<double> InOrder(const Lengths& lengths) const {
    std::vector<double> all(static_cast<size_t>(kBatch * kTokens * vocab_));
    EXPECT_EQ(rows_.size(), all.size());
    auto from = rows_.begin();
    int64_t begin = 0;
    for (const int64_t length : lengths) {
      for (int64_t b = 0; b < kBatch; ++b, from += length * vocab_) {
        std::copy_n(from, length * vocab_, all.begin() + (b * kTokens + begin) * vocab_);
      }
      begin += length;
    }
    return all;
  }

 private:
  int64_t vocab_;
  std::vector<double> rows_;
  ProbeSink probe_;
};

// One step; of its gradients nothing that was there before is left.
Result RunStep(TinyModel* model, const Batch& batch, const Lengths& lengths, PieceRun* pieces) {
  for (const auto& pair : model->Pairs()) {
    Fill(pair.gradient, std::numeric_limits<double>::quiet_NaN(), model->ctx());
  }
  const Logits logits(model->spec().vocab_size);
  Result result;
  if (pieces != nullptr) {
    pieces->Step(batch, logits.probe());
  } else {
    model->Step(batch, /*backward=*/true, logits.probe());
  }
  result.loss = model->Loss(&result.sums);
  result.logits = logits.InOrder(lengths);
  result.gradients = model->Gradients();
  return result;
}

Result RunPieces(const ModelSpec& spec, DType dtype, Recompute mode, const Batch& batch,
                 const Lengths& lengths) {
  TinyModel model(spec, dtype, mode);
  if (dtype == DType::kF32) {
    model.weights().Init(spec, 3, model.ctx());
  } else {
    testing::RandomiseWeights(model.weights(), 11, /*router_scale=*/4);
  }
  if (lengths.size() == 1) return RunStep(&model, batch, lengths, nullptr);
  PieceRun pieces(&model, kBatch, lengths);
  return RunStep(&model, batch, lengths, &pieces);
}

void ExpectEqual(const Result& pieces, const Result& whole, double bound) {
  EXPECT_NEAR(pieces.loss, whole.loss, bound * whole.loss);
  EXPECT_NEAR(pieces.sums.cross_entropy, whole.sums.cross_entropy,
              bound * whole.sums.cross_entropy);
  EXPECT_NEAR(pieces.sums.aux_loss, whole.sums.aux_loss, bound * whole.sums.aux_loss);
  EXPECT_NEAR(pieces.sums.z_loss, whole.sums.z_loss, bound * whole.sums.z_loss);
  EXPECT_EQ(pieces.sums.imbalance, whole.sums.imbalance);
  EXPECT_LE(RelativeError(pieces.logits, whole.logits), bound);
  ASSERT_EQ(pieces.gradients.size(), whole.gradients.size());
  for (size_t p = 0; p < whole.gradients.size(); ++p) {
    EXPECT_LE(RelativeError(pieces.gradients[p], whole.gradients[p]), bound) << "tensor " << p;
  }
}

// In double only rounding is left. In float the bound is the project's and the weights those of a
// fresh model, where a whole step is 1.4e-6 from double at most (pieces are 5e-7 from it); at
// RandomiseWeights' values it is 5e-6 to 3e-5, and pieces are up to 3e-6 from it.
constexpr double kDoubleBound = 1e-12, kFloatBound = 1e-6;

void CheckCuts(const ModelSpec& spec, DType dtype, const Batch& batch, double bound) {
  const Result whole = RunPieces(spec, dtype, Recompute::kNone, batch, {kTokens});
  for (const Lengths& lengths : kCuts) {
    for (const Recompute mode :
         {Recompute::kNone, Recompute::kNorms, Recompute::kMixers, Recompute::kLayer}) {
      SCOPED_TRACE(std::to_string(lengths.size()) + " pieces, recompute mode " +
                   std::to_string(static_cast<int>(mode)));
      ExpectEqual(RunPieces(spec, dtype, mode, batch, lengths), whole, bound);
    }
  }
}

TEST(Pieces, DocumentsAcrossCutsInDouble) {
  const ModelSpec spec = PiecesSpec();
  CheckCuts(spec, DType::kF64, DocumentBatch(spec), kDoubleBound);
}

TEST(Pieces, RopePooledPerLayerTiedInDouble) {
  ModelSpec spec = PiecesSpec();
  spec.attention.rope_theta = 30;
  spec.moe.aux_pool = AuxPool::kLayer;
  spec.moe.renormalize = true;
  spec.tie_embeddings = true;
  spec.mamba.inner_norms = false;
  spec.mamba.proj_bias = true;
  CheckCuts(spec, DType::kF64, DocumentBatch(spec), kDoubleBound);
}

TEST(Pieces, OneDocumentInDouble) {
  ModelSpec spec = PiecesSpec();
  spec.attention.rope_theta = 30;
  CheckCuts(spec, DType::kF64, TestBatch(kBatch, kTokens, spec.vocab_size, 2), kDoubleBound);
}

TEST(Pieces, DocumentsAcrossCutsInFloat) {
  ModelSpec spec = PiecesSpec();
  CheckCuts(spec, DType::kF32, DocumentBatch(spec), kFloatBound);
  spec.attention.rope_theta = 30;
  CheckCuts(spec, DType::kF32, DocumentBatch(spec), kFloatBound);
}

// Steps of one state after Reset: each equals a step of its own.
TEST(Pieces, StepsOfOneState) {
  const ModelSpec spec = PiecesSpec();
  const Lengths lengths = {20, 1, 52};
  TinyModel model(spec, DType::kF64, Recompute::kLayer);
  testing::RandomiseWeights(model.weights(), 11, 4);
  PieceRun pieces(&model, kBatch, lengths);
  for (const uint64_t seed : {1, 2, 3}) {
    const TestBatch batch =
        seed == 2 ? TestBatch(kBatch, kTokens, spec.vocab_size, seed) : DocumentBatch(spec, seed);
    ExpectEqual(RunStep(&model, batch, lengths, &pieces),
                RunPieces(spec, DType::kF64, Recompute::kNone, batch, {kTokens}), kDoubleBound);
  }
}

// What the tests above compare is there: without the state of the first piece, or without the
// gradient that the second leaves in it, values are off by far more than the bounds.
class PiecesWithout : public ::testing::TestWithParam<const char*> {
 protected:
  PiecesWithout() : spec_(PiecesSpec(GetParam())), batch_(kBatch, kTokens, spec_.vocab_size, 3) {
    spec_.moe.aux_loss = spec_.moe.z_loss = 0;
  }
  void Begin(TinyModel* model) {
    testing::RandomiseWeights(model->weights(), 11, 4);
    model->BeginStep(batch_);
    model->weights().BeginPass(model->ctx(), /*first=*/true, /*last=*/true);
  }
  // The largest error of a gradient, relative to its tensor; the head's aside, which forwards add
  // to.
  double Worst(const TinyModel& model, const Result& whole) {
    const auto gradients = model.Gradients();
    double worst = 0;
    for (size_t p = 0; p < gradients.size(); ++p) {
      if (model.table().params()[p].name == "lm_head.weight") continue;
      worst = std::max(worst, RelativeError(gradients[p], whole.gradients[p]));
    }
    return worst;
  }
  const Lengths lengths_ = {33, 40};
  ModelSpec spec_;
  TestBatch batch_;
};

TEST_P(PiecesWithout, StateOrItsGradient) {
  const Result whole = RunPieces(spec_, DType::kF64, Recompute::kNone, batch_, {kTokens});
  TinyModel model(spec_, DType::kF64);
  PieceRun pieces(&model, kBatch, lengths_), other(&model, kBatch, lengths_);

  // The second piece behind a first one of other tokens.
  Begin(&model);
  other.Cut(TestBatch(kBatch, kTokens, spec_.vocab_size, 4));
  other.ForwardPiece(0);
  other.Cut(batch_);
  model.BeginStep(batch_);
  pieces.Cut(batch_);
  pieces.ForwardPiece(0);
  other.ForwardPiece(1);
  EXPECT_GT(std::abs(model.Loss() - whole.loss), 1e-4);

  // The backward of the first piece with a state that no later piece has left a gradient in.
  PieceRun fresh(&model, kBatch, lengths_), first(&model, kBatch, lengths_);
  Begin(&model);
  fresh.Forward(batch_);
  fresh.BackwardPiece(1);
  first.Cut(batch_);
  first.ForwardPiece(0);
  model.BeginStep(batch_);
  first.BackwardPiece(0);
  EXPECT_GT(Worst(model, whole), 1e-3);

  // And with its own.
  PieceRun right(&model, kBatch, lengths_);
  Begin(&model);
  right.Forward(batch_);
  right.Backward();
  EXPECT_LE(Worst(model, whole), kDoubleBound);
}

INSTANTIATE_TEST_SUITE_P(Mixers, PiecesWithout, ::testing::Values("m", "a"), [](const auto& test) {
  return std::string(test.param) == "m" ? "Mamba" : "Attention";
});

}  // namespace
}  // namespace krait
