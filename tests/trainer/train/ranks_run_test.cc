// krait train under mpirun, as a user starts it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/process.h"
#include "support/tiny_run.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// A layout of `ranks` ranks; every pass has four sequences.
struct RankLayout {
  int ranks = 1, tensor = 1, expert = 1;
  std::vector<std::string> Words() const {
    return {"parallel.tensor=" + std::to_string(tensor),
            "parallel.expert=" + std::to_string(expert),
            "train.micro_batch=" + std::to_string(4 * tensor / ranks)};
  }
};

class RanksRun : public ::testing::Test {
 protected:
  // krait WORDS... on so many ranks; one: without mpirun.
  static std::vector<std::string> Argv(int ranks, const std::vector<std::string>& words) {
    std::vector<std::string> argv;
    if (ranks > 1) argv = {KRAIT_MPIRUN, "-n", std::to_string(ranks)};
    argv.push_back(KRAIT_BINARY);
    argv.insert(argv.end(), words.begin(), words.end());
    return argv;
  }
  std::vector<std::string> TrainArgv(const std::string& run, const RankLayout& layout,
                                     std::vector<std::string> words) const {
    const std::vector<std::string> defaults = {"train.device=cpu",        "model.moe.experts=4",
                                               "train.batch_tokens=256",  "optimizer.lr=1e-3",
                                               "schedule.warmup_steps=1", "log.every=1",
                                               "evaluation.every=5",      "evaluation.tokens=224"};
    for (const std::string& word : defaults) {
      const std::string key = word.substr(0, word.find('=') + 1);
      const bool given = std::any_of(words.begin(), words.end(), [&](const std::string& other) {
        return other.starts_with(key);
      });
      if (!given) words.push_back(word);
    }
    for (const std::string& word : layout.Words()) words.push_back(word);
    return Argv(layout.ranks, tiny_.TrainWords(run, words));
  }
  ProcessResult Train(const std::string& run, const RankLayout& layout,
                      const std::vector<std::string>& words) const {
    return RunProcess(TrainArgv(run, layout, words), MpiVariables());
  }
  // The values of a metric by step.
  std::map<int64_t, double> Metric(const std::string& run, const std::string& name) const {
    std::map<int64_t, double> values;
    std::istringstream lines(ReadText(tiny_ / run + "/metrics.jsonl"));
    for (std::string line; std::getline(lines, line);) {
      const auto record = nlohmann::json::parse(line);
      if (record.contains(name) && record[name].is_number()) {
        values[record["step"].get<int64_t>()] = record[name].get<double>();
      }
    }
    return values;
  }
  void ExpectAlike(const std::string& run, const std::string& other, double bound) const {
    for (const char* name : {"train/loss", "val/loss", "train/aux_loss", "tokens"}) {
      const auto a = Metric(run, name), b = Metric(other, name);
      ASSERT_EQ(a.size(), b.size()) << name;
      ASSERT_FALSE(a.empty()) << name;
      for (const auto& [step, value] : a) {
        EXPECT_LE(std::abs(value - b.at(step)), bound * std::abs(value)) << name << " " << step;
      }
    }
  }
  int Diff(const std::string& a, const std::string& b, bool weights_only = false) const {
    std::vector<std::string> words = {"checkpoint", "diff", tiny_ / a, tiny_ / b};
    if (weights_only) words.insert(words.end(), {"--slot", "weight"});
    return TinyRun::Krait(words).code;
  }

  TinyRun tiny_;
};

constexpr double kBound = 2e-6;

// mpirun gives a single rank a terminal too; what it prints goes to a pipe here.
TEST_F(RanksRun, ASingleRankDrawsNoStatusLine) {
  std::vector<std::string> argv = {KRAIT_MPIRUN, "-n", "1", KRAIT_BINARY};
  for (const std::string& word : tiny_.TrainWords("single", {"train.steps=10"})) {
    argv.push_back(word);
  }
  const ProcessResult result = RunProcess(argv, MpiVariables());
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("10/10 | loss"), Not(HasSubstr("\033["))));
}

