// `krait train` as a process: how it ends before its last step, by request or by an error, and what
// it leaves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "nlohmann/json.hpp"
#include "support/tiny_run.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// Steps and names of the validation records.
std::vector<int64_t> Evaluated(const std::string& run) {
  std::vector<int64_t> steps;
  std::istringstream lines(ReadText(run + "/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (record.contains("val/loss")) steps.push_back(record["step"].get<int64_t>());
  }
  return steps;
}

// A token file of `bytes` tokens in one document.
std::string LongFile(const TinyRun& tiny, const std::string& name, int64_t bytes) {
  std::string text;
  while (static_cast<int64_t>(text.size()) < bytes) {
    text += "state " + std::to_string(text.size() * 7919 % 1000) + "\n";
  }
  tiny.folder().Write(name + "/0.txt", text);
  BuildOptions options;
  options.out = tiny / (name + ".h5");
  options.paths = {tiny / name};
  options.force = true;
  KRAIT_CHECK(BuildTokenFile(options).ok());
  return options.out;
}

// Evaluations that take minutes.
std::vector<std::string> LongEvaluation(const TinyRun& tiny) {
  return {"evaluation.every=20", "evaluation.tokens=16M",
          "data.validation=[{path: " + LongFile(tiny, "long", 16 << 20) + "}]"};
}

ProcessResult Stopped(Process* part, int signal) {
  const auto begin = std::chrono::steady_clock::now();
  part->Signal(signal);
  ProcessResult result = part->Wait();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(seconds.count(), 30);
  return result;
}

// Whether the process holds or handles SIGUSR1: its main function has begun.
bool KnowsSigusr1(pid_t pid) {
  std::istringstream lines(ReadText("/proc/" + std::to_string(pid) + "/status"));
  uint64_t known = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("SigBlk:") || line.starts_with("SigCgt:")) {
      known |= std::stoull(line.substr(7), nullptr, 16);
    }
  }
  return (known >> (SIGUSR1 - 1) & 1) != 0;
}

TEST(StopRun, ARequestWhileTheProgramStartsIsNoDeath) {
  const TinyRun tiny;
  for (const int milliseconds : {0, 1, 5, 20, 60}) {
    SCOPED_TRACE(milliseconds);
    Process process(TinyRun::Argv(tiny.TrainWords("run")), TinyRun::Variables());
    while (process.running() && !KnowsSigusr1(process.pid())) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    EXPECT_EQ(Stopped(&process, SIGUSR1).code, 10);
  }
}

TEST(StopRun, AnEvaluationEndsEarlyAndIsMadeUp) {
  const TinyRun tiny;
  // In the midst of training, and at its end, where everything else is done.
  for (const std::string steps : {"40", "20"}) {
    const std::string run = "run" + steps;
    std::vector<std::string> words = LongEvaluation(tiny);
    words.push_back("train.steps=" + steps);
    Process part(TinyRun::Argv(tiny.TrainWords(run, words)), TinyRun::Variables());
    ASSERT_TRUE(WaitFor(&part, "step    20/" + steps)) << part.out();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    ProcessResult result = Stopped(&part, SIGTERM);
    EXPECT_EQ(result.code, 10) << result.out << result.err;
    EXPECT_THAT(result.out, AllOf(HasSubstr("next: "), Not(HasSubstr("val loss"))));
    EXPECT_TRUE(std::filesystem::exists(tiny / run + "/checkpoints/step-00000020"));
    EXPECT_EQ(Evaluated(tiny / run), std::vector<int64_t>{});

    words[1] = "evaluation.tokens=512";
    result = tiny.Train(run, words);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_THAT(result.out, HasSubstr("finished"));
    const auto evaluated = steps == "40" ? std::vector<int64_t>{20, 40} : std::vector<int64_t>{20};
    EXPECT_EQ(Evaluated(tiny / run), evaluated);
    // Once.
    EXPECT_EQ(tiny.Train(run, words).code, 0);
    EXPECT_EQ(Evaluated(tiny / run), evaluated);
  }
}

