// What is held equal, the statistics, and the report's page over made-up runs.
#include "trainer/ablate/sweep_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "kernels/base/file.h"
#include "model/params.h"
#include "support/temp_folder.h"
#include "trainer/ablate/report.h"
#include "trainer/ablate/results.h"

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kBase[] = R"(
model: {vocab_size: 34, d_model: 32, n_layers: 8, attention: {heads: 2}, mlp: {d_ff: 64}}
data:
  train: [{synthetic: {task: recall, items: 4}}]
  validation: [{synthetic: {task: recall, items: 4}}]
  seq_len: 16
train: {device: cpu, steps: 100, batch_tokens: 64, micro_batch: 4}
schedule: {warmup_steps: 2}
)";

class SweepPlanTest : public ::testing::Test {
 protected:
  SweepPlanTest() { folder_.Write("base.yaml", kBase); }
  absl::StatusOr<SweepPlan> Plan(const std::string& text, const StepSeconds& speeds = {}) {
    const auto sweep = LoadSweep(
        folder_.Write("s.yaml", "config: base.yaml\nout: " + folder_.path() + "/out\n" + text), {});
    if (!sweep.ok()) return sweep.status();
    return PlanSweep(*sweep, 1, speeds);
  }
  TempFolder folder_;
};

TEST_F(SweepPlanTest, ParametersAreMetByTheFeedForwards) {
  const auto plan = Plan(
      "grid: {model.mixer.ratio: [\"0:1\", \"1:7\", \"1:0\"], model.moe: [none, {every: 2, "
      "experts: "
      "4, d_ff: 32}]}\nequal: {active_params: baseline}\n");
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->cells.size(), 6U);
  const auto target = static_cast<double>(plan->cells[0].params_active);
  EXPECT_EQ(plan->cells[0].config.model.mlp_d_ff, 64);
  for (const PlannedCell& cell : plan->cells) {
    const ParamTable table(cell.config.model);
    EXPECT_EQ(cell.params_active, table.active(cell.config.model));
    EXPECT_LE(std::abs(static_cast<double>(cell.params_active) / target - 1), 0.005) << cell.name;
    if (cell.config.model.Has(SublayerKind::kMoe)) {  // their ratio stays
      EXPECT_NEAR(2.0 * static_cast<double>(cell.config.model.moe.d_ff),
                  static_cast<double>(cell.config.model.mlp_d_ff), 1);
    }
  }
}

TEST_F(SweepPlanTest, StepsMeetTokensFlopsAndSeconds) {
  const std::string grid = "grid: {model.mixer.ratio: [\"0:1\", \"1:0\"]}\n";
  auto plan = Plan(grid + "equal: {tokens: 12_800}\n");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->cells[1].config.train.steps, 200);
  plan = Plan(grid + "equal: {flops: baseline}\n");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->cells[0].config.train.steps, 100);
  EXPECT_NE(plan->cells[1].config.train.steps, 100);
  EXPECT_LE(std::abs(plan->cells[1].flops / plan->cells[0].flops - 1), 0.01);
  plan = Plan(grid + "equal: {seconds: 30}\n");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->solved());
  EXPECT_NE(plan->cells[0].speed_key, plan->cells[1].speed_key);
  plan = Plan(grid + "equal: {seconds: 30}\n",
              {{plan->cells[0].speed_key, 0.1}, {plan->cells[1].speed_key, 0.03}});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->solved());
  EXPECT_EQ(plan->cells[0].config.train.steps, 300);
  EXPECT_EQ(plan->cells[1].config.train.steps, 1000);
}

TEST_F(SweepPlanTest, MoreThanOnePercentOffIsRefused) {
  const std::string grid = "grid: {model.mixer.ratio: [\"0:1\", \"1:0\"]}\n";
  EXPECT_THAT(MessageOf(Plan(grid + "equal: {tokens: 100}\n").status()),
              HasSubstr("equal.tokens asks for 100, and 2 steps of 64 come to 128"));
  EXPECT_THAT(MessageOf(Plan(grid + "equal: {total_params: 1000}\n").status()),
              HasSubstr("more than 1 % off (cell ratio 0:1)"));
  EXPECT_THAT(MessageOf(Plan(grid + "equal: {total_params: 1000}\n").status()),
              HasSubstr("s.yaml:4:23: "));
  EXPECT_THAT(MessageOf(Plan("grid: {train.steps: [5, 6]}\nequal: {tokens: 6400}\n").status()),
              HasSubstr("train.steps varies"));
}

