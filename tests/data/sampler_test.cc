#include "data/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "data/mix.h"
#include "kernels/base/random.h"
#include "support/temp_folder.h"
#include "support/tokens.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(Mix, EveryPrefixIsWithinOneOfItsWeight) {
  const std::vector<std::vector<double>> cases = {
      {1},
      {1, 1},
      {0.7, 0.2, 0.1},
      {3, 1, 1, 1},
      {5, 2, 2, 2, 2, 2, 2},
      {0.333, 0.667},
      {1.0 / 3, 2.0 / 3},
      {1, 1e-3, 1e-3},
      {0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1},
      {0.9, 0.01, 0.01, 0.01, 0.07},
      {12345, 54321, 1},
      {1e-300, 2e-300},
  };
  for (const std::vector<double>& weights : cases) {
    const auto mix = Mix::Create(weights);
    ASSERT_TRUE(mix.ok()) << mix.status();
    double sum = 0;
    for (const double weight : weights) sum += weight;
    std::vector<int64_t> counts(weights.size(), 0);
    const int64_t positions = 3 * mix->period() + 17;
    for (int64_t q = 0; q < positions; ++q) {
      const Mix::Use use = mix->At(q);
      ASSERT_EQ(use.n, counts[static_cast<size_t>(use.source)]++);
      for (size_t i = 0; i < weights.size(); ++i) {
        const double ideal = weights[i] / sum * static_cast<double>(q + 1);
        // The weights of {12345, 54321, 1} need a period above 65536 (66667): their shares are off
        // by at most 1/65536, so by 3 after three periods.
        const double bound = weights.size() == 3 && weights[0] == 12345 ? 4 : 1;
        ASSERT_LT(std::abs(static_cast<double>(counts[i]) - ideal), bound)
            << "source " << i << " of " << weights.size() << " after " << q + 1;
      }
    }
  }
}

// Weights without a short common measure: the shares are off by at most 1/65536 each, and every
// prefix is within 1 of the shares.
TEST(Mix, IrrationalWeightsAreRoundedOnce) {
  const std::vector<double> weights = {std::sqrt(2.0), std::sqrt(3.0), std::exp(1.0), 0.001};
  const auto mix = Mix::Create(weights);
  ASSERT_TRUE(mix.ok());
  EXPECT_EQ(mix->period(), 65536);
  double sum = 0;
  for (const double weight : weights) sum += weight;
  std::vector<int64_t> counts(weights.size(), 0);
  for (int64_t q = 0; q < 2 * mix->period(); ++q) {
    ++counts[static_cast<size_t>(mix->At(q).source)];
    for (size_t i = 0; i < weights.size(); ++i) {
      const double share = static_cast<double>(mix->shares()[i]) / 65536;
      ASSERT_LT(std::abs(static_cast<double>(counts[i]) - share * static_cast<double>(q + 1)), 1);
      ASSERT_LE(std::abs(share - weights[i] / sum), 1.0 / 65536);
    }
  }
}

TEST(Mix, PositionsAreReachedDirectly) {
  const auto mix = Mix::Create({0.6, 0.3, 0.1});
  ASSERT_TRUE(mix.ok());
  EXPECT_EQ(mix->period(), 10);
  const int64_t far = int64_t{1} << 50;
  const Mix::Use use = mix->At(far);
  EXPECT_EQ(use.source, mix->At(far % 10).source);
  EXPECT_EQ(use.n, far / 10 * mix->shares()[static_cast<size_t>(use.source)] + mix->At(far % 10).n);
}

TEST(Mix, BadWeights) {
  for (const double bad : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity()}) {
    const auto mix = Mix::Create({1.0, bad});
    EXPECT_EQ(ExitCodeOf(mix.status()), ExitCode::kData);
    EXPECT_THAT(MessageOf(mix.status()), HasSubstr("must be above 0"));
  }
  EXPECT_THAT(MessageOf(Mix::Create({1.0, 1e-9}).status()), HasSubstr("never be read"));
  EXPECT_THAT(MessageOf(Mix::Create({1.0, 1e-12, 1e-6}).status()), HasSubstr("never be read"));
}

