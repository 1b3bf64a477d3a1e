#include "trainer/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace krait {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// The smallest valid training config.
constexpr char kSmall[] = R"(
model: {vocab_size: 256, d_model: 64, n_layers: 8, attention: {heads: 4}, mlp: {d_ff: 128}}
data: {train: [{path: x.h5}], seq_len: 128}
train: {steps: 4000, batch_tokens: 1Ki}
)";

absl::StatusOr<RunConfig> Parse(const std::string& text, const std::vector<std::string>& words = {},
                                ConfigUse use = ConfigUse::kTrain, int64_t ranks = 1) {
  return ParseConfig(text, "test.yaml", words, use, ranks);
}

RunConfig MustParse(const std::string& text, const std::vector<std::string>& words = {},
                    ConfigUse use = ConfigUse::kTrain, int64_t ranks = 1) {
  auto config = Parse(text, words, use, ranks);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : RunConfig();
}

std::string ErrorOf(const absl::StatusOr<RunConfig>& config) {
  if (config.ok()) return "";
  EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig);
  return MessageOf(config.status());
}

std::string Layout(const std::string& model, const std::vector<std::string>& words = {}) {
  return LayoutPattern(MustParse("model: {vocab_size: 8, d_model: 8, mlp: {d_ff: 8}, attention: "
                                 "{heads: 2}, " +
                                     model + "}",
                                 words, ConfigUse::kPlan)
                           .model);
}

class ConfigFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() /
           ("krait-config-" + std::to_string(getpid()) + "-" +
            ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(dir_ / "sub");
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name) << text;
    return (dir_ / name).string();
  }
  absl::StatusOr<RunConfig> Load(const std::string& name,
                                 const std::vector<std::string>& words = {}) {
    return LoadConfig((dir_ / name).string(), words, ConfigUse::kTrain, 1);
  }

  std::filesystem::path dir_;
};

TEST(Config, DefaultsAreTheContracts) {
  const RunConfig c = MustParse(kSmall);
  EXPECT_EQ(c.path, "test.yaml");
  EXPECT_EQ(c.run_dir, "runs/test");
  EXPECT_FALSE(c.model.tie_embeddings);
  EXPECT_EQ(c.model.norm_eps, 1e-6);
  EXPECT_EQ(LayoutPattern(c.model), "m m m m a m m m");
  EXPECT_EQ(c.model.attention.kv_heads, 4);
  EXPECT_EQ(c.model.attention.head_dim, 16);
  EXPECT_EQ(c.model.attention.rope_theta, 0);
  EXPECT_EQ(c.model.mamba.d_state, 16);
  EXPECT_EQ(c.model.mamba.d_conv, 4);
  EXPECT_EQ(c.model.mamba.expand, 2);
  EXPECT_EQ(c.model.mamba.d_inner, 128);
  EXPECT_EQ(c.model.mamba.dt_rank, 4);
  EXPECT_TRUE(c.model.mamba.inner_norms);
  EXPECT_TRUE(c.model.mamba.conv_bias);
  EXPECT_FALSE(c.model.mamba.proj_bias);
  EXPECT_EQ(c.model.init_std, 0.02);
  EXPECT_EQ(c.model.init_scheme, InitScheme::kMamba);
  EXPECT_EQ(c.parallel.tensor, 1);
  EXPECT_EQ(c.parallel.data, 0);
  EXPECT_EQ(c.parallel.expert_slack, 1.5);
  ASSERT_EQ(c.data.train.size(), 1U);
  EXPECT_EQ(c.data.train[0].weight, 1.0);
  EXPECT_TRUE(c.data.validation.empty());
  EXPECT_TRUE(c.data.reset_at_documents);
  EXPECT_EQ(c.train.device, DevicePreference::kCpu);
  EXPECT_EQ(c.train.precision, Precision::kFp32);
  EXPECT_TRUE(c.train.deterministic);
  EXPECT_EQ(c.train.micro_batch, 2);
  EXPECT_EQ(c.train.seed, 1234U);
  EXPECT_EQ(c.train.recompute, Recompute::kNone);
  EXPECT_EQ(c.train.hang_timeout, 600);
  EXPECT_EQ(c.optimizer.lr, 3e-4);
  EXPECT_EQ(c.optimizer.beta1, 0.9);
  EXPECT_EQ(c.optimizer.beta2, 0.95);
  EXPECT_EQ(c.optimizer.eps, 1e-8);
  EXPECT_EQ(c.optimizer.weight_decay, 0.1);
  EXPECT_EQ(c.optimizer.clip, 1.0);
  EXPECT_EQ(c.optimizer.moments, MomentDType::kFp32);
  EXPECT_EQ(c.schedule.kind, ScheduleKind::kCosine);
  EXPECT_EQ(c.schedule.warmup_steps, 2000);
  EXPECT_EQ(c.schedule.min_lr_ratio, 0.1);
  EXPECT_EQ(c.schedule.decay_steps, 400);
  EXPECT_EQ(c.checkpoint.every, 1000);
  EXPECT_EQ(c.checkpoint.keep, 3);
  EXPECT_TRUE(c.checkpoint.async);
  EXPECT_EQ(c.checkpoint.dir, "runs/test/checkpoints");
  EXPECT_EQ(c.log.every, 10);
  EXPECT_TRUE(c.log.tensorboard);
  EXPECT_EQ(c.evaluation.every, 1000);
  EXPECT_EQ(c.evaluation.tokens, 2 << 20);
  EXPECT_EQ(c.accumulation(1), 4);
}

