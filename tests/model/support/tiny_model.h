// A small model with its memory, for tests: weights, gradients, one batch, activations.
#ifndef KRAIT_TESTS_MODEL_SUPPORT_TINY_MODEL_H_
#define KRAIT_TESTS_MODEL_SUPPORT_TINY_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/random.h"
#include "model/hybrid_model.h"
#include "model/params.h"
#include "model/weights.h"
#include "support/gradcheck.h"

namespace krait::testing {

// D 8, two attention heads of 4 over one key/value head, N 3, K 3, R 2, F 6, three experts.
inline ModelSpec TinySpec(const std::string& pattern, int64_t n_layers) {
  ModelSpec spec;
  spec.vocab_size = 11;
  spec.d_model = 8;
  spec.n_layers = n_layers;
  spec.attention = {.heads = 2, .kv_heads = 1, .head_dim = 4, .rope_theta = 0};
  spec.mamba.d_state = 3;
  spec.mamba.d_conv = 3;
  spec.mamba.d_inner = 16;
  spec.mamba.dt_rank = 2;
  spec.mlp_d_ff = 6;
  spec.moe.experts = 3;
  spec.moe.d_ff = 6;
  const auto layers = ParsePattern(pattern, n_layers);
  KRAIT_CHECK(layers.ok());
  spec.sublayers = MakeSublayers(*layers);
  return spec;
}

// Values at which no term of a gradient is small: matrices N(0, 1/sqrt(fan-in)), norm weights and D
// around 1, biases away from 0, A_log spread over decades, and a router whose choices are clear.
inline void RandomiseWeights(const Weights& weights, uint64_t seed, double router_scale) {
  const ParamTable& table = weights.table();
  for (size_t p = 0; p < table.params().size(); ++p) {
    const Param& param = table.params()[p];
    const RandomStream stream(seed, RandomPurpose::kSynthetic, HashName(param.name));
    const Tensor values = weights.Param(static_cast<int>(p));
    const auto ends_with = [&](const std::string& suffix) {
      return param.name.size() >= suffix.size() &&
             param.name.compare(param.name.size() - suffix.size(), suffix.size(), suffix) == 0;
    };
    double mean = 0;
    double std = 0.3;
    if (ends_with("norm.weight") || ends_with(".D")) {
      mean = 1;
    } else if (ends_with("router.weight")) {
      std = router_scale / std::sqrt(static_cast<double>(param.shape.back()));
    } else if (ends_with("embed_tokens.weight")) {
      std = 1;
    } else if (param.shape.size() > 1 && !ends_with("A_log")) {
      std = 1 / std::sqrt(static_cast<double>(param.shape.back()));
    }
    for (int64_t i = 0; i < values.numel(); ++i) {
      Set(values, i, mean + std * stream.Normal(static_cast<uint64_t>(i)));
    }
  }
}

// Tokens, targets shifted inside the sequence, and document starts [b] = positions > 0.
class TestBatch {
 public:
  TestBatch(int64_t batch, int64_t seq_len, int64_t vocab, uint64_t seed,
            const std::vector<std::vector<int>>& documents = {})
      : tokens_(DType::kI32, {batch, seq_len}),
        targets_(DType::kI32, {batch, seq_len}),
        doc_start_(DType::kI32, {batch, seq_len}) {
    tokens_.FillIntegers(seed, 0, vocab);
    for (int64_t b = 0; b < batch; ++b) {
      int64_t start = 0;
      for (int64_t t = 0; t < seq_len; ++t) {
        const int64_t i = b * seq_len + t;
        bool next_starts = t + 1 == seq_len;
        if (!documents.empty()) {
          for (const int at : documents[static_cast<size_t>(b)]) {
            if (at == t) start = t;
            if (at == t + 1) next_starts = true;
          }
        }
        Set(doc_start_, i, static_cast<double>(start));
        Set(targets_, i, next_starts ? -1 : Get(tokens_, i + 1));
      }
    }
    value_.shape = {batch, seq_len};
    value_.tokens = tokens_;
    value_.targets = targets_;
    if (!documents.empty()) value_.documents.doc_start = doc_start_;
  }
  const Batch& value() const { return value_; }
  operator const Batch&() const { return value_; }  // NOLINT

 private:
  Buf tokens_, targets_, doc_start_;
  Batch value_;
};

class TinyModel {
 public:
  explicit TinyModel(const ModelSpec& spec, DType dtype, Recompute recompute = Recompute::kNone,
                     SublayerRange range = {})
      : spec_(spec),
        table_(spec),
        weight_arena_("weights", Device::kCpu, int64_t{64} << 20),
        grad_arena_("gradients", Device::kCpu, int64_t{64} << 20),
        activation_arena_("activations", Device::kCpu, kActivationBytes),
        weights_(&table_, {.device = Device::kCpu, .compute = dtype}, true, &weight_arena_,
                 &grad_arena_),
        model_(spec_, &weights_, recompute, range),
        loss_scale_(DType::kF64, {1}),
        sums_(DType::kF64, {model_.SumsSize()}) {}

