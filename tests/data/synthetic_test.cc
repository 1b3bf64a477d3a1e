// Synthetic tasks: that the targets which count follow from what came before, and only they.
#include "data/synthetic.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "data/sampler.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> counts;
};

Sequence Read(const SyntheticSpec& spec, int64_t seq_len, int64_t vocab, int64_t k) {
  const SyntheticTokens task(spec, seq_len, vocab);
  Sequence s{std::vector<int32_t>(static_cast<size_t>(seq_len)),
             std::vector<uint8_t>(static_cast<size_t>(seq_len))};
  task.Read(k * seq_len, seq_len, s.tokens.data(), s.counts.data());
  return s;
}

TEST(Synthetic, RecallAsksForThePairsThatItGave) {
  for (const auto& [items, seq_len, vocab] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 4, 4}, {5, 33, 13}, {8, 64, 34}}) {
    const SyntheticSpec spec{.task = SyntheticTask::kRecall, .items = items};
    const int64_t keys = (vocab - 2) / 2;
    for (int64_t k = 0; k < 50; ++k) {
      const Sequence s = Read(spec, seq_len, vocab, k);
      std::map<int32_t, int32_t> pairs;
      for (int64_t i = 0; i < items; ++i) {
        const int32_t key = s.tokens[static_cast<size_t>(2 * i)];
        const int32_t value = s.tokens[static_cast<size_t>(2 * i + 1)];
        EXPECT_TRUE(key >= 2 && key < 2 + keys);
        EXPECT_TRUE(value >= 2 + keys && value < vocab);
        EXPECT_TRUE(pairs.emplace(key, value).second);
      }
      for (int64_t t = 0; t < seq_len; ++t) {
        const auto i = static_cast<size_t>(t);
        const bool answer = t >= 2 * items && t % 2 == 1;
        EXPECT_EQ(s.counts[i], answer ? 1 : 0);
        if (answer) {
          ASSERT_TRUE(pairs.contains(s.tokens[i - 1]));
          EXPECT_EQ(pairs[s.tokens[i - 1]], s.tokens[i]);
        }
      }
      if (seq_len % 2 == 1) {
        EXPECT_EQ(s.tokens.back(), 0);
      }
    }
  }
}

TEST(Synthetic, CopiesRepeatTheDataInOrder) {
  for (const SyntheticTask name : {SyntheticTask::kCopy, SyntheticTask::kSelectiveCopy}) {
    const SyntheticSpec spec{.task = name, .items = 6};
    std::set<std::vector<size_t>> places;
    for (int64_t k = 0; k < 50; ++k) {
      const Sequence s = Read(spec, 29, 11, k);
      const auto separator = std::find(s.tokens.begin(), s.tokens.end(), 1);
      ASSERT_EQ(separator - s.tokens.begin(), 29 - 6 - 1);
      std::vector<int32_t> data;
      std::vector<size_t> at;
      for (auto it = s.tokens.begin(); it != separator; ++it) {
        if (*it == 0) continue;
        data.push_back(*it);
        at.push_back(static_cast<size_t>(it - s.tokens.begin()));
      }
      EXPECT_EQ(data, std::vector<int32_t>(separator + 1, s.tokens.end()));
      EXPECT_EQ(std::count(s.counts.begin(), s.counts.end(), 1), 6);
      EXPECT_TRUE(
          std::all_of(s.counts.end() - 6, s.counts.end(), [](uint8_t c) { return c == 1; }));
      places.insert(at);
    }
    EXPECT_EQ(places.size() > 1, name == SyntheticTask::kSelectiveCopy);
  }
}