TEST(Config, DefaultsOfThePlan) {
  const RunConfig c = MustParse(
      "model: {vocab_size: 256, d_model: 64, n_layers: 8, attention: {heads: 4}, mlp: {d_ff: 9}, "
      "moe: {every: 2}}",
      {}, ConfigUse::kPlan);
  EXPECT_EQ(c.train.steps, 0);
  EXPECT_EQ(c.train.batch_tokens, 4 << 20);
  EXPECT_EQ(c.data.seq_len, 4096);
  EXPECT_TRUE(c.data.train.empty());
  EXPECT_EQ(c.model.moe.experts, 16);
  EXPECT_EQ(c.model.moe.top_k, 2);
  EXPECT_EQ(c.model.moe.d_ff, 9);
  EXPECT_FALSE(c.model.moe.renormalize);
  EXPECT_EQ(c.model.moe.aux_loss, 0.001);
  EXPECT_EQ(c.model.moe.z_loss, 0);
  EXPECT_EQ(c.model.moe.aux_pool, AuxPool::kModel);
  EXPECT_EQ(LayoutPattern(c.model), "m mE m mE a mE m mE");
}

TEST(Config, Layouts) {
  EXPECT_EQ(Layout("n_layers: 32, mixer: {ratio: \"1:7\", offset: 4}, moe: {every: 2, offset: 1}"),
            "m mE m mE a mE m mE");
  EXPECT_EQ(Layout("n_layers: 8, mixer: {ratio: \"1:3\"}"), "m m a m");
  EXPECT_EQ(Layout("n_layers: 4, mixer: {ratio: 0:1}"), "m");
  EXPECT_EQ(Layout("n_layers: 4, mixer: {ratio: 1:0}, moe: {every: 1}"), "aE");
  EXPECT_EQ(Layout("n_layers: 8, mixer: {ratio: \"2:6\"}"), "m m a m");
  EXPECT_EQ(Layout("n_layers: 6, moe: none, mixer: {ratio: \"1:2\"}"), "m a m");
  EXPECT_EQ(Layout("n_layers: 6, moe: {every: none, offset: 7}, mixer: {ratio: \"1:2\"}"), "m a m");
  EXPECT_EQ(Layout("n_layers: 6, moe: {every: 4, offset: 0}, mixer: {ratio: \"1:1\"}"),
            "mE a m a mE a");
  EXPECT_EQ(Layout("n_layers: 7, pattern: \"m mE a\""), "m mE a m mE a m");
}

TEST(Config, HumanNumbers) {
  const RunConfig c = MustParse(kSmall, {"train.steps=1_000_000", "train.batch_tokens=0.5Mi",
                                         "optimizer.lr=1.5e-3", "train.hang_timeout=2k"});
  EXPECT_EQ(c.train.steps, 1000000);
  EXPECT_EQ(c.train.batch_tokens, 1 << 19);
  EXPECT_EQ(c.optimizer.lr, 1.5e-3);
  EXPECT_EQ(c.train.hang_timeout, 2000);
  EXPECT_EQ(MustParse(kSmall, {"train.steps=1e5"}).train.steps, 100000);
}

TEST(Config, TokensGiveStepsRoundedUp) {
  std::string text = kSmall;
  text.replace(text.find("steps: 4000"), 11, "tokens: 100B");
  // 100e9 / 1024 = 97656250 exactly.
  EXPECT_EQ(MustParse(text).train.steps, 97656250);
  EXPECT_EQ(MustParse(text, {"train.tokens=5_000_001"}).train.steps, 4883);
}

