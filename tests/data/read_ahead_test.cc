#include "data/read_ahead.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/h5.h"
#include "kernels/base/random.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

// `count` tokens, token i being i mod 251 of a vocabulary of `vocab`, in documents of 1 to
// `longest` tokens; `bad`: a token outside of it there.
std::string WriteFile(const std::string& path, int64_t count, int64_t longest, int64_t bad = -1,
                      DType dtype = DType::kU8) {
  auto file = H5File::Create(path, ExitCode::kCannotSave);
  KRAIT_CHECK(file.ok());
  const bool wide = dtype == DType::kU16;
  KRAIT_CHECK(file->CreateChunked("tokens", dtype, (1 << 16) - 4).ok());
  constexpr int64_t kPiece = 1 << 20;
  std::vector<uint8_t> tokens;
  std::vector<uint16_t> wide_tokens;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t n = std::min(kPiece, count - begin);
    tokens.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = begin + i == bad ? 255 : (begin + i) % 251;
      tokens[static_cast<size_t>(i)] = static_cast<uint8_t>(token);
    }
    wide_tokens.assign(tokens.begin(), tokens.end());
    const void* data = wide ? static_cast<const void*>(wide_tokens.data()) : tokens.data();
    KRAIT_CHECK(file->Append("tokens", data, n).ok());
  }
  const RandomStream random(3, RandomPurpose::kSynthetic, 0);
  std::vector<uint64_t> documents = {0};
  while (documents.back() < static_cast<uint64_t>(count)) {
    const uint64_t length = 1 + random.Bits(documents.size())[0] % static_cast<uint64_t>(longest);
    documents.push_back(std::min(static_cast<uint64_t>(count), documents.back() + length));
  }
  KRAIT_CHECK(file->CreateChunked("documents", DType::kU64, 4096).ok());
  KRAIT_CHECK(
      file->Append("documents", documents.data(), static_cast<int64_t>(documents.size())).ok());
  KRAIT_CHECK(file->WriteAttribute("format_version", kTokenFileVersion).ok());
  KRAIT_CHECK(file->WriteAttribute("vocab_size", 251).ok());
  KRAIT_CHECK(file->WriteAttribute("tokenizer", "test").ok());
  KRAIT_CHECK(file->WriteAttribute("content_hash", "0000000000000000").ok());
  KRAIT_CHECK(file->Close().ok());
  return path;
}

std::unique_ptr<Dataset> Open(const std::string& path, int64_t seq_len) {
  auto data = Dataset::Open({{.path = path}}, seq_len, 256, /*seed=*/5, true);
  KRAIT_CHECK(data.ok());
  return *std::move(data);
}

void ExpectEqual(const TokenBatch& a, const TokenBatch& b) {
  EXPECT_EQ(a.sequences, b.sequences);
  EXPECT_EQ(a.seq_len, b.seq_len);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.targets, b.targets);
  EXPECT_EQ(a.doc_start, b.doc_start);
  EXPECT_EQ(a.target_count, b.target_count);
}

