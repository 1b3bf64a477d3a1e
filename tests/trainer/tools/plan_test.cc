#include "trainer/tools/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "paths.h"
#include "trainer/report/environment.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

RunConfig Load(const std::string& name, const std::vector<std::string>& words = {},
               int64_t ranks = 1) {
  const auto config =
      LoadConfig(KRAIT_SOURCE_DIR "/configs/" + name, words, ConfigUse::kPlan, ranks);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : RunConfig();
}

PlanReport Plan(const RunConfig& config, const PlanOptions& options = {}) {
  const auto report = MakePlan(config, options);
  EXPECT_TRUE(report.ok()) << report.status();
  return report.ok() ? *report : PlanReport();
}

// Published counts: arXiv 2403.19887 and 2408.12570, exact values from the released configs.
TEST(Plan, JambaV01) {
  const PlanReport report = Plan(Load("models/jamba-v0.1.yaml"), {.context = 262144});
  EXPECT_EQ(report.params_total, 51'570'323'328);
  EXPECT_EQ(report.params_active, 12'110'311'296);
  EXPECT_EQ(report.seq_len, 4096);
  EXPECT_NEAR(report.flops_per_token, 71.49e9, 0.005e9);
  ASSERT_EQ(report.decode.size(), 1U);
  EXPECT_EQ(report.decode[0].kv_cache_bytes, int64_t{4} << 30);
  // 28 Mamba layers of d_inner 8192: 3 inputs of 2 bytes, 16 states of 4.
  EXPECT_EQ(report.decode[0].conv_state_bytes, 28 * 8192 * 3 * 2);
  EXPECT_EQ(report.decode[0].ssm_state_bytes, 28 * 8192 * 16 * 4);
  EXPECT_EQ(report.pattern, "m mE m mE a mE m mE");
  EXPECT_EQ(report.checkpoint_bytes, 3 * 4 * report.params_total);
  EXPECT_EQ(report.wire_bytes_per_step(), 0);
}

// As transformers counts the published configs (tests/golden/README.md).
TEST(Plan, SmallerPublishedModels) {
  const RunConfig jamba2 = Load("models/jamba2-3b.yaml");
  const PlanReport report = Plan(jamba2, {.context = 262144});
  EXPECT_EQ(report.params_total, 3'029'337'472);
  EXPECT_EQ(report.params_active, 3'029'337'472);
  for (const Sublayer& sublayer : jamba2.model.sublayers) {
    const bool attends = sublayer.layer == 7 || sublayer.layer == 21;
    EXPECT_NE(sublayer.kind, SublayerKind::kMoe);
    if (IsMixer(sublayer.kind)) {
      EXPECT_EQ(sublayer.kind == SublayerKind::kAttention, attends) << sublayer.layer;
    }
  }
  // Two layers with K and V of one head of 128, of 2 bytes.
  EXPECT_EQ(report.decode[0].kv_cache_bytes, int64_t{262144} * 2 * 2 * 128 * 2);
  EXPECT_EQ(Plan(Load("models/jamba-tiny-dev.yaml")).params_total, 318'688'640);
}

TEST(Plan, TheUsualContextIsReportedWithoutOption) {
  const PlanReport report = Plan(Load("models/jamba-v0.1.yaml"));
  ASSERT_EQ(report.decode.size(), 2U);
  EXPECT_EQ(report.decode[0].context, 4096);
  EXPECT_EQ(report.decode[1].context, 262144);
  EXPECT_EQ(report.decode[1].kv_cache_bytes, int64_t{4} << 30);
}

TEST(Plan, Jamba15LargeWellUnderASecond) {
  const RunConfig config = Load("models/jamba-1.5-large.yaml");
  const auto start = std::chrono::steady_clock::now();
  const PlanReport report = Plan(config, {.context = 262144});
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(report.params_total, 398'555'145'696);
  EXPECT_EQ(report.params_active, 94'149'338'592);
  EXPECT_EQ(report.decode[0].kv_cache_bytes, int64_t{9} << 30);
  EXPECT_LT(elapsed.count(), 0.5);
  EXPECT_FALSE(Plan(config, {.memory = int64_t{1} << 40}).fits);
}

TEST(Plan, OtherShippedModels) {
  const PlanReport b3 = Plan(Load("models/jamba-3b.yaml"));
  EXPECT_NEAR(static_cast<double>(b3.params_total), 3.151e9, 0.0005e9);
  EXPECT_NEAR(static_cast<double>(b3.params_active), 1.490e9, 0.0005e9);
  EXPECT_NEAR(b3.flops_per_token, 8.247e9, 0.0005e9);
  const PlanReport block = Plan(Load("models/jamba-block.yaml"));
  EXPECT_NEAR(static_cast<double>(block.params_total), 4.839e9, 0.0005e9);
  EXPECT_NEAR(block.flops_per_token, 19.08e9, 0.005e9);
  const PlanReport bench = Plan(Load("models/bench-20m.yaml"));
  EXPECT_NEAR(static_cast<double>(bench.params_total), 20e6, 1e6);
  const PlanReport tiny = Plan(Load("models/jamba-tiny.yaml"));
  EXPECT_GT(tiny.params_total, 200'000);
  EXPECT_LT(tiny.params_total, 600'000);
  EXPECT_EQ(tiny.accumulation, 2);
}

TEST(Plan, PartsAddUp) {
  for (const char* name : {"quickstart.yaml", "models/jamba-v0.1.yaml", "models/jamba-tiny.yaml"}) {
    const PlanReport report = Plan(Load(name));
    int64_t parameters = 0;
    int64_t sublayers = 0;
    double flops = 0;
    for (const PlanPart& part : report.parts) {
      parameters += part.parameters;
      sublayers += part.sublayers;
      flops += part.flops_per_token;
    }
    EXPECT_EQ(parameters, report.params_total);
    EXPECT_EQ(sublayers, 2 * report.n_layers);
    EXPECT_NEAR(flops / report.flops_per_token, 1, 1e-12);
  }
}

TEST(Plan, MemoryFollowsTheConfig) {
  const MemoryPlan none = PlanTraining(Load("models/jamba-tiny.yaml"));
  const ParamTable table(Load("models/jamba-tiny.yaml").model);
  // Every storage starts at a multiple of 256 bytes.
  const int64_t padding = 256 * static_cast<int64_t>(table.storages().size());
  EXPECT_GE(none.weights, 4 * table.total());
  EXPECT_LE(none.weights, 4 * table.total() + padding);
  EXPECT_EQ(none.gradients, none.weights);
  // Two moments, and the few numbers that say which elements decay.
  EXPECT_GE(none.optimizer, 2 * none.weights);
  EXPECT_LE(none.optimizer, 2 * none.weights + 4096);
  EXPECT_EQ(none.staging, 3 * 4 * table.total());
  // Three numbers per token: one pass of evaluation; the two of the step at hand, and those of
  // 128Ki tokens read ahead.
  constexpr int64_t kPass = 3 * 4 * 4 * 128;
  EXPECT_EQ(none.batches, kPass);
  EXPECT_EQ(none.rows, (1 + 128) * 2 * kPass);
  EXPECT_GT(none.activations, 0);
  EXPECT_GT(none.scratch, 0);
  EXPECT_EQ(none.total(), none.weights + none.gradients + none.optimizer + none.activations +
                              none.scratch + none.batches + none.rows + none.scalars +
                              none.staging);

  int64_t last = none.activations;
  for (const char* mode : {"norms", "mixers", "layer"}) {
    const std::string word = std::string("train.recompute=") + mode;
    const MemoryPlan plan = PlanTraining(Load("models/jamba-tiny.yaml", {word}));
    EXPECT_LT(plan.activations, last) << mode;
    last = plan.activations;
  }
  const MemoryPlan wide = PlanTraining(
      Load("models/jamba-tiny.yaml", {"train.micro_batch=8", "checkpoint.async=false"}));
  EXPECT_EQ(wide.staging, 0);
  // Twice the tokens, twice the activations, but for sizes that do not depend on them.
  EXPECT_NEAR(static_cast<double>(wide.activations) / static_cast<double>(none.activations), 2,
              0.05);
}

TEST(Plan, FitsOrNot) {
  const RunConfig config = Load("models/jamba-tiny.yaml");
  const int64_t total = PlanTraining(config).total();
  EXPECT_TRUE(Plan(config, {.memory = total}).fits);
  EXPECT_FALSE(Plan(config, {.memory = total - 1}).fits);
  EXPECT_GT(MachineMemory(), int64_t{64} << 20);
  EXPECT_EQ(Plan(config).memory_limit, MachineMemory());
}

TEST(Plan, WireBytesOfDataParallelRanks) {
  const RunConfig config = Load("models/jamba-tiny.yaml", {}, 2);
  const PlanReport report = Plan(config, {.ranks = 2}), alone = Plan(config);
  // Half of the gradients out, half of the weights out; padding and the numbers of a step beside.
  const auto bytes = static_cast<double>(4 * report.params_total);
  EXPECT_NEAR(static_cast<double>(report.wire_bytes_per_step()), bytes, 0.01 * bytes);
  EXPECT_EQ(report.memory.sent.tensor + report.memory.sent.expert, 0);
  EXPECT_EQ(report.accumulation, 1);
  // ZeRO-1: half of the moments each, all weights and gradients.
  EXPECT_EQ(report.memory.weights, alone.memory.weights);
  EXPECT_EQ(report.memory.gradients, alone.memory.gradients);
  const auto half = static_cast<double>(alone.memory.optimizer) / 2;
  EXPECT_NEAR(static_cast<double>(report.memory.optimizer), half, 0.01 * half);
  EXPECT_THAT(PlanText(report), HasSubstr("ranks         2 = data 2 x tensor 1, experts over 1"));
}

// The layout that the file says it fits.
TEST(Plan, JambaMiniOnEightGpus) {
  const RunConfig config = Load("jamba-mini-8gpu.yaml", {}, 8);
  const PlanReport report = Plan(config, {.ranks = 8, .memory = 141'000'000'000});
  EXPECT_TRUE(report.fits) << PlanText(report);
  EXPECT_GT(report.memory.sent.expert, 0);
  EXPECT_EQ(report.params_total, 51'570'323'328);
  EXPECT_FALSE(Plan(Load("jamba-mini-8gpu.yaml", {"optimizer.moments=fp32"}, 8),
                    {.ranks = 8, .memory = 141'000'000'000})
                   .fits);
}

TEST(Plan, TextAndJsonSayTheSame) {
  const PlanReport report =
      Plan(Load("models/jamba-v0.1.yaml"), {.context = 262144, .memory = int64_t{1} << 30});
  const std::string text = PlanText(report);
  for (const char* words : {"51,570,323,328", "12,110,311,296", "71.49 GFLOP", "4.00 GiB",
                            "DOES NOT FIT", "4 x [m mE m mE a mE m mE]", "262,144 tokens"}) {
    EXPECT_THAT(text, HasSubstr(words));
  }
  const auto json = nlohmann::json::parse(PlanJson(report));
  EXPECT_EQ(json["params_total"], 51'570'323'328);
  EXPECT_EQ(json["params_active"], 12'110'311'296);
  EXPECT_EQ(json["decode"][0]["kv_cache_bytes"], int64_t{4} << 30);
  EXPECT_EQ(json["fits"], false);
  EXPECT_EQ(json["memory_bytes"]["total"], report.memory.total());
  EXPECT_EQ(json["batch"]["accumulation"], 512);
}

TEST(Plan, RefusesAnImpossibleContext) {
  EXPECT_EQ(ExitCodeOf(MakePlan(Load("models/jamba-tiny.yaml"), {.context = -1}).status()),
            ExitCode::kConfig);
}

}  // namespace
}  // namespace krait
