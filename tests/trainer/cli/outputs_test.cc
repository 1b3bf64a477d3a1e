// What commands write: to files that exist, to standard output that cannot be written, as JSON.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "kernels/base/file.h"
#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/tiny_run.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

const std::string kMicro = std::string(KRAIT_TEST_GOLDEN) + "/jamba-micro";

ProcessResult Krait(const std::vector<std::string>& words) { return TinyRun::Krait(words); }

std::string Quoted(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : TinyRun::Argv(words)) line += "'" + word + "' ";
  return line;
}

// krait WORDS... with REDIRECTION behind it, by a shell.
ProcessResult Shell(const std::vector<std::string>& words, const std::string& redirection) {
  return RunProcess({"/bin/bash", "-c", "set -o pipefail; " + Quoted(words) + redirection},
                    TinyRun::Variables());
}

std::string ContentOf(const std::string& path) {
  const auto text = ReadFile(path, int64_t{1} << 30, ExitCode::kInternal);
  return text.ok() ? *text : "unreadable";
}

TEST(Outputs, AnOlderOneIsReplacedByForceOnly) {
  const TinyRun tiny;
  const std::string batches = kMicro + "/forward.safetensors";
  struct Case {
    std::string out;
    std::vector<std::string> words;
  };
  for (const Case& c :
       {Case{tiny / "built.h5", {"data", "build", "--out", tiny / "built.h5", tiny / "train"}},
        Case{tiny / "probe.safetensors",
             {"probe", "--hf", kMicro, "--batches", batches, "--out", tiny / "probe.safetensors"}},
        Case{tiny / "step.json",
             {"bench", "step", tiny.config(), "--steps", "1", "--json", tiny / "step.json"}},
        Case{tiny / "op.json",
             {"bench", "kernels", "--only", "swiglu", "--json", tiny / "op.json"}},
        Case{tiny / "imported", {"import", "--hf", kMicro, "--out", tiny / "imported"}}}) {
    SCOPED_TRACE(c.words[0]);
    ASSERT_EQ(Krait(c.words).code, 0);
    const auto written = std::filesystem::last_write_time(c.out);
    const ProcessResult again = Krait(c.words);
    EXPECT_EQ(again.code, 20);
    EXPECT_THAT(again.err, AllOf(HasSubstr(c.out), HasSubstr("--force")));
    EXPECT_EQ(std::filesystem::last_write_time(c.out), written);
    std::vector<std::string> forced = c.words;
    forced.push_back("--force");
    const ProcessResult result = Krait(forced);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_NE(std::filesystem::last_write_time(c.out), written);
  }
  // By force, too, nothing of another kind.
  const std::string text = tiny.folder().Write("notes.md", "kept");
  EXPECT_EQ(Krait({"data", "build", "--force", "--out", text, tiny / "train"}).code, 20);
  const std::string folder = tiny / "train";
  EXPECT_EQ(Krait({"import", "--force", "--hf", kMicro, "--out", folder}).code, 20);
  EXPECT_EQ(ContentOf(text), "kept");
  EXPECT_TRUE(Exists(folder + "/0.txt"));
}

TEST(Outputs, AnExportIsReplacedByForceOnlyAndNothingElseIs) {
  const TinyRun tiny;
  const std::string checkpoint = tiny / "step-00000005/";  // the slash is taken, and the name
  ASSERT_EQ(Krait({"import", "--hf", kMicro, "--out", checkpoint}).code, 0);
  EXPECT_EQ(Krait({"checkpoint", "verify", checkpoint}).code, 0);
  const std::string hf = tiny / "hf/";
  ASSERT_EQ(Krait({"export", checkpoint, "--hf", hf}).code, 0);
  ProcessResult result = Krait({"export", checkpoint, "--hf", hf});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("--force"));
  result = Krait({"export", checkpoint, "--hf", hf, "--force", "--dtype", "bf16", "--json"});
  EXPECT_EQ(result.code, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["hf"], tiny / "hf");
  EXPECT_GT(json["tensors"].get<int>(), 10);
  EXPECT_THAT(ContentOf(tiny / "hf/config.json"), HasSubstr("bfloat16"));
  tiny.folder().Write("hf/notes.md", "kept");
  result = Krait({"export", checkpoint, "--hf", hf, "--force"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("notes.md"));
  EXPECT_EQ(ContentOf(tiny / "hf/notes.md"), "kept");
  int entries = 0;
  for (const auto& entry : std::filesystem::directory_iterator(tiny.folder().path())) {
    entries += entry.path().filename().string().starts_with("hf");
  }
  EXPECT_EQ(entries, 1);  // nothing half done lies about
}