TEST(StopRun, TheFirstCtrlCIsAnsweredAndTheSecondEndsAtOnce) {
  std::signal(SIGINT, SIG_DFL);  // a child of a background job would ignore it
  const TinyRun tiny;
  Process once(TinyRun::Argv(tiny.TrainWords("once", {"checkpoint.every=1000"})),
               TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&once, "step     5/200"));
  const ProcessResult saved = Stopped(&once, SIGINT);
  EXPECT_EQ(saved.code, 10) << saved.err;
  EXPECT_THAT(saved.err, HasSubstr("krait: stopping after this step; once more to end at once\n"));
  // A step of minutes.
  Process twice(TinyRun::Argv(tiny.TrainWords(
                    "twice", {"train.batch_tokens=64Mi", "train.micro_batch=2", "log.every=1"})),
                TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&twice, "parameters"));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  twice.Signal(SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_TRUE(twice.running());
  EXPECT_EQ(Stopped(&twice, SIGINT).code, 128 + SIGINT);
}

TEST(StopRun, AnErrorUnderTheDataSavesTheLastStepFirst) {
  const TinyRun tiny;
  const std::string data = LongFile(tiny, "long", 24 << 20);
  const std::vector<std::string> words = {"train.steps=100000", "checkpoint.every=100000",
                                          "data.validation=[]",
                                          "data.train=[{path: " + data + "}]"};
  Process part(TinyRun::Argv(tiny.TrainWords("run", words)), TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&part, "step    20/100000")) << part.out();
  std::filesystem::copy_file(data, tiny / "kept.h5");
  std::filesystem::resize_file(data, 1 << 20);
  const ProcessResult result = part.Wait();
  EXPECT_EQ(result.code, 21) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr(data), HasSubstr("was saved before the end: " +
                                                           (tiny / "run/checkpoints/step-"))));
  std::filesystem::rename(tiny / "kept.h5", data);
  const ProcessResult again = tiny.Train("run", {words[1], words[2], words[3], "train.steps=21"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, HasSubstr("finished"));
}

// As often as a run that still lives puts another file into it.
void RemoveWhole(const std::string& folder) {
  std::error_code error;
  do {
    std::filesystem::remove_all(folder, error);
  } while (error == std::errc::directory_not_empty);
  ASSERT_FALSE(error) << error.message();
}

TEST(StopRun, AFolderThatWasRemovedEndsTheRun) {
  const TinyRun tiny;
  const auto start = [&](const std::string& run, const std::vector<std::string>& more = {}) {
    std::vector<std::string> words = {"train.steps=100000"};
    words.insert(words.end(), more.begin(), more.end());
    return tiny.TrainWords(run, words);
  };
  Process removed(TinyRun::Argv(start("removed", {"checkpoint.every=1000"})), TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&removed, "step    20/"));
  RemoveWhole(tiny / "removed");
  ProcessResult result = removed.Wait();
  EXPECT_EQ(result.code, 31) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr(tiny / "removed"), HasSubstr("was removed, moved")));
  EXPECT_FALSE(std::filesystem::exists(tiny / "removed"));

  // Where another run has taken the name, nothing of it is touched.
  Process first(TinyRun::Argv(start("run")), TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&first, "step    10/"));
  std::filesystem::rename(tiny / "run", tiny / "moved");
  const ProcessResult second = tiny.Train("run", {"train.steps=10"});
  EXPECT_EQ(second.code, 0) << second.err;
  EXPECT_EQ(first.Wait().code, 31);
  EXPECT_FALSE(std::filesystem::exists(tiny / "run/checkpoints/step-00000020"));
  EXPECT_EQ(TinyRun::Krait({"checkpoint", "verify", tiny / "run"}).code, 0);

  // Checkpoints elsewhere are still this run's: the last step is saved there.
  Process apart(TinyRun::Argv(start(
                    "apart", {"checkpoint.dir=" + (tiny / "saves"), "checkpoint.every=100000"})),
                TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&apart, "step    10/"));
  RemoveWhole(tiny / "apart");
  result = apart.Wait();
  EXPECT_EQ(result.code, 31) << result.out << result.err;
  EXPECT_THAT(result.err, HasSubstr("was saved before the end: " + (tiny / "saves")));

  // A removed folder of checkpoints is made again.
  Process saves(TinyRun::Argv(start("saves_again", {"checkpoint.every=300"})),
                TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&saves, "saved "));
  RemoveWhole(tiny / "saves_again/checkpoints");
  result = Stopped(&saves, SIGTERM);
  EXPECT_EQ(result.code, 10) << result.err;
  EXPECT_EQ(TinyRun::Krait({"checkpoint", "verify", tiny / "saves_again"}).code, 0);
}