class SamplerTest : public ::testing::Test {
 protected:
  // A token file of random text in documents of up to `longest` bytes.
  std::string MakeFile(const std::string& name, uint64_t seed, int documents, uint32_t longest) {
    const RandomStream random(seed, RandomPurpose::kSynthetic, 0);
    for (int i = 0; i < documents; ++i) {
      const auto key = static_cast<uint64_t>(i) << 32;
      std::string text(1 + random.Bits(key)[0] % longest, ' ');
      for (size_t k = 0; k < text.size(); ++k) {
        text[k] = static_cast<char>('a' + random.Bits(key + k)[1] % 26);
      }
      folder_.Write(name + ".d/" + std::to_string(i), text);
    }
    const std::string path = folder_ / (name + ".h5");
    const auto report =
        BuildTokenFile({.out = path, .paths = {folder_ / (name + ".d")}, .force = true});
    EXPECT_TRUE(report.ok()) << report.status();
    return path;
  }
  std::unique_ptr<Dataset> Open(const std::vector<SourceSpec>& sources, int64_t seq_len,
                                uint64_t seed = 1, bool reset = true) {
    auto dataset = Dataset::Open(sources, seq_len, 256, seed, reset);
    EXPECT_TRUE(dataset.ok()) << dataset.status();
    return *std::move(dataset);
  }

  TempFolder folder_;
};

TEST_F(SamplerTest, EverySequenceComesOncePerEpoch) {
  const auto data = Open({{MakeFile("a", 1, 20, 300), 0.7},
                          {MakeFile("b", 2, 5, 100), 0.2},
                          {MakeFile("c", 3, 9, 90), 0.1}},
                         16);
  std::vector<int64_t> counts;
  for (const auto& file : data->files()) counts.push_back(file->tokens() / 16);
  std::map<std::pair<int, int64_t>, std::vector<int64_t>> orders;  // per source and epoch
  for (int64_t q = 0; q < 2000; ++q) {
    const SequenceRef ref = data->At(q);
    orders[{ref.source, ref.epoch}].push_back(ref.sequence);
  }
  for (const auto& [key, order] : orders) {
    const int64_t count = counts[static_cast<size_t>(key.first)];
    const std::set<int64_t> distinct(order.begin(), order.end());
    EXPECT_EQ(distinct.size(), order.size());
    EXPECT_GE(*distinct.begin(), 0);
    EXPECT_LT(*distinct.rbegin(), count);
    // Complete, unless it is the epoch the run stands in.
    if (orders.contains({key.first, key.second + 1})) {
      EXPECT_EQ(static_cast<int64_t>(order.size()), count);
      EXPECT_NE(order, (orders[{key.first, key.second + 1}])) << "epochs repeat one order";
    }
  }
  EXPECT_TRUE(orders.contains({2, 1})) << "the test must see more than one epoch of each source";
}

// What a run reads that never changes its data, whatever version began it: {source, epoch, k}.
TEST_F(SamplerTest, TheOrderIsThatOfTheFirstVersion) {
  const std::string a = MakeFile("a", 1, 20, 300), b = MakeFile("b", 2, 9, 100),
                    c = MakeFile("c", 3, 9, 90);
  const auto three = Open({{a, 0.7}, {b, 0.2}, {c, 0.1}}, 16, 7);
  const std::vector<std::array<int64_t, 3>> expected = {
      {0, 0, 29},  {0, 0, 125}, {0, 0, 62},  {1, 0, 11},  {0, 0, 103}, {0, 0, 146},
      {1, 0, 4},   {0, 0, 129}, {0, 0, 13},  {2, 0, 6},   {0, 0, 82},  {0, 0, 85},
      {0, 0, 157}, {1, 0, 9},   {0, 0, 115}, {0, 0, 182}, {1, 0, 0},   {0, 0, 150},
      {0, 0, 10},  {2, 0, 11},  {0, 3, 110}, {0, 3, 72},  {0, 3, 42},  {1, 7, 18},
      {0, 3, 183}, {0, 3, 143}, {1, 7, 27},  {0, 3, 104}, {0, 3, 140}, {2, 3, 9}};
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t q = std::array<int64_t, 3>{0, 100, 1000}[i / 10] + static_cast<int64_t>(i % 10);
    const SequenceRef ref = three->At(q);
    EXPECT_EQ((std::array<int64_t, 3>{ref.source, ref.epoch, ref.sequence}), expected[i]) << q;
  }
  const auto one = Open({{b, 1}}, 32, 123456789);
  std::vector<int64_t> order;
  for (int64_t q = 0; q < 20; ++q) order.push_back(one->At(q).sequence);
  EXPECT_EQ(order, (std::vector<int64_t>{6, 4,  2,  11, 1, 5, 10, 8,  9, 0,
                                         3, 12, 13, 7,  6, 8, 1,  11, 2, 5}));
}

