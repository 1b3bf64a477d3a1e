// Models over ranges of the sublayers, one after the other, are the whole model, bit for bit.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::Buf;
using testing::TestBatch;
using testing::TinyModel;

constexpr int64_t kBatch = 2, kTokens = 19;

// Sublayers 0..7: Mamba, MLP, attention, MoE, Mamba, MoE, Mamba, MLP.
ModelSpec RangesSpec() {
  ModelSpec spec = testing::TinySpec("m aE mE m", 4);
  spec.attention.rope_theta = 30;
  spec.moe.aux_loss = 0;
  return spec;
}

struct Result {
  double cross_entropy = 0, aux_loss = 0, z_loss = 0;
  std::vector<std::vector<double>> gradients;
};

// A step of models over [0, cuts[0]), [cuts[0], cuts[1]), ..., each with weights of its own. The
// gradient of a tensor comes from the one range that reports it.
Result RunRanges(const ModelSpec& spec, Recompute mode, const Batch& batch,
                 std::vector<size_t> cuts) {
  cuts.push_back(spec.sublayers.size());
  std::vector<std::unique_ptr<TinyModel>> models;
  std::vector<Batch> batches;
  std::vector<Buf> streams;  // h, d_h of each cut
  streams.reserve(2 * cuts.size());
  size_t begin = 0;
  for (const size_t end : cuts) {
    models.push_back(std::make_unique<TinyModel>(spec, DType::kF32, mode,
                                                 SublayerRange{.begin = begin, .end = end}));
    testing::RandomiseWeights(models.back()->weights(), 11, /*router_scale=*/4);
    batches.push_back(batch);
    if (begin > 0) {
      batches.back().h_in = streams[streams.size() - 2];
      batches.back().d_h_in = streams[streams.size() - 1];
    }
    if (end < spec.sublayers.size()) {
      for (int i = 0; i < 2; ++i) {
        streams.emplace_back(DType::kF32,
                             std::initializer_list<int64_t>{kBatch * kTokens, spec.d_model});
      }
      batches.back().h_out = streams[streams.size() - 2];
      batches.back().d_h_out = streams[streams.size() - 1];
    }
    begin = end;
  }

  Result result;
  std::vector<std::unique_ptr<ActivationSet>> sets;
  for (size_t i = 0; i < models.size(); ++i) {
    TinyModel& model = *models[i];
    sets.push_back(model.model().NewActivations(batch.shape, model.activation_arena()));
    model.BeginStep(batch);
    model.weights().BeginPass(model.ctx(), /*first=*/true, /*last=*/true);
    model.model().Forward(batches[i], model.loss_scale(), model.sums(), sets[i].get(), model.ctx());
    PassSums sums;
    model.Loss(&sums);
    result.cross_entropy += sums.cross_entropy;
    result.aux_loss += sums.aux_loss;
    result.z_loss += sums.z_loss;
  }
  for (size_t i = models.size(); i-- > 0;) {
    TinyModel& model = *models[i];
    model.model().Backward(batches[i], /*aux_scale=*/1, sets[i].get(), model.ctx());
  }
  const ParamTable& table = models[0]->table();
  for (const Param& param : table.params()) {
    const int sublayer = table.storages()[static_cast<size_t>(param.storage)].sublayer;
    size_t owner = param.name == "model.embed_tokens.weight" ? 0 : models.size() - 1;
    for (size_t i = cuts.size(); sublayer >= 0 && i-- > 0;) {
      if (static_cast<size_t>(sublayer) < cuts[i]) owner = i;
    }
    const int p = table.Find(param.name);
    result.gradients.push_back(testing::Values(models[owner]->weights().ParamGrad(p)));
  }
  return result;
}

void ExpectSameBits(const Result& a, const Result& b) {
  EXPECT_EQ(a.cross_entropy, b.cross_entropy);
  ASSERT_EQ(a.gradients.size(), b.gradients.size());
  for (size_t p = 0; p < a.gradients.size(); ++p) {
    EXPECT_EQ(a.gradients[p], b.gradients[p]) << "tensor " << p;
  }
}

TEST(Ranges, TwoAndThreeAreTheWhole) {
  const ModelSpec spec = RangesSpec();
  const TestBatch batch(kBatch, kTokens, spec.vocab_size, 1, {{7}, {3, 12}});
  const Result whole = RunRanges(spec, Recompute::kNone, batch, {});
  // At layers and within them; ranges of one sublayer.
  const std::vector<std::vector<size_t>> all_cuts = {{4}, {3}, {1}, {7}, {2, 6}, {3, 4}, {1, 5}};
  for (const std::vector<size_t>& cuts : all_cuts) {
    for (const Recompute mode : {Recompute::kNone, Recompute::kMixers, Recompute::kLayer}) {
      SCOPED_TRACE(::testing::PrintToString(cuts) + " mode " +
                   std::to_string(static_cast<int>(mode)));
      ExpectSameBits(RunRanges(spec, mode, batch, cuts), whole);
    }
  }
}

// Auxiliary losses are pooled over a range's own MoE sublayers: with all of them in one range they
// are the whole model's.
TEST(Ranges, AuxiliaryLossesOfOneRange) {
  ModelSpec spec = RangesSpec();
  spec.moe.aux_loss = 0.1;
  spec.moe.z_loss = 0.05;
  const TestBatch batch(kBatch, kTokens, spec.vocab_size, 1, {{7}, {3, 12}});
  const Result whole = RunRanges(spec, Recompute::kNone, batch, {});
  EXPECT_GT(whole.aux_loss, 0);
  for (const std::vector<size_t>& cuts : {std::vector<size_t>{2, 6}, {6}}) {
    const Result ranges = RunRanges(spec, Recompute::kLayer, batch, cuts);
    ExpectSameBits(ranges, whole);
    EXPECT_EQ(ranges.aux_loss, whole.aux_loss);
    EXPECT_EQ(ranges.z_loss, whole.z_loss);
  }
}

// The single-model path through the same code is TinyModel's own step.
TEST(Ranges, OneRangeIsTheStep) {
  const ModelSpec spec = RangesSpec();
  const TestBatch batch(kBatch, kTokens, spec.vocab_size, 1, {{7}, {3, 12}});
  TinyModel model(spec, DType::kF32);
  testing::RandomiseWeights(model.weights(), 11, 4);
  PassSums sums;
  model.Step(batch, /*backward=*/true, nullptr, &sums);
  const Result whole = RunRanges(spec, Recompute::kNone, batch, {});
  EXPECT_EQ(sums.cross_entropy, whole.cross_entropy);
  EXPECT_EQ(model.Gradients(), whole.gradients);
}

}  // namespace
}  // namespace krait
