// Kills of one rank, or of mpirun, while all ranks save in the background: what is in place
// afterwards is whole, and no older than what was said to be saved.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/base/file.h"
#include "support/process.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_testing.h"

namespace krait {
namespace {

constexpr int kRanks = 4;
constexpr int64_t kSteps = 1'000'000;  // never reached before the kill

// The numbers behind a word at the beginning of a line.
std::vector<int64_t> Numbers(const std::string& text, const std::string& word) {
  std::vector<int64_t> numbers;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(word + " ")) numbers.push_back(std::stol(line.substr(word.size() + 1)));
  }
  return numbers;
}

std::vector<std::string> Command(const std::string& dir, int64_t steps) {
  return {KRAIT_MPIEXEC,        "-n", std::to_string(kRanks), KRAIT_CRASH_RANKS_DRIVER, dir,
          std::to_string(steps)};
}

const std::map<std::string, std::string> kEnvironment = MpiVariables();

class CrashJobTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Kills(int count) {
    std::mt19937 random(20261126);
    int64_t saved = 0, saves = 0;
    int cut_short = 0;
    for (int i = 0; i < count && !HasFailure(); ++i) {
      Process job(Command(dir_, kSteps), kEnvironment);
      while (job.running() && Numbers(job.out(), "resumed").empty()) usleep(2000);
      usleep(static_cast<unsigned>(random() % 400'000));
      const std::vector<int64_t> pids = Numbers(job.out(), "pid");
      ASSERT_EQ(pids.size(), static_cast<size_t>(kRanks)) << job.Wait().err;
      ASSERT_TRUE(job.running()) << job.Wait().err;
      const int victim = static_cast<int>(random() % (kRanks + 1));
      SCOPED_TRACE("kill " + std::to_string(i) + " of " +
                   (victim < kRanks ? "rank " + std::to_string(victim) : "mpirun"));
      if (victim < kRanks) {
        kill(static_cast<pid_t>(pids[static_cast<size_t>(victim)]), SIGKILL);
      } else {
        job.Signal(SIGKILL);
      }
      const ProcessResult result = job.Wait();
      for (const int64_t pid : pids) {
        for (int tries = 0; kill(static_cast<pid_t>(pid), 0) == 0; ++tries) {
          ASSERT_LT(tries, 1000) << "process " << pid << " is still there";
          usleep(10'000);
        }
      }
      // No older than what the last job had, nor what this one said.
      const std::vector<int64_t> resumed = Numbers(result.out, "resumed");
      ASSERT_EQ(resumed.size(), 1u);
      EXPECT_GE(resumed[0], saved);
      saved = std::max(saved, resumed[0]);
      for (const int64_t step : Numbers(result.out, "saved")) {
        saved = std::max(saved, step);
        ++saves;
      }
      CheckWhole(saved);
      const std::vector<std::string> names = *ListDirectory(dir_, ExitCode::kData);
      for (const std::string& name : names) {
        cut_short += name.ends_with(".tmp");
      }
    }
    // To the end, where nothing is left behind.
    const ProcessResult last = RunProcess(Command(dir_, saved + 5), kEnvironment);
    EXPECT_EQ(last.code, 0) << last.err;
    CheckWhole(saved + 5);
    EXPECT_EQ(std::filesystem::exists(dir_ + "/latest"), true);
    EXPECT_EQ(ListDirectory(dir_, ExitCode::kData)->size(), 3u);
    std::printf("%d kills, %d saves in place, %d cut short\n", count, static_cast<int>(saves),
                cut_short);
  }
  // All that is under a final name, and the newest of it is of `step` or later.
  void CheckWhole(int64_t step) {
    const std::vector<std::string> folders = *ListCheckpoints(dir_);
    for (const std::string& folder : folders) {
      const auto checkpoint = OpenCheckpoint(folder);
      ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
      EXPECT_TRUE(VerifyCheckpoint(*checkpoint).ok()) << folder;
    }
    if (step == 0) return;
    ASSERT_FALSE(folders.empty());
    EXPECT_GE(ReadManifest(folders[0])->meta.step, step);
  }

  const std::string dir_ = testing_checkpoint::TempFolder("krait_crash_job_test");
};

TEST_F(CrashJobTest, AFewKills) { Kills(3); }

TEST_F(CrashJobTest, LongFiftyKills) { Kills(50); }

}  // namespace
}  // namespace krait
