#include "model/hybrid_model.h"

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/activation.h"
#include "model/names.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::Buf;
using testing::Get;
using testing::RelativeError;
using testing::Set;
using testing::TestBatch;
using testing::TestContext;
using testing::TinyModel;
using testing::Values;

// Every kind of sublayer, one feed-forward of each.
ModelSpec MixedSpec() {
  ModelSpec spec = testing::TinySpec("m aE mE", 3);
  spec.moe.aux_loss = 0.1;
  spec.moe.z_loss = 0.05;
  return spec;
}

ModelSpec WiderSpec(const std::string& pattern) {
  ModelSpec spec = testing::TinySpec(pattern, 4);
  spec.d_model = 32;
  spec.vocab_size = 61;
  spec.attention = {.heads = 4, .kv_heads = 2, .head_dim = 8, .rope_theta = 0};
  spec.mamba.d_inner = 64;
  spec.mamba.d_state = 16;
  spec.mamba.d_conv = 4;
  spec.mlp_d_ff = 40;
  spec.moe.d_ff = 40;
  spec.moe.experts = 4;
  return spec;
}

struct Result {
  double loss;
  PassSums sums;
  std::vector<std::vector<double>> gradients;
};

Result RunOnce(const ModelSpec& spec, DType dtype, Recompute recompute, const Batch& batch,
               int64_t* activation_bytes = nullptr) {
  TinyModel model(spec, dtype, recompute);
  testing::RandomiseWeights(model.weights(), 11, 2);
  Result result;
  result.loss = model.Step(batch, true, nullptr, &result.sums);
  result.gradients = model.Gradients();
  if (activation_bytes != nullptr) *activation_bytes = model.activation_arena()->high_water();
  return result;
}

void ExpectSameBits(const Result& a, const Result& b) {
  EXPECT_EQ(a.loss, b.loss);
  ASSERT_EQ(a.gradients.size(), b.gradients.size());
  for (size_t p = 0; p < a.gradients.size(); ++p) {
    EXPECT_EQ(a.gradients[p], b.gradients[p]) << "tensor " << p;
  }
}

TEST(HybridModel, RecomputeModesGiveTheSameBits) {
  // Long enough for several scan chunks; widths that are no multiples of a vector.
  const TestBatch batch(1, 130, 61, 1, {{40, 64}});
  for (const bool inner_norms : {true, false}) {
    ModelSpec spec = WiderSpec("m aE mE");
    spec.moe.z_loss = 0.01;
    spec.mamba.inner_norms = inner_norms;
    int64_t none_bytes = 0;
    const Result none = RunOnce(spec, DType::kF32, Recompute::kNone, batch, &none_bytes);
    for (const Recompute mode : {Recompute::kNorms, Recompute::kMixers, Recompute::kLayer}) {
      SCOPED_TRACE(static_cast<int>(mode));
      int64_t bytes = 0;
      const Result other = RunOnce(spec, DType::kF32, mode, batch, &bytes);
      ExpectSameBits(none, other);
      EXPECT_LT(bytes, none_bytes);
    }
  }
}

// Attention costs most to compute again, and its output is small.
TEST(HybridModel, AttentionIsNotRecomputed) {
  const TestBatch batch(1, 30, 61, 1);
  for (const Recompute mode : {Recompute::kNone, Recompute::kMixers, Recompute::kLayer}) {
    TinyModel model(WiderSpec("m aE mE"), DType::kF32, mode);
    testing::RandomiseWeights(model.weights(), 11, 2);
    Profile profile;
    model.ctx().get()->profile = &profile;
    model.Step(batch, /*backward=*/true);
    EXPECT_EQ(profile.ops().at("AttentionForward").calls, 1) << static_cast<int>(mode);
  }
}

Result RunWithThreads(int threads, const ModelSpec& spec, const Batch& batch) {
  Result result;
  testing::WithThreads(threads,
                       [&] { result = RunOnce(spec, DType::kF32, Recompute::kNone, batch); });
  return result;
}

