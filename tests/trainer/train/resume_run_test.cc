// `krait train` as a process, started again: no start loses or undoes work without a word.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "support/tiny_run.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// The folders of checkpoints, whole or not, by name.
std::vector<std::string> Steps(const std::string& dir) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.is_directory()) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void Damage(const std::string& checkpoint) {
  const std::string path = checkpoint + "/rank-00000.h5";
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(std::filesystem::file_size(path) / 2));
  file.put('\x5a');
  file.put('\xa5');
}

TEST(ResumeRun, MomentsAndPrecisionChangeOnTheWay) {
  const TinyRun tiny;
  const auto train = [&](int steps, const std::vector<std::string>& words) {
    std::vector<std::string> all = {"train.steps=" + std::to_string(steps)};
    all.insert(all.end(), words.begin(), words.end());
    return tiny.Train("run", all);
  };
  // Each start goes on where the one before it ended, whatever the dtypes of both.
  ASSERT_EQ(train(10, {"optimizer.moments=bf16"}).code, 0);
  int from = 10;
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"optimizer.moments=fp32"},
        {"optimizer.moments=bf16"},
        {"optimizer.moments=bf16", "train.precision=bf16"},
        {"optimizer.moments=fp32", "train.precision=fp32"}}) {
    const ProcessResult result = train(from + 10, words);
    EXPECT_EQ(result.code, 0) << result.out << result.err;
    EXPECT_THAT(result.out, AllOf(HasSubstr("resuming at step " + std::to_string(from)),
                                  HasSubstr("changed: "), Not(HasSubstr("passed over"))));
    from += 10;
  }
}

TEST(ResumeRun, CheckpointsThatAreNotThereAreNotForgotten) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=30"}).code, 0);
  // Misspelt or not mounted: no start from zero, and nothing is moved or created.
  const std::string metrics = ReadText(tiny / "run/metrics.jsonl");
  const std::string elsewhere = tiny / "elsewhere";
  ProcessResult result = tiny.Train("run", {"train.steps=40", "checkpoint.dir=" + elsewhere});
  EXPECT_EQ(result.code, 30) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("step 30"), HasSubstr("run/checkpoints/step-00000030"),
                                HasSubstr("checkpoint.dir"), HasSubstr("--resume never")));
  EXPECT_FALSE(std::filesystem::exists(elsewhere));
  EXPECT_EQ(ReadText(tiny / "run/metrics.jsonl"), metrics);
  // The newest is gone and older ones are there: no going back without a word either.
  const std::string newest = tiny / "run/checkpoints/step-00000030";
  std::filesystem::rename(newest, tiny / "away");
  result = tiny.Train("run", {"train.steps=40"});
  EXPECT_EQ(result.code, 30) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("step 30"), HasSubstr("step 20"), HasSubstr("--resume")));
  // Another run's checkpoints, also later ones, are not this run's.
  ASSERT_EQ(tiny.Train("other", {"train.steps=50"}).code, 0);
  result = tiny.Train("run", {"train.steps=60", "checkpoint.dir=" + (tiny / "other/checkpoints")});
  EXPECT_EQ(result.code, 30) << result.out << result.err;
  // What the sentence says works: back in its place, or an older one by name, or from the start.
  std::filesystem::rename(tiny / "away", newest);
  result = tiny.Train("run", {"train.steps=40"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("resuming at step 30"));
  std::filesystem::remove_all(tiny / "run/checkpoints/step-00000040");
  result = tiny.Train("run", {"train.steps=50", "--resume", newest});
  EXPECT_EQ(result.code, 0) << result.err;
  std::filesystem::remove_all(tiny / "run/checkpoints");
  EXPECT_EQ(tiny.Train("run", {"train.steps=50"}).code, 30);
  EXPECT_EQ(tiny.Train("run", {"train.steps=10", "--resume", "never"}).code, 0);
  // Moved as a whole, the run goes on.
  std::filesystem::rename(tiny / "run", tiny / "renamed");
  result = tiny.Train("renamed", {"train.steps=20"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("resuming at step 10"));
}

TEST(ResumeRun, TwoRunsDoNotShareACheckpointFolder) {
  const TinyRun tiny;
  const std::string dir = "checkpoint.dir=" + (tiny / "shared");
  Process first(TinyRun::Argv(tiny.TrainWords("first", {"train.steps=100000", dir})),
                TinyRun::Variables());
  ASSERT_TRUE(WaitFor(&first, "step     1/"));
  const ProcessResult second = tiny.Train("second", {"train.steps=10", dir});
  EXPECT_EQ(second.code, 20) << second.out << second.err;
  EXPECT_THAT(second.err, AllOf(HasSubstr(tiny / "shared"), HasSubstr("in use")));
  first.Signal(SIGTERM);
  EXPECT_EQ(first.Wait().code, 10);
  // A run whose checkpoints lie in its own folder, beside each other, is not in its own way.
  EXPECT_EQ(tiny.Train("flat", {"train.steps=10", "checkpoint.dir=" + (tiny / "flat")}).code, 0);
}

TEST(ResumeRun, TheNextLineAndARequeuedJobGoOn) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("source", {"train.steps=20"}).code, 0);
  const std::string path = tiny / "source/checkpoints/step-00000020";
  const auto stop_after = [&](const std::string& text, const std::vector<std::string>& words) {
    Process part(TinyRun::Argv(tiny.TrainWords("run", words)), TinyRun::Variables());
    EXPECT_TRUE(WaitFor(&part, text)) << part.out();
    part.Signal(SIGTERM);
    return part.Wait();
  };
  // The printed line has no --resume, the typed one is in command.txt.
  for (const std::vector<std::string>& resume :
       {std::vector<std::string>{"--resume", "never"}, {"--resume=" + path}}) {
    const ProcessResult part = stop_after("step    60/200", resume);
    EXPECT_EQ(part.code, 10) << part.err;
    const size_t next = part.out.find("next: ");
    ASSERT_NE(next, std::string::npos);
    EXPECT_THAT(part.out.substr(next), AllOf(HasSubstr("train"), Not(HasSubstr("--resume"))));
    EXPECT_THAT(ReadText(tiny / "run/command.txt"), HasSubstr("--resume"));
  }
  // The same job once more: PATH was followed, so its own newer checkpoints go first.
  ProcessResult again = stop_after("step   120/200", {"--resume", path});
  EXPECT_EQ(again.code, 10) << again.err;
  EXPECT_THAT(again.out, AllOf(HasSubstr("followed before"), Not(HasSubstr("moved to")),
                               Not(HasSubstr("resuming at step 20 "))));
  // Also when the PATH is gone.
  std::filesystem::rename(tiny / "source", tiny / "gone");
  again = tiny.Train("run", {"--resume", path});
  EXPECT_EQ(again.code, 0) << again.err;
  // What the sentence says leads back to it.
  std::filesystem::rename(tiny / "gone", tiny / "source");
  std::filesystem::remove(tiny / "run/last_checkpoint.json");
  again = tiny.Train("run", {"--resume", path, "train.steps=30"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, HasSubstr("resuming at step 20 "));
}