TEST(Outputs, ImportRefusesWhatNoConfigMaySay) {
  const TinyRun tiny;
  for (const char* key : {"initializer_range", "rms_norm_eps"}) {
    const std::string folder = tiny / key;
    std::filesystem::copy(kMicro, folder);
    auto config = nlohmann::json::parse(ContentOf(folder + "/config.json"));
    config[key] = 0;
    tiny.folder().Write(std::string(key) + "/config.json", config.dump());
    const ProcessResult result = Krait({"import", "--hf", folder, "--out", tiny / "out"});
    EXPECT_EQ(result.code, 20) << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr(folder), HasSubstr(std::string(key) + " is 0")));
    EXPECT_FALSE(Exists(tiny / "out"));
  }
}

TEST(Outputs, AFullDiskIsAnErrorAndAClosedPipeIsNot) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=2", "schedule.warmup_steps=1"}).code, 0);
  const std::string run = tiny / "run";
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"plan", tiny.config()},
        {"plan", tiny.config(), "--json"},
        {"config", tiny.config()},
        {"config", "keys"},
        {"data", "inspect", tiny / "more.h5", "--json"},
        {"data", "build", "--out", tiny / "new.h5", "--force", tiny / "more"},
        {"eval", run, "--json"},
        {"generate", run, "--prompt", "a", "--tokens", "5"},
        {"checkpoint", "inspect", run},
        {"checkpoint", "verify", run, "--json"},
        {"bench", "kernels", "--only", "swiglu"},
        {"--version"},
        {"train", "--help"}}) {
    SCOPED_TRACE(words[0]);
    ProcessResult result = Shell(words, "> /dev/full");
    EXPECT_EQ(result.code, 31) << result.err;
    EXPECT_THAT(result.err, HasSubstr("krait: cannot write to standard output: No space left"));
    result = Shell(words, "| true");
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_THAT(result.err, Not(HasSubstr("cannot write")));
  }
}

TEST(Outputs, GenerateStopsWhenNobodyReadsOn) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=2", "schedule.warmup_steps=1"}).code, 0);
  // 10 million tokens: text comes at once, and the command ends with its reader.
  const ProcessResult result = Shell(
      {"generate", tiny / "run", "--prompt", "krait", "--tokens", "10M"}, "| head -c 20 | wc -c");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(std::stoi(result.out), 20);
}