// Matrix products too small for CBLAS to spread over threads (2^18 multiplications): what is left
// are Krait's own loops, whose bits do not depend on threads.
TEST(HybridModel, SameBitsWithOneAndTwoThreads) {
  const TestBatch batch(2, 30, 61, 1, {{10}, {8, 17}});
  const ModelSpec spec = WiderSpec("m aE mE");
  ExpectSameBits(RunWithThreads(1, spec, batch), RunWithThreads(2, spec, batch));
}

// Larger products: the same bits again with the same threads, equal up to the order of sums with
// others (kernels/gemm.h). Bounds as for golden values: ten times the distance of fp32 from double.
TEST(HybridModel, SameBitsAgainWithTheSameThreads) {
  const TestBatch batch(2, 300, 61, 1, {{40}, {64, 100}});
  const ModelSpec spec = WiderSpec("m aE mE");
  const Result two = RunWithThreads(2, spec, batch);
  ExpectSameBits(two, RunWithThreads(2, spec, batch));
  const Result one = RunWithThreads(1, spec, batch);
  EXPECT_NEAR(one.loss, two.loss, 2e-6 * one.loss);
  for (size_t p = 0; p < one.gradients.size(); ++p) {
    EXPECT_LE(RelativeError(one.gradients[p], two.gradients[p]), 2e-5) << "tensor " << p;
  }
}

// A step is a function of weights and batch: what an earlier, larger pass left behind in the arenas
// does not matter.
TEST(HybridModel, StepsDoNotDependOnWhatWasBefore) {
  const TestBatch large(3, 20, 11, 1);
  const TestBatch small(2, 9, 11, 2, {{4}, {}});
  TinyModel model(MixedSpec(), DType::kF32, Recompute::kLayer);
  testing::RandomiseWeights(model.weights(), 11, 2);
  model.Step(large, true);
  const double loss = model.Step(small, true);
  const auto gradients = model.Gradients();
  const Result fresh = RunOnce(MixedSpec(), DType::kF32, Recompute::kLayer, small);
  EXPECT_EQ(loss, fresh.loss);
  EXPECT_EQ(gradients, fresh.gradients);
}

// Two documents in one row equal the same two documents in rows of their own (issue bound 1e-6;
// here in double, where only rounding is left). The router losses are pooled over tokens, so both
// layouts must hold the same tokens.
TEST(HybridModel, PackedDocumentsEqualSeparateOnes) {
  ModelSpec spec = MixedSpec();
  spec.attention.rope_theta = 30;
  constexpr int64_t kFirst = 7, kSecond = 7;
  const TestBatch packed(1, kFirst + kSecond, spec.vocab_size, 5, {{kFirst}});
  TestBatch separate(2, kFirst, spec.vocab_size, 5);
  for (int64_t i = 0; i < kFirst + kSecond; ++i) {  // same seed, same order
    ASSERT_EQ(Get(packed.value().tokens, i), Get(separate.value().tokens, i));
    ASSERT_EQ(Get(packed.value().targets, i), Get(separate.value().targets, i));
  }
  const Result a = RunOnce(spec, DType::kF64, Recompute::kNone, packed);
  const Result b = RunOnce(spec, DType::kF64, Recompute::kNone, separate);
  EXPECT_NEAR(a.loss, b.loss, 1e-13);
  for (size_t p = 0; p < a.gradients.size(); ++p) {
    EXPECT_LE(RelativeError(a.gradients[p], b.gradients[p]), 1e-12) << "tensor " << p;
  }
  // And documents do matter.
  const TestBatch joined(1, kFirst + kSecond, spec.vocab_size, 5);
  EXPECT_GT(std::abs(RunOnce(spec, DType::kF64, Recompute::kNone, joined).loss - a.loss), 1e-3);
}

