// Sources go on where they stood, whatever changes around them.
#include "data/position.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "data/sampler.h"
#include "kernels/base/random.h"
#include "support/temp_folder.h"
#include "support/tokens.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kSeqLen = 8;
// Content hashes.
constexpr char kA[] = "aaaaaaaaaaaaaaaa", kB[] = "bbbbbbbbbbbbbbbb", kC[] = "cccccccccccccccc",
               kD[] = "dddddddddddddddd", kE[] = "eeeeeeeeeeeeeeee";

// What a run has read, by content and epoch.
class Reads {
 public:
  // Training positions [from, from + count) of `data`.
  void Read(const Dataset& data, int64_t from, int64_t count) {
    for (int64_t q = from; q < from + count; ++q) {
      const SequenceRef ref = data.At(q);
      const TokenFile& file = *data.files()[static_cast<size_t>(ref.source)];
      counts_[file.content_hash()] = file.tokens() / data.seq_len();
      repeats_ += !read_[{file.content_hash(), ref.epoch}].insert(ref.sequence).second;
    }
  }
  int64_t repeats() const { return repeats_; }  // within an epoch
  // Every epoch but the last of each content is complete, and the last is where `position` says.
  void ExpectAt(const DataPosition& position) const {
    for (const SourcePosition& source : position.sources) {
      for (int64_t epoch = 0; epoch < source.epoch; ++epoch) {
        EXPECT_EQ(Count(source.content, epoch), counts_.at(source.content))
            << source.content << " epoch " << epoch;
      }
      EXPECT_EQ(Count(source.content, source.epoch), source.place) << source.content;
    }
  }
  int64_t Count(const std::string& content, int64_t epoch) const {
    const auto found = read_.find({content, epoch});
    return found == read_.end() ? 0 : static_cast<int64_t>(found->second.size());
  }

 private:
  std::map<std::pair<std::string, int64_t>, std::set<int64_t>> read_;
  std::map<std::string, int64_t> counts_;
  int64_t repeats_ = 0;
};

class PositionTest : public ::testing::Test {
 protected:
  // A token file of `sequences` sequences that has `content`.
  std::string File(const std::string& name, const std::string& content, int64_t sequences = 200) {
    std::filesystem::remove(folder_ / (name + ".h5"));
    return WriteTokens(folder_ / (name + ".h5"), "letters", sequences * kSeqLen + 3, content);
  }
  static std::unique_ptr<Dataset> Open(const std::vector<SourceSpec>& sources, uint64_t seed = 1,
                                       int64_t seq_len = kSeqLen) {
    auto data = Dataset::Open(sources, seq_len, 256, seed, true);
    EXPECT_TRUE(data.ok()) << data.status();
    return *std::move(data);
  }
  // These sources, going on where `before` stands at `q`.
  std::unique_ptr<Dataset> GoOn(const DataPosition& position,
                                const std::vector<SourceSpec>& sources, uint64_t seed = 1,
                                int64_t seq_len = kSeqLen) {
    auto data = Open(sources, seed, seq_len);
    auto next = data->ContinueFrom(position);
    EXPECT_TRUE(next.ok()) << next.status();
    lines_ = next->lines;
    same_data_ = next->same_data;
    data->Seek(*std::move(next));
    return data;
  }
  // The content and sequence of each training position.
  static std::vector<std::pair<std::string, int64_t>> Order(const Dataset& data, int64_t from,
                                                            int64_t count) {
    std::vector<std::pair<std::string, int64_t>> order;
    for (int64_t q = from; q < from + count; ++q) {
      const SequenceRef ref = data.At(q);
      order.emplace_back(data.files()[static_cast<size_t>(ref.source)]->content_hash(),
                         ref.sequence);
    }
    return order;
  }
  // Those of one content.
  static std::vector<int64_t> OrderOf(const std::string& content, const Dataset& data, int64_t from,
                                      int64_t count) {
    std::vector<int64_t> order;
    for (const auto& [name, sequence] : Order(data, from, count)) {
      if (name == content) order.push_back(sequence);
    }
    return order;
  }

  TempFolder folder_;
  std::vector<std::string> lines_;  // of the last GoOn
  bool same_data_ = false;
};

TEST_F(PositionTest, OtherWeightsRepeatNothing) {
  const std::string a = File("a", kA), b = File("b", kB);
  const auto first = Open({{a, 0.9}, {b, 0.1}});
  Reads reads;
  reads.Read(*first, 0, 100);
  const auto second = GoOn(first->PositionAt(100), {{a, 0.5}, {b, 0.5}});
  EXPECT_FALSE(same_data_);
  reads.Read(*second, 100, 100);  // 50 draws of each
  EXPECT_EQ(reads.repeats(), 0);
  EXPECT_EQ(reads.Count(kA, 0), 140);
  EXPECT_EQ(reads.Count(kB, 0), 60);
  reads.Read(*second, 200, 800);
  EXPECT_EQ(reads.repeats(), 0);
  reads.ExpectAt(second->PositionAt(1000));
}

