// `krait ablate` as a command: runs, failures, kills, and what is said.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "kernels/cuda/runtime.h"
#include "support/tiny_run.h"
#include "trainer/report/run_summary.h"

namespace krait {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kBase[] = R"(
model: {vocab_size: 18, d_model: 16, n_layers: 2, mixer: {ratio: "1:1"}, attention: {heads: 2}, mlp: {d_ff: 16}}
data:
  train: [{synthetic: {task: recall, items: 3}}]
  validation: [{synthetic: {task: recall, items: 3}}]
  seq_len: 12
train: {device: cpu, steps: 20, batch_tokens: 48, micro_batch: 4}
schedule: {warmup_steps: 2}
checkpoint: {every: 5, keep: 2}
log: {every: 2, tensorboard: false}
evaluation: {every: 10, tokens: 240}
)";

class AblateTest : public ::testing::Test {
 protected:
  AblateTest() { folder_.Write("base.yaml", kBase); }
  std::string Sweep(const std::string& text) const {
    return folder_.Write("s.yaml", "config: base.yaml\nout: " + folder_.path() + "/out\n" + text);
  }
  static ProcessResult Krait(const std::vector<std::string>& words) {
    return TinyRun::Krait(words);
  }
  std::vector<std::string> Runs() const {
    std::vector<std::string> runs;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ / "out/runs")) {
      runs.push_back(entry.path().string());
    }
    std::sort(runs.begin(), runs.end());
    return runs;
  }
  TempFolder folder_;
};

constexpr char kGrid[] = "grid: {model.mixer.ratio: [\"0:1\", \"1:1\"]}\nseeds: [1, 2]\n";

TEST_F(AblateTest, RunsOnceAndReports) {
  const std::string sweep = Sweep(kGrid);
  const ProcessResult planned = Krait({"ablate", "plan", sweep, "--json"});
  ASSERT_EQ(planned.code, 0) << planned.err;
  EXPECT_EQ(nlohmann::json::parse(planned.out)["runs"].size(), 4U);
  const ProcessResult first = Krait({"ablate", "run", sweep, "--jobs", "2"});
  ASSERT_EQ(first.code, 0) << first.out << first.err;
  EXPECT_THAT(first.out, HasSubstr("4 of 4 runs are finished"));
  EXPECT_THAT(first.out, HasSubstr("finished  ratio 0:1, seed 2"));
  EXPECT_THAT(first.out, HasSubstr("less the baseline"));
  std::map<std::string, std::string> before;
  ASSERT_EQ(Runs().size(), 4U);
  for (const std::string& run : Runs()) {
    const auto summary = ReadRunSummary(run);
    ASSERT_TRUE(summary.has_value());
    EXPECT_TRUE(summary->finished);
    EXPECT_EQ(summary->step, 20);
    EXPECT_EQ(summary->tokens, 20 * 48);
    EXPECT_GT(summary->params_total, 0);
    EXPECT_GT(summary->seconds, 0);
    EXPECT_TRUE(summary->val_accuracy.has_value());
    before[run] = ReadText(run + "/train.log") + ReadText(run + "/metrics.jsonl");
    // One checkpoint stays, without moments, and can be evaluated.
    EXPECT_TRUE(std::filesystem::exists(run + "/checkpoints/step-00000020"));
    EXPECT_FALSE(std::filesystem::exists(run + "/checkpoints/step-00000015"));
    const ProcessResult inside = Krait({"checkpoint", "inspect", run});
    EXPECT_EQ(inside.code, 0) << inside.err;
    EXPECT_THAT(inside.out, Not(HasSubstr("exp_avg")));
  }
  EXPECT_EQ(Krait({"checkpoint", "verify", Runs()[0]}).code, 0);
  const ProcessResult eval = Krait({"eval", Runs()[0], "--tokens", "480"});
  EXPECT_EQ(eval.code, 0) << eval.err;
  // A second call trains nothing, and yields the same report.
  const std::string csv = ReadText(folder_ / "out/runs.csv");
  const ProcessResult second = Krait({"ablate", "run", sweep});
  EXPECT_EQ(second.code, 0);
  EXPECT_THAT(second.out, HasSubstr("4 finished before"));
  for (const auto& [run, text] : before) {
    EXPECT_EQ(ReadText(run + "/train.log") + ReadText(run + "/metrics.jsonl"), text);
  }
  EXPECT_EQ(ReadText(folder_ / "out/runs.csv"), csv);
  for (const char* name : {"report.html", "report.md", "cells.csv", "plots/quality.svg"}) {
    EXPECT_TRUE(std::filesystem::exists(folder_ / ("out/" + std::string(name)))) << name;
  }
}