TEST_F(SamplerTest, SeedsAndSourcesHaveTheirOwnOrders) {
  const std::string a = MakeFile("a", 1, 20, 300);
  const auto order = [&](const Dataset& data, int source) {
    std::vector<int64_t> sequences;
    for (int64_t q = 0; q < 200; ++q) {
      if (data.At(q).source == source) sequences.push_back(data.At(q).sequence);
    }
    return sequences;
  };
  const auto one = Open({{a, 1}, {a, 1}}, 16, 1);
  const auto two = Open({{a, 1}, {a, 1}}, 16, 2);
  EXPECT_NE(order(*one, 0), order(*two, 0));
  EXPECT_NE(order(*one, 0), order(*one, 1));
}

// The rows against a direct computation from the files' tokens and documents.
TEST_F(SamplerTest, RowsHoldTokensTargetsAndDocumentStarts) {
  const std::string a = MakeFile("a", 1, 40, 30);
  const std::string b = MakeFile("b", 2, 10, 50);
  for (const bool reset : {true, false}) {
    const auto data = Open({{a, 2}, {b, 1}}, 24, 1, reset);
    TokenBatch batch;
    ASSERT_TRUE(data->ReadTraining(5, 20, &batch).ok());
    ASSERT_EQ(batch.sequences, 20);
    ASSERT_EQ(batch.seq_len, 24);
    int64_t targets = 0;
    for (int64_t row = 0; row < 20; ++row) {
      const SequenceRef ref = data->At(5 + row);
      const TokenFile& file = *data->files()[static_cast<size_t>(ref.source)];
      std::vector<int32_t> ids(static_cast<size_t>(file.tokens()));
      ASSERT_TRUE(file.Read(0, file.tokens(), ids.data()).ok());
      const auto table = file.document_table().All().value();
      const std::set<uint64_t> starts(table.begin(), table.end());
      int32_t doc_start = 0;
      for (int32_t t = 0; t < 24; ++t) {
        const auto at = static_cast<size_t>(row * 24 + t);
        const auto position = static_cast<uint64_t>(ref.sequence * 24 + t);
        if (reset && starts.contains(position)) doc_start = t;
        ASSERT_EQ(batch.tokens[at], ids[position]);
        ASSERT_EQ(batch.doc_start[at], doc_start);
        const bool has_target = t < 23 && !(reset && starts.contains(position + 1));
        ASSERT_EQ(batch.targets[at], has_target ? ids[position + 1] : -1);
        targets += has_target;
      }
    }
    EXPECT_EQ(batch.target_count, targets);
    EXPECT_EQ(targets == 20 * 23, !reset);
  }
}

TEST_F(SamplerTest, BatchesDoNotDependOnHowTheyAreCut) {
  const auto data = Open({{MakeFile("a", 1, 20, 300), 0.7}, {MakeFile("b", 2, 9, 100), 0.3}}, 32);
  TokenBatch whole;
  ASSERT_TRUE(data->ReadTraining(40, 8, &whole).ok());
  for (const int64_t ranks : {1, 2, 4, 8}) {
    TokenBatch joined;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      TokenBatch part;
      ASSERT_TRUE(data->ReadTraining(40 + rank * 8 / ranks, 8 / ranks, &part).ok());
      joined.tokens.insert(joined.tokens.end(), part.tokens.begin(), part.tokens.end());
      joined.targets.insert(joined.targets.end(), part.targets.begin(), part.targets.end());
      joined.doc_start.insert(joined.doc_start.end(), part.doc_start.begin(), part.doc_start.end());
      joined.target_count += part.target_count;
    }
    EXPECT_EQ(joined.tokens, whole.tokens) << ranks << " ranks";
    EXPECT_EQ(joined.targets, whole.targets);
    EXPECT_EQ(joined.doc_start, whole.doc_start);
    EXPECT_EQ(joined.target_count, whole.target_count);
  }
}