// A token stream decoded in pieces (a prompt, then single tokens) gives the logits of one pass over
// all of it.
TEST(HybridModel, DecodingEqualsOnePass) {
  ModelSpec spec = MixedSpec();
  spec.attention.rope_theta = 30;
  constexpr int64_t kBatch = 2, kTokens = 12;
  const TestBatch batch(kBatch, kTokens, spec.vocab_size, 6);
  TinyModel model(spec, DType::kF64);
  testing::RandomiseWeights(model.weights(), 11, 2);
  std::vector<double> full;  // [B,T,V]
  ProbeSink probe;
  probe.on_tensor = [&](const std::string& name, Tensor value) {
    if (name != "logits") return;
    const auto rows = Values(value);
    full.insert(full.end(), rows.begin(), rows.end());
  };
  model.Step(batch, false, &probe);
  ASSERT_EQ(static_cast<int64_t>(full.size()), kBatch * kTokens * spec.vocab_size);

  for (const std::vector<int64_t>& pieces :
       {std::vector<int64_t>{12}, {5, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 4, 4}}) {
    Arena arena("decoding", Device::kCpu, 1 << 24);
    // Memory that was used before: a state starts from zeros all the same.
    Fill(arena.Alloc(DType::kF64, {1 << 18}), 123, model.ctx());
    arena.Release(0);
    auto state =
        model.model().NewSequence(kBatch, kTokens, /*with_grad=*/false, &arena, model.ctx());
    int64_t begin = 0;
    for (const int64_t t : pieces) {
      Buf tokens(DType::kI32, {kBatch, t});
      for (int64_t b = 0; b < kBatch; ++b) {
        for (int64_t i = 0; i < t; ++i) {
          Set(tokens, b * t + i, Get(batch.value().tokens, b * kTokens + begin + i));
        }
      }
      Buf logits(DType::kF64, {kBatch, spec.vocab_size});
      model.model().Decode(logits, tokens, state.get(), model.ctx());
      begin += t;
      EXPECT_EQ(state->position(), begin);
      std::vector<double> want;
      for (int64_t b = 0; b < kBatch; ++b) {
        const auto row = full.begin() + (b * kTokens + begin - 1) * spec.vocab_size;
        want.insert(want.end(), row, row + spec.vocab_size);
      }
      // Rounding of double through six sublayers.
      EXPECT_LE(RelativeError(Values(logits), want), 1e-12) << "after " << begin << " tokens";
    }
  }
}

TEST(HybridModel, EvaluateGivesTheLossesOfForward) {
  const TestBatch batch(2, 9, 11, 2, {{4}, {}});
  TinyModel model(MixedSpec(), DType::kF32);
  testing::RandomiseWeights(model.weights(), 11, 2);
  PassSums forward;
  model.Step(batch, true, nullptr, &forward);
  const PassSums evaluated = model.Evaluate(batch);
  EXPECT_EQ(evaluated.cross_entropy, forward.cross_entropy);
  EXPECT_EQ(evaluated.aux_loss, forward.aux_loss);
  EXPECT_EQ(evaluated.z_loss, forward.z_loss);
  EXPECT_EQ(evaluated.imbalance, forward.imbalance);
}