TEST_F(SweepPlanTest, ErrorsOfAllCellsComeAtOnceAndEachOnce) {
  const std::string said = MessageOf(
      Plan("grid: {model.mixer.ratio: [\"1:1\", x], model.attention.heads: [3, 2]}\n").status());
  EXPECT_THAT(said, HasSubstr("\"x\" is no ratio"));
  EXPECT_THAT(said, HasSubstr("model.attention.heads"));
  EXPECT_EQ(said.find("is no ratio"), said.rfind("is no ratio"));
}

TEST_F(SweepPlanTest, WidthsAtOneRateWarnWithoutMup) {
  const std::string grid = "grid: {model.d_model: [32, 64]}\n";
  const auto notes = [&](const std::string& text) {
    const auto plan = Plan(text);
    EXPECT_TRUE(plan.ok()) << plan.status();
    return plan.ok() ? plan->notes : std::vector<std::string>();
  };
  EXPECT_THAT(notes(grid),
              ElementsAre(HasSubstr("cells of model.d_model 32 and 64 share optimizer.lr 3e-4")));
  EXPECT_THAT(
      notes("cases: {a: {model.d_model: 32}, b: {model.d_model: 64, optimizer.lr: 1e-4}}\n"),
      ElementsAre());
  EXPECT_THAT(notes("grid: {model.d_model: [32, 64], optimizer.mup.base_d_model: [32]}\n"),
              ElementsAre());
}

TEST_F(SweepPlanTest, RunsAreKnownByTheirSettings) {
  const std::string grid = "grid: {model.mixer.ratio: [\"0:1\", \"1:0\"]}\n";
  const auto two = Plan(grid + "seeds: [1, 2]\n"), three = Plan(grid + "seeds: [1, 2, 3]\n");
  ASSERT_TRUE(two.ok() && three.ok());
  ASSERT_EQ(two->runs.size(), 4U);
  EXPECT_EQ(two->runs[3].dir, three->runs[3].dir);
  EXPECT_THAT(two->runs[0].dir, HasSubstr("/out/runs/ratio-0-1.s1-"));
  folder_.Write("base.yaml", std::string(kBase) + "optimizer: {lr: 1e-3}\n");
  const auto other = Plan(grid + "seeds: [1, 2]\n");
  ASSERT_TRUE(other.ok());
  EXPECT_NE(other->runs[0].dir, two->runs[0].dir);
}

TEST(Results, StudentsQuantiles) {
  EXPECT_EQ(StudentQuantile(2), 4.303);
  EXPECT_EQ(StudentQuantile(30), 2.042);
  EXPECT_NEAR(StudentQuantile(31), 2.040, 1e-3);  // any table
  EXPECT_NEAR(StudentQuantile(120), 1.980, 1e-3);
  EXPECT_EQ(StudentQuantile(0), 0);
}

// A finished run with this accuracy at its end.
void MakeRun(const PlannedRun& run, double accuracy, double tokens_per_s, int records) {
  ASSERT_TRUE(MakeDirectories(run.dir, ExitCode::kCannotSave).ok());
  std::string metrics;
  for (int i = 1; i <= records; ++i) {
    metrics +=
        "{\"step\":" + std::to_string(i) + ",\"time\":1,\"train/loss\":" + std::to_string(3.0 / i) +
        ",\"perf/tokens_per_s\":" + std::to_string(tokens_per_s) +
        ",\"perf/step_ms\":10,\"mem/peak_gib\":0.5,\"moe/layer_01/imbalance\":1.5,\"tokens\":" +
        std::to_string(64 * i) + "}\n";
  }
  metrics +=
      "{\"step\":9,\"time\":1,\"val/loss\":0.5,\"val/accuracy\":" + std::to_string(accuracy) +
      ",\"tokens\":" + std::to_string(64 * records) + "}\n";
  ASSERT_TRUE(WriteFileAtomic(run.dir + "/metrics.jsonl", metrics, ExitCode::kCannotSave).ok());
  RunSummary summary;
  summary.finished = true;
  ASSERT_TRUE(WriteRunSummary(run.dir, summary).ok());
}