TEST(Config, WsdDecayIsAShareOrACount) {
  EXPECT_EQ(MustParse(kSmall, {"schedule.name=wsd"}).schedule.decay_steps, 400);
  EXPECT_EQ(
      MustParse(kSmall, {"schedule.name=wsd", "schedule.decay_steps=0.25"}).schedule.decay_steps,
      1000);
  EXPECT_EQ(
      MustParse(kSmall, {"schedule.name=wsd", "schedule.decay_steps=77"}).schedule.decay_steps, 77);
}

TEST_F(ConfigFiles, BasesAreReadFirstAndRelativeToTheirFile) {
  Write(
      "model.yaml",
      "model: {vocab_size: 256, d_model: 64, n_layers: 8, attention: {heads: 4}, mlp: {d_ff: 9}}");
  Write("sub/small.yaml", "base: ../model.yaml\nmodel: {d_model: 32}\ndata: {seq_len: 64}\n");
  Write("sub/data.yaml", "data: {train: [{path: a.h5}, {path: b.h5, weight: 2}], seq_len: 32}\n");
  Write("run.yaml",
        "base: [sub/small.yaml, sub/data.yaml]\n"
        "train: {steps: 4000, batch_tokens: 1Ki}\nmodel: {attention: {kv_heads: 2}}\n");
  auto config = Load("run.yaml", {"model.attention.kv_heads=1", "data.train=[{path: c.h5}]"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model.d_model, 32);
  EXPECT_EQ(config->model.attention.heads, 4);
  EXPECT_EQ(config->model.attention.kv_heads, 1);
  EXPECT_EQ(config->data.seq_len, 32);
  ASSERT_EQ(config->data.train.size(), 1U);  // lists are replaced
  EXPECT_EQ(config->data.train[0].path, "c.h5");
  EXPECT_EQ(config->run_dir, "runs/run");
}

TEST_F(ConfigFiles, TheLastLayerThatNamesAnAlternativeWins) {
  Write("base.yaml", kSmall);
  Write("pattern.yaml", "base: base.yaml\nmodel: {pattern: m a}\n");
  Write("ratio.yaml", "base: pattern.yaml\nmodel: {mixer: {ratio: \"1:3\"}}\n");
  Write("back.yaml", "base: ratio.yaml\nmodel: {pattern: a mE}\n");
  Write("tokens.yaml", "base: base.yaml\ntrain: {tokens: 4Mi}\n");
  EXPECT_EQ(LayoutPattern(Load("pattern.yaml")->model), "m a");
  EXPECT_EQ(LayoutPattern(Load("ratio.yaml")->model), "m m a m");
  EXPECT_EQ(LayoutPattern(Load("back.yaml")->model), "a mE");
  EXPECT_EQ(Load("tokens.yaml")->train.steps, 4096);
  EXPECT_EQ(Load("tokens.yaml", {"train.steps=3000"})->train.steps, 3000);
  EXPECT_EQ(LayoutPattern(Load("back.yaml", {"model.mixer.ratio=1:1"})->model), "m a");
}

TEST_F(ConfigFiles, BothAlternativesInOneLayerAreAnError) {
  Write("base.yaml", kSmall);
  Write("both.yaml",
        "base: base.yaml\nmodel: {pattern: m a, mixer: {ratio: \"1:3\"}}\ntrain:\n  steps: 9000\n"
        "  tokens: 1B\n");
  const std::string error = ErrorOf(Load("both.yaml"));
  EXPECT_THAT(error, HasSubstr("both.yaml:2:9: model.pattern stands instead of"));
  EXPECT_THAT(error, HasSubstr("both.yaml:5:3: train.tokens and train.steps"));
  EXPECT_THAT(ErrorOf(Load("base.yaml", {"train.steps=1", "train.tokens=1"})),
              HasSubstr("alternatives"));
  // A period for MoE has no meaning beside a pattern.
  Write("pattern.yaml", "base: base.yaml\nmodel: {pattern: m a}\n");
  EXPECT_THAT(ErrorOf(Load("pattern.yaml", {"model.moe.every=2"})),
              HasSubstr("every has no meaning beside model.pattern"));
}

TEST_F(ConfigFiles, ShorthandsMergeByKey) {
  Write("base.yaml", kSmall);
  Write("moe.yaml", "base: base.yaml\nmodel: {moe: {every: 2, experts: 4}}\n");
  Write("dense.yaml", "base: moe.yaml\nmodel: {moe: none}\ncheckpoint:\n");
  EXPECT_TRUE(Load("moe.yaml")->model.Has(SublayerKind::kMoe));
  EXPECT_FALSE(Load("dense.yaml")->model.Has(SublayerKind::kMoe));
  EXPECT_FALSE(Load("moe.yaml", {"model.moe=none"})->model.Has(SublayerKind::kMoe));
  EXPECT_EQ(Load("dense.yaml", {"model.moe.every=4"})->model.moe.experts, 4);
}

TEST_F(ConfigFiles, BrokenBases) {
  Write("base.yaml", kSmall);
  Write("a.yaml", "base: b.yaml\n");
  Write("b.yaml", "base: [a.yaml]\n");
  EXPECT_THAT(ErrorOf(Load("a.yaml")), HasSubstr("its own base"));
  Write("self.yaml", "base: ./sub/../self.yaml\n");
  EXPECT_THAT(ErrorOf(Load("self.yaml")), HasSubstr("self.yaml:1:7: base"));
  Write("missing.yaml", "\nbase: nothing.yaml\nmodel: {d_modle: 3}\n");
  const std::string error = ErrorOf(Load("missing.yaml"));
  EXPECT_THAT(error, HasSubstr("missing.yaml:2:7: base"));
  EXPECT_THAT(error, HasSubstr("did you mean model.d_model?"));
  EXPECT_THAT(error, Not(HasSubstr("is missing")));
  Write("list.yaml", "base: [{a: b}]\n");
  EXPECT_THAT(ErrorOf(Load("list.yaml")), HasSubstr("base must be the path"));
  Write("dir.yaml", "base: sub\n");
  EXPECT_THAT(ErrorOf(Load("dir.yaml")), HasSubstr("this is a directory"));
  // Every level doubles the number of reads: stopped by a count.
  Write("l0.yaml", "model: {}\n");
  for (int i = 1; i < 40; ++i) {
    const std::string below = absl::StrCat("l", i - 1, ".yaml");
    Write(absl::StrCat("l", i, ".yaml"), absl::StrCat("base: [", below, ", ", below, "]\n"));
  }
  EXPECT_THAT(ErrorOf(Load("l39.yaml")), HasSubstr("more than 100 base files"));
}

TEST(Config, WordsAreNamedInMessages) {
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.stpes=5"})),
              HasSubstr("word \"train.stpes=5\": unknown key \"train.stpes\"; did you mean "
                        "train.steps?"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.steps=many"})), HasSubstr("word \"train.steps=many\""));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.steps"})), HasSubstr("key.path=value"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"=5"})), HasSubstr("key.path=value"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train..steps=5"})), HasSubstr("empty part"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.steps="})), HasSubstr("found no value"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.steps=[1"})), HasSubstr("not valid YAML"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.steps=5", "train.steps=6"})), HasSubstr("given twice"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train=5", "train.steps=6"})), HasSubstr("given twice"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"base=x.yaml"})), HasSubstr("only be given in a file"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"model.d_model.x=5"})), HasSubstr("model.d_model"));
}

