// Statistics by layer, and the name of the first value that is not finite.
#include "trainer/train/layer_statistics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <limits>
#include <map>

#include "nlohmann/json.hpp"
#include "support/tiny_run.h"
#include "support/training_batch.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

class LayerStatisticsTest : public ::testing::Test {
 protected:
  LayerStatisticsTest() { omp_set_num_threads(1); }
  RunConfig Config() const {
    auto config = LoadConfig(tiny_.config(), {}, ConfigUse::kTrain, 1);
    KRAIT_CHECK(config.ok());
    return *config;
  }
  static void Poison(Trainer* trainer, const std::string& name, float value) {
    const int param = trainer->weights().table().Find(name);
    KRAIT_CHECK(param >= 0);
    trainer->weights().Param(param).data<float>()[0] = value;
  }
  TinyRun tiny_;
};

// Layers of the tiny model: 0 mamba mlp, 1 attention moe, 2 mamba mlp, 3 mamba moe.
TEST_F(LayerStatisticsTest, Values) {
  const RunConfig config = Config();
  Trainer trainer(config);
  trainer.Init();
  const TokenBatch batch = BatchAt(config, 0);
  trainer.Step(batch);
  const std::string before = Bits(trainer);
  std::map<std::string, double> values;
  for (const Metric& metric : LayerStatistics(&trainer, batch)) {
    values[metric.name] = std::get<double>(metric.value);
  }
  EXPECT_EQ(Bits(trainer), before);
  EXPECT_EQ(values.size(), 8U + 3U * 4U + 2U * 3U);
  for (const char* sublayer : {"00_mamba", "00_mlp", "01_attention", "01_moe", "02_mamba", "02_mlp",
                               "03_mamba", "03_moe"}) {
    const double most = values.at(std::string("layers/") + sublayer + "/max_abs");
    EXPECT_GT(most, 0) << sublayer;
    EXPECT_LT(most, 100) << sublayer;
  }
  for (const std::string layer : {"layers/00_mamba/", "layers/02_mamba/", "layers/03_mamba/"}) {
    // At the start dt is log-uniform in [1e-3, 1e-1], and A is -1 ... -N.
    EXPECT_LT(values.at(layer + "dt_p05"), values.at(layer + "dt_p50"));
    EXPECT_LT(values.at(layer + "dt_p50"), values.at(layer + "dt_p95"));
    EXPECT_GT(values.at(layer + "dt_p05"), 1e-4);
    EXPECT_LT(values.at(layer + "dt_p95"), 0.5);
    EXPECT_NEAR(values.at(layer + "min_a"), 1, 0.05);
  }
  for (const std::string layer : {"layers/01_moe/", "layers/03_moe/"}) {
    EXPECT_GT(values.at(layer + "entropy"), 0.5);
    EXPECT_LE(values.at(layer + "entropy"), std::log(3.0) + 1e-6);
    EXPECT_LE(values.at(layer + "load_min"), 1);
    EXPECT_GE(values.at(layer + "load_max"), 1);
    EXPECT_LE(values.at(layer + "load_max"), 1.5);  // two of three experts for each token
  }
}

TEST_F(LayerStatisticsTest, TheFirstValueThatIsNotFiniteIsNamed) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [weight, where] : std::map<std::string, std::string>{
           {"model.layers.2.mamba.out_proj.weight", "the output of layer 2's mamba"},
           {"model.layers.1.self_attn.o_proj.weight", "the output of layer 1's attention"},
           {"model.layers.2.feed_forward.up_proj.weight", "the output of layer 2's mlp"},
           {"model.final_layernorm.weight", "the output of the final norm"},
           {"lm_head.weight", "the gradient of the head's input"}}) {
    const RunConfig config = Config();
    Trainer trainer(config);
    trainer.Init();
    Poison(&trainer, weight, nan);
    const TokenBatch batch = BatchAt(config, 0);
    EXPECT_TRUE(trainer.Step(batch).was_skipped);
    EXPECT_EQ(FirstNonFinite(&trainer, batch), where);
  }
  // Where all is finite.
  Trainer trainer(Config());
  trainer.Init();
  EXPECT_THAT(FirstNonFinite(&trainer, BatchAt(Config(), 0)), HasSubstr("no sublayer's output"));
}

TEST_F(LayerStatisticsTest, InARun) {
  const ProcessResult result =
      tiny_.Train("run", {"train.steps=10", "log.layer_statistics=true", "log.every=5"});
  ASSERT_EQ(result.code, 0) << result.err;
  int records = 0;
  std::istringstream lines(ReadText(tiny_ / "run/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (!record.contains("train/loss")) continue;
    EXPECT_TRUE(record.contains("layers/03_mamba/dt_p50")) << line;
    EXPECT_TRUE(record.contains("layers/03_moe/entropy")) << line;
    ++records;
  }
  EXPECT_EQ(records, 3);
  // It only looks.
  ASSERT_EQ(tiny_.Train("plain", {"train.steps=10", "log.every=5"}).code, 0);
  EXPECT_EQ(TinyRun::Krait({"checkpoint", "diff", tiny_ / "run/checkpoints/step-00000010",
                            tiny_ / "plain/checkpoints/step-00000010"})
                .code,
            0);
}

}  // namespace
}  // namespace krait
