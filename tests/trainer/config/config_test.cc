#include "trainer/config/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "paths.h"
#include "support/temp_folder.h"
#include "trainer/config/config_testing.h"

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::string Layout(const std::string& model, const std::vector<std::string>& words = {}) {
  return LayoutPattern(MustParse("model: {vocab_size: 8, d_model: 8, mlp: {d_ff: 8}, attention: "
                                 "{heads: 2}, " +
                                     model + "}",
                                 words, ConfigUse::kPlan)
                           .model);
}

class ConfigFiles : public ::testing::Test {
 protected:
  void Write(const std::string& name, const std::string& text) { folder_.Write(name, text); }
  absl::StatusOr<RunConfig> Load(const std::string& name,
                                 const std::vector<std::string>& words = {}) {
    return LoadConfig(folder_ / name, words, ConfigUse::kTrain, 1);
  }

  TempFolder folder_;
};

TEST(Config, PlacementFollowsPrecision) {
  const Placement automatic = PlacementOf(MustParse(kSmall));
  EXPECT_EQ(automatic.device, Device::kCpu);
  EXPECT_EQ(automatic.compute, DType::kF32);
  const RunConfig bf16 = MustParse(kSmall, {"train.device=cpu", "train.precision=bf16"});
  EXPECT_EQ(bf16.train.precision, Precision::kBf16);
  EXPECT_EQ(PlacementOf(bf16).compute, DType::kBF16);
}

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
  EXPECT_EQ(c.schedule.decay_steps, 0);  // of wsd only
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

TEST(Config, WsdDecayOfOneIsAShareWithAPoint) {
  const std::vector<std::string> words = {"schedule.name=wsd", "schedule.warmup_steps=0"};
  const auto steps = [&](const std::string& decay) {
    std::vector<std::string> all = words;
    all.push_back("schedule.decay_steps=" + decay);
    return MustParse(kSmall, all).schedule.decay_steps;
  };
  EXPECT_EQ(steps("1.0"), 4000);
  EXPECT_EQ(steps("1"), 1);
  // The resolved config says the count.
  EXPECT_EQ(MustParse(MustParse(kSmall, {words[0], words[1], "schedule.decay_steps=1"}).ToYaml())
                .schedule.decay_steps,
            1);
}

TEST(Config, ARatioOverAPatternKeepsItsExperts) {
  const RunConfig saved = MustParse(kSmall, {"model.moe={every: 4, offset: 1, experts: 4}"});
  ASSERT_EQ(LayoutPattern(saved.model), "m mE m m a mE m m");
  // A run's resolved config stores the pattern.
  const RunConfig config = MustParse(saved.ToYaml(), {"model.mixer.ratio=1:3"});
  EXPECT_EQ(LayoutPattern(config.model), "m mE a m");
  EXPECT_EQ(config.model.moe.experts, 4);
  EXPECT_EQ(Layout("n_layers: 8, pattern: \"m m m aE m m m m\"", {"model.mixer.ratio=1:1"}),
            "m a m aE m a m a");
  // Given beside the ratio, the experts are those that are given.
  EXPECT_EQ(LayoutPattern(
                MustParse(saved.ToYaml(), {"model.mixer.ratio=1:3", "model.moe.every=none"}).model),
            "m m a m");
  EXPECT_EQ(LayoutPattern(
                MustParse(saved.ToYaml(), {"model.mixer.ratio=1:3", "model.moe.offset=0"}).model),
            "mE m a m");
  const std::string error = ErrorOf(
      Parse(MustParse(kSmall, {"model.pattern=mE mE m a"}).ToYaml(), {"model.mixer.ratio=1:3"}));
  EXPECT_THAT(error, HasSubstr("word \"model.mixer.ratio=1:3\": model.mixer.ratio takes the place "
                               "of model.pattern"));
  EXPECT_THAT(error, HasSubstr("give model.moe.every too"));
}

