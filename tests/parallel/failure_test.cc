// What becomes of a job when one of its ranks fails: under mpirun, with the program rank_loop.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <filesystem>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/file.h"
#include "paths.h"
#include "support/process.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr int kRanks = 4;
constexpr double kEndSeconds = 10;  // within these a job ends after the failure of a rank

std::string ReadText(const std::string& path) {
  const auto text = ReadFile(path, 1 << 20, ExitCode::kInternal);
  return text.ok() ? *text : "";
}

class Job {
 public:
  Job(const std::string& what, double timeout)
      : process_({KRAIT_MPIRUN, "-n", std::to_string(kRanks), KRAIT_RANK_LOOP, folder_.path(),
                  std::to_string(timeout), what},
                 MpiVariables()) {
    for (int rank = 0; rank < kRanks; ++rank) {
      const std::string path = folder_ / ("rank-" + std::to_string(rank) + ".pid");
      pid_t pid = 0;
      while (pid == 0 && process_.running()) {
        std::istringstream(ReadText(path)) >> pid;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      pids_.push_back(pid);
    }
  }

  void SignalRank(int rank, int signal) { kill(pids_[static_cast<size_t>(rank)], signal); }
  Process& mpirun() { return process_; }
  std::string Report(int rank) const {
    return ReadText(folder_ / ("hang-rank-" + std::to_string(rank) + ".txt"));
  }
  // Its end within so many seconds, with no rank left over.
  ProcessResult End(double seconds) {
    const double begin = MonotonicSeconds();
    while (process_.running() && MonotonicSeconds() < begin + seconds) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_FALSE(process_.running()) << "after " << seconds << " s";
    const ProcessResult result = process_.Wait();
    for (double until = MonotonicSeconds() + 3; AnyAlive() && MonotonicSeconds() < until;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_FALSE(AnyAlive());
    return result;
  }

 private:
  bool AnyAlive() const {
    for (const pid_t pid : pids_) {
      if (pid > 0 && kill(pid, 0) == 0) return true;
    }
    return false;
  }

  TempFolder folder_;
  std::vector<pid_t> pids_;
  Process process_;
};

TEST(FailureTest, AFailingRankEndsAllWithItsCode) {
  struct Case {
    const char* what;
    int code;
    const char* said;
  };
  for (const Case& c : {Case{"fatal", 70, "krait: rank 3 ends all ranks (exit code 70)"},
                        Case{"memory", 71, "krait: rank 3 ends all ranks (exit code 71)"},
                        Case{"throw", 134, "rank 3"}, Case{"exit", 21, "Exit code:    21"},
                        Case{"segfault", 139, "rank 3"}}) {
    SCOPED_TRACE(c.what);
    Job job(c.what, 600);
    const ProcessResult result = job.End(kEndSeconds);
    EXPECT_EQ(result.code, c.code) << result.err;
    EXPECT_THAT(result.err, HasSubstr(c.said));
  }
}

TEST(FailureTest, Sigusr1StopsAllRanksAndSigtermEndsThem) {
  Job stopped("loop", 600);
  stopped.mpirun().Signal(SIGUSR1);
  EXPECT_EQ(stopped.End(kEndSeconds).code, 10);
  Job ended("loop", 600);
  ended.SignalRank(2, SIGTERM);
  EXPECT_EQ(ended.End(kEndSeconds).code, 128 + SIGTERM);
}

TEST(FailureTest, NoRankOutlivesMpirun) {
  Job job("loop", 600);
  job.mpirun().Signal(SIGKILL);
  EXPECT_EQ(job.End(kEndSeconds).code, 128 + SIGKILL);
}

// kill -9 of one rank.
void Kill(int rank) {
  SCOPED_TRACE("rank " + std::to_string(rank));
  Job job("loop", 600);
  job.SignalRank(rank, SIGKILL);
  const ProcessResult result = job.End(kEndSeconds);
  EXPECT_EQ(result.code, 128 + SIGKILL) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("process rank " + std::to_string(rank)),
                                HasSubstr("exited on signal 9 (Killed)")));
}

// A rank that stands still, and three that wait for it.
void Stop(int rank) {
  SCOPED_TRACE("rank " + std::to_string(rank));
  Job job("loop", 2);
  job.SignalRank(rank, SIGSTOP);
  const ProcessResult result = job.End(2 + kEndSeconds);
  EXPECT_EQ(result.code, 50) << result.err;
  for (int other = 0; other < kRanks; ++other) {
    if (other == rank) continue;
    const std::string name = "rank " + std::to_string(other);
    EXPECT_THAT(result.err, HasSubstr("krait: " + name +
                                      ": no progress for 2 s, in gather of "
                                      "numbers (4 ranks, 0 to 3), waiting for rank " +
                                      std::to_string(rank) + "; stacks"));
    EXPECT_THAT(job.Report(other),
                AllOf(HasSubstr(name), HasSubstr("not done"), HasSubstr("\nthread "),
                      AnyOf(HasSubstr("MPI_Waitsome"), HasSubstr("libmpi.so"))));
  }
  EXPECT_EQ(job.Report(rank), "");
}

TEST(FailureTest, AKilledRankEndsAll) { Kill(2); }
TEST(FailureTest, AStoppedRankIsAHang) { Stop(1); }

TEST(FailureTest, LongKillsAndStopsOfRandomRanks) {
  std::mt19937 random(std::random_device{}());
  for (int round = 0; round < 20; ++round) {
    Kill(static_cast<int>(random() % kRanks));
    Stop(static_cast<int>(random() % kRanks));
  }
}

TEST(FailureTest, ARankThatComputesForEverIsInItsReport) {
  Job job("stuck", 2);
  const ProcessResult result = job.End(3 + 2 + kEndSeconds);
  EXPECT_EQ(result.code, 50) << result.err;
  EXPECT_THAT(result.err, HasSubstr("krait: rank 3: no progress for 2 s, in no collective"));
  EXPECT_THAT(result.err, HasSubstr("waiting for rank 3"));
  EXPECT_THAT(job.Report(3), HasSubstr("rank_loop"));
}

TEST(FailureTest, TheEndOfAJobIsWatchedToo) {
  Job job("late", 0.3);  // whose limit at the end is ten times as long
  const ProcessResult result = job.End(3 + 3 + kEndSeconds);
  EXPECT_EQ(result.code, 50) << result.err;
  EXPECT_THAT(result.err, HasSubstr("krait: rank 0: no progress for 3 s, in gather of numbers (4 "
                                    "ranks, 0 to 3), waiting for rank 3"));
}

TEST(FailureTest, PhasesThatTakeLongAreNoHangs) {
  Job phase("long", 1);
  ProcessResult result = phase.End(20);
  EXPECT_EQ(result.code, 0) << result.err;
  Job idle("idle", 1);
  result = idle.End(20);
  EXPECT_EQ(result.code, 50) << result.err;
}

TEST(FailureTest, AJobThatIsSuspendedGoesOn) {
  Job job("loop", 2);
  for (int rank = 0; rank < kRanks; ++rank) job.SignalRank(rank, SIGSTOP);
  std::this_thread::sleep_for(std::chrono::seconds(6));
  for (int rank = 0; rank < kRanks; ++rank) job.SignalRank(rank, SIGCONT);
  std::this_thread::sleep_for(std::chrono::seconds(3));
  job.mpirun().Signal(SIGUSR1);
  const ProcessResult result = job.End(kEndSeconds);
  EXPECT_EQ(result.code, 10) << result.err;
}

}  // namespace
}  // namespace krait
