// `krait train` as a process: resume after kills, signals, refusals, the run folder.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/str_format.h"
#include "data/token_file.h"
#include "kernels/base/number.h"
#include "nlohmann/json.hpp"
#include "support/tiny_run.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// The records of metrics.jsonl without what is exempt from bit equality.
std::vector<std::string> Metrics(const std::string& run) {
  std::vector<std::string> records;
  std::istringstream lines(ReadText(run + "/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    nlohmann::json kept;
    const auto record = nlohmann::json::parse(line);
    for (const auto& [key, value] : record.items()) {
      if (key != "time" && !key.starts_with("perf/") && !key.starts_with("mem/")) kept[key] = value;
    }
    records.push_back(kept.dump());
  }
  return records;
}

void ExpectSameRun(const TinyRun& tiny, const std::string& a, const std::string& b) {
  EXPECT_EQ(Metrics(tiny / a), Metrics(tiny / b));
  const ProcessResult diff = TinyRun::Krait({"checkpoint", "diff", tiny / a, tiny / b});
  EXPECT_EQ(diff.code, 0) << diff.out << diff.err;
}

TEST(TrainRun, KilledTwiceEqualsUninterrupted) {
  const TinyRun tiny;
  const ProcessResult whole = tiny.Train("whole");
  ASSERT_EQ(whole.code, 0) << whole.err;
  // Killed in the middle of steps and, with saves in the background, at times during a save. The
  // second part resumes what was resumed.
  for (const char* until : {"step    50/200", "step   115/200"}) {
    Process part(TinyRun::Argv(tiny.TrainWords("cut")), TinyRun::Variables());
    ASSERT_TRUE(WaitFor(&part, until)) << part.out();
    part.Signal(SIGKILL);
    EXPECT_EQ(part.Wait().code, 128 + SIGKILL);
  }
  const ProcessResult rest = tiny.Train("cut");
  ASSERT_EQ(rest.code, 0) << rest.err;
  EXPECT_THAT(rest.out, HasSubstr("resuming at step 1"));
  ExpectSameRun(tiny, "whole", "cut");
}

TEST(TrainRun, SignalsSaveAndStop) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("whole", {"checkpoint.async=false"}).code, 0);
  for (const auto& [signal, line] : {std::pair{SIGUSR1, "step    20/200"},
                                     {SIGTERM, "step    60/200"},
                                     {SIGHUP, "step   100/200"}}) {
    Process part(TinyRun::Argv(tiny.TrainWords("stopped", {"checkpoint.every=1000"})),
                 TinyRun::Variables());
    ASSERT_TRUE(WaitFor(&part, line));
    part.Signal(signal);
    const ProcessResult result = part.Wait();
    EXPECT_EQ(result.code, 10) << result.err;
    EXPECT_THAT(result.out, AllOf(HasSubstr("stopped at step"), HasSubstr("next: ")));
  }
  ASSERT_EQ(tiny.Train("stopped").code, 0);
  ExpectSameRun(tiny, "whole", "stopped");
}

TEST(TrainRun, TheEnvironmentIsKeptWithoutCredentials) {
  const TinyRun tiny;
  std::map<std::string, std::string> variables = TinyRun::Variables();
  variables["SLURM_JOB_ID"] = "17";
  variables["SLURM_JWT"] = variables["OMPI_MCA_secret"] = variables["NCCL_TOKEN"] = "hidden";
  const ProcessResult run = RunProcess(
      TinyRun::Argv(tiny.TrainWords("run", {"train.steps=1", "schedule.warmup_steps=1"})),
      variables);
  ASSERT_EQ(run.code, 0) << run.err;
  const std::string kept = ReadText(tiny / "run/environment.json");
  EXPECT_EQ(nlohmann::json::parse(kept)[0]["variables"]["SLURM_JOB_ID"], "17");
  EXPECT_THAT(kept, ::testing::Not(HasSubstr("hidden")));
}

TEST(TrainRun, EveryStartIsKept) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  // What a run of the first version left is one record.
  std::ofstream(tiny / "run/environment.json") << R"({"pid": 17})";
  ASSERT_EQ(tiny.Train("run", {"train.steps=20"}).code, 0);
  ASSERT_EQ(tiny.Train("run", {"train.steps=30"}).code, 0);
  std::istringstream commands(ReadText(tiny / "run/command.txt"));
  std::vector<std::string> lines;
  for (std::string line; std::getline(commands, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 3U);
  EXPECT_THAT(lines[0], HasSubstr("train.steps=10"));
  EXPECT_THAT(lines[2], HasSubstr("train.steps=30"));
  const auto starts = nlohmann::json::parse(ReadText(tiny / "run/environment.json"));
  ASSERT_EQ(starts.size(), 3U);
  EXPECT_EQ(starts[0]["pid"], 17);
  EXPECT_EQ(starts[1]["step"], 10);
  EXPECT_EQ(starts[2]["step"], 20);
}