// 3 passes of 2 rows on each of 2 data ranks: pass k of rank r is rows [4k + 2r, 4k + 2r + 2).
TEST_F(SamplerTest, ARankReadsItsOwnRowsOfEachPass) {
  const auto data = Open({{MakeFile("a", 1, 20, 300), 0.7}, {MakeFile("b", 2, 9, 100), 0.3}}, 32);
  TokenBatch whole;
  ASSERT_TRUE(data->ReadTraining(40, 12, &whole).ok());
  int64_t targets = 0;
  for (const int64_t rank : {0, 1}) {
    TokenBatch own;
    ASSERT_TRUE(
        data->ReadTraining(40 + rank * 2, /*passes=*/3, /*stride=*/4, /*rows=*/2, &own).ok());
    ASSERT_EQ(own.sequences, 6);
    targets += own.target_count;
    for (int64_t i = 0; i < 6 * 32; ++i) {
      const int64_t row = i / 32 / 2 * 4 + rank * 2 + i / 32 % 2;
      ASSERT_EQ(own.tokens[static_cast<size_t>(i)],
                whole.tokens[static_cast<size_t>(row * 32 + i % 32)]);
    }
  }
  EXPECT_EQ(targets, whole.target_count);
}

TEST_F(SamplerTest, AResumeReadsWhatTheWholeRunReads) {
  const std::vector<SourceSpec> sources = {{MakeFile("a", 1, 20, 300), 0.7},
                                           {MakeFile("b", 2, 9, 100), 0.3}};
  const auto run = Open(sources, 32);
  TokenBatch batch, resumed;
  for (int64_t first = 0; first < 300; first += 6) {
    ASSERT_TRUE(run->ReadTraining(first, 6, &batch).ok());  // one run, batch reused
    ASSERT_TRUE(Open(sources, 32)->ReadTraining(first, 6, &resumed).ok());
    ASSERT_EQ(batch.tokens, resumed.tokens) << first;
    ASSERT_EQ(batch.targets, resumed.targets);
    ASSERT_EQ(batch.doc_start, resumed.doc_start);
    ASSERT_EQ(batch.target_count, resumed.target_count);
  }
}

TEST_F(SamplerTest, StoredOrderIsTheConcatenationOfAllSources) {
  const auto data = Open({{MakeFile("a", 1, 7, 300), 1}, {MakeFile("b", 2, 9, 100), 1}}, 32);
  TokenBatch batch;
  ASSERT_TRUE(data->ReadStored(0, data->sequences(), &batch).ok());
  std::vector<int32_t> expected;
  for (const auto& file : data->files()) {
    std::vector<int32_t> ids(static_cast<size_t>(file->tokens() / 32 * 32));
    ASSERT_TRUE(file->Read(0, static_cast<int64_t>(ids.size()), ids.data()).ok());
    expected.insert(expected.end(), ids.begin(), ids.end());
  }
  EXPECT_EQ(batch.tokens, expected);
  EXPECT_EQ(data->sequences() * 32, static_cast<int64_t>(expected.size()));
  TokenBatch one;
  const int64_t last = data->sequences() - 1;
  ASSERT_TRUE(data->ReadStored(last, 1, &one).ok());
  EXPECT_EQ(one.tokens, std::vector<int32_t>(expected.end() - 32, expected.end()));
}