// The losses against their formulas, from the probed logits.
TEST(HybridModel, LossesFollowTheirFormulas) {
  for (const AuxPool pool : {AuxPool::kModel, AuxPool::kLayer}) {
    ModelSpec spec = MixedSpec();
    spec.moe.aux_pool = pool;
    const int64_t experts = spec.moe.experts;
    const TestBatch batch(2, 9, spec.vocab_size, 2);
    TinyModel model(spec, DType::kF64);
    testing::RandomiseWeights(model.weights(), 11, 2);
    std::map<std::string, std::vector<double>> seen;
    ProbeSink probe;
    probe.on_tensor = [&](const std::string& name, Tensor value) {
      const auto rows = Values(value);
      seen[name].insert(seen[name].end(), rows.begin(), rows.end());
    };
    PassSums sums;
    model.Step(batch, false, &probe, &sums);
    for (const char* name :
         {"hidden_states.0", "hidden_states.1", "hidden_states.2", "hidden_states.3"}) {
      EXPECT_EQ(seen[name].size(), 18u * 8u) << name;
    }

    double cross_entropy = 0;
    for (int64_t m = 0; m < 18; ++m) {
      const auto target = static_cast<int64_t>(Get(batch.value().targets, m));
      if (target < 0) continue;
      const double* row = &seen["logits"][static_cast<size_t>(m * spec.vocab_size)];
      double sum = 0;
      for (int64_t v = 0; v < spec.vocab_size; ++v) sum += std::exp(row[v]);
      cross_entropy += std::log(sum) - row[target];
    }
    EXPECT_NEAR(sums.cross_entropy, cross_entropy, 1e-12 * cross_entropy);

    // Means over the tokens of both layers together, or of each.
    std::vector<double> prob(static_cast<size_t>(2 * experts)), share(prob.size());
    double z = 0;
    for (int64_t j = 0; j < 2; ++j) {
      const auto& logits = seen["router_logits." + std::to_string(j)];
      ASSERT_EQ(static_cast<int64_t>(logits.size()), 18 * experts);
      for (int64_t m = 0; m < 18; ++m) {
        const double* row = &logits[static_cast<size_t>(m * experts)];
        double sum = 0;
        for (int64_t e = 0; e < experts; ++e) sum += std::exp(row[e]);
        z += std::pow(std::log(sum), 2) / 36;
        for (int64_t e = 0; e < experts; ++e) {
          int64_t rank = 0;
          for (int64_t other = 0; other < experts; ++other) rank += row[other] > row[e];
          prob[static_cast<size_t>(j * experts + e)] += std::exp(row[e]) / sum / 18;
          share[static_cast<size_t>(j * experts + e)] += rank < spec.moe.top_k ? 1.0 / 18 : 0;
        }
      }
    }
    double aux = 0;
    for (size_t e = 0; e < static_cast<size_t>(experts); ++e) {
      const size_t f = e + static_cast<size_t>(experts);
      aux += pool == AuxPool::kModel ? (prob[e] + prob[f]) / 2 * (share[e] + share[f]) / 2
                                     : (prob[e] * share[e] + prob[f] * share[f]) / 2;
    }
    EXPECT_NEAR(sums.aux_loss, aux * static_cast<double>(experts), 1e-12);
    EXPECT_NEAR(sums.z_loss, z, 1e-12 * z);
    ASSERT_EQ(sums.imbalance.size(), 2u);
    for (size_t j = 0; j < 2; ++j) {
      const auto first = share.begin() + static_cast<int64_t>(j) * experts;
      const double mean = static_cast<double>(spec.moe.top_k) / static_cast<double>(experts);
      EXPECT_NEAR(sums.imbalance[j], *std::max_element(first, first + experts) / mean, 1e-12);
    }
  }
}

// A router of zeros is uniform: the aux loss is top_k.
TEST(HybridModel, UniformRoutingGivesTopK) {
  ModelSpec spec = MixedSpec();
  TinyModel model(spec, DType::kF64);
  testing::RandomiseWeights(model.weights(), 11, /*router_scale=*/0);
  PassSums sums;
  model.Step(TestBatch(1, 8, spec.vocab_size, 1), false, nullptr, &sums);
  EXPECT_NEAR(sums.aux_loss, static_cast<double>(spec.moe.top_k), 1e-12);
}

