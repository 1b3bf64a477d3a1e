#include "model/weights.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "gtest/gtest.h"
#include "model/support/published.h"

namespace krait {
namespace {

class WeightsTest : public ::testing::Test {
 protected:
  explicit WeightsTest() : spec_(JambaSpec({64, 4, 4, 2, 96, 4, 256, 4})), table_(spec_) {}

  // All weights of a fresh initialisation, one vector per parameter.
  std::vector<std::vector<float>> Init(uint64_t seed) {
    Arena values("weights", Device::kCpu, 64 << 20);
    Arena grads("gradients", Device::kCpu, 64 << 20);
    Weights weights(&table_, Placement(), true, &values, &grads);
    Arena scratch("scratch", Device::kCpu, 1 << 20);
    Context ctx;
    ctx.scratch = &scratch;
    weights.Init(spec_, seed, ctx);
    std::vector<std::vector<float>> all;
    for (size_t p = 0; p < table_.params().size(); ++p) {
      const Tensor t = weights.Param(static_cast<int>(p));
      all.emplace_back(t.data<float>(), t.data<float>() + t.numel());
    }
    return all;
  }
  const std::vector<float>& Named(const std::vector<std::vector<float>>& all,
                                  const std::string& name) {
    const int p = table_.Find(name);
    EXPECT_GE(p, 0) << name;
    return all[static_cast<size_t>(p)];
  }
  static double Std(const std::vector<float>& v) {
    double sum = 0, squares = 0;
    for (const float x : v) {
      sum += x;
      squares += static_cast<double>(x) * x;
    }
    const auto n = static_cast<double>(v.size());
    return std::sqrt(squares / n - sum / n * (sum / n));
  }