TEST(Config, SeveralRanks) {
  EXPECT_THAT(ErrorOf(Parse(kSmall, {}, ConfigUse::kTrain, 4)),
              HasSubstr("several ranks are not supported yet"));
  const RunConfig c = MustParse(kSmall, {"parallel.data=4"}, ConfigUse::kPlan, 4);
  EXPECT_EQ(c.accumulation(4), 1);
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"parallel.data=2"}, ConfigUse::kPlan, 4)),
              HasSubstr("parallel.data 2 needs 2 ranks, but there are 4"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {}, ConfigUse::kPlan, 8)),
              HasSubstr("the nearest valid value is 2048"));
}

TEST(Config, AllErrorsAtOnceInOrder) {
  const std::string error = ErrorOf(
      Parse("model:\n  d_model: x\n  vocab_size: 1e99\nlog: 5\ntrain: {steps: 0, batch_tokens: 3}\n"
            "optimizer: {clip: -1}\n"));
  EXPECT_THAT(error, HasSubstr("test.yaml:1:1: data.train is missing"));
  EXPECT_THAT(error, HasSubstr("test.yaml:1:1: model.n_layers is missing"));
  EXPECT_THAT(error, HasSubstr("test.yaml:2:12: model.d_model: \"x\" is not a number"));
  EXPECT_THAT(error, HasSubstr("test.yaml:3:15: model.vocab_size: \"1e99\" is out of range"));
  EXPECT_THAT(error, HasSubstr("test.yaml:4:6: log: expected a map of keys, found \"5\""));
  EXPECT_THAT(error, HasSubstr("test.yaml:5:16: train.steps: \"0\" is out of range"));
  EXPECT_THAT(error, HasSubstr("test.yaml:5:33: train.batch_tokens 3 must be a multiple of"));
  EXPECT_THAT(error, HasSubstr("test.yaml:6:19: optimizer.clip: \"-1\" is out of range"));
  EXPECT_LT(error.find(":2:12:"), error.find(":3:15:"));
  EXPECT_LT(error.find(":5:33:"), error.find(":6:19:"));
}