  // Loss (as HybridModel's comment defines it) and, with `backward`, fresh gradients.
  double Step(const Batch& batch, bool backward, const ProbeSink* probe = nullptr,
              PassSums* sums_out = nullptr) {
    BeginStep(batch);
    weights_.BeginPass(ctx_, /*first=*/true, /*last=*/true);
    Pass(batch, /*passes=*/1, backward, probe);
    return Loss(sums_out);
  }

  // The parts of a step, for tests that take it apart: sums zeroed and the loss scale set for the
  // targets of `batch`; one pass of `passes`; the loss of what was added up.
  void BeginStep(const Batch& batch) {
    int64_t targets = 0;
    pass_tokens_ = batch.shape.tokens();
    for (int64_t i = 0; i < batch.targets.numel(); ++i) targets += Get(batch.targets, i) >= 0;
    Set(loss_scale_, 0, 1 / static_cast<double>(targets));
    sums_.Fill(0);
  }
  void Pass(const Batch& batch, int passes, bool backward, const ProbeSink* probe = nullptr) {
    if (activations_ == nullptr) {
      activations_ = model_.NewActivations(batch.shape, &activation_arena_);
    }
    model_.Forward(batch, loss_scale_, sums_, activations_.get(), ctx_, probe);
    if (backward) model_.Backward(batch, 1.0 / passes, activations_.get(), ctx_);
  }
  double Loss(PassSums* sums_out = nullptr, int passes = 1) const {
    const PassSums sums = PassSumsOf(Values(sums_));
    if (sums_out != nullptr) *sums_out = sums;
    const double activation =
        sums.squares / static_cast<double>(pass_tokens_ * spec_.d_model);  // of every pass
    return sums.cross_entropy * Get(loss_scale_, 0) +
           (spec_.moe.aux_loss * sums.aux_loss + spec_.moe.z_loss * sums.z_loss +
            spec_.activation_loss * activation) /
               passes;
  }

  // The losses of Evaluate.
  PassSums Evaluate(const Batch& batch) {
    sums_.Fill(0);
    model_.Evaluate(batch, sums_, ctx_);
    return PassSumsOf(Values(sums_));
  }

  // One (value, gradient) per published tensor.
  std::vector<GradientPair> Pairs() const {
    std::vector<GradientPair> pairs;
    for (size_t p = 0; p < table_.params().size(); ++p) {
      const int i = static_cast<int>(p);
      pairs.push_back({table_.params()[p].name, weights_.Param(i), weights_.ParamGrad(i)});
    }
    return pairs;
  }
  std::vector<std::vector<double>> Gradients() const {
    std::vector<std::vector<double>> all;
    for (const GradientPair& pair : Pairs()) all.push_back(Values(pair.gradient));
    return all;
  }

  const ModelSpec& spec() const { return spec_; }
  const ParamTable& table() const { return table_; }
  Weights& weights() { return weights_; }
  HybridModel& model() { return model_; }
  TestContext& ctx() { return ctx_; }
  Arena* activation_arena() { return &activation_arena_; }
  Tensor loss_scale() { return loss_scale_; }
  Tensor sums() { return sums_; }

 private:
  static constexpr int64_t kActivationBytes = int64_t{256} << 20;

  int64_t pass_tokens_ = 1;
  ModelSpec spec_;
  ParamTable table_;
  Arena weight_arena_, grad_arena_, activation_arena_;
  TestContext ctx_;
  Weights weights_;
  HybridModel model_;
  Buf loss_scale_, sums_;
  std::unique_ptr<ActivationSet> activations_;
};

// The smallest distance between a chosen and a passed-over router logit: a finite difference must
// not cross it.
inline double RoutingMargin(const std::vector<double>& logits, int64_t experts, int64_t top_k) {
  double margin = std::numeric_limits<double>::infinity();
  for (size_t row = 0; row < logits.size(); row += static_cast<size_t>(experts)) {
    std::vector<double> sorted(logits.begin() + static_cast<int64_t>(row),
                               logits.begin() + static_cast<int64_t>(row) + experts);
    std::sort(sorted.rbegin(), sorted.rend());
    margin = std::min(margin, sorted[static_cast<size_t>(top_k) - 1] - sorted[top_k]);
  }
  return margin;
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_MODEL_SUPPORT_TINY_MODEL_H_