TEST_F(ConfigFiles, APatternWithoutExpertsSaysSo) {
  Write("base.yaml", kSmall);
  Write("moe.yaml", "base: base.yaml\nmodel: {moe: {every: 2, experts: 4}}\n");
  Write("pattern.yaml", "base: moe.yaml\nmodel: {pattern: m a}\n");
  const auto config = Load("pattern.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  ASSERT_EQ(config->notes.size(), 2U);
  EXPECT_THAT(config->notes[0], HasSubstr("pattern.yaml:2:9: model.pattern has no E"));
  EXPECT_THAT(config->notes[0], HasSubstr("model.moe.every 2"));
  EXPECT_THAT(config->notes[1], HasSubstr("model.moe.experts has no effect"));
  EXPECT_TRUE(Load("moe.yaml")->notes.empty());
  // Unknown keys below a pattern stay unknown.
  Write("ration.yaml", "base: base.yaml\nmodel: {mixer: {ration: \"1:3\"}}\n");
  Write("over.yaml", "base: ration.yaml\nmodel: {pattern: m a}\n");
  EXPECT_THAT(ErrorOf(Load("over.yaml")), HasSubstr("did you mean model.mixer.ratio?"));
}

TEST(Config, WhatHasNoEffectIsNoted) {
  const auto notes = [](const std::vector<std::string>& words) {
    const RunConfig config = MustParse(kSmall, words);
    std::string all;
    for (const std::string& note : config.notes) all += note + "\n";
    // A run's own config says nothing of the kind.
    EXPECT_TRUE(MustParse(config.ToYaml()).notes.empty()) << config.ToYaml();
    return all;
  };
  EXPECT_EQ(notes({}), "");
  EXPECT_THAT(notes({"schedule.decay_steps=10"}),
              HasSubstr("word \"schedule.decay_steps=10\": schedule.decay_steps has no effect: it "
                        "is for schedule.name wsd only"));
  EXPECT_EQ(notes({"schedule.name=wsd", "schedule.decay_steps=10"}), "");
  EXPECT_THAT(notes({"schedule.name=constant", "schedule.min_lr_ratio=0"}),
              HasSubstr("schedule.min_lr_ratio has no effect"));
  EXPECT_THAT(notes({"model.mixer.ratio=1:0", "model.mamba.d_state=8"}),
              HasSubstr("model.mamba.d_state has no effect: no layer is a Mamba layer"));
  EXPECT_THAT(notes({"model.mixer.ratio=0:1"}),
              HasSubstr("model.attention.heads has no effect: no layer has attention"));
  EXPECT_THAT(notes({"model.mixer={ratio: 1:0, offset: 2}"}),
              HasSubstr("model.mixer.offset has no effect"));
  EXPECT_THAT(notes({"model.moe={every: none, experts: 4}"}),
              HasSubstr("model.moe.experts has no effect: no layer has experts"));
  EXPECT_THAT(notes({"evaluation.every=5"}), HasSubstr("evaluation.every has no effect"));
  EXPECT_EQ(notes({"evaluation.every=5", "data.validation=[{path: v.h5}]"}), "");
  EXPECT_THAT(notes({"model.pattern=m a m a m m m m m"}),
              HasSubstr("model.pattern has 9 words for 8 layers: the last 1 have no effect"));
}

TEST_F(ConfigFiles, NotesStandAboveTheExplainedConfig) {
  Write("base.yaml", kSmall);
  const auto text = ExplainConfig(folder_ / "base.yaml", {"evaluation.every=5"}, 1);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_TRUE(text->starts_with("# note: word \"evaluation.every=5\": ")) << *text;
}

TEST(Config, PathsAreTakenAsUsersWriteThem) {
  const RunConfig config =
      MustParse(kSmall, {"run_dir=a/b//", "data.train=[{path: ~/x.h5}]", "checkpoint.dir=c/"});
  EXPECT_EQ(config.run_dir, "a/b");
  EXPECT_EQ(config.checkpoint.dir, "c");
  EXPECT_EQ(config.data.train[0].path, std::string(getenv("HOME")) + "/x.h5");
  EXPECT_EQ(MustParse(kSmall, {"run_dir=a/"}).checkpoint.dir, "a/checkpoints");
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
  EXPECT_EQ(LayoutPattern(Load("back.yaml", {"model.mixer.ratio=1:1"})->model), "m aE");
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
  Write("sub/other.yaml", "model: {}\n");
  Write("self.yaml", "base: ./sub/../self.yaml\n");
  EXPECT_THAT(ErrorOf(Load("self.yaml")), HasSubstr("self.yaml:1:7: base"));
  EXPECT_THAT(ErrorOf(Load("self.yaml")), HasSubstr("its own base"));
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
  EXPECT_EQ(MustParse(kSmall, {}, ConfigUse::kTrain, 4).accumulation(4), 1);
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"parallel.tensor=3"}, ConfigUse::kTrain, 4)),
              HasSubstr("parallel.tensor 3 needs 3 ranks or a multiple of that, but there are 4"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"parallel.expert=8"}, ConfigUse::kTrain, 4)),
              HasSubstr("parallel.expert 8 does not divide the ranks of a stage 4"));
  EXPECT_THAT(
      ErrorOf(Parse(kSmall, {"parallel.tensor=2", "parallel.data=4"}, ConfigUse::kTrain, 4)),
      HasSubstr("parallel.data 4 x parallel.tensor 2 needs 8 ranks, but there are 4; use "
                "auto or 2"));
  // Where the number of ranks is not known, nothing is said of it.
  const RunConfig unknown =
      MustParse(kSmall, {"parallel.tensor=2", "parallel.expert=4"}, ConfigUse::kPlan, 0);
  EXPECT_EQ(LeastRanks(unknown.parallel), 4);
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