// A vocabulary so large that the head runs in several chunks of rows: loss and head gradient
// against sums over all rows.
TEST(HybridModel, HeadRunsInChunks) {
  ModelSpec spec = testing::TinySpec("a", 1);
  spec.vocab_size = 60'000;
  const TestBatch batch(3, 50, spec.vocab_size, 9);
  TinyModel model(spec, DType::kF64);
  testing::RandomiseWeights(model.weights(), 11, 2);
  int chunks = 0;
  int64_t row = 0;
  double cross_entropy = 0;
  std::vector<double> hidden, p(static_cast<size_t>(spec.vocab_size));
  std::vector<double> d_head(static_cast<size_t>(spec.vocab_size * spec.d_model));
  ProbeSink probe;
  probe.on_tensor = [&](const std::string& name, Tensor value) {
    if (name == "hidden_states.1") hidden = Values(value);
    if (name != "logits") return;
    ++chunks;
    for (int64_t r = 0; r < value.dim(0); ++r, ++row) {
      const auto target = static_cast<int64_t>(Get(batch.value().targets, row));
      if (target < 0) continue;
      const double* logits = value.data<double>() + r * spec.vocab_size;
      double sum = 0;
      for (size_t v = 0; v < p.size(); ++v) sum += p[v] = std::exp(logits[v]);
      cross_entropy += std::log(sum) - logits[target];
      for (size_t v = 0; v < p.size(); ++v) {
        const double d_logit = (p[v] / sum - (static_cast<int64_t>(v) == target ? 1 : 0)) / 147;
        for (size_t d = 0; d < 8; ++d) {
          d_head[v * 8 + d] += d_logit * hidden[static_cast<size_t>(row) * 8 + d];
        }
      }
    }
  };
  PassSums sums;
  model.Step(batch, true, &probe, &sums);
  EXPECT_EQ(row, 150);
  EXPECT_EQ(chunks, 3);  // 32 MiB of f64 logits are 69 rows
  EXPECT_NEAR(sums.cross_entropy, cross_entropy, 1e-11 * cross_entropy);
  const Tensor grad = model.weights().ParamGrad(model.table().Find("lm_head.weight"));
  EXPECT_LE(RelativeError(Values(grad), d_head), 1e-12);
}

// The plan of a pass: the same code with measuring arenas takes at least what a real pass takes,
// and no more than the alignment on top.
TEST(HybridModel, PlannedMemoryIsEnoughAndTight) {
  const TestBatch batch(2, 100, 61, 1);
  for (const Recompute mode :
       {Recompute::kNone, Recompute::kNorms, Recompute::kMixers, Recompute::kLayer}) {
    const ModelSpec spec = WiderSpec("m aE mE");
    const ParamTable table(spec);
    Arena values("weights"), grads("gradients"), activations("activations"), scratch("scratch");
    const Weights weights(&table, Placement(), true, &values, &grads);
    HybridModel model(spec, &weights, mode);
    Context ctx;
    ctx.scratch = &scratch;
    ctx.planning = true;
    Batch planned;
    planned.shape = batch.value().shape;
    Arena batches("batches");
    planned.tokens = batches.Alloc(DType::kI32, {2, 100});
    planned.targets = batches.Alloc(DType::kI32, {2, 100});
    const Tensor loss_scale = batches.Alloc(DType::kF64, {1});
    const Tensor sums = batches.Alloc(DType::kF64, {model.SumsSize()});
    const auto set = model.NewActivations(planned.shape, &activations);
    model.Forward(planned, loss_scale, sums, set.get(), ctx);
    model.Backward(planned, 1, set.get(), ctx);
    EXPECT_EQ(scratch.mark(), 0);

    // A real pass in arenas of exactly these sizes: too small ones are fatal.
    Arena real_values("weights", Device::kCpu, values.high_water());
    Arena real_grads("gradients", Device::kCpu, grads.high_water());
    Arena real_activations("activations", Device::kCpu, activations.high_water());
    Arena real_scratch("scratch", Device::kCpu, scratch.high_water());
    Weights real_weights(&table, Placement(), true, &real_values, &real_grads);
    testing::RandomiseWeights(real_weights, 11, 2);
    HybridModel real_model(spec, &real_weights, mode);
    Context real;
    real.scratch = &real_scratch;
    const auto real_set = real_model.NewActivations(batch.value().shape, &real_activations);
    Buf real_scale(DType::kF64, {1}), real_sums(DType::kF64, {real_model.SumsSize()});
    real_weights.BeginPass(real, /*first=*/true, /*last=*/true);
    real_model.Forward(batch, real_scale, real_sums, real_set.get(), real);
    real_model.Backward(batch, 1, real_set.get(), real);
    EXPECT_EQ(real_activations.high_water(), activations.high_water());
    EXPECT_EQ(real_scratch.high_water(), scratch.high_water());
    EXPECT_EQ(real_scratch.mark(), 0);
  }
}

