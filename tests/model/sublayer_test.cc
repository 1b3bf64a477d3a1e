// Gradient checks of every kind of sublayer on its own, in double: its input and all its weights.
#include "model/sublayer.h"

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::GradientPair;
using testing::Set;
using testing::TestContext;

// The sublayer at `index` of the spec, with random weights and input, and a loss of random
// cotangents: y . c, plus for MoE sum_t p_t . a and a z-loss.
class SublayerCheck {
 public:
  SublayerCheck(const ModelSpec& spec, int index, PassShape shape, bool documents)
      : spec_(spec),
        table_(spec),
        weight_arena_("weights", Device::kCpu, 1 << 24),
        grad_arena_("gradients", Device::kCpu, 1 << 24),
        keep_("activations", Device::kCpu, 1 << 24),
        weights_(&table_, {.device = Device::kCpu, .compute = DType::kF64}, true, &weight_arena_,
                 &grad_arena_),
        module_(MakeSublayer(spec, LocalSizesOf(spec, Mesh()), table_, index, 0)),
        saved_(module_->NewSaved()),
        index_(index),
        x_(DType::kF64, {shape.tokens(), spec.d_model}),
        y_(DType::kF64, {shape.tokens(), spec.d_model}),
        dx_(DType::kF64, {shape.tokens(), spec.d_model}),
        cotangent_(DType::kF64, {shape.tokens(), spec.d_model}),
        doc_start_(DType::kI32, {shape.batch, shape.seq_len}),
        prob_sum_(DType::kF64, {1, spec.moe.experts}),
        d_prob_(DType::kF64, {1, spec.moe.experts}),
        choice_count_(DType::kI64, {1, spec.moe.experts}),
        z_sum_(DType::kF64, {1}) {
    testing::RandomiseWeights(weights_, 3, /*router_scale=*/3);
    x_.FillNormal(5);
    cotangent_.FillNormal(6);
    d_prob_.FillNormal(7);
    if (documents) {  // a document start in the middle of every sequence, at different places
      for (int64_t b = 0; b < shape.batch; ++b) {
        for (int64_t t = 0; t < shape.seq_len; ++t) {
          const int64_t start = 2 + b;
          Set(doc_start_, b * shape.seq_len + t, static_cast<double>(t >= start ? start : 0));
        }
      }
      pass_.documents.doc_start = doc_start_;
    }
    router_.prob_sum = prob_sum_;
    router_.choice_count = choice_count_;
    router_.z_sum = z_sum_;
    router_.d_prob = d_prob_;
    router_.z_scale = 0.01;
    pass_.shape = shape;
    pass_.router = &router_;
    pass_.router_logits = &router_logits_;
    pass_.ctx = ctx_.get();
  }

  double Loss() {
    prob_sum_.Fill(0);
    choice_count_.Fill(0);
    z_sum_.Fill(0);
    keep_.Release(0);
    module_->Forward(y_, x_, weights_, &keep_, saved_.get(), /*state=*/nullptr, pass_);
    double loss = testing::Dot(y_, cotangent_);
    if (router_logits_.defined()) {
      loss += testing::Dot(prob_sum_, d_prob_) + router_.z_scale * Get(z_sum_, 0);
    }
    return loss;
  }

  void Run(bool keep_norms = true) {
    pass_.keep_norms = keep_norms;
    weights_.BeginPass(ctx_, /*first=*/true, /*last=*/true);
    Loss();
    if (router_logits_.defined()) {
      // Perturbing a weight by 2e-3 moves a logit by less than 2e-3 * |x| < 0.02.
      ASSERT_GT(testing::RoutingMargin(testing::Values(router_logits_), spec_.moe.experts,
                                       spec_.moe.top_k),
                0.025);
    }
    module_->Backward(dx_, cotangent_, x_, weights_, saved_.get(), /*state=*/nullptr, pass_);
    std::vector<GradientPair> pairs = {{"x", x_, dx_}};
    for (size_t p = 0; p < table_.params().size(); ++p) {
      const Param& param = table_.params()[p];
      const Storage& storage = table_.storages()[static_cast<size_t>(param.storage)];
      const bool residual_norm = param.name.find("input_layernorm") != std::string::npos ||
                                 param.name.find("pre_ff_layernorm") != std::string::npos;
      if (storage.sublayer != index_ || residual_norm) continue;
      pairs.push_back({param.name, weights_.Param(static_cast<int>(p)),
                       weights_.ParamGrad(static_cast<int>(p))});
    }
    EXPECT_GT(pairs.size(), 2u);
    testing::CheckGradients([this] { return Loss(); }, pairs);
  }