TEST(TrainRun, TheStartSaysWhatIsToCome) {
  const TinyRun tiny;
  const ProcessResult result =
      tiny.Train("run", {"train.steps=10", "train.hang_timeout=5",
                         "data.train=[{path: " + (tiny / "more.h5") + "}]"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto file = TokenFile::Open(tiny / "more.h5");
  const auto tokens = static_cast<double>((*file)->tokens());
  EXPECT_THAT(
      result.out,
      AllOf(
          HasSubstr(absl::StrFormat("data: %s tokens in 1 file; the run takes 1.28k, %.3g epochs\n",
                                    PrintShort(tokens), 1280 / tokens)),
          HasSubstr("curves: tensorboard --logdir " + (tiny / "run") + "/tensorboard\n")));
  EXPECT_THAT(result.err, HasSubstr("train.hang_timeout has no effect on a run of one process\n"));

  // Of several files each has its share of the mix: here 3 and 1 of 4.
  const std::string mix = "data.train=[{path: " + (tiny / "more.h5") +
                          ", weight: 3}, {path: " + (tiny / "train.h5") + ", weight: 1}]";
  const ProcessResult mixed = tiny.Train("mix", {"train.steps=10", mix});
  ASSERT_EQ(mixed.code, 0) << mixed.err;
  const auto other = TokenFile::Open(tiny / "train.h5");
  const double a = 0.75 * 1280 / tokens;
  const double b = 0.25 * 1280 / static_cast<double>((*other)->tokens());
  EXPECT_THAT(mixed.out, HasSubstr(absl::StrFormat("in 2 files; the run takes 1.28k, %.3g to %.3g "
                                                   "epochs of a file\n",
                                                   std::min(a, b), std::max(a, b))));
}

TEST(TrainRun, EveryValidationSourceIsEvaluated) {
  const TinyRun tiny;
  const std::string valid = WriteText(tiny.folder(), "valid", 30, 5);
  const std::vector<std::string> words = {
      "train.steps=10", "evaluation.tokens=1024",
      "data.validation=[{path: " + (tiny / "more.h5") + "}, {path: " + valid + ", weight: 3}]"};
  const ProcessResult result = tiny.Train("run", words);
  ASSERT_EQ(result.code, 0) << result.err;
  std::istringstream lines(ReadText(tiny / "run/metrics.jsonl"));
  std::string line, last;
  while (std::getline(lines, line)) last = line;
  const auto record = nlohmann::json::parse(last);
  // Each one's share, alone.
  double sum = 0, targets = 0;
  for (const auto& [name, tokens] : {std::pair{"more", "256"}, {"valid", "768"}}) {
    const ProcessResult eval =
        TinyRun::Krait({"eval", tiny / "run", "--data", tiny / (std::string(name) + ".h5"),
                        "--tokens", tokens, "--json"});
    ASSERT_EQ(eval.code, 0) << eval.err;
    const auto alone = nlohmann::json::parse(eval.out);
    const std::string key = std::string("val/") + name;
    EXPECT_NEAR(record[key + "/loss"].get<double>(), alone["loss"].get<double>(), 1e-6);
    EXPECT_NEAR(record[key + "/bpb"].get<double>(), alone["bits_per_byte"].get<double>(), 1e-6);
    EXPECT_THAT(result.out, HasSubstr(std::string("val ") + name + " loss"));
    sum += alone["loss"].get<double>() * alone["targets"].get<double>();
    targets += alone["targets"].get<double>();
  }
  EXPECT_NEAR(record["val/loss"].get<double>(), sum / targets, 1e-6);
}

TEST(TrainRun, FinishedRunSaysSoAndFolderHasItsFiles) {
  const TinyRun tiny;
  const ProcessResult first = tiny.Train("run", {"train.steps=20"});
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_THAT(first.out,
              AllOf(HasSubstr("finished: 20 steps, 2.56k tokens"), HasSubstr("step-00000020"),
                    HasSubstr("bits per byte"), HasSubstr("generate "), HasSubstr("eval ")));
  for (const char* name :
       {"config.yaml", "command.txt", "environment.json", "train.log", "metrics.jsonl",
        "tensorboard", "checkpoints/step-00000020", "checkpoints/latest"}) {
    EXPECT_TRUE(std::filesystem::exists(tiny / "run" + "/" + name)) << name;
  }
  EXPECT_THAT(ReadText(tiny / "run/train.log"), HasSubstr("step    20/20 | loss "));
  EXPECT_TRUE(nlohmann::json::accept(ReadText(tiny / "run/environment.json")));
  const std::string metrics = ReadText(tiny / "run/metrics.jsonl");

  const ProcessResult again = tiny.Train("run", {"train.steps=20"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, AllOf(HasSubstr("finished"), HasSubstr("bits per byte")));
  EXPECT_EQ(ReadText(tiny / "run/metrics.jsonl"), metrics);
}

TEST(TrainRun, MetricsHaveTheContractedFields) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10", "evaluation.every=5"}).code, 0);
  std::istringstream lines(ReadText(tiny / "run/metrics.jsonl"));
  int steps = 0, evaluations = 0;
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    for (const auto& [key, value] : record.items()) {
      EXPECT_TRUE(value.is_number() || value.is_null()) << key;
    }
    EXPECT_TRUE(record.contains("step") && record.contains("time")) << line;
    if (record.contains("val/loss")) {
      ++evaluations;
      EXPECT_NEAR(record["val/bpb"].get<double>() * 0.6931471805599453,
                  record["val/loss"].get<double>(), 1e-9);
      continue;
    }
    ++steps;
    for (const char* key :
         {"train/loss", "train/aux_loss", "train/total_loss", "optim/lr", "optim/grad_norm",
          "optim/skipped", "perf/tokens_per_s", "perf/mfu", "perf/step_ms", "mem/peak_gib",
          "moe/layer_01/imbalance", "moe/layer_03/imbalance", "moe/overflow_rounds", "tokens"}) {
      EXPECT_TRUE(record.contains(key)) << key;
    }
    EXPECT_EQ(record["tokens"], record["step"].get<int64_t>() * 128);
  }
  EXPECT_EQ(steps, 3);  // 1, 5, 10
  EXPECT_EQ(evaluations, 2);
}

TEST(TrainRun, NonFiniteTenTimesInARowEndsWith40) {
  const TinyRun tiny;
  const ProcessResult result =
      tiny.Train("run", {"optimizer.lr=1e38", "optimizer.clip=0", "schedule.warmup_steps=0"});
  EXPECT_EQ(result.code, 40) << result.out << result.err;
  EXPECT_THAT(result.out, HasSubstr("skipped: not finite (10 in a row"));
  EXPECT_THAT(result.err, HasSubstr("10 steps in a row"));
  std::istringstream lines(ReadText(tiny / "run/metrics.jsonl"));
  std::string line, last;
  while (std::getline(lines, line)) last = line;
  const auto record = nlohmann::json::parse(last);
  EXPECT_GE(record["optim/skipped"].get<int64_t>(), 10);
  EXPECT_TRUE(record["train/loss"].is_null() || record["optim/grad_norm"].is_null());
}

TEST(TrainRun, SecondProcessIsRefusedByTheLock) {
  const TinyRun tiny;
  Process first(TinyRun::Argv(tiny.TrainWords("run", {"train.steps=100000"})),
                TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&first, "step     1/"));
  const ProcessResult second = tiny.Train("run");
  EXPECT_EQ(second.code, 20);
  EXPECT_THAT(second.err, HasSubstr(tiny / "run"));
}