#ifndef KRAIT_SANITIZE  // it reserves terabytes of address space

// krait WORDS... under `ulimit -v KIB`.
ProcessResult Limited(int64_t kib, const std::vector<std::string>& words) {
  std::string command = "ulimit -v " + std::to_string(kib) + "; exec timeout -s KILL 60";
  for (const std::string& word : TinyRun::Argv(words)) command += " '" + word + "'";
  return RunProcess({"/bin/bash", "-c", command}, TinyRun::Variables());
}

TEST(StopRun, ALimitOfTheAddressSpaceIsNamed) {
  const TinyRun tiny;
  for (const int64_t kib : {150'000, 250'000, 400'000}) {
    EXPECT_EQ(Limited(kib, {"--version"}).code, 0) << kib;
    EXPECT_EQ(Limited(kib, {"train", "--help"}).code, 0) << kib;
    const ProcessResult result = Limited(kib, tiny.TrainWords("run", {"train.steps=10"}));
    EXPECT_EQ(result.code, 71) << kib << result.out << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr("ulimit -v"), Not(HasSubstr("fatal")))) << kib;
    EXPECT_FALSE(std::filesystem::exists(tiny / "run"));
  }
  const ProcessResult result = Limited(1'000'000, tiny.TrainWords("run", {"train.steps=10"}));
  EXPECT_EQ(result.code, 0) << result.err;
}

TEST(StopRun, APlanThatDoesNotFitIsRefusedBeforeAnythingIsAllocated) {
  const TinyRun tiny;
  std::vector<std::string> words =
      tiny.TrainWords("run", {"train.steps=10", "model.mlp.d_ff=1Mi", "model.d_model=64"});
  ProcessResult result = Limited(2'000'000, words);
  EXPECT_EQ(result.code, 71) << result.out << result.err;
  EXPECT_THAT(result.err,
              AllOf(HasSubstr("this run takes"), HasSubstr("--force"), Not(HasSubstr("fatal"))));
  EXPECT_FALSE(std::filesystem::exists(tiny / "run"));
  EXPECT_LT(result.peak_bytes, int64_t{200} << 20);
  // Who knows better may try, and fails where it does.
  words.push_back("--force");
  result = Limited(2'000'000, words);
  EXPECT_EQ(result.code, 71) << result.out << result.err;
  EXPECT_THAT(result.err, HasSubstr("cannot reserve"));
}

// The copy that saves in the background write from is taken before the first step.
TEST(StopRun, TheStagingCopyIsTakenAtTheStart) {
  const TinyRun tiny;
  // 75 MB of weights and moments; the only save is the last one, which waits and needs no copy.
  const auto peak = [&](const std::string& run, const std::string& async) {
    const ProcessResult result =
        tiny.Train(run, {"train.steps=1", "schedule.warmup_steps=1", "model.mlp.d_ff=16Ki",
                         "data.validation=[]", "checkpoint.async=" + async});
    EXPECT_EQ(result.code, 0) << result.err;
    return result.peak_bytes;
  };
  const int64_t with = peak("with", "true"), without = peak("without", "false");
  EXPECT_GT(with - without, int64_t{50} << 20);
}

#endif  // KRAIT_SANITIZE

}  // namespace
}  // namespace krait
