#include "kernels/base/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>
#include <thread>

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "krait_file_test_" + std::to_string(getpid());
    ASSERT_TRUE(RemoveAll(dir_, ExitCode::kData).ok());
    ASSERT_TRUE(MakeDirectories(dir_, ExitCode::kData).ok());
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string dir_;
};

TEST_F(FileTest, WritesAndReadsAtOffsets) {
  const std::string path = dir_ + "/a";
  {
    auto file = File::Create(path, true, ExitCode::kCannotSave);
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->WriteAt("world", 5, 6).ok());
    ASSERT_TRUE(file->WriteAt("hello ", 6, 0).ok());
    ASSERT_TRUE(file->Sync().ok());
    ASSERT_TRUE(file->Close().ok());
  }
  EXPECT_EQ(*ReadFile(path, 100, ExitCode::kData), "hello world");
  auto file = File::OpenRead(path, ExitCode::kData);
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(*file->Size(), 11);
  char word[5];
  ASSERT_TRUE(file->ReadAt(word, 5, 6).ok());
  EXPECT_EQ(std::string(word, 5), "world");

  const absl::Status end = file->ReadAt(word, 5, 8);
  EXPECT_EQ(ExitCodeOf(end), ExitCode::kData);
  EXPECT_THAT(MessageOf(end), HasSubstr(path));
  EXPECT_THAT(MessageOf(end), HasSubstr("ends at byte 11, 2 more bytes"));
}

TEST_F(FileTest, ErrorsNamePathAndReason) {
  const absl::Status missing = File::OpenRead(dir_ + "/none", ExitCode::kData).status();
  EXPECT_EQ(ExitCodeOf(missing), ExitCode::kData);
  EXPECT_EQ(MessageOf(missing), "cannot open " + dir_ + "/none: No such file or directory");
  EXPECT_THAT(MessageOf(ReadFile(dir_, 100, ExitCode::kData).status()), HasSubstr("is a folder"));

  ASSERT_TRUE(WriteFileAtomic(dir_ + "/f", "12345", ExitCode::kCannotSave).ok());
  EXPECT_THAT(MessageOf(ReadFile(dir_ + "/f", 4, ExitCode::kData).status()), HasSubstr("5 bytes"));
  const absl::Status again = File::Create(dir_ + "/f", true, ExitCode::kCannotSave).status();
  EXPECT_EQ(ExitCodeOf(again), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(again), HasSubstr("File exists"));
  EXPECT_THAT(MessageOf(MakeDirectories(dir_ + "/f/g", ExitCode::kCannotSave)),
              HasSubstr("Not a directory"));
}

TEST_F(FileTest, AFifoIsRefusedAtOnce) {
  ASSERT_EQ(mkfifo((dir_ + "/fifo").c_str(), 0600), 0);
  EXPECT_THAT(MessageOf(ReadFile(dir_ + "/fifo", 10, ExitCode::kData).status()),
              HasSubstr("not a regular file"));
}

TEST_F(FileTest, AtomicWriteReplacesAndLeavesNothingBehind) {
  const std::string path = dir_ + "/latest";
  // What a killed process left: a stale temporary file.
  ASSERT_TRUE(File::Create(path + ".tmp", true, ExitCode::kData).ok());
  ASSERT_TRUE(WriteFileAtomic(path, "one", ExitCode::kCannotSave).ok());
  ASSERT_TRUE(WriteFileAtomic(path, "two", ExitCode::kCannotSave).ok());
  EXPECT_EQ(*ReadFile(path, 10, ExitCode::kData), "two");
  EXPECT_THAT(*ListDirectory(dir_, ExitCode::kData), ElementsAre("latest"));

  EXPECT_EQ(ExitCodeOf(WriteFileAtomic(dir_ + "/no/x", "", ExitCode::kCannotSave)),
            ExitCode::kCannotSave);
}

TEST_F(FileTest, AFailedAtomicWriteKeepsTheOldContent) {
  const std::string path = dir_ + "/config";
  ASSERT_TRUE(WriteFileAtomic(path, "old", ExitCode::kCannotSave).ok());
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 1000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = WriteFileAtomic(path, std::string(2000, 'x'), ExitCode::kCannotSave);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kCannotSave);
  EXPECT_THAT(MessageOf(status), HasSubstr("File too large"));
  EXPECT_EQ(*ReadFile(path, 10, ExitCode::kData), "old");
  EXPECT_THAT(*ListDirectory(dir_, ExitCode::kData), ElementsAre("config"));
}

TEST_F(FileTest, RemoveAllDoesNotFollowLinks) {
  ASSERT_TRUE(MakeDirectories(dir_ + "/keep/x", ExitCode::kData).ok());
  ASSERT_TRUE(MakeDirectories(dir_ + "/gone/deep/er", ExitCode::kData).ok());
  ASSERT_EQ(symlink((dir_ + "/keep").c_str(), (dir_ + "/gone/link").c_str()), 0);
  ASSERT_TRUE(RemoveAll(dir_ + "/gone", ExitCode::kData).ok());
  EXPECT_FALSE(Exists(dir_ + "/gone"));
  EXPECT_TRUE(IsDirectory(dir_ + "/keep/x"));
  EXPECT_TRUE(RemoveAll(dir_ + "/gone", ExitCode::kData).ok());  // missing is fine
}

TEST_F(FileTest, ExistsSeesDanglingLinks) {
  ASSERT_EQ(symlink("nowhere", (dir_ + "/link").c_str()), 0);
  EXPECT_TRUE(Exists(dir_ + "/link"));
  EXPECT_FALSE(IsDirectory(dir_ + "/link"));
}

}  // namespace
}  // namespace krait
