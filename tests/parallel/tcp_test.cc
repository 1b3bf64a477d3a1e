// Ranks that meet by TCP: processes of the program rank_loop, and the krait command.
#include "parallel/tcp.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/base/clock.h"
#include "paths.h"
#include "support/process.h"
#include "support/temp_folder.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kEndSeconds = 10;  // within these a job ends after the death of a rank
using Variables = std::map<std::string, std::string>;

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// A socket of this test; listening at a port that was free, or connected to one.
class TestSocket {
 public:
  explicit TestSocket(int connect_to = 0) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(connect_to));
    auto* raw = reinterpret_cast<sockaddr*>(&address);
    if (connect_to > 0) {
      connected_ = connect(fd_, raw, sizeof address) == 0;
      return;
    }
    socklen_t size = sizeof address;
    EXPECT_EQ(bind(fd_, raw, size), 0);
    EXPECT_EQ(listen(fd_, 8), 0);
    EXPECT_EQ(getsockname(fd_, raw, &size), 0);
    port_ = ntohs(address.sin_port);
  }
  TestSocket(TestSocket&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), port_(other.port_), connected_(other.connected_) {}
  ~TestSocket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }
  int port() const { return port_; }
  bool connected() const { return connected_; }
  void Send(const std::string& text) const {
    (void)!send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
  }

 private:
  int fd_ = -1, port_ = 0;
  bool connected_ = false;
};

int FreePort() { return TestSocket().port(); }

class TcpTest : public ::testing::Test {
 protected:
  Variables Rank(int rank, int ranks, int port) const {
    return {{"RANK", std::to_string(rank)},
            {"WORLD_SIZE", std::to_string(ranks)},
            {"MASTER_ADDR", "127.0.0.1"},
            {"MASTER_PORT", std::to_string(port)},
            {"ASAN_OPTIONS", "handle_segv=0:handle_abort=0"}};
  }
  std::unique_ptr<Process> Start(const std::string& what, const Variables& variables,
                                 double seconds = 60, double timeout = 600) const {
    return std::make_unique<Process>(
        std::vector<std::string>{KRAIT_RANK_LOOP, folder_.path(), std::to_string(timeout), what,
                                 std::to_string(seconds)},
        variables);
  }
  // Its end within so many seconds.
  static ProcessResult End(Process* process, double seconds = kEndSeconds) {
    for (const double begin = MonotonicSeconds();
         process->running() && MonotonicSeconds() < begin + seconds;) {
      Sleep(0.01);
    }
    EXPECT_FALSE(process->running()) << "after " << seconds << " s";
    if (process->running()) process->Signal(SIGKILL);
    return process->Wait();
  }
  void WaitUntilMet(int ranks) const {
    for (int rank = 0; rank < ranks; ++rank) {
      const std::string path = folder_ / ("rank-" + std::to_string(rank) + ".pid");
      for (int i = 0; i < 3000 && !std::ifstream(path).good(); ++i) Sleep(0.01);
    }
  }

  TempFolder folder_;
};

TEST_F(TcpTest, RanksMeetInAnyOrder) {
  const std::vector<std::vector<int>> orders = {{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}};
  for (const double delay : {0.0, 0.4}) {
    for (const auto& order : orders) {
      const int port = FreePort();
      std::vector<std::unique_ptr<Process>> ranks;
      for (const int rank : order) {
        ranks.push_back(Start("check", Rank(rank, 4, port)));
        Sleep(delay);
      }
      for (auto& rank : ranks) {
        const ProcessResult result = End(rank.get(), 60);
        EXPECT_EQ(result.code, 0) << result.err;
      }
    }
  }
}

TEST_F(TcpTest, ManyRanksMeet) {
  const int port = FreePort();
  std::vector<std::unique_ptr<Process>> ranks;
  for (int rank = 0; rank < 24; ++rank)
    ranks.push_back(Start("long", Rank(rank, 24, port), 60, 0.2));
  for (auto& rank : ranks) EXPECT_EQ(End(rank.get(), 60).code, 0);
}

TEST_F(TcpTest, TheMissingAreNamed) {
  const int port = FreePort();
  const auto first = Start("check", Rank(0, 4, port), 2),
             last = Start("check", Rank(3, 4, port), 2);
  ProcessResult result = End(first.get());
  EXPECT_EQ(result.code, 50);
  EXPECT_EQ(result.err, "krait: after 2 s at 127.0.0.1:" + std::to_string(port) +
                            " 2 of 4 ranks are missing (rank 1, 2)\n");
  result = End(last.get());
  EXPECT_EQ(result.code, 50);
  EXPECT_EQ(result.err, "");
}