TEST(Config, ManyErrorsAreCutShort) {
  std::string text = kSmall;
  for (int i = 0; i < 5000; ++i) absl::StrAppend(&text, "key", i, ": 1\n");
  const std::string error = ErrorOf(Parse(text));
  EXPECT_THAT(error, HasSubstr("and 4900 more errors"));
}

// Every setting away from its default.
constexpr char kEverything[] = R"(
run_dir: "/tmp/a run \"x\" \\ é"
model:
  vocab_size: 300
  d_model: 48
  n_layers: 6
  tie_embeddings: true
  norm_eps: 1.5e-5
  pattern: "m aE a mE mE m"
  attention: {heads: 6, kv_heads: 2, head_dim: 10, rope_theta: 12345.678}
  mamba: {d_state: 7, d_conv: 3, expand: 3, dt_rank: 5, inner_norms: false, conv_bias: false, proj_bias: true}
  mlp: {d_ff: 100}
  moe: {experts: 5, top_k: 3, d_ff: 60, renormalize: true, aux_loss: 0.0123, z_loss: 1e-3, aux_pool: layer}
  init: {std: 0.013, scheme: hf}
parallel: {data: 1, expert_slack: 1.7}
data:
  train: [{path: a.h5, weight: 0.1}, {path: "b,c: {d}.h5", weight: 3}]
  validation: [{path: v.h5}]
  seq_len: 96
  reset_at_documents: false
train:
  device: cpu
  precision: fp32
  deterministic: false
  steps: 777
  batch_tokens: 960
  micro_batch: 5
  seed: 9223372036854775807
  recompute: mixers
  hang_timeout: 12.5
optimizer: {name: adamw, lr: 0.00123, betas: [0.85, 0.999], eps: 1e-9, weight_decay: 0.07, clip: 0, moments: bf16}
schedule: {name: wsd, warmup_steps: 11, min_lr_ratio: 0.3, decay_steps: 99, decay: linear}
checkpoint: {every: 7, keep: 2, async: false, dir: elsewhere}
log: {every: 3, tensorboard: false}
evaluation: {every: 9, tokens: 480}
)";