TEST_F(PositionTest, AnAddedSourceLeavesTheOthersAlone) {
  const std::string a = File("a", kA), b = File("b", kB), c = File("c", kC, 30);
  const auto alone = Open({{a, 1}, {c, 1}});
  const std::vector<int64_t> order = OrderOf(kA, *alone, 100, 300);
  for (const std::vector<SourceSpec>& sources :
       {std::vector<SourceSpec>{{a, 1}, {c, 1}, {b, 1}}, {{b, 1}, {a, 1}, {c, 1}}}) {
    Reads reads;
    reads.Read(*alone, 0, 100);
    const auto data = GoOn(alone->PositionAt(100), sources);
    EXPECT_THAT(lines_, ElementsAre(HasSubstr("b.h5 is new to this run")));
    reads.Read(*data, 100, 600);
    EXPECT_EQ(reads.repeats(), 0);
    reads.ExpectAt(data->PositionAt(700));
    const std::vector<int64_t> now = OrderOf(kA, *data, 100, 300);
    ASSERT_GE(now.size(), 99u);
    EXPECT_TRUE(std::equal(now.begin(), now.end(), order.begin()));
    EXPECT_EQ(OrderOf(kB, *data, 100, 300).size(), 100u);
  }
}

TEST_F(PositionTest, ReorderedMovedAndRenamedSourcesReadTheSame) {
  const std::string a = File("a", kA), b = File("b", kB), c = File("c", kC, 30);
  const auto first = Open({{a, 0.6}, {b, 0.3}, {c, 0.1}});
  const auto expected = Order(*first, 123, 700);
  // Also with the weights on another scale.
  const std::string moved = File("elsewhere", kA);
  for (const std::vector<SourceSpec>& sources :
       {std::vector<SourceSpec>{{a, 0.6}, {b, 0.3}, {c, 0.1}},
        {{c, 0.1}, {a, 0.6}, {b, 0.3}},
        {{b, 3}, {c, 1}, {moved, 6}}}) {
    const auto data = GoOn(first->PositionAt(123), sources);
    EXPECT_TRUE(same_data_);
    EXPECT_THAT(lines_, IsEmpty());
    EXPECT_EQ(Order(*data, 123, 700), expected);
    // And from there once more, in the first order.
    const auto again = GoOn(data->PositionAt(307), {{a, 0.6}, {b, 0.3}, {c, 0.1}});
    EXPECT_EQ(Order(*again, 307, 500),
              (std::vector(expected.begin() + 184, expected.begin() + 684)));
  }
}

TEST_F(PositionTest, AReplacedFileStartsAtItsBeginning) {
  const std::string a = File("a", kA);
  const DataPosition position = Open({{a, 1}})->PositionAt(153);
  // Under another path, and in place.
  const std::string other = File("other", kB);
  Reads reads;
  reads.Read(*GoOn(position, {{other, 1}}), 153, 200);
  EXPECT_THAT(lines_, ElementsAre(HasSubstr("other.h5 is new"), HasSubstr("a.h5 (content aaaa")));
  EXPECT_EQ(reads.Count(kB, 0), 200);
  File("a", kC);
  reads.Read(*GoOn(position, {{a, 1}}), 153, 200);
  EXPECT_FALSE(same_data_);
  EXPECT_THAT(lines_, Contains(AllOf(HasSubstr("a.h5 holds other tokens"), HasSubstr(kC),
                                     HasSubstr(kA), HasSubstr("from its beginning"))));
  EXPECT_EQ(reads.Count(kC, 0), 200);
  EXPECT_EQ(reads.repeats(), 0);
}

TEST_F(PositionTest, ExchangedFilesGoOnByContent) {
  const std::string a = File("a", kA), b = File("b", kB);
  const auto first = Open({{a, 0.8}, {b, 0.2}});
  Reads reads;
  reads.Read(*first, 0, 100);
  const DataPosition position = first->PositionAt(100);
  File("a", kB);
  File("b", kA);
  const auto second = GoOn(position, {{a, 0.8}, {b, 0.2}});
  EXPECT_FALSE(same_data_);
  EXPECT_THAT(lines_, ElementsAre(AllOf(HasSubstr("a.h5 holds other"), HasSubstr("goes on")),
                                  AllOf(HasSubstr("b.h5 holds other"), HasSubstr("goes on"))));
  reads.Read(*second, 100, 900);
  EXPECT_EQ(reads.repeats(), 0);
  reads.ExpectAt(second->PositionAt(1000));
}