TEST_F(TcpTest, WhoWaitsForLongSaysForWhom) {
  const int port = FreePort();
  const std::string place = "127.0.0.1:" + std::to_string(port);
  const auto first = Start("check", Rank(0, 3, port), 6),
             last = Start("check", Rank(2, 3, port), 6);
  const ProcessResult result = End(first.get());
  EXPECT_EQ(result.err, "krait: waiting for the others at " + place +
                            " for 6 s: 1 of 3 ranks are missing (rank 1) (unset RANK and "
                            "WORLD_SIZE for a single process)\n"
                            "krait: after 6 s at " +
                            place + " 1 of 3 ranks are missing (rank 1)\n");
  EXPECT_EQ(End(last.get()).err, "");
}

TEST_F(TcpTest, WrongPorts) {
  // Nobody is there.
  const auto lonely = Start("check", Rank(1, 2, FreePort()), 1);
  ProcessResult result = End(lonely.get());
  EXPECT_EQ(result.code, 50);
  EXPECT_THAT(result.err, AllOf(HasSubstr("krait: rank 1: no rank 0 at 127.0.0.1:"),
                                HasSubstr("within 1 s: Connection refused")));
  // Somebody else is there.
  const TestSocket other;
  const auto lost = Start("check", Rank(1, 2, other.port()), 1);
  const int caller = accept(other.fd(), nullptr, nullptr);
  (void)!send(caller, "SSH-2.0-OpenSSH_9.2 and so on\r\n", 31, MSG_NOSIGNAL);
  result = End(lost.get(), 12 + kEndSeconds);
  EXPECT_EQ(result.code, 50);
  EXPECT_THAT(result.err, HasSubstr("who answers there is no rank of krait"));
  close(caller);
  // Where rank 0 would listen.
  const auto first = Start("check", Rank(0, 2, other.port()), 60);
  result = End(first.get(), 8 + kEndSeconds);
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, AllOf(HasSubstr("rank 0 cannot listen at 127.0.0.1:"),
                                HasSubstr("Address already in use"), HasSubstr("MASTER_PORT")));
}