void ExpectSame(const RunConfig& a, const RunConfig& b) {
  const auto same_sources = [](const std::vector<SourceSpec>& x, const std::vector<SourceSpec>& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), [](const auto& p, const auto& q) {
      return p.path == q.path && p.weight == q.weight;
    });
  };
  EXPECT_EQ(a.run_dir, b.run_dir);
  EXPECT_EQ(a.model.vocab_size, b.model.vocab_size);
  EXPECT_EQ(a.model.d_model, b.model.d_model);
  EXPECT_EQ(a.model.n_layers, b.model.n_layers);
  EXPECT_EQ(a.model.tie_embeddings, b.model.tie_embeddings);
  EXPECT_EQ(a.model.norm_eps, b.model.norm_eps);
  EXPECT_EQ(a.model.attention.heads, b.model.attention.heads);
  EXPECT_EQ(a.model.attention.kv_heads, b.model.attention.kv_heads);
  EXPECT_EQ(a.model.attention.head_dim, b.model.attention.head_dim);
  EXPECT_EQ(a.model.attention.rope_theta, b.model.attention.rope_theta);
  EXPECT_EQ(a.model.mamba.d_state, b.model.mamba.d_state);
  EXPECT_EQ(a.model.mamba.d_conv, b.model.mamba.d_conv);
  EXPECT_EQ(a.model.mamba.expand, b.model.mamba.expand);
  EXPECT_EQ(a.model.mamba.d_inner, b.model.mamba.d_inner);
  EXPECT_EQ(a.model.mamba.dt_rank, b.model.mamba.dt_rank);
  EXPECT_EQ(a.model.mamba.inner_norms, b.model.mamba.inner_norms);
  EXPECT_EQ(a.model.mamba.conv_bias, b.model.mamba.conv_bias);
  EXPECT_EQ(a.model.mamba.proj_bias, b.model.mamba.proj_bias);
  EXPECT_EQ(a.model.mlp_d_ff, b.model.mlp_d_ff);
  EXPECT_EQ(a.model.moe.experts, b.model.moe.experts);
  EXPECT_EQ(a.model.moe.top_k, b.model.moe.top_k);
  EXPECT_EQ(a.model.moe.d_ff, b.model.moe.d_ff);
  EXPECT_EQ(a.model.moe.renormalize, b.model.moe.renormalize);
  EXPECT_EQ(a.model.moe.aux_loss, b.model.moe.aux_loss);
  EXPECT_EQ(a.model.moe.z_loss, b.model.moe.z_loss);
  EXPECT_EQ(a.model.moe.aux_pool, b.model.moe.aux_pool);
  EXPECT_EQ(a.model.init_std, b.model.init_std);
  EXPECT_EQ(a.model.init_scheme, b.model.init_scheme);
  EXPECT_TRUE(std::equal(
      a.model.sublayers.begin(), a.model.sublayers.end(), b.model.sublayers.begin(),
      b.model.sublayers.end(),
      [](const Sublayer& x, const Sublayer& y) { return x.kind == y.kind && x.layer == y.layer; }));
  EXPECT_EQ(a.parallel.tensor, b.parallel.tensor);
  EXPECT_EQ(a.parallel.expert, b.parallel.expert);
  EXPECT_EQ(a.parallel.data, b.parallel.data);
  EXPECT_EQ(a.parallel.expert_slack, b.parallel.expert_slack);
  EXPECT_TRUE(same_sources(a.data.train, b.data.train));
  EXPECT_TRUE(same_sources(a.data.validation, b.data.validation));
  EXPECT_EQ(a.data.seq_len, b.data.seq_len);
  EXPECT_EQ(a.data.reset_at_documents, b.data.reset_at_documents);
  EXPECT_EQ(a.train.device, b.train.device);
  EXPECT_EQ(a.train.precision, b.train.precision);
  EXPECT_EQ(a.train.deterministic, b.train.deterministic);
  EXPECT_EQ(a.train.steps, b.train.steps);
  EXPECT_EQ(a.train.batch_tokens, b.train.batch_tokens);
  EXPECT_EQ(a.train.micro_batch, b.train.micro_batch);
  EXPECT_EQ(a.train.seed, b.train.seed);
  EXPECT_EQ(a.train.recompute, b.train.recompute);
  EXPECT_EQ(a.train.hang_timeout, b.train.hang_timeout);
  EXPECT_EQ(a.optimizer.lr, b.optimizer.lr);
  EXPECT_EQ(a.optimizer.beta1, b.optimizer.beta1);
  EXPECT_EQ(a.optimizer.beta2, b.optimizer.beta2);
  EXPECT_EQ(a.optimizer.eps, b.optimizer.eps);
  EXPECT_EQ(a.optimizer.weight_decay, b.optimizer.weight_decay);
  EXPECT_EQ(a.optimizer.clip, b.optimizer.clip);
  EXPECT_EQ(a.optimizer.moments, b.optimizer.moments);
  EXPECT_EQ(a.schedule.kind, b.schedule.kind);
  EXPECT_EQ(a.schedule.warmup_steps, b.schedule.warmup_steps);
  EXPECT_EQ(a.schedule.min_lr_ratio, b.schedule.min_lr_ratio);
  EXPECT_EQ(a.schedule.decay_steps, b.schedule.decay_steps);
  EXPECT_EQ(a.checkpoint.every, b.checkpoint.every);
  EXPECT_EQ(a.checkpoint.keep, b.checkpoint.keep);
  EXPECT_EQ(a.checkpoint.async, b.checkpoint.async);
  EXPECT_EQ(a.checkpoint.dir, b.checkpoint.dir);
  EXPECT_EQ(a.log.every, b.log.every);
  EXPECT_EQ(a.log.tensorboard, b.log.tensorboard);
  EXPECT_EQ(a.evaluation.every, b.evaluation.every);
  EXPECT_EQ(a.evaluation.tokens, b.evaluation.tokens);
}