TEST(ResumeRun, DamagedCheckpointsAreNotCountedAsKept) {
  const TinyRun tiny;
  const std::string dir = tiny / "run/checkpoints";
  ASSERT_EQ(tiny.Train("run", {"train.steps=40", "checkpoint.keep=3"}).code, 0);
  ASSERT_EQ(Steps(dir),
            (std::vector<std::string>{"step-00000020", "step-00000030", "step-00000040"}));
  Damage(dir + "/step-00000030");
  Damage(dir + "/step-00000040");
  // Saves step 25: with 20, the two that are kept.
  const std::vector<std::string> words = {"checkpoint.every=5", "checkpoint.keep=2"};
  std::vector<std::string> until = words;
  until.insert(until.end(), {"train.steps=25"});
  const ProcessResult result = tiny.Train("run", until);
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("resuming at step 20"), HasSubstr("was moved to")));
  EXPECT_EQ(Steps(dir), (std::vector<std::string>{"damaged-step-00000030", "damaged-step-00000040",
                                                  "step-00000020", "step-00000025"}));
  const ProcessResult verify = TinyRun::Krait({"checkpoint", "verify", tiny / "run"});
  EXPECT_EQ(verify.code, 0) << verify.out;
}

TEST(ResumeRun, DivergedStepsAreNeitherSavedNorTakeTheGoodOnesPlace) {
  const TinyRun tiny;
  const std::string dir = tiny / "run/checkpoints";
  const std::vector<std::string> words = {"checkpoint.every=3", "checkpoint.keep=2", "log.every=1"};
  std::vector<std::string> good = words, bad = words;
  good.push_back("train.steps=12");
  ASSERT_EQ(tiny.Train("run", good).code, 0);
  ASSERT_EQ(Steps(dir), (std::vector<std::string>{"step-00000009", "step-00000012"}));
  bad.insert(bad.end(), {"train.steps=200", "optimizer.lr=1e38", "optimizer.clip=0",
                         "schedule.warmup_steps=0"});
  const ProcessResult result = tiny.Train("run", bad);
  EXPECT_EQ(result.code, 40) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("The last good step is 12"),
                                HasSubstr("run/checkpoints/step-00000012"),
                                HasSubstr("to resume there: "), HasSubstr("train ")));
  EXPECT_EQ(Steps(dir), (std::vector<std::string>{"step-00000009", "step-00000012"}));
}

TEST(ResumeRun, InitThatDoesNotFitIsRefused) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("first", {"train.steps=10"}).code, 0);
  ProcessResult result = tiny.Train("wide", {"--init", tiny / "first", "model.d_model=32"});
  EXPECT_EQ(result.code, 20) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("does not fit this run's model"),
                                Not(HasSubstr("no checkpoint is whole"))));
  result = tiny.Train("empty", {"train.steps=10", "--init", ""});
  EXPECT_EQ(result.code, 20) << result.out << result.err;
  EXPECT_THAT(result.err, HasSubstr("--init"));
}