TEST_F(TcpTest, StrangersAreNoRanks) {
  const int port = FreePort();
  const auto first = Start("check", Rank(0, 2, port));
  for (int i = 0; i < 1000 && !TestSocket(port).connected(); ++i) Sleep(0.01);
  std::vector<TestSocket> strangers;
  for (const std::string& text :
       {std::string(), std::string("GET / HTTP/1.1\r\n\r\n"), std::string(100'000, 'x'),
        std::string("krait h1"), "krait h1" + std::string(200, '\0'), std::string("krait")}) {
    for (int i = 0; i < 60; ++i) {
      strangers.emplace_back(port);
      strangers.back().Send(text);
    }
  }
  const auto second = Start("check", Rank(1, 2, port));
  const ProcessResult a = End(first.get(), 60), b = End(second.get(), 60);
  EXPECT_EQ(a.code, 0) << a.err;
  EXPECT_EQ(b.code, 0) << b.err;
}

TEST_F(TcpTest, TwoJobsOnOnePort) {
  const int port = FreePort();
  const auto first = Start("check", Rank(0, 2, port));
  Sleep(0.5);
  const auto intruder = Start("loop", Rank(1, 2, port));  // other words
  const auto larger = Start("check", Rank(2, 4, port));   // another size
  const auto other_first = Start("loop", Rank(0, 2, port));
  for (Process* other : {intruder.get(), larger.get()}) {
    const ProcessResult result = End(other);
    EXPECT_EQ(result.code, 20);
    EXPECT_THAT(result.err,
                HasSubstr("is of another job, of 2 ranks or with another command line"));
  }
  const auto second = Start("check", Rank(1, 2, port), 60);
  const auto twin = Start("check", Rank(1, 2, port), 60);
  const ProcessResult a = End(second.get(), 30), b = End(twin.get(), 70), c = End(first.get());
  EXPECT_EQ(c.code, 0) << c.err;
  // Whichever came first; the other is refused, or finds nobody any more.
  EXPECT_EQ(std::min(a.code, b.code), 0) << a.err << b.err;
  EXPECT_THAT(std::max(a.code, b.code), AnyOf(20, 50));
  // The port was free by then, so this one waits for its own.
  other_first->Signal(SIGKILL);
}

TEST_F(TcpTest, TheSameRankTwiceIsRefused) {
  const int port = FreePort();
  const auto first = Start("check", Rank(0, 3, port));
  const auto second = Start("check", Rank(1, 3, port));
  Sleep(1);
  const auto twin = Start("check", Rank(1, 3, port));
  const ProcessResult refused = End(twin.get());
  EXPECT_EQ(refused.code, 20);
  EXPECT_THAT(refused.err, HasSubstr("rank 1: rank 1 is at 127.0.0.1:"));
  const auto third = Start("check", Rank(2, 3, port));
  for (Process* rank : {first.get(), second.get(), third.get()}) {
    const ProcessResult result = End(rank, 60);
    EXPECT_EQ(result.code, 0) << result.err;
  }
}

TEST_F(TcpTest, ADeathWhileTheRanksMeetEndsAll) {
  for (const int dies : {0, 1}) {
    SCOPED_TRACE(dies);
    const int port = FreePort();
    std::vector<std::unique_ptr<Process>> ranks;  // the last one never comes
    for (int rank = 0; rank < 3; ++rank) ranks.push_back(Start("check", Rank(rank, 4, port)));
    Sleep(1.5);
    ranks[static_cast<size_t>(dies)]->Signal(SIGKILL);
    for (int rank = 0; rank < 3; ++rank) {
      const ProcessResult result = End(ranks[static_cast<size_t>(rank)].get());
      EXPECT_EQ(result.code, rank == dies ? 128 + SIGKILL : 50);
      if (rank != dies && (rank == 0 || dies == 0)) {
        EXPECT_THAT(result.err, HasSubstr("rank " + std::to_string(dies)));
        EXPECT_THAT(result.err, HasSubstr("is gone: its connection closed before all had met"));
      }
    }
  }
}

// One rank fails in its own way; the others' code, and what is said once.
TEST_F(TcpTest, AFailingRankEndsAll) {
  struct Case {
    const char* what;
    int own, others;
    const char* said;
  };
  for (const Case& c :
       {Case{"fatal", 70, 70, "krait: rank 3 ends all ranks (exit code 70)"},
        Case{"memory", 71, 71, "krait: rank 3 ends all ranks (exit code 71)"},
        Case{"throw", 134, 50, "krait: rank 3 is gone (its connection closed): all ranks end"},
        Case{"exit", 21, 50, "krait: rank 3 is gone (its connection closed): all ranks end"},
        Case{"segfault", 139, 50, "krait: rank 3 is gone (its connection closed)"}}) {
    SCOPED_TRACE(c.what);
    const int port = FreePort();
    std::vector<std::unique_ptr<Process>> ranks;
    for (int rank = 0; rank < 4; ++rank) ranks.push_back(Start(c.what, Rank(rank, 4, port)));
    std::string said;
    for (int rank = 0; rank < 4; ++rank) {
      const ProcessResult result = End(ranks[static_cast<size_t>(rank)].get(), 60);
      EXPECT_EQ(result.code, rank == 3 ? c.own : c.others) << result.err;
      said += result.err;
    }
    EXPECT_THAT(said, HasSubstr(c.said));
    EXPECT_EQ(said.find(c.said), said.rfind(c.said));
  }
}

TEST_F(TcpTest, Sigusr1StopsAll) {
  const int port = FreePort();
  std::vector<std::unique_ptr<Process>> ranks;
  for (int rank = 0; rank < 3; ++rank) ranks.push_back(Start("loop", Rank(rank, 3, port)));
  WaitUntilMet(3);
  Sleep(0.3);
  ranks[1]->Signal(SIGUSR1);
  for (auto& rank : ranks) EXPECT_EQ(End(rank.get()).code, 10);
}

TEST_F(TcpTest, AStoppedRankIsAHang) {
  const int port = FreePort();
  std::vector<std::unique_ptr<Process>> ranks;
  for (int rank = 0; rank < 3; ++rank) ranks.push_back(Start("loop", Rank(rank, 3, port), 60, 2));
  WaitUntilMet(3);
  Sleep(0.3);
  ranks[1]->Signal(SIGSTOP);
  const ProcessResult first = End(ranks[0].get(), 2 + kEndSeconds);
  EXPECT_EQ(first.code, 50);
  EXPECT_THAT(first.err, HasSubstr("krait: rank 0: no progress for 2 s, in gather of numbers (3 "
                                   "ranks, 0 to 2), waiting for rank 1"));
  EXPECT_EQ(End(ranks[2].get(), 2 + kEndSeconds).code, 50);
  // It goes, too, when somebody lets it go on.
  ranks[1]->Signal(SIGCONT);
  EXPECT_EQ(End(ranks[1].get()).code, 50);
}

// kill -9 of a random rank at a random time: while the ranks start, meet and work.
TEST_F(TcpTest, DeathsAtAnyTimeEndAll) {
  std::mt19937 random(7);
  for (int round = 0; round < 20; ++round) {
    const int port = FreePort(), dies = static_cast<int>(random() % 4);
    const double delay = static_cast<double>(random() % 1000) / 1000;
    SCOPED_TRACE("round " + std::to_string(round) + ": rank " + std::to_string(dies) + " after " +
                 std::to_string(delay) + " s");
    std::vector<std::unique_ptr<Process>> ranks;
    for (int rank = 0; rank < 4; ++rank) ranks.push_back(Start("loop", Rank(rank, 4, port), 5));
    Sleep(delay);
    ranks[static_cast<size_t>(dies)]->Signal(SIGKILL);
    for (int rank = 0; rank < 4; ++rank) {
      // A rank that never called is missed after the 5 s in which all must be there.
      const ProcessResult result = End(ranks[static_cast<size_t>(rank)].get(), kEndSeconds + 5);
      EXPECT_EQ(result.code, rank == dies ? 128 + SIGKILL : 50) << result.err;
    }
  }
}

TEST_F(TcpTest, SlurmsVariablesWhereMpiCannotServe) {
  const int port = FreePort();
  std::vector<std::unique_ptr<Process>> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.push_back(Start("check", {{"SLURM_STEP_NUM_TASKS", "2"},
                                    {"SLURM_PROCID", std::to_string(rank)},
                                    {"SLURM_LOCALID", std::to_string(rank)},
                                    {"SLURM_STEP_NODELIST", "localhost"},
                                    {"SLURM_JOB_ID", "123"},
                                    {"MASTER_PORT", std::to_string(port)}}));
  }
  for (auto& rank : ranks) {
    const ProcessResult result = End(rank.get(), 60);
    EXPECT_EQ(result.code, 0) << result.err;
  }
}