TEST_F(RanksRun, EveryLayoutTrainsAlike) {
  ASSERT_EQ(Train("one", {}, {"train.steps=20"}).code, 0);
  int n = 0;
  for (const RankLayout& layout :
       {RankLayout{2, 1, 1}, {2, 2, 2}, {4, 2, 4}, {4, 1, 2}, {4, 4, 1}}) {
    const std::string run = "layout-" + std::to_string(n++);
    SCOPED_TRACE(run);
    const ProcessResult result = Train(run, layout, {"train.steps=20"});
    ASSERT_EQ(result.code, 0) << result.out << result.err;
    EXPECT_THAT(result.out, HasSubstr("ranks: " + std::to_string(layout.ranks)));
    ExpectAlike("one", run, kBound);
    // Printed once, by the first rank.
    EXPECT_EQ(result.out.find("finished: "), result.out.rfind("finished: "));
  }
}

// Every rank decides by the sums of all, so that all leave out the same steps: weights that one of
// them alone had stepped would show in the next loss.
TEST_F(RanksRun, TheSpikeGuardSkipsTheSameStepsOnEveryLayout) {
  // With so small a z every third step or so is an outlier.
  const std::vector<std::string> words = {"train.steps=40", "train.spike_guard.window=8",
                                          "train.spike_guard.z=0.8", "schedule.name=constant",
                                          "checkpoint.every=20"};
  ASSERT_EQ(Train("one", {}, words).code, 0);
  const auto skipped = Metric("one", "optim/skipped");
  ASSERT_EQ(skipped.size(), 40U);
  EXPECT_GE(skipped.at(40), 4);
  EXPECT_LE(skipped.at(40), 30);
  const RankLayout layouts[] = {{2, 1, 1}, {4, 1, 4}, {4, 2, 2}, {4, 4, 1}};
  for (size_t i = 0; i < std::size(layouts); ++i) {
    const std::string run = "layout-" + std::to_string(i);
    SCOPED_TRACE(run);
    const ProcessResult result = Train(run, layouts[i], words);
    ASSERT_EQ(result.code, 0) << result.out << result.err;
    EXPECT_THAT(result.out, HasSubstr("| skipped: a spike ("));
    EXPECT_EQ(Metric(run, "optim/skipped"), skipped);
    ExpectAlike("one", run, kBound);
  }
  // From the middle, with a window that another layout has filled.
  std::vector<std::string> half = words;
  half.front() = "train.steps=20";
  ASSERT_EQ(Train("moved", {4, 2, 4}, half).code, 0);
  ASSERT_EQ(Train("moved", {2, 2, 1}, words).code, 0);
  EXPECT_EQ(Metric("moved", "optim/skipped"), skipped);
  ExpectAlike("one", "moved", 1e-5);
}

TEST_F(RanksRun, FreshWeightsAreTheSameOnEveryLayout) {
  // Steps too small to change a bit, of a zero either.
  const std::vector<std::string> words = {"train.steps=1", "optimizer.lr=1e-30",
                                          "optimizer.eps=1e30"};
  ASSERT_EQ(Train("one", {}, words).code, 0);
  ASSERT_EQ(Train("two", {2, 2, 1}, words).code, 0);
  ASSERT_EQ(Train("four", {4, 2, 4}, words).code, 0);
  EXPECT_EQ(Diff("one", "two", /*weights_only=*/true), 0);
  EXPECT_EQ(Diff("one", "four", /*weights_only=*/true), 0);
}

TEST_F(RanksRun, ResumesOnAnotherLayout) {
  ASSERT_EQ(Train("one", {}, {"train.steps=20"}).code, 0);
  const std::vector<std::string> first = {"train.steps=10", "schedule.name=constant"};
  const std::vector<std::string> second = {"train.steps=20", "schedule.name=constant"};
  ASSERT_EQ(Train("constant", {}, second).code, 0);
  const RankLayout layouts[] = {{4, 2, 4}, {2, 1, 2}, {1, 1, 1}};
  for (int i = 0; i < 3; ++i) {
    const std::string run = "moved-" + std::to_string(i);
    ASSERT_EQ(Train(run, layouts[i], first).code, 0);
    const ProcessResult result = Train(run, layouts[(i + 1) % 3], second);
    ASSERT_EQ(result.code, 0) << result.out << result.err;
    EXPECT_THAT(result.out, HasSubstr("resuming at step 10 from"));
    ExpectAlike("constant", run, 1e-5);
  }
}