TEST(TrainRun, ChangesOnResumeFollowTheRules) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  ProcessResult result = tiny.Train("run", {"train.steps=20", "model.mlp.d_ff=32"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, AllOf(HasSubstr("model.mlp.d_ff"), HasSubstr("24"), HasSubstr("32")));
  result = tiny.Train("run", {"train.steps=20", "train.seed=8"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, AllOf(HasSubstr("train.seed"), HasSubstr("--allow-change seed")));
  result = tiny.Train("run", {"train.steps=20", "--allow-change", "model"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("takes seq_len, batch_tokens, data or seed"));
  result = tiny.Train(
      "run", {"train.steps=20", "train.seed=8", "data.seq_len=16", "--allow-change", "seed",
              "--allow-change", "seq_len", "optimizer.lr=5e-3", "train.micro_batch=4"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(
      result.out,
      AllOf(HasSubstr("changed: train.seed"), HasSubstr("changed: data.seq_len"),
            HasSubstr("changed: optimizer.lr"), Not(HasSubstr("changed: train.micro_batch"))));
}

TEST(TrainRun, OtherTokensUnderTheSamePathNeedAllowChangeData) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  WriteText(tiny.folder(), "more", 16, 3);
  ProcessResult result = tiny.Train("run", {"train.steps=20"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("--allow-change data"));
  result = tiny.Train("run", {"train.steps=20", "--allow-change", "data"});
  EXPECT_EQ(result.code, 0) << result.err;
}

TEST(TrainRun, DamagedCheckpointsArePassedOverAndNeverStartedBeside) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=30"}).code, 0);
  const auto damage = [&](const std::string& step) {
    const std::string path = tiny / "run/checkpoints" + "/" + step + "/rank-00000.h5";
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(std::filesystem::file_size(path) / 2));
    file.put('\x5a');
    file.put('\xa5');
  };
  damage("step-00000030");
  ProcessResult result = tiny.Train("run", {"train.steps=40"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("passed over"), HasSubstr("step-00000030"),
                                HasSubstr("resuming at step 20")));
  for (const auto& entry : std::filesystem::directory_iterator(tiny / "run/checkpoints")) {
    if (entry.is_directory()) damage(entry.path().filename());
  }
  result = tiny.Train("run", {"train.steps=50"});
  EXPECT_EQ(result.code, 30);
  EXPECT_THAT(result.err, AllOf(HasSubstr("run_dir"), HasSubstr("--resume never")));
}

TEST(TrainRun, ResumeNeverKeepsTheOldCheckpointsApart) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=20"}).code, 0);
  const std::vector<std::string> metrics = Metrics(tiny / "run");
  const ProcessResult result = tiny.Train("run", {"train.steps=20", "--resume", "never"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("checkpoints.before-1"), HasSubstr("step     1/20")));
  EXPECT_TRUE(std::filesystem::exists(tiny / "run/checkpoints.before-1/step-00000020"));
  EXPECT_EQ(Metrics(tiny / "run"), metrics);
  EXPECT_TRUE(std::filesystem::exists(tiny / "run/metrics.discarded.jsonl"));
}

TEST(TrainRun, ResumeOfAPathSetsNewerCheckpointsAside) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=30"}).code, 0);
  const std::string older = tiny / "run/checkpoints/step-00000020";
  ProcessResult result = tiny.Train("run", {"train.steps=30", "--resume", older});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("resuming at step 20"), HasSubstr("moved to")));
  result = tiny.Train("run", {"--resume", tiny / "none"});
  EXPECT_EQ(result.code, 30);
  EXPECT_THAT(result.err, HasSubstr(tiny / "none"));
}