TEST(ResumeRun, WhatCannotBeReadStopsTheStart) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=20"}).code, 0);
  // A name that no folder can have stands for what only the system's refusal shows: as the
  // superuser nothing is forbidden.
  const std::string newest = tiny / "run/checkpoints/step-00000020";
  const std::string loop = newest + "/manifest.json";
  if (geteuid() != 0) {
    ASSERT_EQ(chmod(newest.c_str(), 0), 0);
    const ProcessResult result = tiny.Train("run", {"train.steps=30"});
    ASSERT_EQ(chmod(newest.c_str(), 0755), 0);
    EXPECT_EQ(result.code, 30) << result.out << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr("Permission denied"), HasSubstr(newest)));
    EXPECT_THAT(result.out, Not(HasSubstr("resuming at step 10")));
  }
  // A link that leads to itself in place of the folder: ELOOP.
  std::filesystem::rename(newest, tiny / "away");
  std::filesystem::create_symlink(newest, newest);
  const ProcessResult result = tiny.Train("run", {"train.steps=30"});
  EXPECT_EQ(result.code, 30) << result.out << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr(loop), HasSubstr("symbolic links")));
  EXPECT_THAT(result.out, Not(HasSubstr("resuming")));
}

TEST(ResumeRun, LatestIsMendedWhenDamagedOnesAreMovedAway) {
  const TinyRun tiny;
  const std::string dir = tiny / "run/checkpoints";
  ASSERT_EQ(tiny.Train("run", {"train.steps=30"}).code, 0);
  Damage(dir + "/step-00000030");
  // Nothing is saved by this start.
  const ProcessResult result = tiny.Train("run", {"train.steps=20"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(ReadText(dir + "/latest"), "step-00000020\n");
}

TEST(ResumeRun, MilestonesAreKept) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=40", "checkpoint.every=5", "checkpoint.keep=2",
                               "checkpoint.keep_every=10"})
                .code,
            0);
  EXPECT_EQ(Steps(tiny / "run/checkpoints"),
            (std::vector<std::string>{"step-00000010", "step-00000020", "step-00000030",
                                      "step-00000035", "step-00000040"}));
}

TEST(ResumeRun, OtherThreadsAreNamed) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  const auto resume = [&](const char* threads, const char* steps) {
    return RunProcess(TinyRun::Argv(tiny.TrainWords("run", {steps})),
                      {{"OMP_NUM_THREADS", threads}, {"OMP_WAIT_POLICY", "passive"}});
  };
  ProcessResult result = resume("2", "train.steps=20");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, Not(HasSubstr("the last steps ran on")));
  result = resume("1", "train.steps=30");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("the last steps ran on CPU, 2 threads, "),
                                HasSubstr("; this is CPU, 1 thread, ")));
}

// A checkpoint of a run on other hardware: its config is rewritten to what such a run stores.
TEST(ResumeRun, ACheckpointOfAnotherLayoutAndDeviceIsOfUseHere) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  const std::string path = tiny / "run/checkpoints/step-00000010";
  auto checkpoint = OpenCheckpoint(path);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  std::string& config = checkpoint->meta.config_yaml;
  for (const auto& [from, to] : {std::pair<std::string, std::string>{"tensor: 1", "tensor: 2"},
                                 {"data: auto", "data: 4"},
                                 {"device: cpu", "device: cuda"},
                                 {"precision: fp32", "precision: bf16"},
                                 {"batch_tokens: 128", "batch_tokens: 1024"}}) {
    ASSERT_NE(config.find(from), std::string::npos) << from;
    config.replace(config.find(from), from.size(), to);
  }
  const auto text = ManifestText(*checkpoint);
  ASSERT_TRUE(text.ok()) << text.status();
  std::ofstream(path + "/manifest.json", std::ios::binary) << *text;

  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"checkpoint", "inspect", path},
        {"eval", path, "--data", tiny / "more.h5", "--tokens", "512"},
        {"generate", path, "--prompt", "krait", "--tokens", "4"},
        {"export", path, "--hf", tiny / "hf"},
        tiny.TrainWords("weights", {"train.steps=10", "--init", path}),
        tiny.TrainWords("run", {"train.steps=20", "--allow-change", "batch_tokens"})}) {
    const ProcessResult result = TinyRun::Krait(words);
    EXPECT_EQ(result.code, 0) << words[0] << ": " << result.out << result.err;
  }
}

TEST(ResumeRun, AnotherMicroBatchIsNamedWhereItChangesTheWeights) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  const ProcessResult result = tiny.Train("run", {"train.steps=20", "train.micro_batch=4"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("train.micro_batch: 2 in the checkpoint, 4 now"),
                                HasSubstr("router's statistics")));
}

}  // namespace
}  // namespace krait