TEST(Synthetic, InductionAsksForWhatFollowedTheSeparator) {
  const SyntheticSpec spec{.task = SyntheticTask::kInduction};
  std::set<int64_t> places;
  for (int64_t k = 0; k < 200; ++k) {
    const Sequence s = Read(spec, 10, 8, k);
    const auto first = std::find(s.tokens.begin(), s.tokens.end(), 1);
    ASSERT_LT(first - s.tokens.begin(), 7);
    EXPECT_EQ(s.tokens[8], 1);
    EXPECT_EQ(s.tokens[9], *(first + 1));
    EXPECT_NE(s.tokens[9], 1);
    EXPECT_EQ(std::count(s.tokens.begin(), s.tokens.end(), 1), 2);
    EXPECT_EQ(std::count(s.counts.begin(), s.counts.end(), 1), 1);
    EXPECT_EQ(s.counts[9], 1);
    places.insert(first - s.tokens.begin());
  }
  EXPECT_EQ(places.size(), 7U);
}

TEST(Synthetic, AnyPartIsThatOfTheWhole) {
  const SyntheticTokens task({.task = SyntheticTask::kRecall, .items = 3, .sequences = 7}, 12, 20);
  std::vector<int32_t> all(84), part(84);
  std::vector<uint8_t> counts(84);
  task.Read(0, 84, all.data(), nullptr);
  for (int64_t begin = 0; begin < 84; begin += 5) {
    const int64_t count = std::min<int64_t>(31, 84 - begin);
    task.Read(begin, count, part.data(), counts.data());
    EXPECT_TRUE(std::equal(part.begin(), part.begin() + count, all.begin() + begin));
  }
  const SyntheticTokens other(
      {.task = SyntheticTask::kRecall, .items = 3, .sequences = 7, .seed = 2}, 12, 20);
  EXPECT_NE(task.Hash(), other.Hash());
  other.Read(0, 84, part.data(), nullptr);
  EXPECT_NE(part, all);
}

TEST(Synthetic, WhatDoesNotFitIsSaid) {
  const auto said = [](const SyntheticSpec& spec, int64_t seq_len, int64_t vocab) {
    return MessageOf(CheckSynthetic(spec, seq_len, vocab));
  };
  EXPECT_THAT(said({.task = SyntheticTask::kRecall, .items = 8}, 17, 34),
              HasSubstr("takes 18 tokens with items 8"));
  EXPECT_THAT(said({.task = SyntheticTask::kRecall, .items = 17}, 64, 34), HasSubstr("has 16"));
  EXPECT_THAT(said({.task = SyntheticTask::kRecall}, 64, 34), HasSubstr("items"));
  EXPECT_THAT(said({.task = SyntheticTask::kCopy, .items = 4}, 8, 34), HasSubstr("takes 9 tokens"));
  EXPECT_THAT(said({.task = SyntheticTask::kInduction, .items = 1}, 8, 34),
              HasSubstr("items has no effect"));
  EXPECT_THAT(said({.task = SyntheticTask::kCopy, .items = 1}, 8, 3), HasSubstr("at least 4"));
  EXPECT_TRUE(CheckSynthetic({.task = SyntheticTask::kRecall, .items = 8}, 18, 34).ok());
}

// As a source of training: each sequence is a document, and only the answers are targets.
TEST(Synthetic, ADatasetHasOnlyTheAnswersAsTargets) {
  SourceSpec source{.path = "recall-3"};
  source.synthetic = SyntheticSpec{.task = SyntheticTask::kRecall, .items = 3, .sequences = 40};
  auto data = Dataset::Open({source}, /*seq_len=*/12, /*model_vocab=*/20, /*seed=*/5,
                            /*reset_at_documents=*/true);
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ((*data)->sequences(), 40);
  TokenBatch batch;
  ASSERT_TRUE((*data)->ReadTraining(0, 40, &batch).ok());
  EXPECT_EQ(batch.target_count, 40 * 3);
  for (size_t i = 0; i < batch.targets.size(); ++i) {
    const bool answer = i % 12 == 6 || i % 12 == 8 || i % 12 == 10;  // of token 7, 9 and 11
    EXPECT_EQ(batch.targets[i] >= 0, answer);
    if (answer) {
      EXPECT_EQ(batch.targets[i], batch.tokens[i + 1]);
    }
    EXPECT_EQ(batch.doc_start[i], 0);
  }
}

}  // namespace
}  // namespace krait