// What a checkpoint says of its run is read anywhere; whether it could run here is another
// question.
TEST(Config, AStoredConfigAsksNothingOfThisMachine) {
  const std::vector<std::string> words = {"parallel.tensor=2",      "parallel.data=3",
                                          "train.device=cuda",      "train.precision=bf16",
                                          "train.batch_tokens=3Ki", "schedule.warmup_steps=5000",
                                          "optimizer.moments=bf16", "optimizer.betas=[0.9, 0.999]"};
  const std::string error = ErrorOf(Parse(kSmall, words));
  EXPECT_THAT(error, HasSubstr("parallel.tensor"));
  EXPECT_THAT(error, HasSubstr("optimizer.moments"));
  const RunConfig stored = MustParse(kSmall, words, ConfigUse::kStored);
  EXPECT_EQ(stored.parallel.tensor, 2);
  EXPECT_EQ(stored.train.device, DevicePreference::kCuda);
  EXPECT_EQ(stored.train.precision, Precision::kBf16);
  // Its model has to be one all the same.
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"model.attention.kv_heads=3"}, ConfigUse::kStored)),
              HasSubstr("kv_heads"));
}

TEST(Config, SettingsWithoutEffectOnThisDeviceOrRanksAreNoted) {
  EXPECT_THAT(MustParse(kSmall).notes, IsEmpty());
  EXPECT_THAT(MustParse(kSmall, {"train.hang_timeout=600"}).notes, IsEmpty());
  EXPECT_THAT(
      MustParse(kSmall, {"train.hang_timeout=60", "parallel.expert_slack=2"}).notes,
      ElementsAre(HasSubstr("train.hang_timeout has no effect on a run of one process"),
                  HasSubstr("parallel.expert_slack has no effect where no experts are shared")));
  EXPECT_THAT(MustParse(kSmall, {"train.deterministic=false"}).notes,
              ElementsAre(HasSubstr("train.deterministic has no effect on the CPU")));
  EXPECT_THAT(MustParse(kSmall, {"train.spike_guard.z=4"}).notes,
              ElementsAre(HasSubstr("train.spike_guard.z has no effect without")));
  EXPECT_THAT(MustParse(kSmall, {"train.spike_guard={window: none, z: 4}"}).notes, IsEmpty());
  // Of a checkpoint's config nothing is said.
  EXPECT_THAT(MustParse(kSmall, {"train.hang_timeout=60"}, ConfigUse::kStored).notes, IsEmpty());
  const auto two = ParseConfig(kSmall, "test.yaml", {"train.hang_timeout=60"}, ConfigUse::kTrain,
                               /*ranks=*/2);
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_THAT(two->notes, IsEmpty());
}

TEST(Config, TheReadmesBlockIsAConfig) {
  std::ifstream in(KRAIT_SOURCE_DIR "/README.md");
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const size_t begin = text.find("```yaml\n") + 8, end = text.find("```", begin);
  ASSERT_LT(begin, end);
  const RunConfig config = MustParse(text.substr(begin, end - begin));
  // The defaults that the contract names.
  EXPECT_EQ(config.train.steps, 100000);
  EXPECT_EQ(config.model.d_model, 4096);
  EXPECT_EQ(config.model.attention.rope_theta, 0);
}

TEST(Config, SuggestsTheSection) {
  EXPECT_THAT(ErrorOf(Parse(std::string(kSmall) + "lr: 3\n")),
              HasSubstr("did you mean optimizer.lr?"));
  // The right word without its section goes before a section of a like name.
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"d_model=64"})), HasSubstr("did you mean model.d_model?"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"train.every=5"})),
              HasSubstr("did you mean model.moe.every or checkpoint.every or log.every or "
                        "evaluation.every?"));
  EXPECT_THAT(ErrorOf(Parse(std::string(kSmall) + "zebra: 3\n")), HasSubstr("known here: base, "));
}

}  // namespace
}  // namespace krait