TEST_F(PositionTest, ASourceThatComesBackGoesOnWhereItStood) {
  const std::string a = File("a", kA), b = File("b", kB), c = File("c", kC, 30);
  const auto first = Open({{a, 1}, {b, 2}, {c, 1}});
  Reads reads;
  reads.Read(*first, 0, 90);
  const auto second = GoOn(first->PositionAt(90), {{a, 1}, {c, 1}});
  EXPECT_THAT(lines_, ElementsAre(HasSubstr("b.h5 (content bbbbbbbbbbbbbbbb) is left out")));
  reads.Read(*second, 90, 50);
  const auto third = GoOn(second->PositionAt(140), {{c, 1}, {a, 3}});
  reads.Read(*third, 140, 7);
  const auto fourth = GoOn(third->PositionAt(147), {{a, 1}, {b, 1}});
  EXPECT_THAT(lines_, Contains(HasSubstr("b.h5 comes back, at epoch 0.22")));
  reads.Read(*fourth, 147, 700);
  EXPECT_EQ(reads.repeats(), 0);
  reads.ExpectAt(fourth->PositionAt(847));
}

TEST_F(PositionTest, TheFirstVersionsNumberIsEnough) {
  const std::string a = File("a", kA), b = File("b", kB), c = File("c", kC, 30);
  const std::vector<SourceSpec> sources = {{a, 0.7}, {b, 0.2}, {c, 0.1}};
  const auto run = Open(sources, 5);
  const auto saved = PositionOfFirstVersion(run->Fingerprint(), 777, kSeqLen, 5);
  ASSERT_TRUE(saved.ok()) << saved.status();
  // Unchanged, it goes on bit for bit, and what it saves from there is what a whole run saves.
  const auto unchanged = GoOn(*saved, sources, 5);
  EXPECT_TRUE(same_data_);
  EXPECT_EQ(Order(*unchanged, 777, 500), Order(*run, 777, 500));
  EXPECT_EQ(unchanged->PositionAt(1000).sources, run->PositionAt(1000).sources);
  // Changed, it repeats nothing, and a source left out knows where it stood.
  Reads reads;
  reads.Read(*run, 0, 777);
  const auto changed = GoOn(*saved, {{a, 1}, {b, 3}}, 5);
  reads.Read(*changed, 777, 333);
  const auto back = GoOn(changed->PositionAt(1110), {{c, 1}, {a, 1}, {b, 1}}, 5);
  reads.Read(*back, 1110, 444);
  EXPECT_EQ(reads.repeats(), 0);
  reads.ExpectAt(back->PositionAt(1554));

  for (const char* broken : {"", "train.h5 0123456789abcdef", "a weight 0 content A\n"}) {
    const auto position = PositionOfFirstVersion(broken, 10, kSeqLen, 5);
    EXPECT_EQ(ExitCodeOf(position.status()), ExitCode::kNoCheckpoint) << broken;
  }
  const auto strange =
      PositionOfFirstVersion("a weight 1 content b weight 2 content C\n", 10, 8, 5);
  ASSERT_TRUE(strange.ok());
  EXPECT_EQ(strange->sources[0].path, "a weight 1 content b");
  EXPECT_EQ(strange->sources[0].content, "C");
}

TEST_F(PositionTest, AnotherSeedShufflesTheRestOfTheEpoch) {
  const std::string a = File("a", kA), b = File("b", kB, 77);
  const std::vector<SourceSpec> sources = {{a, 0.5}, {b, 0.5}};
  auto data = Open(sources, 1);
  Reads reads;
  int64_t q = 0;
  const auto read = [&](int64_t count) {
    reads.Read(*data, q, count);
    q += count;
  };
  read(100);
  // Several times within one epoch, also twice at one place, and with a start in between.
  for (const uint64_t seed : {2, 2, 3, 1, 7}) {
    const std::vector<int64_t> unchanged = OrderOf(kA, *data, q, 100);
    const bool other = data->PositionAt(q).sources[0].shuffles.back().seed != seed;
    data = GoOn(data->PositionAt(q), sources, seed);
    EXPECT_TRUE(same_data_);
    EXPECT_EQ(OrderOf(kA, *data, q, 100) != unchanged, other);
    EXPECT_EQ(lines_.size(), other ? 1u : 0u);
    if (seed != 1) read(13);
  }
  read(1000);
  EXPECT_EQ(reads.repeats(), 0);
  reads.ExpectAt(data->PositionAt(q));
  // From the next epoch on it is the order of a run with that seed.
  EXPECT_EQ(data->PositionAt(q).sources[0].shuffles, (std::vector<Shuffle>{{0, 7}}));
  EXPECT_EQ(data->At(q).sequence, Open(sources, 7)->At(q).sequence);
}