 private:
  ModelSpec spec_;
  ParamTable table_;
  Arena weight_arena_, grad_arena_, keep_;
  TestContext ctx_;
  Weights weights_;
  std::unique_ptr<SublayerModule> module_;
  std::unique_ptr<Saved> saved_;
  int index_;
  Buf x_, y_, dx_, cotangent_, doc_start_, prob_sum_, d_prob_, choice_count_, z_sum_;
  RouterStats router_;
  Tensor router_logits_;
  PassContext pass_;
};

constexpr PassShape kShape{2, 5};

TEST(AttentionSublayer, Gradients) {
  SublayerCheck(testing::TinySpec("a", 1), 0, kShape, false).Run();
}

TEST(AttentionSublayer, GradientsWithDocumentsAndRope) {
  ModelSpec spec = testing::TinySpec("a", 1);
  spec.attention.rope_theta = 100;
  SublayerCheck(spec, 0, kShape, true).Run();
}

TEST(AttentionSublayer, GradientsWithFreeHeadDim) {
  ModelSpec spec = testing::TinySpec("a", 1);
  spec.attention = {.heads = 4, .kv_heads = 2, .head_dim = 6, .rope_theta = 0};
  SublayerCheck(spec, 0, kShape, true).Run();
}

TEST(MambaSublayer, Gradients) { SublayerCheck(testing::TinySpec("m", 1), 0, kShape, false).Run(); }

TEST(MambaSublayer, GradientsWithDocumentsAndRecomputedNorms) {
  SublayerCheck(testing::TinySpec("m", 1), 0, kShape, true).Run(/*keep_norms=*/false);
}

TEST(MambaSublayer, GradientsWithProjectionBiasAndNoInnerNorms) {
  ModelSpec spec = testing::TinySpec("m", 1);
  spec.mamba.proj_bias = true;
  spec.mamba.inner_norms = false;
  SublayerCheck(spec, 0, kShape, true).Run();
}

TEST(MambaSublayer, GradientsWithoutConvBias) {
  ModelSpec spec = testing::TinySpec("m", 1);
  spec.mamba.conv_bias = false;
  SublayerCheck(spec, 0, kShape, false).Run();
}

// Longer than a chunk of kept scan states.
TEST(MambaSublayer, GradientsOverChunks) {
  SublayerCheck(testing::TinySpec("m", 1), 0, {1, 70}, true).Run();
}

TEST(MlpSublayer, Gradients) { SublayerCheck(testing::TinySpec("m", 1), 1, kShape, false).Run(); }

TEST(MoeSublayer, Gradients) { SublayerCheck(testing::TinySpec("mE", 1), 1, kShape, false).Run(); }

TEST(MoeSublayer, GradientsRenormalised) {
  ModelSpec spec = testing::TinySpec("mE", 1);
  spec.moe.renormalize = true;
  SublayerCheck(spec, 1, kShape, false).Run();
}

TEST(MoeSublayer, GradientsTopOneWithIdleExperts) {
  ModelSpec spec = testing::TinySpec("mE", 1);
  spec.moe.top_k = 1;
  spec.moe.experts = 12;  // more experts than tokens: some have no rows
  SublayerCheck(spec, 1, kShape, false).Run();
}

}  // namespace
}  // namespace krait