// Steps shorter and longer than what is read ahead, over several epochs.
TEST(ReadAheadTest, StepsGetTheRowsOfTheirPositions) {
  const TempFolder folder;
  const std::string path = WriteFile(folder / "a.h5", 200'000, 90);
  for (const StepRows& rows : {StepRows{1, 1, 1}, StepRows{2, 6, 3}, StepRows{3, 1500, 1500}}) {
    for (const int64_t steps : {1, 2, 3, 40}) {
      const auto ahead = Open(path, 64), direct = Open(path, 64);
      const int64_t first = 17;
      ReadAhead reader(ahead.get(), rows, first, steps);
      for (int64_t s = 0; s < steps; ++s) {
        TokenBatch expected;
        ASSERT_TRUE(direct
                        ->ReadTraining(first + s * rows.passes * rows.stride, rows.passes,
                                       rows.stride, rows.rows, &expected)
                        .ok());
        const auto batch = reader.Next();
        ASSERT_TRUE(batch.ok()) << batch.status();
        ExpectEqual(**batch, expected);
        // What the run asks the dataset for meanwhile.
        EXPECT_EQ(ahead->PositionAt(first + s).sources, direct->PositionAt(first + s).sources);
      }
    }
  }
}

// A batch stays as it is while the steps behind it are read.
TEST(ReadAheadTest, ABatchIsNotTouchedBeforeTheNextCall) {
  const TempFolder folder;
  const auto data = Open(WriteFile(folder / "a.h5", 400'000, 90), 128);
  const StepRows rows = {1, 512, 512};  // two batches in memory
  ASSERT_EQ(ReadAhead::Batches(rows.rows * 128), 3);
  ReadAhead reader(data.get(), rows, 0, 6);
  for (int s = 0; s < 6; ++s) {
    const auto batch = reader.Next();
    ASSERT_TRUE(batch.ok());
    const TokenBatch copy = **batch;
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    ExpectEqual(**batch, copy);
  }
}

TEST(ReadAheadTest, AnErrorIsThatOfItsStep) {
  const TempFolder folder;
  const std::string path = WriteFile(folder / "a.h5", 6400, 90, /*bad=*/3000);
  const auto data = Open(path, 64), direct = Open(path, 64);
  const StepRows rows = {1, 5, 5};
  int64_t failing = 0;  // the step that reads the bad token
  TokenBatch batch;
  while (direct->ReadTraining(failing * 5, 1, 5, 5, &batch).ok()) ++failing;
  ASSERT_GT(failing, 1);
  ReadAhead reader(data.get(), rows, 0, failing + 3);
  for (int64_t s = 0; s < failing; ++s) ASSERT_TRUE(reader.Next().ok()) << "step " << s;
  for (int64_t s = failing; s < failing + 3; ++s) {
    const auto failed = reader.Next();
    ASSERT_EQ(ExitCodeOf(failed.status()), ExitCode::kData);
    EXPECT_THAT(MessageOf(failed.status()), HasSubstr("/tokens[3000] is 255"));
  }
}

// The end does not wait for what is left to read, used or not.
TEST(ReadAheadTest, EndsAtOnce) {
  const TempFolder folder;
  const auto data = Open(WriteFile(folder / "a.h5", 2'000'000, 90), 64);
  double step_seconds = MonotonicSeconds();
  TokenBatch batch;
  ASSERT_TRUE(data->ReadTraining(0, 1, 20'000, 20'000, &batch).ok());
  step_seconds = MonotonicSeconds() - step_seconds;
  for (const int64_t steps : {int64_t{0}, int64_t{1}, int64_t{1} << 40}) {
    const double begin = MonotonicSeconds();
    { const ReadAhead reader(data.get(), {1, 20'000, 20'000}, 0, steps); }
    EXPECT_LT(MonotonicSeconds() - begin, 0.5 + step_seconds / 2);
  }
  ReadAhead reader(data.get(), {1, 8, 8}, 0, 1000);
  ASSERT_TRUE(reader.Next().ok());
}

// A run that computes 1M tokens/s, the steps of which wait for their rows, over a file that is not
// in the page cache. 2 GB of ids and 4 million documents; a rank that reads everything alone, steps
// of 8 and 512 sequences of 4096 tokens.
TEST(ReadAheadTest, LongStepsWaitLittleOnAColdPageCache) {
  const TempFolder folder;
  constexpr int64_t kTokens = 1'000'000'000, kSeqLen = 4096;
  const std::string path = WriteFile(folder / "a.h5", kTokens, 500, -1, DType::kU16);
  for (const int64_t rows : {8, 512}) {
    const int fd = open(path.c_str(), O_RDONLY);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(fsync(fd), 0);
    ASSERT_EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    const double opening = MonotonicSeconds();
    const auto data = Open(path, kSeqLen);
    const double opened = MonotonicSeconds() - opening;
    ASSERT_EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    close(fd);
    const double step_seconds = static_cast<double>(rows * kSeqLen) / 1e6;
    const auto steps = static_cast<int64_t>(20 / step_seconds);
    ReadAhead reader(data.get(), {1, rows, rows}, 0, steps);
    ASSERT_TRUE(reader.Next().ok());  // nothing could be read ahead of it
    double waits = 0, longest = 0;
    const double begin = MonotonicSeconds();
    for (int64_t s = 1; s < steps; ++s) {
      std::this_thread::sleep_for(std::chrono::duration<double>(step_seconds));
      const double asked = MonotonicSeconds();
      ASSERT_TRUE(reader.Next().ok());
      const double waited = MonotonicSeconds() - asked;
      waits += waited;
      longest = std::max(longest, waited);
    }
    // As fast as it can: what is left of the disk and of the core beside a run.
    const double alone = MonotonicSeconds();
    const int64_t more = steps / 4;
    ReadAhead fast(data.get(), {1, rows, rows}, steps * rows, more);
    for (int64_t s = 0; s < more; ++s) ASSERT_TRUE(fast.Next().ok());
    const double rate = static_cast<double>(more * rows * kSeqLen) / (MonotonicSeconds() - alone);
    const double share = waits / (alone - begin);
    std::printf(
        "steps of %lld tokens: %.3f %% of the time waited, at most %.1f ms at once; opened in %.2f "
        "s; "
        "%.1fM tokens/s without a pause\n",
        static_cast<long long>(rows * kSeqLen), 100 * share, 1000 * longest, opened, rate / 1e6);
    EXPECT_LT(share, 0.01);
  }
}

}  // namespace
}  // namespace krait