TEST_F(SamplerTest, OpenCollectsAllErrors) {
  const std::string good = MakeFile("a", 1, 20, 300);
  const std::string small = MakeFile("b", 2, 1, 10);
  const auto data =
      Dataset::Open({{good, 1}, {small, -1}, {folder_ / "none.h5", 1}}, 64, 200, 1, true);
  ASSERT_FALSE(data.ok());
  EXPECT_EQ(ExitCodeOf(data.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(data.status()),
              AllOf(HasSubstr(good + ": its vocab_size 256 is above the model's vocab_size 200"),
                    HasSubstr(small + ": "), HasSubstr("less than one sequence of seq_len 64"),
                    HasSubstr("none.h5: No such file"), HasSubstr("weight of a source is -1")));
}

TEST_F(SamplerTest, ASourceWithoutASingleTargetIsRefused) {
  const std::string good = MakeFile("a", 1, 20, 300);
  // Documents of one token.
  const std::string ones = MakeFile("ones", 2, 60, 1);
  const auto data = Dataset::Open({{good, 1}, {ones, 1}}, 16, 256, 1, true);
  EXPECT_EQ(ExitCodeOf(data.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(data.status()), AllOf(HasSubstr(ones), HasSubstr("target")));
  EXPECT_TRUE(Dataset::Open({{good, 1}, {ones, 1}}, 16, 256, 1, false).ok());
  // A single target is enough: one document of two tokens among them.
  folder_.Write("ones.d/last", "ab");
  ASSERT_TRUE(BuildTokenFile({.out = folder_ / "few.h5", .paths = {folder_ / "ones.d"}}).ok());
  const auto few = Dataset::Open({{folder_ / "few.h5", 1}}, 61, 256, 1, true);
  EXPECT_TRUE(few.ok()) << few.status();
}

TEST_F(SamplerTest, TokenizersMustAgree) {
  const std::string good = MakeFile("a", 1, 5, 300);
  const std::string other = WriteTokens(folder_ / "other.h5", "letters", 100);
  const auto data = Dataset::Open({{good, 1}, {other, 1}}, 16, 256, 1, true);
  EXPECT_EQ(ExitCodeOf(data.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(data.status()), HasSubstr("its tokenizer is letters"));
}

TEST_F(SamplerTest, OnlySomeTargets) {
  const auto data = Open({{MakeFile("a", 1, 5, 300), 1}}, 16);
  TokenBatch all, some;
  ASSERT_TRUE(data->ReadStored(0, data->sequences(), &all).ok());
  int64_t by_context = 0;
  for (int64_t context = 1; context < 16; ++context) {
    data->Only({.context_begin = context, .context_end = context + 1});
    ASSERT_TRUE(data->ReadStored(0, data->sequences(), &some).ok());
    by_context += some.target_count;
    for (size_t i = 0; i < some.targets.size(); ++i) {
      if (some.targets[i] < 0) continue;
      EXPECT_EQ(some.targets[i], all.targets[i]);
      EXPECT_EQ(static_cast<int64_t>(i % 16) + 1 - all.doc_start[i], context);
    }
  }
  EXPECT_EQ(by_context, all.target_count);
  data->Only({.token_begin = 20, .token_end = 25});
  ASSERT_TRUE(data->ReadStored(1, 1, &some).ok());
  for (int64_t t = 0; t < 16; ++t) {
    const bool inside = 16 + t + 1 >= 20 && 16 + t + 1 < 25;
    const auto i = static_cast<size_t>(t);
    EXPECT_EQ(some.targets[i], inside ? all.targets[16 + i] : -1);
  }
}

TEST_F(SamplerTest, FingerprintTellsContentsWeightsAndPathsApart) {
  const std::string a = MakeFile("a", 1, 5, 300);
  const std::string b = MakeFile("b", 2, 5, 300);
  std::set<std::string> prints = {
      Open({{a, 1}, {b, 1}}, 16)->Fingerprint(), Open({{b, 1}, {a, 1}}, 16)->Fingerprint(),
      Open({{a, 2}, {b, 1}}, 16)->Fingerprint(), Open({{a, 1}}, 16)->Fingerprint()};
  EXPECT_EQ(prints.size(), 4u);
  EXPECT_TRUE(prints.contains(Open({{a, 1}, {b, 1}}, 32, 9)->Fingerprint()));
  const std::string same = MakeFile("a", 3, 5, 300);
  EXPECT_FALSE(prints.contains(Open({{same, 1}, {b, 1}}, 16)->Fingerprint()));
}

}  // namespace
}  // namespace krait
