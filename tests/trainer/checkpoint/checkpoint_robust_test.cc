// What is neither damage nor a failed write: refusals of the system, exceptions while saving.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"
#include "trainer/checkpoint/run_record.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using testing_checkpoint::Fill;
using testing_checkpoint::SmallMeta;
using testing_checkpoint::SmallState;
using testing_checkpoint::State;

class CheckpointRobustTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(dir_); }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  void Save(int64_t step) {
    State state = SmallState();
    Fill(step, &state);
    const absl::Status status = SaveCheckpoint({dir_, 3, ""}, SmallMeta(step), state.boxes);
    ASSERT_TRUE(status.ok()) << status;
  }
  std::string Step(int64_t step) const { return dir_ + "/" + StepFolderName(step); }
  absl::StatusOr<Checkpoint> Load(std::vector<PassedOver>* passed) {
    State state = SmallState();
    return LoadNewestWhole(
        *ListCheckpoints(dir_), [&](const Checkpoint& c) { return LoadBoxes(c, state.boxes); },
        passed);
  }

  const std::string dir_ = testing_checkpoint::TempFolder("krait_checkpoint_robust_test");
};

TEST_F(CheckpointRobustTest, WhatTheSystemRefusesIsNamedAndNotPassedOver) {
  Save(1);
  Save(2);
  // A file of another process's making in place of the folder's: a link that leads to itself.
  const std::string away = dir_ + "/away";
  std::filesystem::rename(Step(2), away);
  std::filesystem::create_symlink(Step(2), Step(2));
  std::vector<PassedOver> passed;
  const auto refused = Load(&passed);
  EXPECT_EQ(ExitCodeOf(refused.status()), ExitCode::kNoCheckpoint);
  EXPECT_THAT(MessageOf(refused.status()),
              AllOf(HasSubstr(Step(2)), HasSubstr("Too many levels of symbolic links")));
  EXPECT_THAT(passed, IsEmpty());
  EXPECT_FALSE(ListCheckpoints(Step(2) + "/x").ok());  // not known, so not "none"
  EXPECT_THAT(MessageOf(FindCheckpoints(Step(2) + "/x").status()), HasSubstr("Too many levels"));
  // A folder that is empty is damage, and one that is not there is none.
  std::filesystem::remove(Step(2));
  std::filesystem::create_directory(Step(2));
  EXPECT_EQ(Load(&passed)->meta.step, 1);
  EXPECT_THAT(passed, SizeIs(1));
  EXPECT_THAT(*ListCheckpoints(dir_ + "/none"), IsEmpty());

  if (geteuid() == 0) return;  // nothing is forbidden
  std::filesystem::remove(Step(2));
  std::filesystem::rename(away, Step(2));
  for (const std::string& path :
       {Step(2), Step(2) + "/manifest.json", Step(2) + "/rank-00000.h5"}) {
    struct stat info;
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    ASSERT_EQ(chmod(path.c_str(), 0), 0);
    const auto forbidden = Load(&passed);
    ASSERT_EQ(chmod(path.c_str(), info.st_mode), 0);
    EXPECT_THAT(MessageOf(forbidden.status()), AllOf(HasSubstr(path), HasSubstr("denied")));
  }
  EXPECT_EQ(Load(&passed)->meta.step, 2);
}

// The bytes of address space in use.
int64_t AddressSpace() {
  std::ifstream in("/proc/self/statm");
  int64_t pages = 0;
  in >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

TEST_F(CheckpointRobustTest, MemoryThatRunsOutWhileSavingIsAnError) {
#ifdef KRAIT_SANITIZE
  GTEST_SKIP() << "the sanitizers' allocator ends the process itself";
#endif
  // The copies that Start makes fit below the limit, those of the saving thread do not. In a
  // process of its own, whose limit ends with it.
  const auto save = [&] {
    constexpr int64_t kText = int64_t{300} << 20;
    State state = SmallState();
    std::vector<char> staging(static_cast<size_t>(AsyncSaver::StagingBytes(state.boxes)));
    CheckpointMeta meta = SmallMeta(1);
    meta.config_yaml.assign(static_cast<size_t>(kText), 'x');
    const auto bytes = static_cast<rlim_t>(AddressSpace() + kText + kText / 2);
    const rlimit limit = {bytes, bytes};
    if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(99);
    AsyncSaver saver;
    const absl::Status started = saver.Start({dir_, 2, ""}, meta, state.boxes, staging.data(),
                                             static_cast<int64_t>(staging.size()));
    if (!started.ok()) _exit(98);
    const absl::Status status = saver.Wait();
    std::fprintf(stderr, "%s\n", MessageOf(status).c_str());
    _exit(static_cast<int>(ExitCodeOf(status)));
  };
  EXPECT_EXIT(save(), ::testing::ExitedWithCode(static_cast<int>(ExitCode::kOutOfMemory)),
              "cannot save .*/step-00000001: out of memory");
  EXPECT_THAT(*ListCheckpoints(dir_), IsEmpty());
}

TEST_F(CheckpointRobustTest, ARunRecordReadsBackAndABrokenOneIsNoMissingOne) {
  std::filesystem::create_directories(dir_);
  auto none = ReadRunRecord(dir_);
  ASSERT_TRUE(none.ok());
  EXPECT_FALSE(none->has_value());
  const RunRecord record = {.path = "a \"b\"/step-00000007",
                            .save_id = std::string(32, 'a'),
                            .step = 7,
                            .followed = "/c/d",
                            .followed_step = 5};
  ASSERT_TRUE(WriteRunRecord(dir_, record).ok());
  const auto read = ReadRunRecord(dir_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, record);
  for (const char* text : {"", "{}", "[]", "{\"path\": 3, \"save_id\": \"\", \"step\": 1}"}) {
    std::ofstream(RunRecordPath(dir_)) << text;
    const absl::Status status = ReadRunRecord(dir_).status();
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kNoCheckpoint) << text;
    EXPECT_THAT(MessageOf(status), ::testing::HasSubstr("remove it to go on from the newest"));
  }
}

}  // namespace
}  // namespace krait