TEST_F(AblateTest, AFailingRunIsToldAndTheOthersGoOn) {
  // A learning rate that cannot be: weights that are not finite end the run with 40.
  const std::string sweep =
      Sweep("cases: {good: {}, bad: {optimizer.lr: 1e30, optimizer.clip: 0}}\n");
  const ProcessResult run = Krait({"ablate", "run", sweep, "--jobs", "1"});
  EXPECT_EQ(run.code, 1) << run.out << run.err;
  EXPECT_THAT(run.out, HasSubstr("failed    bad (exit 40)"));
  EXPECT_THAT(run.out, HasSubstr("finished  good"));
  EXPECT_THAT(run.out, HasSubstr("1 of 2 runs are finished, 1 failed"));
  EXPECT_THAT(ReadText(folder_ / "out/report.md"), HasSubstr("Runs without a result"));
}

TEST_F(AblateTest, AKilledSweepGoesOn) {
  const std::string sweep =
      Sweep("grid: {model.mixer.ratio: [\"0:1\", \"1:1\"], train.steps: [2000]}\nseeds: [1]\n");
  const std::string clean = folder_ / "clean";
  ASSERT_EQ(Krait({"ablate", "run", sweep, "--jobs", "1", "out=" + clean}).code, 0);
  for (const int signal : {SIGKILL, SIGTERM}) {
    Process process(TinyRun::Argv({"ablate", "run", sweep, "--jobs", "1"}), TinyRun::Variables());
    ASSERT_TRUE(WaitFor(&process, "started"));
    // Into the middle of a run.
    const std::string run = Runs().back();
    for (int i = 0; i < 2000 && ReadText(run + "/metrics.jsonl").size() < 4000; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    process.Signal(signal);
    const ProcessResult ended = process.Wait();
    EXPECT_EQ(ended.code, signal == SIGKILL ? 128 + SIGKILL : 10) << ended.out << ended.err;
  }
  const ProcessResult last = Krait({"ablate", "run", sweep, "--jobs", "1"});
  EXPECT_EQ(last.code, 0) << last.out << last.err;
  EXPECT_THAT(last.out, HasSubstr("2 of 2 runs are finished"));
  // Nothing was lost or repeated: the numbers are those of the sweep that was left alone.
  const auto numbers = [](const std::string& folder) {
    std::map<std::string, std::string> of_run;
    for (const auto& entry : std::filesystem::directory_iterator(folder + "/runs")) {
      std::string& text = of_run[entry.path().filename().string()];
      std::istringstream lines(ReadText(entry.path().string() + "/metrics.jsonl"));
      for (std::string line; std::getline(lines, line);) {
        const auto record = nlohmann::json::parse(line);
        for (const char* name : {"step", "train/loss", "val/loss", "val/accuracy"}) {
          if (record.contains(name)) text += record[name].dump() + " ";
        }
      }
    }
    return of_run;
  };
  EXPECT_EQ(numbers(folder_ / "out"), numbers(clean));
}

// Runs that have been started and are not in their main() yet are asked to stop, too.
TEST_F(AblateTest, AStopWhileRunsStartIsNoFailure) {
  const std::string sweep = Sweep("grid: {train.steps: [2000, 2001]}\n");
  for (int i = 0; i < 5; ++i) {
    Process process(TinyRun::Argv({"ablate", "run", sweep, "--jobs", "2"}), TinyRun::Variables());
    ASSERT_TRUE(WaitFor(&process, "started"));
    process.Signal(SIGTERM);
    const ProcessResult ended = process.Wait();
    EXPECT_EQ(ended.code, 10) << ended.out << ended.err;
    EXPECT_THAT(ended.out, Not(HasSubstr("failed"))) << ended.out;
  }
}

// The page in a browser: no error, no request, and something to see in a window and on a phone.
TEST_F(AblateTest, ThePageOpensInABrowser) {
  std::string browser;
  for (const char* path :
       {"/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"}) {
    if (std::filesystem::exists(path)) browser = path;
  }
  if (browser.empty()) GTEST_SKIP() << "no chromium here (apt-get install chromium)";
  const std::string sweep = Sweep(kGrid);
  ASSERT_EQ(Krait({"ablate", "run", sweep}).code, 0);
  for (const char* window : {"--window-size=1200,1600", "--window-size=390,3000"}) {
    const std::string picture = folder_ / "page.png";
    const ProcessResult shown =
        RunProcess({browser, "--headless", "--no-sandbox", "--disable-gpu",
                    "--enable-logging=stderr", "--user-data-dir=" + (folder_ / "browser"), window,
                    "--screenshot=" + picture, "file://" + (folder_ / "out/report.html")},
                   {});
    EXPECT_EQ(shown.code, 0) << shown.err;
    EXPECT_THAT(shown.err, Not(HasSubstr("CONSOLE")));
    ASSERT_TRUE(std::filesystem::exists(picture)) << shown.err;
    EXPECT_GT(std::filesystem::file_size(picture), 30'000U);  // a blank page takes some 5 kB
    std::filesystem::remove(picture);
  }
}

TEST_F(AblateTest, MistakesAre20WithTheirPlace) {
  const ProcessResult bad = Krait({"ablate", "plan", Sweep("grid: {model.mixer.ratio: [oops]}\n")});
  EXPECT_EQ(bad.code, 20);
  EXPECT_THAT(bad.err, HasSubstr("s.yaml:3:28: model.mixer.ratio: \"oops\""));
  EXPECT_EQ(Krait({"ablate", "run", folder_ / "none.yaml"}).code, 20);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out"));
}

TEST_F(AblateTest, CudaWhereThereIsNoneIsRefusedOnce) {
  if (cuda::Available()) GTEST_SKIP() << "this machine has a GPU";
  const ProcessResult run = Krait({"ablate", "run",
                                   Sweep("grid: {model.mixer.ratio: [\"0:1\", \"1:1\"]}\n"
                                         "cases: {gpu: {train.device: cuda}}\n")});
  EXPECT_EQ(run.code, 20);
  EXPECT_THAT(run.err, HasSubstr("train.device: cuda cannot be used"));
  EXPECT_THAT(run.out, Not(HasSubstr("started")));
}

TEST_F(AblateTest, SecondsAreMeasuredFirst) {
  const std::string sweep =
      Sweep("grid: {model.mixer.ratio: [\"0:1\", \"1:1\"]}\nequal: {seconds: 0.5}\n");
  EXPECT_THAT(Krait({"ablate", "plan", sweep}).out, HasSubstr("measures the speed of each cell"));
  const ProcessResult run = Krait({"ablate", "run", sweep, "--jobs", "1"});
  ASSERT_EQ(run.code, 0) << run.out << run.err;
  EXPECT_THAT(run.out, HasSubstr("measuring the speed of ratio 1:1"));
  EXPECT_THAT(run.out, HasSubstr("2 of 2 runs are finished"));
  EXPECT_THAT(Krait({"ablate", "plan", sweep}).out, HasSubstr("furthest off"));
}

}  // namespace
}  // namespace krait