// Planning touches no memory, so a model of 400 B parameters can be planned on a laptop.
TEST(HybridModel, PlansEvaluationAndDecodingOfLargeModels) {
  ModelSpec spec = testing::TinySpec("m mE m mE a mE m mE", 72);
  spec.d_model = 8192;
  spec.vocab_size = 65536;
  spec.attention = {.heads = 64, .kv_heads = 8, .head_dim = 128, .rope_theta = 0};
  spec.mamba = {.d_inner = 16384, .dt_rank = 512};
  spec.mlp_d_ff = spec.moe.d_ff = 24576;
  spec.moe.experts = 16;
  const ParamTable table(spec);
  Arena values("weights"), grads("gradients"), scratch("scratch"), states("states");
  const Weights weights(&table, Placement(), false, &values, &grads);
  HybridModel model(spec, &weights, Recompute::kNone);
  Context ctx;
  ctx.scratch = &scratch;
  ctx.planning = true;
  Arena batches("batches");
  Batch batch;
  batch.shape = {1, 4096};
  batch.tokens = batches.Alloc(DType::kI32, {1, 4096});
  batch.targets = batches.Alloc(DType::kI32, {1, 4096});
  model.Evaluate(batch, batches.Alloc(DType::kF64, {model.SumsSize()}), ctx);
  EXPECT_GT(scratch.high_water(), 4 * 4096 * 2 * 2 * 24576);
  const auto state = model.NewSequence(1, 262'144, /*with_grad=*/false, &states, ctx);
  model.Decode(batches.Alloc(DType::kF32, {1, 65536}), batch.tokens, state.get(), ctx);
  // 9 attention layers, keys and values of 8 heads of 128.
  EXPECT_GE(states.high_water(), int64_t{9} * 2 * 8 * 128 * 262'144 * 4);
}

// The padding token's row: its lookup adds nothing, the tied head's gradient still reaches it, and
// no other gradient changes.
TEST(HybridModel, PaddingRowGetsNoGradientFromTheLookup) {
  const TestBatch batch(2, 9, 11, 5);
  int64_t pad = -1;
  for (int64_t i = 0; i < batch.value().tokens.numel(); ++i) {
    if (Get(batch.value().targets, i) >= 0)
      pad = static_cast<int64_t>(Get(batch.value().tokens, i));
  }
  const auto run = [&](bool tied, int64_t pad_token) {
    ModelSpec spec = MixedSpec();
    spec.tie_embeddings = tied;
    spec.pad_token = pad_token;
    TinyModel model(spec, DType::kF64);
    testing::RandomiseWeights(model.weights(), 11, 2);
    if (!tied) {
      const Tensor head = model.weights().Param(model.table().Find(kHeadName)),
                   embedding = model.weights().Param(model.table().Find(kEmbeddingName));
      for (int64_t i = 0; i < head.numel(); ++i) Set(head, i, Get(embedding, i));
    }
    model.Step(batch, true);
    std::map<std::string, std::vector<double>> gradients;
    for (const auto& pair : model.Pairs()) gradients[pair.name] = Values(pair.gradient);
    return gradients;
  };
  const int64_t d = MixedSpec().d_model;
  const auto untied = run(false, -1);
  for (const bool tied : {false, true}) {
    const auto all = run(tied, -1), padded = run(tied, pad);
    for (const auto& [name, gradient] : all) {
      for (size_t i = 0; i < gradient.size(); ++i) {
        const bool in_row = name == kEmbeddingName && static_cast<int64_t>(i) / d == pad;
        const double lookup = in_row ? untied.at(name)[i] : 0;
        if (in_row) {
          EXPECT_GT(std::abs(lookup), 1e-6);
        }
        EXPECT_NEAR(padded.at(name)[i], gradient[i] - lookup, in_row ? 1e-14 : 0) << name << i;
      }
    }
  }
}

}  // namespace
}  // namespace krait