// The figures of `krait eval` of one process, by several: of the whole, and of its parts.
TEST_F(RanksRun, EvaluatesAlike) {
  ASSERT_EQ(Train("run", {4, 2, 2}, {"train.steps=10"}).code, 0);
  const auto eval = [&](int ranks, std::vector<std::string> words) {
    words.insert(words.begin(), {"eval", tiny_ / "run"});
    return RunProcess(Argv(ranks, words), MpiVariables());
  };
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"--by", "context"},
      {"--by", "document"},
      {"--tokens", "96", "--micro-batch", "5", "--data", tiny_ / "train.h5"},  // three sequences
      {"--data", tiny_ / "train.h5", "--data", tiny_ / "more.h5", "--micro-batch", "3"}};
  for (std::vector<std::string> words : cases) {
    SCOPED_TRACE(::testing::PrintToString(words));
    words.push_back("--json");
    const ProcessResult alone = eval(1, words);
    ASSERT_EQ(alone.code, 0) << alone.err;
    const auto one = nlohmann::json::parse(alone.out);
    const auto expect_alike = [](const nlohmann::json& a, const nlohmann::json& b) {
      EXPECT_EQ(a["targets"], b["targets"]);
      if (a["targets"] == 0) return;
      const double x = a["loss"].get<double>(), y = b["loss"].get<double>();
      EXPECT_LE(std::abs(x - y), kBound * std::abs(x));
    };
    for (const int ranks : {2, 4}) {
      const ProcessResult result = eval(ranks, words);
      ASSERT_EQ(result.code, 0) << result.err;
      const auto several = nlohmann::json::parse(result.out);  // printed once
      expect_alike(one, several);
      EXPECT_EQ(one["sequences"], several["sequences"]);
      EXPECT_EQ(one.contains("parts"), several.contains("parts"));
      for (size_t i = 0; one.contains("parts") && i < one["parts"].size(); ++i) {
        expect_alike(one["parts"][i], several["parts"][i]);
      }
    }
  }
  const ProcessResult text = eval(2, {});
  EXPECT_EQ(text.code, 0);
  EXPECT_EQ(text.out.find("perplexity"), text.out.rfind("perplexity"));
  // Errors are said once too.
  const ProcessResult three = eval(3, {});
  EXPECT_EQ(three.code, 20);
  EXPECT_THAT(three.err, HasSubstr("parallel.tensor 2 of the checkpoint's run needs 2 ranks or a "
                                   "multiple of that, or a single one, but there are 3"));
  EXPECT_EQ(three.err.find("parallel.tensor"), three.err.rfind("parallel.tensor"));
  const ProcessResult no_data = eval(2, {"--data", tiny_ / "none.h5"});
  EXPECT_EQ(no_data.code, 21);
  EXPECT_EQ(no_data.err.find("none.h5"), no_data.err.rfind("none.h5"));
  const ProcessResult odd = eval(2, {"--seq-len", "31", "--micro-batch", "1"});
  EXPECT_EQ(odd.code, 20);
  EXPECT_THAT(odd.err, HasSubstr("does not divide the tokens of a pass, 1 x 31"));
  const ProcessResult none = RunProcess(Argv(2, {"eval", tiny_ / "no-run"}), MpiVariables());
  EXPECT_EQ(none.code, 30);
}

TEST_F(RanksRun, OneLayoutGivesTheSameBits) {
  const RankLayout layout = {4, 2, 4};
  ASSERT_EQ(Train("a", layout, {"train.steps=12", "checkpoint.every=4"}).code, 0);
  ASSERT_EQ(Train("b", layout, {"train.steps=12", "checkpoint.every=4"}).code, 0);
  EXPECT_EQ(Diff("a", "b"), 0);
  // With a stop on request on the way.
  Process stopped(TrainArgv("c", layout, {"train.steps=12", "checkpoint.every=4"}), MpiVariables());
  ASSERT_TRUE(WaitFor(&stopped, "saved "));
  stopped.Signal(SIGUSR1);
  const ProcessResult result = stopped.Wait();
  EXPECT_TRUE(result.code == 10 || result.code == 0) << result.out << result.err;
  if (result.code == 10) {
    EXPECT_THAT(result.out, HasSubstr("next: mpirun -n 4 "));
  }
  ASSERT_EQ(Train("c", layout, {"train.steps=12", "checkpoint.every=4"}).code, 0);
  EXPECT_EQ(Diff("a", "c"), 0);
}

