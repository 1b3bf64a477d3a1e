// The list of keys, where values come from, and keys of one value.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "paths.h"
#include "support/temp_folder.h"
#include "trainer/config/config.h"
#include "trainer/config/config_testing.h"

namespace krait {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(ConfigKeys, EachHasATypeADefaultAndAMeaningAndStandsInTheReadme) {
  std::ifstream file(KRAIT_SOURCE_DIR "/README.md");
  const std::string readme((std::istreambuf_iterator<char>(file)), {});
  std::set<std::string> seen;
  for (const ConfigKeyInfo& key : ListConfigKeys()) {
    EXPECT_TRUE(seen.insert(key.key).second) << key.key << " is named twice";
    EXPECT_FALSE(key.type.empty()) << key.key;
    EXPECT_FALSE(key.default_value.empty()) << key.key;
    EXPECT_FALSE(key.meaning.empty()) << key.key;
    EXPECT_THAT(readme, HasSubstr(key.key.substr(key.key.rfind('.') + 1) + ": ")) << key.key;
  }
  EXPECT_GT(seen.size(), 60U);
}

TEST(ConfigKeys, GivingADefaultChangesNothing) {
  // With experts, so that no group of keys is without effect. What the text itself sets is left
  // out, and defaults that are words: they are refused as values, but for three keys that take any
  // text.
  const std::set<std::string> left_out = {"model.moe.every", "train.batch_tokens", "run_dir",
                                          "model.pattern", "checkpoint.dir"};
  const std::vector<std::string> base = {"model.moe.every=2"};
  const std::string expected = MustParse(kSmall, base).ToYaml();
  int given = 0;
  for (const ConfigKeyInfo& key : ListConfigKeys()) {
    if (left_out.contains(key.key)) continue;
    const auto config = Parse(kSmall, {base[0], key.key + "=" + key.default_value});
    if (!config.ok()) continue;
    EXPECT_EQ(config->ToYaml(), expected) << key.key;
    ++given;
  }
  EXPECT_GE(given, 45);
}

TEST(ConfigKeys, EveryPrintedKeyIsListed) {
  std::set<std::string> listed;
  for (const ConfigKeyInfo& key : ListConfigKeys()) listed.insert(key.key);
  const RunConfig before = MustParse(kSmall, {"model.moe.every=2"});
  RunConfig after = before;
  after.model = {};  // every model key differs
  for (const ConfigDifference& difference : CompareForResume(before, after)) {
    EXPECT_TRUE(listed.contains(difference.key)) << difference.key;
  }
}

TEST(ConfigKeys, GradientsTravelInOneOfTwoDtypes) {
  EXPECT_EQ(MustParse(kSmall).parallel.reduce, GradReduce::kFp32);
  EXPECT_EQ(MustParse(kSmall, {"parallel.reduce=bf16"}).parallel.reduce, GradReduce::kBf16);
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"parallel.reduce=fp8"})), HasSubstr("parallel.reduce"));
}

TEST(ConfigKeys, PadTokenIsAnIdOfTheVocabularyOrNone) {
  EXPECT_EQ(MustParse(kSmall).model.pad_token, -1);
  EXPECT_EQ(MustParse(kSmall, {"model.pad_token=none"}).model.pad_token, -1);
  const RunConfig padded = MustParse(kSmall, {"model.pad_token=0"});
  EXPECT_EQ(padded.model.pad_token, 0);
  EXPECT_THAT(padded.ToYaml(), HasSubstr("pad_token: 0\n"));
  EXPECT_THAT(MustParse(kSmall).ToYaml(), HasSubstr("pad_token: none\n"));
  EXPECT_EQ(MustParse(kSmall, {"model.pad_token=255"}).model.pad_token, 255);
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"model.pad_token=256"})),
              HasSubstr("model.pad_token 256 is no token of model.vocab_size 256"));
  EXPECT_THAT(ErrorOf(Parse(kSmall, {"model.pad_token=-1"})), HasSubstr("model.pad_token"));
  // A resumed run keeps it.
  const auto changes = CompareForResume(MustParse(kSmall), padded);
  ASSERT_EQ(changes.size(), 1u);
  EXPECT_EQ(changes[0].key, "model.pad_token");
  EXPECT_EQ(changes[0].kind, ConfigDifference::Kind::kRefused);
}

TEST(ConfigKeys, RopeThetaNoneMeansNoPositions) {
  EXPECT_EQ(MustParse(kSmall, {"model.attention.rope_theta=none"}).model.attention.rope_theta, 0);
}

TEST(ExplainConfig, SaysWhereEachValueCameFrom) {
  const TempFolder folder;
  folder.Write("base.yaml",
               "model: {vocab_size: 256, d_model: 64, n_layers: 8, attention: {heads: 4},\n"
               "        mlp: {d_ff: 128}}\n");
  folder.Write("run.yaml",
               "base: base.yaml\n"
               "data: {train: [{path: x.h5}], seq_len: 128}\n"
               "train: {tokens: 4M, batch_tokens: 1Ki}\n");
  const std::string path = folder / "run.yaml";
  const auto text = ExplainConfig(path, {"optimizer.lr=1e-3", "model.mixer.ratio=1:3"}, 1);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_THAT(*text, HasSubstr("  d_model: 64  # " + (folder / "base.yaml") + ":1:35\n"));
  EXPECT_THAT(*text, HasSubstr("    kv_heads: 4  # default: heads\n"));
  EXPECT_THAT(*text, HasSubstr("    dt_rank: 4  # default: auto\n"));
  EXPECT_THAT(*text, HasSubstr("    d_state: 16  # default\n"));
  EXPECT_THAT(*text, HasSubstr("  pattern: \"m m a m\"  # model.mixer.ratio at word "
                               "\"model.mixer.ratio=1:3\"\n"));
  EXPECT_THAT(*text, HasSubstr("  tokens: 4000000  # " + path + ":3:17; 3907 steps\n"));
  EXPECT_THAT(*text, HasSubstr("  lr: 0.001  # word \"optimizer.lr=1e-3\"\n"));

  // It is a config itself, with the same values.
  const RunConfig loaded =
      *LoadConfig(path, {"optimizer.lr=1e-3", "model.mixer.ratio=1:3"}, ConfigUse::kTrain, 1);
  EXPECT_EQ(MustParse(*text).ToYaml(), loaded.ToYaml());
  EXPECT_THAT(ErrorOf(ExplainConfig(path, {"optimizer.lr=x"}, 1)), HasSubstr("optimizer.lr"));
}

}  // namespace
}  // namespace krait