TEST(TcpVariables, FirstNodes) {
  EXPECT_EQ(FirstNode("gpu3"), "gpu3");
  EXPECT_EQ(FirstNode("gpu3,gpu4"), "gpu3");
  EXPECT_EQ(FirstNode("gpu[03-05,9],cpu1"), "gpu03");
  EXPECT_EQ(FirstNode("gpu[7,9-11]"), "gpu7");
  EXPECT_EQ(FirstNode("rack[1-2]node[10-20]-ib,x"), "rack1node10-ib");
  EXPECT_EQ(FirstNode("broken[1-"), "broken1");
  EXPECT_EQ(FirstNode(""), "");
}

TEST(TcpVariables, WhatIsMissingOrWrongIsNamed) {
  const auto run = [](const Variables& variables) {
    return RunProcess({KRAIT_RANK_LOOP, "/", "1", "check", "1"}, variables);
  };
  ProcessResult result = run({{"RANK", "0"}, {"WORLD_SIZE", "2"}});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err,
              AllOf(HasSubstr("MASTER_ADDR is not set"), HasSubstr("MASTER_PORT is not set")));
  result = run({{"RANK", "5"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "x"}, {"MASTER_PORT", "port"}});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, AllOf(HasSubstr("RANK is \"5\"; a number from 0 to 1 is needed"),
                                HasSubstr("MASTER_PORT is \"port\""),
                                Not(HasSubstr("MASTER_PORT is not set"))));
  result = run({{"RANK", "1"}, {"WORLD_SIZE", "2"}});  // said by rank 0
  EXPECT_EQ(result.code, 20);
  EXPECT_EQ(result.err, "");
}

TEST_F(TcpTest, TheCommandSpeaksOnce) {
  struct Case {
    std::vector<std::string> words;
    int code;
    const char* said;
  };
  const std::string config = KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml";
  for (const Case& c :
       {Case{{"--version"}, 0, "krait "},
        Case{{"plan", config}, 20, "krait plan runs as one process, but torchrun started 2"},
        Case{{"train", config, "train.device=cpu", "run_dir=" + (folder_ / "run"),
              "data.train=[{path: none.h5}]"},
             20,
             "train.device: several ranks on the CPU need MPI"}}) {
    SCOPED_TRACE(c.words.front());
    const int port = FreePort();
    std::vector<std::string> argv = {KRAIT_BINARY};
    argv.insert(argv.end(), c.words.begin(), c.words.end());
    Process first(argv, Rank(0, 2, port)), second(argv, Rank(1, 2, port));
    const ProcessResult a = End(&first, 60), b = End(&second, 60);
    EXPECT_EQ(a.code, c.code) << a.err;
    EXPECT_EQ(b.code, c.code) << b.err;
    EXPECT_THAT(a.out + a.err, HasSubstr(c.said));
    EXPECT_EQ(b.out + b.err, "");
  }
}

}  // namespace
}  // namespace krait