TEST_F(SweepPlanTest, PairedDifferencesAndTheirMarks) {
  const auto plan =
      Plan("grid: {model.mixer.ratio: [\"0:1\", \"1:7\", \"1:0\"]}\nseeds: [1, 2, 3]\n");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->metric, "val/accuracy");
  // By seed: cells 0:1, 1:7, 1:0. Differences of 1:7: 0.2, 0.21, 0.19; of 1:0: 0.3, -0.2, 0.
  const double accuracy[] = {0.5, 0.7, 0.8, 0.6, 0.81, 0.4, 0.4, 0.59, 0.4};
  for (size_t i = 0; i < 9; ++i) MakeRun(plan->runs[i], accuracy[i], i % 3 == 2 ? 2e4 : 1e4, 3);
  const SweepResults results = ReadResults(*plan);
  EXPECT_NEAR(results.cells[0].mean, 0.5, 1e-12);
  EXPECT_NEAR(results.cells[0].spread, 0.1, 1e-12);
  EXPECT_NEAR(results.cells[1].difference, 0.2, 1e-12);
  EXPECT_NEAR(results.cells[1].half_width, 4.303 * 0.01 / std::sqrt(3.0), 1e-9);
  EXPECT_TRUE(results.cells[1].significant());
  EXPECT_FALSE(results.cells[2].significant());
  EXPECT_NEAR(results.cells[1].imbalance.at(1), 1.5, 1e-12);
  // 1:0 is faster and worse than 1:7; 0:1 is beaten by 1:7.
  EXPECT_THAT(ParetoFront(*plan, results, {-1e4, -1e4, -2e4}), ElementsAre(1, 2));
  const auto text = WriteSweepReport(*plan);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text, HasSubstr("n.s."));
  const auto cells = ReadFile(plan->sweep.out + "/cells.csv", 1 << 20, ExitCode::kData);
  ASSERT_TRUE(cells.ok());
  EXPECT_THAT(*cells, HasSubstr("ratio 1:7,3,0.7"));
}

TEST_F(SweepPlanTest, APageOfFiftyRunsIsSmallAndNeedsNoNetwork) {
  std::string ratios = "\"0:1\"";
  for (int i = 1; i < 10; ++i) ratios += ", \"" + std::to_string(i) + ":9\"";
  const auto plan = Plan("title: \"<b> & \\\"q\\\"\"\ngrid: {model.mixer.ratio: [" + ratios +
                         "]}\nseeds: [1, 2, 3, 4, 5]\nconfig: base.yaml\n");
  ASSERT_FALSE(plan.ok());  // config twice
  const auto good = Plan(
      "title: \"<b> & \\\"q\\\"\"\ngrid: {model.n_layers: [8, 9, 10, 11, 12, 13, "
      "14, 15, 16, 17]}\nseeds: [1, 2, 3, 4, 5]\n");
  ASSERT_TRUE(good.ok()) << good.status();
  ASSERT_EQ(good->runs.size(), 50U);
  for (const PlannedRun& run : good->runs) MakeRun(run, 0.5, 1e4, 2000);
  ASSERT_TRUE(WriteSweepReport(*good).ok());
  const std::string path = good->sweep.out + "/report.html";
  EXPECT_LT(std::filesystem::file_size(path), 2'000'000U);
  const auto page = ReadFile(path, 1 << 22, ExitCode::kData);
  ASSERT_TRUE(page.ok());
  EXPECT_THAT(*page, HasSubstr("<h1>&lt;b&gt; &amp; &quot;q&quot;</h1>"));
  EXPECT_THAT(*page, HasSubstr("prefers-color-scheme:dark"));
  EXPECT_THAT(*page, HasSubstr("FLOP, forward and backward"));
  EXPECT_THAT(*page, HasSubstr("cross-entropy (nats/token)"));
  for (const char* outside : {"src=", "@import", "url(", "<script"}) {
    EXPECT_THAT(*page, Not(HasSubstr(outside)));
  }
  EXPECT_THAT(*page, Not(HasSubstr("nan")));
}

TEST_F(SweepPlanTest, AReportOfNothingSaysSo) {
  const auto plan = Plan("grid: {model.mixer.ratio: [\"0:1\", \"1:0\"]}\n");
  ASSERT_TRUE(plan.ok());
  const auto text = WriteSweepReport(*plan);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text, HasSubstr("0 of 2 runs are finished"));
}

}  // namespace
}  // namespace krait
