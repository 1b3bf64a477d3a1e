// Sweeps: combinations, names, and every mistake with its place.
#include "trainer/config/sweep.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "paths.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kBase[] = R"(
model: {vocab_size: 34, d_model: 16, n_layers: 8, attention: {heads: 2}, mlp: {d_ff: 32}}
data: {train: [{synthetic: {task: recall, items: 4}}], seq_len: 16}
train: {steps: 10, batch_tokens: 64, micro_batch: 4}
schedule: {warmup_steps: 2}
)";

class SweepTest : public ::testing::Test {
 protected:
  SweepTest() { folder_.Write("base.yaml", kBase); }
  absl::StatusOr<Sweep> Load(const std::string& text, const std::vector<std::string>& words = {}) {
    return LoadSweep(folder_.Write("s.yaml", text), words);
  }
  std::string Said(const std::string& text, const std::vector<std::string>& words = {}) {
    return MessageOf(Load(text, words).status());
  }
  static std::vector<std::string> Names(const Sweep& sweep) {
    std::vector<std::string> names;
    for (const SweepCell& cell : sweep.cells) names.push_back(cell.name);
    return names;
  }
  static std::vector<std::string> Words(const SweepCell& cell) {
    std::vector<std::string> words;
    for (const SweepSetting& setting : cell.settings) words.push_back(setting.Word());
    return words;
  }
  TempFolder folder_;
};

TEST_F(SweepTest, GridCasesExcludeAndBaseline) {
  const auto sweep = Load(R"(
config: base.yaml
grid:
  model.mixer.ratio: ["0:1", "1:1"]
  model.moe: [none, {every: 2, experts: 4}]
cases:
  plain:
  wide: {model.mlp.d_ff: 64, model: {mamba: {inner_norms: false}}}
exclude: [{ratio: "0:1", case: wide}]
baseline: {model.mixer.ratio: "1:1", moe: none, case: plain}
seeds: [3, 1]
equal: {flops: 1e9, active_params: baseline}
)");
  ASSERT_TRUE(sweep.ok()) << sweep.status();
  EXPECT_THAT(Names(*sweep),
              ElementsAre("ratio 0:1, moe none, plain", "ratio 0:1, moe every 2 experts 4, plain",
                          "ratio 1:1, moe none, plain", "ratio 1:1, moe none, wide",
                          "ratio 1:1, moe every 2 experts 4, plain",
                          "ratio 1:1, moe every 2 experts 4, wide"));
  EXPECT_THAT(Words(sweep->cells[5]),
              ElementsAre("model.mixer.ratio=\"1:1\"", "model.moe.every=2", "model.moe.experts=4",
                          "model.mlp.d_ff=64", "model.mamba.inner_norms=false"));
  EXPECT_EQ(sweep->baseline, 2U);
  EXPECT_THAT(sweep->seeds, ElementsAre(3, 1));
  EXPECT_EQ(sweep->steps.kind, EqualSteps::kFlops);
  EXPECT_EQ(sweep->steps.value, 1e9);
  EXPECT_EQ(sweep->size.kind, EqualSize::kActive);
  EXPECT_FALSE(sweep->size.value.has_value());
  EXPECT_EQ(sweep->out, "runs/s");
  const auto config = LoadCell(*sweep, sweep->cells[5].settings, 1);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model.moe.experts, 4);
  EXPECT_EQ(config->model.mlp_d_ff, 64);
}

TEST_F(SweepTest, ACaseGoesOverTheGridAndWordsOverBoth) {
  const auto sweep = Load(
      "config: base.yaml\ngrid: {model.mlp.d_ff: [32, 48]}\ncases: {a: {model.mlp.d_ff: 64}}\n",
      {"seeds=[7]", "grid.train.steps=[5, 6]", "out=elsewhere/"});
  ASSERT_TRUE(sweep.ok()) << sweep.status();
  EXPECT_EQ(sweep->cells.size(), 4U);
  EXPECT_THAT(Words(sweep->cells[1]), ElementsAre("model.mlp.d_ff=64", "train.steps=6"));
  EXPECT_THAT(sweep->seeds, ElementsAre(7));
  EXPECT_EQ(sweep->out, "elsewhere");
}

TEST_F(SweepTest, ASweepMayBeBuiltOnAnother) {
  folder_.Write("big.yaml", "config: base.yaml\ngrid: {train.steps: [1, 2]}\nseeds: [1, 2, 3]\n");
  const auto sweep = Load("base: big.yaml\nseeds: [1]\n");
  ASSERT_TRUE(sweep.ok()) << sweep.status();
  EXPECT_EQ(sweep->cells.size(), 2U);
  EXPECT_EQ(sweep->seeds.size(), 1U);
}

