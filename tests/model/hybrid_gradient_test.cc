// Gradient checks of the whole model in double: all weights, through every kind of sublayer, the
// fused residual additions and norms, the head and the router losses.
#include <algorithm>
#include <limits>
#include <string>

#include "gtest/gtest.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::TestBatch;
using testing::TinyModel;

// The smallest routing margin of a forward pass; infinity without MoE.
double Margin(TinyModel* model, const Batch& batch) {
  double margin = std::numeric_limits<double>::infinity();
  ProbeSink probe;
  probe.on_tensor = [&](const std::string& name, Tensor value) {
    if (name.rfind("router_logits", 0) != 0) return;
    const MoeSpec& moe = model->spec().moe;
    margin =
        std::min(margin, testing::RoutingMargin(testing::Values(value), moe.experts, moe.top_k));
  };
  model->Step(batch, /*backward=*/false, &probe);
  return margin;
}

void Check(const ModelSpec& spec, const TestBatch& batch, Recompute recompute) {
  testing::GradientCheckOptions options;
  options.max_elements = 24;
  // A fifth of the usual step: through several sublayers fifth derivatives reach 1e5 times the
  // gradient, which leaves h^4 * 1e5 / 30 = 5e-12 of truncation, and 1.5 eps |loss| / h = 6e-12 of
  // rounding beside gradients of 1e-2 and more.
  options.step = 2e-4;
  // No choice of an expert may change under finite differences, which move a weight by 4e-4:
  // weights are drawn until the logits of chosen and passed-over experts lie 100 times that apart.
  constexpr double kMargin = 0.04;
  TinyModel model(spec, DType::kF64, recompute);
  double margin = 0;
  for (uint64_t seed = 1; margin < kMargin; ++seed) {
    ASSERT_LE(seed, 100u);
    testing::RandomiseWeights(model.weights(), seed, /*router_scale=*/4);
    margin = Margin(&model, batch);
  }
  model.Step(batch, /*backward=*/true);
  testing::CheckGradients([&] { return model.Step(batch, /*backward=*/false); }, model.Pairs(),
                          options);
}

TEST(HybridGradients, AllKindsWithDocuments) {
  ModelSpec spec = testing::TinySpec("m aE mE", 3);
  spec.moe.aux_loss = 0.1;
  Check(spec, TestBatch(2, 6, spec.vocab_size, 1, {{2, 3}, {5}}), Recompute::kNone);
}

TEST(HybridGradients, PooledPerLayerWithZLossRenormalisedTiedRope) {
  ModelSpec spec = testing::TinySpec("mE aE", 2);
  spec.tie_embeddings = true;
  spec.attention.rope_theta = 50;
  spec.moe.renormalize = true;
  spec.moe.aux_loss = 0.1;
  spec.moe.aux_pool = AuxPool::kLayer;
  spec.moe.z_loss = 0.05;
  Check(spec, TestBatch(2, 5, spec.vocab_size, 2, {{}, {2}}), Recompute::kLayer);
}

// Statistics pooled over one sequence, and over two, of four in a pass.
TEST(HybridGradients, RouterStatisticsOfSequences) {
  for (const int64_t sequences : {1, 2}) {
    ModelSpec spec = testing::TinySpec("mE aE", 2);
    spec.moe.aux_loss = 0.1;
    spec.moe.z_loss = 0.05;
    spec.moe.aux_sequences = sequences;
    spec.moe.aux_pool = sequences == 1 ? AuxPool::kModel : AuxPool::kLayer;
    Check(spec, TestBatch(4, 3, spec.vocab_size, 5), Recompute::kNone);
  }
}

TEST(HybridGradients, ZLossAloneNoInnerNormsWithBiases) {
  ModelSpec spec = testing::TinySpec("mE m", 2);
  spec.moe.aux_loss = 0;
  spec.moe.z_loss = 0.1;
  spec.mamba.inner_norms = false;
  spec.mamba.proj_bias = true;
  spec.mamba.conv_bias = false;
  Check(spec, TestBatch(1, 7, spec.vocab_size, 3), Recompute::kMixers);
}

TEST(HybridGradients, ActivationLoss) {
  for (const Recompute recompute : {Recompute::kNone, Recompute::kMixers, Recompute::kLayer}) {
    ModelSpec spec = testing::TinySpec("m aE mE", 3);
    spec.moe.aux_loss = 0.1;
    spec.activation_loss = 0.3;
    Check(spec, TestBatch(2, 6, spec.vocab_size, 6, {{2, 3}, {5}}), recompute);
  }
}

TEST(HybridGradients, DenseAttentionOnly) {
  Check(testing::TinySpec("a", 2), TestBatch(2, 4, 11, 4), Recompute::kNorms);
}

}  // namespace
}  // namespace krait