TEST(TrainRun, InitTakesWeightsOnly) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("first", {"train.steps=20"}).code, 0);
  ProcessResult result = tiny.Train("second", {"train.steps=10", "--init", tiny / "first"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("starting at step 0 with the weights of"),
                                HasSubstr("step     1/10")));
  result = tiny.Train("second", {"train.steps=20", "--init", tiny / "first"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("resuming at step 10"), HasSubstr("--init is ignored")));
  result = tiny.Train("third", {"--init", tiny / "first", "model.d_model=32"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, AllOf(HasSubstr("does not fit this run's model"),
                                Not(HasSubstr("no checkpoint is whole"))));
}

TEST(TrainRun, CannotSaveEndsWith31) {
  const TinyRun tiny;
  ProcessResult result = tiny.Train("run", {"train.steps=10", "checkpoint.dir=/dev/null/none"});
  EXPECT_EQ(result.code, 31) << result.out << result.err;
  EXPECT_THAT(result.err, HasSubstr("/dev/null"));

  // A file size limit below the checkpoint's size: an error, not a death by SIGXFSZ.
  std::string command = "ulimit -f 40; exec";
  for (const std::string& word : TinyRun::Argv(tiny.TrainWords("run", {"train.steps=20"}))) {
    command += " '" + word + "'";
  }
  result = RunProcess({"/bin/bash", "-c", command}, TinyRun::Variables());
  EXPECT_EQ(result.code, 31) << result.out << result.err;
  EXPECT_THAT(result.err, HasSubstr("File too large"));
  result = tiny.Train("run", {"train.steps=20"});
  EXPECT_EQ(result.code, 0) << result.err;
}

}  // namespace
}  // namespace krait