TEST_F(SweepTest, EveryMistakeIsNamedWithItsPlace) {
  const std::string said = Said(R"(confg: base.yaml
grid: {model.mixer.ratio: "1:7", train.steps: [], train.seed: [1, 2]}
cases: {a: 3}
seeds: [1, 1, x]
equal: {tokens: 1, flops: -2, seconds: baseline}
exclude: [{model.nothing: 1}]
)");
  EXPECT_THAT(said, HasSubstr("unknown key \"confg\""));
  EXPECT_THAT(said, HasSubstr("config is missing"));
  EXPECT_THAT(said, HasSubstr("s.yaml:2:27: grid: model.mixer.ratio: expected a list of values"));
  EXPECT_THAT(said, HasSubstr("grid: train.steps: expected a list of values, found an empty list"));
  EXPECT_THAT(said, HasSubstr("train.seed is set by the sweep itself: give seeds instead"));
  EXPECT_THAT(said, HasSubstr("cases: a: expected a map"));
  EXPECT_THAT(said, HasSubstr("s.yaml:4:12: seeds: 1 is given twice"));
  EXPECT_THAT(said, HasSubstr("seeds: expected a list of whole numbers"));
  EXPECT_THAT(said, HasSubstr("are alternatives"));
  EXPECT_THAT(said, HasSubstr("\"model.nothing\" does not vary in this sweep"));
}

TEST_F(SweepTest, ExcludeAndBaselineNameWhatIsThere) {
  const std::string grid =
      "config: base.yaml\ngrid: {train.steps: [1, 2], model.mlp.d_ff: [8, 16]}\n";
  EXPECT_THAT(Said(grid + "exclude: [{train.steps: 3}]\n"),
              HasSubstr("train.steps has no value \"3\"; it has 1, 2"));
  EXPECT_THAT(Said(grid + "exclude: [{train.steps: [1, 2]}]\n"),
              HasSubstr("no combination is left"));
  EXPECT_THAT(Said(grid + "baseline: {train.steps: 1}\n"), HasSubstr("2 cells fit this"));
  EXPECT_THAT(Said(grid + "baseline: {train.steps: 1, d_ff: 8}\nexclude: [{train.steps: 1}]\n"),
              HasSubstr("this combination is excluded"));
  EXPECT_THAT(Said(grid + "baseline: [1]\n"),
              HasSubstr("expected the keys and values of one cell"));
  EXPECT_THAT(Said("- 1\n"), HasSubstr("s.yaml"));
}

TEST_F(SweepTest, AWrongValueIsNamedWhereTheSweepSaysIt) {
  const auto sweep = Load("config: base.yaml\ngrid: {model.mixer.ratio: [\"1:1\", oops]}\n");
  ASSERT_TRUE(sweep.ok()) << sweep.status();
  const auto config = LoadCell(*sweep, sweep->cells[1].settings, 1);
  EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(config.status()), HasSubstr("s.yaml:2:35: model.mixer.ratio: \"oops\""));
}

TEST_F(SweepTest, ShippedSweepsLoad) {
  int sweeps = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(KRAIT_SOURCE_DIR "/configs/ablations")) {
    const std::filesystem::path& path = entry.path();
    if (path.extension() != ".yaml" || path.filename().string().starts_with("recall-")) continue;
    SCOPED_TRACE(path);
    const auto sweep = LoadSweep(path.string(), {});
    ASSERT_TRUE(sweep.ok()) << sweep.status();
    for (const SweepCell& cell : sweep->cells) {
      const auto config = LoadCell(*sweep, cell.settings, 1);
      EXPECT_TRUE(config.ok()) << config.status();
    }
    ++sweeps;
  }
  EXPECT_EQ(sweeps, 9);
}

TEST_F(SweepTest, ConfigsKeepRefusingDottedKeys) {
  const std::string path = folder_.Write("c.yaml", "model.d_model: 3\n");
  EXPECT_THAT(MessageOf(LoadConfig(path, {}, ConfigUse::kPlan, 1).status()),
              HasSubstr("dotted keys belong on the command line"));
}

TEST_F(SweepTest, TasksReadBackFromTheResolvedConfig) {
  const std::string path = folder_ / "base.yaml";
  const auto config = LoadConfig(
      path, {"data.validation=[{synthetic: {task: induction, sequences: 9}, weight: 2}]"},
      ConfigUse::kTrain, 1);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->data.train[0].synthetic->seed, 1U);
  EXPECT_EQ(config->data.validation[0].synthetic->seed, 2U);
  EXPECT_EQ(config->data.validation[0].path, "induction");
  const auto again = ParseConfig(config->ToYaml(), "again", {}, ConfigUse::kTrain, 1);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->ToYaml(), config->ToYaml());
  const auto said = [&](const std::string& source) {
    return MessageOf(
        LoadConfig(path, {"data.train=[" + source + "]"}, ConfigUse::kTrain, 1).status());
  };
  EXPECT_THAT(said("{synthetic: {task: recal, items: 4}}"),
              HasSubstr("recall | copy | induction | selective_copy"));
  EXPECT_THAT(said("{synthetic: {items: 4}}"), HasSubstr("synthetic.task is missing"));
  EXPECT_THAT(said("{path: x.h5, synthetic: {task: recall, items: 4}}"), HasSubstr("alternatives"));
  EXPECT_THAT(said("{synthetic: {task: recall, items: 8}}"), HasSubstr("takes 18 tokens"));
}

}  // namespace
}  // namespace krait