TEST_F(PositionTest, AnotherSeqLenBeginsAnEpoch) {
  const std::string a = File("a", kA), b = File("b", kB), c = File("c", kC);
  const auto first = Open({{a, 2}, {b, 1}});
  for (const int64_t seq_len : {3, 4, 7, 16, 1000}) {
    // In the middle of a's epoch, at the end of it.
    for (const int64_t q : {75, 300}) {
      const auto data = GoOn(first->PositionAt(q), {{a, 2}, {b, 1}}, 1, seq_len);
      EXPECT_TRUE(same_data_);
      ASSERT_EQ(lines_.size(), 1u);
      EXPECT_THAT(lines_[0], AllOf(HasSubstr("data.seq_len is " + std::to_string(seq_len)),
                                   HasSubstr("b.h5 was at epoch 0.")));
      const int64_t count = data->files()[0]->tokens() / seq_len;
      Reads reads;
      reads.Read(*data, q, 2 * count);
      EXPECT_EQ(reads.repeats(), 0);
      const DataPosition position = data->PositionAt(q);
      EXPECT_EQ(position.sources[0].epoch, 1);
      EXPECT_EQ(position.sources[0].place, 0);
      EXPECT_EQ(position.sources[0].seq_len, seq_len);
    }
  }
  // A source that was left out meanwhile counts in its own sequences until it comes back.
  const auto alone = GoOn(first->PositionAt(75), {{a, 2}}, 1, 4);
  const auto both = GoOn(alone->PositionAt(100), {{a, 2}, {b, 1}}, 1, 8);
  EXPECT_EQ(both->PositionAt(100).sources[1].place, 25);
  EXPECT_EQ(both->PositionAt(100).sources[1].epoch, 0);
}

TEST_F(PositionTest, OneContentTwiceIsTwoSources) {
  const std::string a = File("a", kA), copy = File("copy", kA);
  const auto first = Open({{a, 3}, {copy, 1}, {a, 1}});
  EXPECT_THAT(first->Repeated(),
              ElementsAre(AllOf(HasSubstr("copy.h5"), HasSubstr("same tokens as")),
                          AllOf(HasSubstr("a.h5 is named twice"))));
  EXPECT_THAT(Open({{a, 1}, {File("b", kB), 1}})->Repeated(), IsEmpty());
  const auto expected = Order(*first, 50, 400);
  EXPECT_EQ(Order(*GoOn(first->PositionAt(50), {{a, 1}, {a, 3}, {copy, 1}}), 50, 400), expected);
  EXPECT_TRUE(same_data_);
}

TEST_F(PositionTest, EpochsAreRoundedDown) {
  EXPECT_EQ(PrintEpoch(1, 74, 200), "1.37");
  EXPECT_EQ(PrintEpoch(0, 0, 1), "0.00");
  EXPECT_EQ(PrintEpoch(1, 1999, 2000), "1.99");
  EXPECT_EQ(PrintEpoch(3, int64_t{1} << 61, (int64_t{1} << 61) + 1), "3.99");
  const auto data = Open({{File("a", kA), 3}, {File("b", kB, 30), 1}});
  EXPECT_THAT(data->StandingAt(367),
              ElementsAre(HasSubstr("a.h5: epoch 1.38 (76 of 200 sequences), 75 % of the mix"),
                          HasSubstr("b.h5: epoch 3.03 (1 of 30 sequences), 25 %")));
}

// Runs of random changes: sources come, go, change weight and place, are shuffled anew; starts are
// at any position. Each sequence of each source is read as often as its epochs say.
TEST_F(PositionTest, WhateverChangesEachSequenceIsReadOncePerEpoch) {
  const std::vector<std::string> paths = {File("a", kA), File("b", kB, 60), File("c", kC, 17),
                                          File("d", kD, 1), File("e", kE, 130)};
  for (uint64_t run = 0; run < 20; ++run) {
    const RandomStream random(run, RandomPurpose::kSynthetic, 0);
    uint64_t index = 0;
    const auto draw = [&](uint64_t n) { return random.Bits(index++)[0] % n; };
    Reads reads;
    DataPosition position;
    uint64_t seed = 1;
    for (int start = 0; start < 25; ++start) {
      std::vector<SourceSpec> sources;
      for (const std::string& path : paths) {
        if (draw(3) == 0) continue;
        sources.insert(sources.begin() + static_cast<int64_t>(draw(sources.size() + 1)),
                       {path, static_cast<double>(1 + draw(9))});
      }
      if (sources.empty()) continue;
      if (draw(4) == 0) seed = draw(5);
      const auto data = GoOn(position, sources, seed);
      const auto count = static_cast<int64_t>(draw(90));
      reads.Read(*data, position.sequences, count);
      position = data->PositionAt(position.sequences + count);
    }
    EXPECT_EQ(reads.repeats(), 0) << run;
    reads.ExpectAt(position);
  }
}

}  // namespace
}  // namespace krait