  ModelSpec spec_;
  ParamTable table_;
};

TEST_F(WeightsTest, MambaScheme) {
  const auto all = Init(1);
  // The deviation of a sample of n normal values has a relative spread of 1/sqrt(2n); five of them.
  const auto expect_std = [&](const std::string& name, double expected) {
    const auto& v = Named(all, name);
    EXPECT_NEAR(Std(v), expected, expected * 5 / std::sqrt(2.0 * static_cast<double>(v.size())))
        << name;
  };
  const double residual = 0.02 / std::sqrt(8.0);
  expect_std("model.embed_tokens.weight", 0.02);
  expect_std("lm_head.weight", 0.02);
  expect_std("model.layers.2.self_attn.q_proj.weight", 0.02);
  expect_std("model.layers.2.self_attn.o_proj.weight", residual);
  expect_std("model.layers.0.mamba.conv1d.weight", 0.02);
  expect_std("model.layers.0.mamba.out_proj.weight", residual);
  expect_std("model.layers.0.feed_forward.down_proj.weight", residual);
  expect_std("model.layers.1.feed_forward.experts.3.down_proj.weight", residual);
  expect_std("model.layers.1.feed_forward.router.weight", 0.02);
  // dt_rank is 4: uniform in +-1/2, deviation 1/sqrt(12); spread of a sample below 1/sqrt(2n).
  expect_std("model.layers.0.mamba.dt_proj.weight", 1 / std::sqrt(12.0));
  for (const float w : Named(all, "model.layers.0.mamba.dt_proj.weight")) {
    EXPECT_LT(std::abs(w), 0.5);
  }
  double low = 1, high = 0;
  for (const float b : Named(all, "model.layers.0.mamba.dt_proj.bias")) {
    const double dt = std::log1p(std::exp(b));
    EXPECT_GT(dt, 0.999e-3);
    EXPECT_LT(dt, 1.001e-1);
    low = std::min(low, dt);
    high = std::max(high, dt);
  }
  EXPECT_LT(low, 2e-3);  // 128 log-uniform values reach towards both ends
  EXPECT_GT(high, 5e-2);
  const auto& a_log = Named(all, "model.layers.0.mamba.A_log");
  for (size_t i = 0; i < a_log.size(); ++i) {
    EXPECT_FLOAT_EQ(a_log[i], std::log(static_cast<float>(i % 16 + 1)));
  }
  for (const float d : Named(all, "model.layers.0.mamba.D")) EXPECT_EQ(d, 1);
  for (const float b : Named(all, "model.layers.0.mamba.conv1d.bias")) EXPECT_EQ(b, 0);
  for (const float w : Named(all, "model.layers.0.mamba.b_layernorm.weight")) EXPECT_EQ(w, 1);
}

TEST_F(WeightsTest, HfScheme) {
  spec_.init_scheme = InitScheme::kHf;
  const auto all = Init(1);
  const auto& out = Named(all, "model.layers.0.mamba.out_proj.weight");
  EXPECT_NEAR(Std(out), 0.02, 0.02 * 5 / std::sqrt(2.0 * static_cast<double>(out.size())));
  const auto& dt = Named(all, "model.layers.0.mamba.dt_proj.weight");
  EXPECT_NEAR(Std(dt), 0.02, 0.02 * 5 / std::sqrt(2.0 * static_cast<double>(dt.size())));
  for (const float b : Named(all, "model.layers.0.mamba.dt_proj.bias")) EXPECT_EQ(b, 0);
}

TEST_F(WeightsTest, SameBitsWithAnyNumberOfThreadsAndOtherBitsWithAnotherSeed) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto one = Init(7);
  omp_set_num_threads(2);
  const auto two = Init(7);
  omp_set_num_threads(before);
  EXPECT_EQ(one, two);
  EXPECT_NE(one, Init(8));
  // Tensors of one shape are drawn from different streams.
  EXPECT_NE(Named(one, "model.layers.0.mamba.out_proj.weight"),
            Named(one, "model.layers.1.mamba.out_proj.weight"));
}

// Random values belong to the published name and element: another depth leaves them alone.
TEST_F(WeightsTest, ValuesDependOnNameAndElementOnly) {
  const auto base = Init(7);
  const auto in_proj = Named(base, "model.layers.3.mamba.in_proj.weight");
  spec_ = JambaSpec({64, 8, 4, 2, 96, 8, 256, 4});
  table_ = ParamTable(spec_);
  EXPECT_EQ(Named(Init(7), "model.layers.3.mamba.in_proj.weight"), in_proj);
}

TEST_F(WeightsTest, MeasuringArenasTakeTheTableSize) {
  const ModelSpec large = Jamba15Large();
  const ParamTable table(large);
  Arena values("weights");
  Arena grads("gradients");
  const Weights weights(&table, Placement(), true, &values, &grads);
  EXPECT_GE(values.high_water(), 4 * table.total());
  EXPECT_LE(
      values.high_water(),
      4 * (table.total() + Layout::kAlignment * static_cast<int64_t>(table.storages().size())));
  EXPECT_EQ(values.high_water(), grads.high_water());
}

// A gradient is zeroed at the start of a step, or its first write overwrites it; in later passes
// both are added to.
TEST_F(WeightsTest, FirstPassOfAStepClearsGradients) {
  Arena values("weights", Device::kCpu, 64 << 20);
  Arena grads("gradients", Device::kCpu, 64 << 20);
  Weights weights(&table_, {.device = Device::kCpu, .compute = DType::kF64}, true, &values, &grads);
  const Context ctx;
  const int overwritten = table_.Find("lm_head.weight");
  const int zeroed = table_.Find("model.embed_tokens.weight");
  const auto storage = [&](int p) { return table_.params()[static_cast<size_t>(p)].storage; };
  for (int step = 0; step < 2; ++step) {
    for (const int p : {overwritten, zeroed}) weights.ParamGrad(p).data<double>()[17] = 3;
    weights.BeginPass(ctx, /*first=*/true, /*last=*/false);
    EXPECT_EQ(weights.ParamGrad(zeroed).data<double>()[17], 0);
    EXPECT_TRUE(weights.Accumulate(storage(zeroed)));
    EXPECT_FALSE(weights.Accumulate(storage(overwritten)));
    EXPECT_TRUE(weights.Accumulate(storage(overwritten)));
    for (const int p : {overwritten, zeroed}) weights.ParamGrad(p).data<double>()[17] = 3;
    weights.BeginPass(ctx, /*first=*/false, /*last=*/true);
    EXPECT_EQ(weights.ParamGrad(zeroed).data<double>()[17], 3);
    EXPECT_TRUE(weights.Accumulate(storage(zeroed)));
    EXPECT_TRUE(weights.Accumulate(storage(overwritten)));
  }
}

}  // namespace
}  // namespace krait