// The processes that `parent` started.
std::vector<pid_t> ChildrenOf(pid_t parent) {
  std::vector<pid_t> children;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    std::ifstream stat(entry.path() / "stat");
    std::string pid, name, state;
    pid_t ppid = 0;
    if (stat >> pid >> name >> state >> ppid && ppid == parent) children.push_back(std::stoi(pid));
  }
  return children;
}

// Kills a rank, or mpirun itself, `kills` times on the way, and compares the end with that of an
// undisturbed run.
void KillAndCompare(int kills, const TinyRun& tiny,
                    const std::function<std::vector<std::string>(const std::string&)>& argv) {
  ASSERT_EQ(RunProcess(argv("whole"), MpiVariables()).code, 0);
  uint64_t random = 12345;
  for (int i = 0; i < kills; ++i) {
    Process process(argv("killed"), MpiVariables());
    random = random * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto delay = static_cast<int>(random >> 33) % 3000;
    std::this_thread::sleep_for(std::chrono::milliseconds(delay));
    const std::vector<pid_t> ranks = ChildrenOf(process.pid());
    const bool launcher = i % 5 == 4 || ranks.empty();
    kill(launcher ? process.pid() : ranks[static_cast<size_t>(delay) % ranks.size()], SIGKILL);
    const ProcessResult result = process.Wait();
    EXPECT_NE(result.code, 70) << result.out << result.err;
    // Ranks outlive a killed mpirun by a moment, and their locks with them.
    for (const pid_t rank : ranks) {
      for (int wait = 0; wait < 1000 && kill(rank, 0) == 0; ++wait) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    }
  }
  const ProcessResult last = RunProcess(argv("killed"), MpiVariables());
  ASSERT_EQ(last.code, 0) << last.out << last.err;
  EXPECT_EQ(TinyRun::Krait({"checkpoint", "diff", tiny / "whole", tiny / "killed"}).code, 0);
}

TEST_F(RanksRun, KilledRanksLoseNothingThatWasSaved) {
  KillAndCompare(4, tiny_, [&](const std::string& run) {
    return TrainArgv(run, {4, 2, 4}, {"train.steps=60", "checkpoint.every=2"});
  });
}

TEST_F(RanksRun, LongFiftyKills) {
  KillAndCompare(50, tiny_, [&](const std::string& run) {
    return TrainArgv(run, {4, 2, 4}, {"train.steps=400", "checkpoint.every=2"});
  });
}

TEST_F(RanksRun, MistakesAreToldOnceAndEndAllRanks) {
  ProcessResult result = Train("bad", {4, 2, 1},
                               {"train.steps=2", "model.attention.heads=3",
                                "model.attention.kv_heads=3", "model.attention.head_dim=8"});
  EXPECT_EQ(result.code, 20) << result.err;
  const std::string said = "parallel.tensor 2 does not divide model.attention.heads 3";
  EXPECT_THAT(result.err, HasSubstr(said));
  EXPECT_EQ(result.err.find(said), result.err.rfind(said)) << result.err;

  result = Train("bad", {2, 1, 1}, {"train.steps=2", "data.train=[{path: /nowhere.h5}]"});
  EXPECT_EQ(result.code, 21) << result.err;
  const std::string missing = "cannot open /nowhere.h5";
  EXPECT_THAT(result.err, AllOf(HasSubstr(missing), Not(HasSubstr("rank 0"))));
  EXPECT_EQ(result.err.find(missing), result.err.rfind(missing)) << result.err;
  EXPECT_FALSE(std::filesystem::exists(tiny_ / "bad"));

  // A second job on the same run folder.
  Process running(TrainArgv("busy", {2, 1, 1}, {"train.steps=100000"}), MpiVariables());
  ASSERT_TRUE(WaitFor(&running, "step     2/"));
  result = Train("busy", {2, 1, 1}, {"train.steps=100000"});
  EXPECT_EQ(result.code, 20) << result.err;
  running.Signal(SIGUSR1);
  EXPECT_EQ(running.Wait().code, 10);
}

}  // namespace
}  // namespace krait