TEST(Outputs, JsonOfDataBuildAndImport) {
  const TinyRun tiny;
  ProcessResult result =
      Krait({"data", "build", "--out", tiny / "new.h5", tiny / "more", "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["path"], tiny / "new.h5");
  EXPECT_EQ(json["documents"], 15);
  EXPECT_EQ(json["skipped_files"], 0);
  result = Krait({"import", "--hf", kMicro, "--out", tiny / "in", "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out)["checkpoint"], tiny / "in");
}

TEST(Outputs, InspectTakesSeveralAndDiffOneSlot) {
  const TinyRun tiny;
  const std::vector<std::string> words = {"train.steps=2", "schedule.warmup_steps=1"};
  ASSERT_EQ(tiny.Train("a", words).code, 0);
  ASSERT_EQ(tiny.Train("b", {"train.steps=2", "schedule.warmup_steps=1",
                             "optimizer.betas=[0.8,0.95]", "optimizer.lr=1e-9"})
                .code,
            0);
  ProcessResult result = Krait({"checkpoint", "inspect", tiny / "a", tiny / "b", "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  ASSERT_EQ(json.size(), 2u);
  EXPECT_THAT(json[1]["path"].get<std::string>(), HasSubstr("/b/"));
  EXPECT_THAT(Krait({"checkpoint", "inspect", tiny / "a", tiny / "b"}).out,
              AllOf(HasSubstr("/a/"), HasSubstr("/b/")));
  result = Krait({"checkpoint", "diff", tiny / "a", tiny / "b"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, HasSubstr("exp_avg "));
  result = Krait({"checkpoint", "diff", tiny / "a", tiny / "b", "--slot", "weight"});
  EXPECT_THAT(result.out, AllOf(HasSubstr("weight "), Not(HasSubstr("exp_avg"))));
  EXPECT_EQ(Krait({"checkpoint", "diff", tiny / "a", tiny / "a", "--slot", "weight"}).code, 0);
  result = Krait({"checkpoint", "diff", tiny / "a", tiny / "b", "--slot", "weights"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("there are exp_avg, exp_avg_sq, weight"));
}

// krait with a system call failing, or skipped where that cannot be done.
class Failing : public testing::Test {
 protected:
  void SetUp() override {
#ifdef KRAIT_SANITIZE
    GTEST_SKIP() << "sanitizers cannot work under strace";
#endif
    if (RunProcess({"/bin/sh", "-c", "strace -o /dev/null true"}).code != 0) {
      GTEST_SKIP() << "strace is missing or may not trace (apt install strace)";
    }
  }
  ProcessResult Krait(const std::vector<std::string>& strace,
                      const std::vector<std::string>& words) {
    std::vector<std::string> argv = {"/usr/bin/env", "strace", "-f", "-qq", "-o", "/dev/null"};
    argv.insert(argv.end(), strace.begin(), strace.end());
    for (const std::string& word : TinyRun::Argv(words)) argv.push_back(word);
    return RunProcess(argv, TinyRun::Variables());
  }
  const TinyRun tiny_;
};

TEST_F(Failing, AFileSystemWithoutLocksGivesAWarning) {
  const std::vector<std::string> no_locks = {"-e", "trace=flock", "-e",
                                             "inject=flock:error=ENOSYS"};
  const auto train = [&](const std::string& steps) {
    return Krait(no_locks, tiny_.TrainWords("run", {"schedule.warmup_steps=1", steps}));
  };
  ProcessResult result = train("train.steps=1");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("has no file locks"));
  EXPECT_EQ(ContentOf(tiny_ / "run/lock"), "");  // let go of
  EXPECT_EQ(ContentOf(tiny_ / "run/checkpoints/checkpoints.lock"), "");

  char host[256] = "";
  ASSERT_EQ(gethostname(host, sizeof(host)), 0);
  const auto held_by = [&](const std::string& holder) {
    tiny_.folder().Write("run/lock", holder + " since 2026-01-01T00:00:00Z\n");
  };
  held_by(std::string(host) + " pid " + std::to_string(getpid()));  // lives
  result = train("train.steps=2");
  EXPECT_EQ(result.code, 20) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("in use by another krait"), HasSubstr("run/lock")));
  held_by(std::string(host) + " pid 99999999");  // was killed
  EXPECT_EQ(train("train.steps=2").code, 0);
  held_by("another-host pid 1");
  result = train("train.steps=3");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("another-host pid 1"));
}

TEST_F(Failing, AnOldCheckpointThatCannotBeRenamedIsAWarning) {
  // The renames from this name; the one to it, which publishes it, does not count.
  const ProcessResult result = Krait(
      {"-P", tiny_ / "run/checkpoints/step-00000001", "-e", "inject=rename:error=EPERM:when=1+"},
      tiny_.TrainWords("run", {"train.steps=4", "schedule.warmup_steps=1", "checkpoint.every=1",
                               "checkpoint.keep=2", "checkpoint.async=false"}));
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("cannot rename " + (tiny_ / "run/checkpoints/step-00000001")));
  EXPECT_TRUE(Exists(tiny_ / "run/checkpoints/step-00000001/manifest.json"));
  EXPECT_FALSE(Exists(tiny_ / "run/checkpoints/step-00000002"));
  EXPECT_TRUE(Exists(tiny_ / "run/checkpoints/step-00000004"));
}

TEST(Outputs, ABrokenBatchFileOfProbeIsData) {
  const TinyRun tiny;
  const std::string broken = tiny.folder().Write("broken.safetensors", "no header");
  for (const std::string& batches : {broken, tiny / "none.safetensors"}) {
    const ProcessResult result =
        Krait({"probe", "--hf", kMicro, "--batches", batches, "--out", tiny / "out.safetensors"});
    EXPECT_EQ(result.code, 21) << result.err;
    EXPECT_THAT(result.err, HasSubstr(batches));
  }
  EXPECT_EQ(Krait({"probe", "--hf", tiny / "none", "--batches", broken, "--out", tiny / "o"}).code,
            30);
}

}  // namespace
}  // namespace krait
