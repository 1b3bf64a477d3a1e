#include "data/document_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/base/random.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

// `entries` starts, 1 to 9 apart.
std::vector<uint64_t> Starts(int64_t entries) {
  const RandomStream random(1, RandomPurpose::kSynthetic, static_cast<uint64_t>(entries));
  std::vector<uint64_t> starts = {0};
  while (static_cast<int64_t>(starts.size()) < entries) {
    starts.push_back(starts.back() + 1 + random.Bits(starts.size())[0] % 9);
  }
  return starts;
}

// A table over `starts`, which may change under it, and how much of them it has read.
struct Stored {
  std::vector<uint64_t> starts;
  int64_t read = 0;
  absl::StatusOr<DocumentTable> Open() {
    return DocumentTable::Open(
        [this](int64_t first, int64_t count, uint64_t* entries) {
          read += count;
          std::copy_n(starts.begin() + first, count, entries);
          return absl::OkStatus();
        },
        static_cast<int64_t>(starts.size()), static_cast<int64_t>(starts.back()), "x: /documents");
  }
};

// Sizes around the blocks that are read at once, and more than a piece of the check.
TEST(DocumentTableTest, FindsTheStartsOfARange) {
  for (const int64_t entries : {2, 3, 4095, 4096, 4097, 8192, 8193, 70'000}) {
    SCOPED_TRACE(entries);
    Stored stored{Starts(entries)};
    const auto table = stored.Open();
    ASSERT_TRUE(table.ok()) << table.status();
    EXPECT_EQ(table->documents(), entries - 1);
    EXPECT_EQ(table->All().value(), stored.starts);
    const DocumentTable in_memory = DocumentTable::InMemory(stored.starts);
    const auto tokens = static_cast<int64_t>(stored.starts.back());
    const RandomStream random(2, RandomPurpose::kSynthetic, static_cast<uint64_t>(entries));
    std::vector<std::pair<int64_t, int64_t>> ranges = {{0, 0}, {0, tokens}, {tokens, tokens}};
    for (uint64_t i = 0; i < 200; ++i) {
      const auto bits = random.Bits(i);
      const auto begin = static_cast<int64_t>(bits[0] % static_cast<uint64_t>(tokens));
      // Some end and begin on a start.
      const auto on = static_cast<int64_t>(stored.starts[bits[2] % static_cast<uint64_t>(entries)]);
      ranges.emplace_back(begin, std::min<int64_t>(tokens, begin + bits[1] % 5000));
      ranges.emplace_back(on, std::min<int64_t>(tokens, on + bits[1] % 100));
      ranges.emplace_back(std::max<int64_t>(0, on - bits[1] % 100), on);
    }
    for (const auto& [begin, end] : ranges) {
      std::vector<uint64_t> expected, found;
      for (const uint64_t start : stored.starts) {
        const auto at = static_cast<int64_t>(start);
        if (at > begin && at < end) expected.push_back(start);
      }
      ASSERT_TRUE(table->Within(begin, end, &found).ok());
      ASSERT_EQ(found, expected) << begin << " to " << end;
      ASSERT_TRUE(in_memory.Within(begin, end, &found).ok());
      ASSERT_EQ(found, expected) << begin << " to " << end;
    }
  }
}

TEST(DocumentTableTest, ReadsAsMuchAsIsNeeded) {
  Stored stored{Starts(100'000)};
  const auto table = stored.Open();
  EXPECT_EQ(stored.read, 100'000);
  std::vector<uint64_t> found;
  ASSERT_TRUE(table->Within(200'000, 204'096, &found).ok());
  EXPECT_LE(stored.read, 100'000 + 2 * 4096);
  ASSERT_TRUE(table->Within(200'000, 200'001, &found).ok());
  EXPECT_LE(stored.read, 100'000 + 3 * 4096);
}

TEST(DocumentTableTest, RefusesWhatDoesNotAscend) {
  const auto fault = [](std::vector<uint64_t> starts, int64_t tokens) {
    const auto table = DocumentTable::Open(
        [&](int64_t first, int64_t count, uint64_t* entries) {
          std::copy_n(starts.begin() + first, count, entries);
          return absl::OkStatus();
        },
        static_cast<int64_t>(starts.size()), tokens, "x: /documents");
    EXPECT_EQ(ExitCodeOf(table.status()), ExitCode::kData);
    return MessageOf(table.status());
  };
  EXPECT_EQ(fault({1, 2}, 2), "x: /documents[0] is 1; it must be 0");
  EXPECT_EQ(fault({0, 2, 2}, 2), "x: /documents[2] is 2 after 2; they must ascend");
  EXPECT_EQ(fault({0, 2}, 3),
            "x: /documents[1], the last, is 2; it must be the number of tokens, 3");
  std::vector<uint64_t> starts = Starts(70'000);
  std::swap(starts[65'536], starts[65'535]);  // where two pieces meet
  EXPECT_THAT(fault(starts, static_cast<int64_t>(starts.back())), HasSubstr("they must ascend"));
}

// A file that was replaced under a run.
TEST(DocumentTableTest, NoticesChanges) {
  Stored stored{Starts(10'000)};
  auto table = stored.Open();
  ASSERT_TRUE(table.ok());
  std::vector<uint64_t> found;
  const auto in_block_1 = static_cast<int64_t>(stored.starts[5000]);
  std::swap(stored.starts[6000], stored.starts[6001]);
  const absl::Status changed = table->Within(in_block_1, in_block_1 + 20, &found);
  EXPECT_EQ(ExitCodeOf(changed), ExitCode::kData);
  EXPECT_THAT(MessageOf(changed), HasSubstr("x: /documents changed at entries 4096 to 8191"));
  // The error does not stay when the cause goes.
  std::swap(stored.starts[6000], stored.starts[6001]);
  EXPECT_TRUE(table->Within(in_block_1, in_block_1 + 20, &found).ok());
}

}  // namespace
}  // namespace krait