std::vector<std::string> ShippedConfigs() {
  std::vector<std::string> paths;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(KRAIT_SOURCE_DIR "/configs")) {
    if (entry.is_regular_file()) paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

TEST(Config, ResolvedTextReadsBackToTheSame) {
  const RunConfig everything = MustParse(kEverything);
  EXPECT_EQ(everything.run_dir, "/tmp/a run \"x\" \\ é");
  EXPECT_EQ(everything.data.train[1].path, "b,c: {d}.h5");
  EXPECT_EQ(everything.optimizer.clip, 0);
  EXPECT_EQ(everything.model.attention.rope_theta, 12345.678);
  ExpectSame(everything, MustParse(everything.ToYaml()));
  EXPECT_EQ(MustParse(everything.ToYaml()).ToYaml(), everything.ToYaml());
  EXPECT_THAT(everything.ToYaml(), HasSubstr("lr: 0.00123\n"));

  ASSERT_GE(ShippedConfigs().size(), 7U);
  for (const std::string& path : ShippedConfigs()) {
    SCOPED_TRACE(path);
    const auto config = LoadConfig(path, {}, ConfigUse::kPlan, 1);
    ASSERT_TRUE(config.ok()) << config.status();
    ExpectSame(*config, MustParse(config->ToYaml(), {}, ConfigUse::kPlan));
  }
}

TEST(Config, TheQuickstartTrainsAsItIs) {
  const auto config =
      LoadConfig(KRAIT_SOURCE_DIR "/configs/quickstart.yaml", {}, ConfigUse::kTrain, 1);
  ASSERT_TRUE(config.ok()) << config.status();
  for (const SublayerKind kind :
       {SublayerKind::kAttention, SublayerKind::kMamba, SublayerKind::kMlp, SublayerKind::kMoe}) {
    EXPECT_TRUE(config->model.Has(kind)) << Name(kind);
  }
}

// The keys of a resolved config, dotted, and their lines.
std::vector<std::pair<std::string, size_t>> KeysOf(const std::vector<std::string>& lines) {
  std::vector<std::pair<std::string, size_t>> keys;
  std::vector<std::string> open;
  for (size_t i = 0; i < lines.size(); ++i) {
    const size_t indent = lines[i].find_first_not_of(' ');
    open.resize(indent / 2);
    open.push_back(lines[i].substr(indent, lines[i].find(':') - indent));
    std::string dotted;
    for (const std::string& part : open) dotted += (dotted.empty() ? "" : ".") + part;
    keys.emplace_back(dotted, i);
  }
  return keys;
}

TEST(Config, EveryKeyMisspeltByOneLetterIsSuggested) {
  std::vector<std::string> lines;
  std::string text = MustParse(kEverything).ToYaml();
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  std::mt19937 random(7);
  int tried = 0;
  for (const auto& [dotted, line] : KeysOf(lines)) {
    const std::string key = dotted.substr(dotted.rfind('.') + 1);
    const size_t at = lines[line].find_first_not_of(' ');
    for (size_t i = 0; i < key.size(); ++i) {
      // A letter replaced, left out, doubled.
      for (int edit = 0; edit < 3; ++edit) {
        if (edit == 1 && key.size() == 1) continue;
        std::string wrong = key;
        if (edit == 0) {
          wrong[i] = static_cast<char>('a' + random() % 26);
        } else if (edit == 1) {
          wrong.erase(i, 1);
        } else {
          wrong.insert(i, 1, key[i]);
        }
        if (wrong == key) continue;
        std::vector<std::string> changed = lines;
        changed[line] = changed[line].substr(0, at) + wrong + changed[line].substr(at + key.size());
        std::string broken;
        for (const std::string& l : changed) broken += l + "\n";
        const std::string place =
            "test.yaml:" + std::to_string(line + 1) + ":" + std::to_string(at + 1) + ": ";
        EXPECT_THAT(ErrorOf(Parse(broken)), HasSubstr(place + "unknown key"));
        EXPECT_THAT(ErrorOf(Parse(broken)), HasSubstr("did you mean " + dotted + "?"))
            << wrong << " for " << dotted;
        ++tried;
      }
    }
  }
  EXPECT_GT(tried, 1000);
}

TEST(Config, SuggestsTheSection) {
  EXPECT_THAT(ErrorOf(Parse(std::string(kSmall) + "lr: 3\n")),
              HasSubstr("did you mean optimizer.lr?"));
  EXPECT_THAT(ErrorOf(Parse(std::string(kSmall) + "zebra: 3\n")), HasSubstr("known here: base, "));
}

TEST(Config, SettingsOfAbsentKindsDoNotMatter) {
  const RunConfig a = MustParse(kSmall, {"model.moe.experts=4", "model.moe.every=none"});
  ExpectSame(a, MustParse(kSmall));
  ExpectSame(MustParse(kSmall, {"model.mixer.ratio=1:0", "model.mamba.d_state=8"}),
             MustParse(kSmall, {"model.mixer.ratio=1:0"}));
}

TEST(CompareForResume, SortsKeysByWhatAChangeNeeds) {
  using Kind = ConfigDifference::Kind;
  const RunConfig before = MustParse(kSmall);
  EXPECT_TRUE(CompareForResume(before, before).empty());
  const std::pair<const char*, Kind> cases[] = {
      {"model.vocab_size=257", Kind::kRefused},
      {"model.mlp.d_ff=130", Kind::kRefused},
      {"model.pattern=m a", Kind::kRefused},
      {"model.attention.rope_theta=10000", Kind::kRefused},
      {"data.seq_len=256", Kind::kNeedsAllow},
      {"data.train=[{path: y.h5}]", Kind::kNeedsAllow},
      {"data.reset_at_documents=false", Kind::kNeedsAllow},
      {"train.batch_tokens=2Ki", Kind::kNeedsAllow},
      {"train.seed=1", Kind::kNeedsAllow},
      {"train.steps=9000", Kind::kApplies},
      {"optimizer.lr=1e-3", Kind::kApplies},
      {"optimizer.betas=[0.9, 0.99]", Kind::kApplies},
      {"schedule.name=linear", Kind::kApplies},
  };
  for (const auto& [word, kind] : cases) {
    const std::string key = std::string(word).substr(0, std::string(word).find('='));
    const auto differences = CompareForResume(before, MustParse(kSmall, {word}));
    const auto it = std::find_if(differences.begin(), differences.end(),
                                 [&key](const ConfigDifference& d) { return d.key == key; });
    ASSERT_NE(it, differences.end()) << word;
    EXPECT_EQ(it->kind, kind) << word;
    EXPECT_NE(it->before, it->after);
  }
  const auto lr = CompareForResume(before, MustParse(kSmall, {"optimizer.lr=1e-3"}));
  ASSERT_EQ(lr.size(), 1U);
  EXPECT_EQ(lr[0].before, "3e-4");
  EXPECT_EQ(lr[0].after, "0.001");
  // More steps move the end of a decay given as a share.
  EXPECT_EQ(CompareForResume(before, MustParse(kSmall, {"train.steps=9000"})).size(), 2U);
  EXPECT_TRUE(
      CompareForResume(
          before, MustParse(kSmall, {"log.every=3", "checkpoint.keep=9", "evaluation.every=2",
                                     "parallel.expert_slack=2", "train.micro_batch=4", "run_dir=x",
                                     "train.recompute=layer"}))
          .empty());
}

TEST(AllowsChange, WholeKeyLastPartOrSection) {
  EXPECT_TRUE(AllowsChange("data.seq_len", "data.seq_len"));
  EXPECT_TRUE(AllowsChange("seq_len", "data.seq_len"));
  EXPECT_TRUE(AllowsChange("data", "data.seq_len"));
  EXPECT_TRUE(AllowsChange("batch_tokens", "train.batch_tokens"));
  EXPECT_FALSE(AllowsChange("seed", "data.seq_len"));
  EXPECT_FALSE(AllowsChange("seq", "data.seq_len"));
  EXPECT_FALSE(AllowsChange("", "data.seq_len"));
}

TEST(ConfigFuzz, MutatedBytesNeverCrashOrHang) {
  const std::string valid = kEverything;
  const std::string spice = "{}[]:,&*!|>'\"%@`#?-\n \t\\0x1e9_.\xff\xc3\x00~<";
  std::mt19937 random(20240607);
  const auto below = [&random](size_t n) { return static_cast<size_t>(random()) % n; };
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = valid;
    const size_t edits = 1 + below(4);
    for (size_t e = 0; e < edits && !text.empty(); ++e) {
      const size_t at = below(text.size());
      switch (below(5)) {
        case 0:
          text[at] = static_cast<char>(random() & 0xFF);
          break;
        case 1:
          text[at] = spice[below(spice.size())];
          break;
        case 2:
          text.insert(at, 1, spice[below(spice.size())]);
          break;
        case 3:
          text.erase(at, 1 + below(20));
          break;
        default:
          text.insert(at, text.substr(below(text.size()), below(40)));
          break;
      }
    }
    const auto config = Parse(text);
    if (config.ok()) {
      ++accepted;
      ExpectSame(*config, MustParse(config->ToYaml()));
    } else {
      EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig);
      EXPECT_NE(MessageOf(config.status()), "");
    }
  }
  // Some mutations hit comments, digits or names and stay valid.
  EXPECT_GT(accepted, 40);
  EXPECT_LT(accepted, 3500);
}

}  // namespace
}  // namespace krait
