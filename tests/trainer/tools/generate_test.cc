// Generation against the whole forward pass.
#include "trainer/tools/generate.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "support/tiny_run.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

class GenerateTest : public testing::Test {
 protected:
  GenerateTest() { omp_set_num_threads(1); }
  void SetUp() override {
    const auto config = LoadConfig(tiny_.config(), {}, ConfigUse::kTrain, 1);
    ASSERT_TRUE(config.ok());
    Trainer trainer(*config);
    trainer.Init();
    trainer.state().config_yaml = config->ToYaml();
    trainer.state().tokenizer = "bytes";
    SaveOptions save;
    save.dir = config->checkpoint.dir;
    ASSERT_TRUE(SaveCheckpoint(save, trainer.state(), trainer.Boxes()).ok());
    auto loaded = InferenceModel::Load(config->run_dir, [](const std::string&) {});
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    model_ = std::move(*loaded);
  }
  std::vector<int32_t> Greedy(const std::vector<int32_t>& prompt, int64_t tokens,
                              const std::vector<int32_t>& ends = {}) {
    SamplingOptions options;
    options.temperature = 0;
    std::vector<int32_t> ids;
    const auto stats = Generate(model_.get(), prompt, tokens, 256, ends, options, [&](int32_t id) {
      ids.push_back(id);
      return absl::OkStatus();
    });
    EXPECT_TRUE(stats.ok()) << stats.status();
    return ids;
  }
  // The logits after `ids`, fed in pieces of the given sizes.
  std::vector<float> Logits(const std::vector<int32_t>& ids, const std::vector<int64_t>& pieces) {
    std::unique_ptr<SequenceState> state;
    const auto total = static_cast<int64_t>(ids.size());
    const int64_t longest = *std::max_element(pieces.begin(), pieces.end());
    const Context ctx = model_->ForDecode({.batch = 1, .seq_len = longest}, total, &state);
    std::vector<float> logits(256);
    std::vector<int32_t> copy = ids;
    int64_t at = 0;
    for (int64_t piece : pieces) {
      model_->model().Decode(Tensor(logits.data(), DType::kF32, Device::kCpu, {1, 256}),
                             Tensor(copy.data() + at, DType::kI32, Device::kCpu, {1, piece}),
                             state.get(), ctx);
      at += piece;
    }
    EXPECT_EQ(at, total);
    return logits;
  }
  TinyRun tiny_;
  std::unique_ptr<InferenceModel> model_;
};

std::vector<int32_t> Ids(int64_t n) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(i * 37 % 256));
  return ids;
}

TEST_F(GenerateTest, PiecesOfThePromptGiveTheSameLogits) {
  const std::vector<int32_t> ids = Ids(150);
  const std::vector<float> whole = Logits(ids, {150});
  for (const std::vector<int64_t>& pieces :
       {std::vector<int64_t>{64, 64, 22}, {1, 149}, {149, 1}, {3, 1, 1, 70, 75}}) {
    const std::vector<float> cut = Logits(ids, pieces);
    for (size_t v = 0; v < whole.size(); ++v) {
      // fp32 in another order of summation.
      EXPECT_NEAR(cut[v], whole[v], 2e-5) << v;
    }
  }
}

TEST_F(GenerateTest, PromptsAboveOnePieceGoInPieces) {
  // More than one piece of 512 tokens, and the last token decides as in one pass.
  const std::vector<int32_t> ids = Ids(700);
  const std::vector<float> logits = Logits(ids, {700});
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  EXPECT_EQ(Greedy(ids, 1).front(), best);
}

TEST_F(GenerateTest, EachTokenIsDrawnFromWhatCameBefore) {
  std::vector<int32_t> ids = Ids(5);
  const std::vector<int32_t> drawn = Greedy(ids, 6);
  ASSERT_EQ(drawn.size(), 6u);
  for (int32_t id : drawn) {
    const std::vector<float> logits = Logits(ids, {static_cast<int64_t>(ids.size())});
    // Ties between near-equal logits may fall either way: the drawn one is within rounding of best.
    EXPECT_NEAR(logits[static_cast<size_t>(id)], *std::max_element(logits.begin(), logits.end()),
                2e-5);
    ids.push_back(id);
  }
}

TEST_F(GenerateTest, StopsAtTheEndToken) {
  const std::vector<int32_t> ids = Ids(5);
  const std::vector<int32_t> drawn = Greedy(ids, 20);
  ASSERT_EQ(drawn.size(), 20u);
  const auto end = std::find(drawn.begin(), drawn.end(), drawn[7]);
  EXPECT_EQ(Greedy(ids, 20, {drawn[7]}), std::vector<int32_t>(drawn.begin(), end));
}

TEST_F(GenerateTest, AnErrorOfTheReceiverEndsIt) {
  int taken = 0;
  const auto stats =
      Generate(model_.get(), {1, 2, 3}, 1000, 256, {}, SamplingOptions(),
               [&](int32_t) { return ++taken < 3 ? absl::OkStatus() : absl::CancelledError("x"); });
  EXPECT_TRUE(absl::IsCancelled(stats.status()));
  EXPECT_EQ(taken, 3);
}

TEST_F(GenerateTest, TokensAreCappedByTheMemory) {
  EXPECT_EQ(model_->DecodeTokens(5, 100), 100);
  // Keys and values of one layer: 2 x 2 heads x 4 x 4 bytes a token, so a terabyte holds 2^34.
  const int64_t most = model_->DecodeTokens(5, std::numeric_limits<int64_t>::max());
  EXPECT_GT(most, 1'000'000);
  EXPECT_LT(most, int64_t{1} << 40);
  // What is free may change between the calls.
  EXPECT_EQ(model_->DecodeTokens(5, most / 2), most / 2);
  EXPECT_EQ(model_->DecodeTokens(int64_t{1} << 40, 1), -1);
}

TEST_F(GenerateTest, NonFiniteWeightsAreNamed) {
  float* head =
      model_->weights().Param(model_->weights().table().Find("lm_head.weight")).data<float>();
  head[0] = std::nanf("");
  SamplingOptions options;
  const auto stats = Generate(model_.get(), {1, 2, 3}, 4, 256, {}, options,
                              [](int32_t) { return absl::OkStatus(); });
  EXPECT_EQ(ExitCodeOf(stats.status()), ExitCode::kNumerics);
}

}  // namespace
}  // namespace krait
