// The command line: help on every level, misuse, refusals.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "kernels/cuda/runtime.h"
#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/tiny_run.h"
#include "support/tokens.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

ProcessResult Krait(const std::vector<std::string>& words) { return TinyRun::Krait(words); }

int64_t Lines(const std::string& text) { return std::count(text.begin(), text.end(), '\n'); }

TEST(Cli, HelpOnEveryLevel) {
  const std::vector<std::vector<std::string>> commands = {{},
                                                          {"config"},
                                                          {"config", "keys"},
                                                          {"data"},
                                                          {"data", "build"},
                                                          {"data", "inspect"},
                                                          {"plan"},
                                                          {"train"},
                                                          {"eval"},
                                                          {"generate"},
                                                          {"import"},
                                                          {"export"},
                                                          {"probe"},
                                                          {"bench"},
                                                          {"bench", "kernels"},
                                                          {"bench", "step"},
                                                          {"checkpoint"},
                                                          {"checkpoint", "inspect"},
                                                          {"checkpoint", "verify"},
                                                          {"checkpoint", "diff"}};
  for (std::vector<std::string> words : commands) {
    words.push_back("--help");
    const ProcessResult result = Krait(words);
    EXPECT_EQ(result.code, 0);
    EXPECT_THAT(result.out, HasSubstr("Usage:"));
    EXPECT_THAT(result.err, IsEmpty());
  }
}

TEST(Cli, VersionNamesBuildAndCompiler) {
  const ProcessResult result = Krait({"--version"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, AllOf(HasSubstr("krait 0."), HasSubstr("GCC")));
}

TEST(Cli, ConfigExplainsValuesAndListsKeys) {
  const std::string config = KRAIT_SOURCE_DIR "/configs/quickstart.yaml";
  const ProcessResult explained = Krait({"config", config, "optimizer.lr=1e-3"});
  EXPECT_EQ(explained.code, 0) << explained.err;
  EXPECT_THAT(explained.out, HasSubstr("  lr: 0.001  # word \"optimizer.lr=1e-3\"\n"));
  EXPECT_THAT(explained.out, HasSubstr("  # " + config + ":"));

  const ProcessResult keys = Krait({"config", "keys", "optimizer.", "--json"});
  EXPECT_EQ(keys.code, 0) << keys.err;
  const auto list = nlohmann::json::parse(keys.out);
  ASSERT_EQ(list.size(), 8U);
  EXPECT_EQ(list[1]["key"], "optimizer.lr");
  EXPECT_EQ(list[1]["default"], "3e-4");
  EXPECT_THAT(Krait({"config", "keys"}).out, HasSubstr("train.batch_tokens"));
  EXPECT_EQ(Krait({"config", "keys", "zebra"}).code, 20);
}

TEST(Cli, MisuseIsOneSentenceAnd20) {
  const std::vector<std::vector<std::string>> misuses = {
      {"trian"},
      {"train"},
      {"train", "a.yaml", "--nosuch"},
      {"train", "a.yaml", "--resume"},
      {"plan", "a.yaml", "--context", "many"},
      {"plan", "a.yaml", "--context", "-5"},
      {"plan", "a.yaml", "--memory", "big"},
      {"eval"},
      {"generate", "x", "--prompt", "a", "--seed", "-1"},
      {"generate", "x", "--prompt", "a", "--seed", "010"},
      {"generate", "x", "--prompt", "a", "--seed", "0x10"},
      {"generate", "x", "--prompt", "a", "--seed", "18446744073709551616"},
      {"generate", "x", "--prompt", "a", "--top-p", "0x1p-1"},
      {"data", "build", "--out", "x.h5", "--seed", "-1", "x"},
      {"generate", "x", "--prompt", "a", "--temperature", "warm"},
      {"export", "x", "--hf", "y", "--dtype", "f16"},
      {"checkpoint", "diff", "x"},
      {"bench", "step"},
      {"data", "build", "--out", "x.h5"},
      {"--nosuch"}};
  for (const auto& words : misuses) {
    const ProcessResult result = Krait(words);
    EXPECT_EQ(result.code, 20) << words.front() << ": " << result.err;
    EXPECT_EQ(Lines(result.err), 1) << result.err;
    EXPECT_THAT(result.err, HasSubstr("krait")) << words.front();
    EXPECT_THAT(result.out, IsEmpty());
  }
}

TEST(Cli, UsageNamesTheCommandOnce) {
  EXPECT_THAT(Krait({}).err, HasSubstr("Usage: krait [OPTIONS]"));
  EXPECT_THAT(Krait({"--help"}).out, HasSubstr("Usage: krait [OPTIONS]"));
  EXPECT_THAT(Krait({"data"}).err, HasSubstr("Usage: krait data [OPTIONS]"));
  EXPECT_THAT(Krait({"data", "build", "--help"}).out, HasSubstr("Usage: krait data build "));
}

TEST(Cli, WaitingThreadsSleepUnlessToldOtherwise) {
  const TinyRun tiny;
  const auto policy = [&](const std::string& run, const std::vector<std::string>& variables) {
    std::vector<std::string> argv = {"/usr/bin/env", "-u", "OMP_WAIT_POLICY", "-u",
                                     "GOMP_SPINCOUNT"};
    argv.insert(argv.end(), variables.begin(), variables.end());
    for (const std::string& word :
         TinyRun::Argv(tiny.TrainWords(run, {"train.steps=1", "schedule.warmup_steps=1"}))) {
      argv.push_back(word);
    }
    const ProcessResult result = RunProcess(argv, {{"OMP_NUM_THREADS", "2"}});
    EXPECT_EQ(result.code, 0) << result.err;
    std::ifstream in(tiny / (run + "/environment.json"));
    const auto kept = nlohmann::json::parse(in).back()["variables"];
    return kept.value("OMP_WAIT_POLICY", "none") + " " + kept.value("GOMP_SPINCOUNT", "none");
  };
  EXPECT_EQ(policy("a", {}), "passive none");
  EXPECT_EQ(policy("b", {"OMP_WAIT_POLICY=active"}), "active none");
  EXPECT_EQ(policy("c", {"GOMP_SPINCOUNT=100"}), "none 100");
}

TEST(Cli, MoreThreadsThanCanBeAreRefused) {
  const TinyRun tiny;
  const ProcessResult result =
      RunProcess(TinyRun::Argv(tiny.TrainWords("run")), {{"OMP_NUM_THREADS", "100000"}});
  EXPECT_EQ(result.code, 20);
  EXPECT_EQ(Lines(result.err), 1) << result.err;
  EXPECT_THAT(result.err, HasSubstr("krait: OMP_NUM_THREADS asks for 100000 threads, more than "));
  EXPECT_FALSE(std::filesystem::exists(tiny / "run"));
}

TEST(Cli, ARefusedStartLeavesNoRunFolder) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=1", "schedule.warmup_steps=1"}).code, 0);
  EXPECT_EQ(tiny.Train("new", {"--resume", tiny / "nosuch"}).code, 30);
  EXPECT_FALSE(std::filesystem::exists(tiny / "new"));
  EXPECT_EQ(tiny.Train("new", {"--resume", tiny / "run", "model.d_model=32"}).code, 20);
  EXPECT_FALSE(std::filesystem::exists(tiny / "new"));
  // One that was there stays, with what is in it.
  tiny.folder().Write("old/notes.txt", "kept");
  EXPECT_EQ(tiny.Train("old", {"--resume", tiny / "nosuch"}).code, 30);
  EXPECT_TRUE(std::filesystem::exists(tiny / "old/notes.txt"));
}

TEST(Cli, NotesOfAConfigGoToStandardError) {
  const TinyRun tiny;
  const ProcessResult result = Krait({"plan", tiny.config(), "schedule.decay_steps=5", "--json"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.err, HasSubstr("krait: note: word \"schedule.decay_steps=5\": "));
  EXPECT_TRUE(nlohmann::json::accept(result.out));
}

TEST(Cli, SlashesAtTheEndOfPathsDoNotMatter) {
  const TinyRun tiny;
  const std::vector<std::string> words = {"train.steps=2", "schedule.warmup_steps=1"};
  ASSERT_EQ(tiny.Train("run/", {"train.steps=2", "schedule.warmup_steps=1",
                                "checkpoint.dir=" + (tiny / "saved//")})
                .code,
            0);
  const ProcessResult again = tiny.Train(
      "run", {"train.steps=3", "schedule.warmup_steps=1", "checkpoint.dir=" + (tiny / "saved")});
  EXPECT_THAT(again.out, HasSubstr("resuming at step 2 from " + (tiny / "saved/step-00000002")));
  for (const std::string& path : {tiny / "saved/", tiny / "saved/step-00000003//"}) {
    EXPECT_EQ(Krait({"eval", path, "--data", tiny / "more.h5"}).code, 0) << path;
    EXPECT_EQ(Krait({"checkpoint", "verify", path}).code, 0) << path;
  }
  EXPECT_EQ(tiny.Train("next", {"train.steps=4", "schedule.warmup_steps=1", "--resume",
                                tiny / "saved/step-00000003/"})
                .code,
            0);
  EXPECT_EQ(Krait({"data", "build", "--out", tiny / "new.h5", tiny / "more/"}).code, 0);
}

TEST(Cli, MissingSubcommandsShowHelpAnd20) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{}, {"data"}, {"bench"}, {"checkpoint"}, {"ablate"}}) {
    const ProcessResult result = Krait(words);
    EXPECT_EQ(result.code, 20);
    EXPECT_THAT(result.err, HasSubstr("Usage:"));
  }
}

TEST(Cli, CommandsOfOneProcessSayOnceThatTheyAre) {
  const std::string config = KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml";
  const auto run = [&](const std::vector<std::string>& words) {
    std::vector<std::string> argv = {KRAIT_MPIRUN, "-n", "3", KRAIT_BINARY};
    argv.insert(argv.end(), words.begin(), words.end());
    return RunProcess(argv, MpiVariables());
  };
  const auto lines = [](const ProcessResult& result) {  // of krait's own, in both streams
    int count = 0;
    for (const std::string& text : {result.out, result.err}) {
      for (size_t at = 0; (at = text.find("krait", at)) != std::string::npos; ++count) {
        at = text.find('\n', at);
      }
    }
    return count;
  };
  ProcessResult result = run({"plan", config});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, StartsWith("krait: krait plan runs as one process, but mpirun started 3: "
                                     "start it without mpirun\n"));
  EXPECT_EQ(lines(result), 1) << result.err;
  result = run({"data", "build"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, StartsWith("krait: krait data build: "));
  EXPECT_EQ(lines(result), 1) << result.err;
  result = run({"--version"});
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(lines(result), 1) << result.out;
}

TEST(Cli, ALauncherOfAnotherMpiIsToldFromTheRightOne) {
  // MPI leaks at its end, which the address sanitizer would report.
  const auto plan = [](std::map<std::string, std::string> launcher) {
    launcher["ASAN_OPTIONS"] = "detect_leaks=0";
    return RunProcess({KRAIT_BINARY, "plan", KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml"},
                      launcher);
  };
  for (const std::map<std::string, std::string>& launcher :
       {std::map<std::string, std::string>{{"OMPI_COMM_WORLD_SIZE", "2"}}, {{"PMI_SIZE", "4"}}}) {
    const ProcessResult result = plan(launcher);
    EXPECT_EQ(result.code, 20) << result.err;
    EXPECT_THAT(result.err, HasSubstr("ranks, but Open MPI v"));
  }
  const ProcessResult second = plan({{"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_RANK", "1"}});
  EXPECT_EQ(second.code, 20);
  EXPECT_THAT(second.err, IsEmpty());  // said once, by rank 0
  EXPECT_EQ(
      plan({{"OMPI_COMM_WORLD_SIZE", "1"}, {"SLURM_NTASKS", "8"}, {"SLURM_PROCID", "0"}}).code, 0);
}

TEST(Cli, CudaWhereThereIsNoneIsRefusedBeforeAnythingIsWritten) {
  if (cuda::Available()) GTEST_SKIP() << "this machine has a GPU";
  const TinyRun tiny;
  const ProcessResult result = tiny.Train("run", {"train.device=cuda"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("train.device: cuda cannot be used"));
  EXPECT_FALSE(std::filesystem::exists(tiny / "run"));
  // A plan needs no GPU.
  const ProcessResult plan = Krait({"plan", tiny.config(), "train.device=cuda"});
  EXPECT_EQ(plan.code, 0) << plan.err;
  EXPECT_THAT(plan.out, AllOf(HasSubstr("bf16 on CUDA"), HasSubstr("--memory SIZE")));
}

TEST(Cli, ConfigErrorsNameTheirPlace) {
  const TinyRun tiny;
  ProcessResult result = Krait({"train", tiny / "none.yaml"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, HasSubstr("none.yaml"));
  result = tiny.Train("run", {"model.d_modle=3", "optimizer.lr=fast"});
  EXPECT_EQ(result.code, 20);
  EXPECT_THAT(result.err, AllOf(HasSubstr("d_modle"), HasSubstr("optimizer.lr")));
  result = tiny.Train("run", {"data.train=[{path: " + (tiny / "gone.h5") + "}]"});
  EXPECT_EQ(result.code, 21) << result.err;
  EXPECT_THAT(result.err, HasSubstr("gone.h5"));
  EXPECT_THAT(result.err, HasSubstr(": data.train[0]: "));
  result = Krait({"train", tiny / "none.yaml"});
  EXPECT_EQ(result.code, 20);
  EXPECT_EQ(result.err, "krait: " + (tiny / "none.yaml") + ": there is no such file\n");
}

TEST(Cli, EvalTakesTheRunsValidationFiles) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=2", "schedule.warmup_steps=1",
                               "data.validation=[{path: " + (tiny / "more.h5") +
                                   "}, {path: " + (tiny / "train.h5") + "}]"})
                .code,
            0);
  const auto loss = [&](std::vector<std::string> words) {
    words.insert(words.begin(), {"eval", tiny / "run", "--json"});
    const ProcessResult result = Krait(words);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out);
  };
  const auto both = loss({});
  const auto more = loss({"--data", tiny / "more.h5"});
  const auto train = loss({"--data", tiny / "train.h5"});
  ASSERT_EQ(both["files"].size(), 2u);
  EXPECT_FALSE(more.contains("files"));
  EXPECT_EQ(both["files"][0]["loss"], more["loss"]);
  EXPECT_EQ(both["files"][1]["loss"], train["loss"]);
  const double a = more["targets"].get<double>(), b = train["targets"].get<double>();
  EXPECT_NEAR(both["loss"].get<double>(),
              (a * more["loss"].get<double>() + b * train["loss"].get<double>()) / (a + b), 1e-9);
  EXPECT_EQ(loss({"--data", tiny / "more.h5", "--data", tiny / "train.h5"})["loss"], both["loss"]);

  const ProcessResult few = Krait({"eval", tiny / "run", "--tokens", "1"});
  EXPECT_EQ(few.code, 20);
  EXPECT_THAT(few.err, HasSubstr("--tokens 1 is less than one sequence of 32 tokens"));
  ASSERT_EQ(
      tiny.Train("bare", {"train.steps=1", "schedule.warmup_steps=1", "data.validation=[]"}).code,
      0);
  const ProcessResult none = Krait({"eval", tiny / "bare"});
  EXPECT_EQ(none.code, 20);
  EXPECT_THAT(none.err, HasSubstr("--data X.h5"));
}

TEST(Cli, GenerateReadsItsPromptFromStandardInput) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=1", "schedule.warmup_steps=1"}).code, 0);
  const std::string command =
      std::string(KRAIT_BINARY) + " generate " + (tiny / "run") + " --tokens 4 --seed 3";
  const auto shell = [](const std::string& line) {
    return RunProcess({"/bin/sh", "-c", line}, TinyRun::Variables());
  };
  const ProcessResult piped = shell("printf 'two\\nlines' | " + command);
  EXPECT_EQ(piped.code, 0) << piped.err;
  EXPECT_EQ(piped.out, shell(command + " --prompt 'two\nlines'").out);
  EXPECT_TRUE(piped.out.starts_with("two\nlines"));
  const ProcessResult empty = shell(command + " < /dev/null");
  EXPECT_EQ(empty.code, 20);
  EXPECT_THAT(empty.err, HasSubstr("the prompt is empty"));
}

TEST(Cli, DataBuildAndInspect) {
  const TinyRun tiny;
  const std::string out = tiny / "built.h5";
  ProcessResult result =
      Krait({"data", "build", "--tokenizer", "bytes", "--out", out, tiny / "train"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("40 documents"));
  result = Krait({"data", "inspect", out, "--json", "--verify"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out)["documents"], 40);
  result = Krait({"data", "inspect", tiny.config()});
  EXPECT_EQ(result.code, 21);
}

TEST(Cli, EvalAgreesWithTrainingAndPrintsJson) {
  const TinyRun tiny;
  const ProcessResult train =
      tiny.Train("run", {"train.steps=20", "evaluation.tokens=100k", "checkpoint.async=false"});
  ASSERT_EQ(train.code, 0) << train.err;
  const ProcessResult eval = Krait({"eval", tiny / "run", "--data", tiny / "more.h5", "--json"});
  ASSERT_EQ(eval.code, 0) << eval.err;
  const auto json = nlohmann::json::parse(eval.out);
  char line[64];
  std::snprintf(line, sizeof(line), "val loss %.4f", json["loss"].get<double>());
  EXPECT_THAT(train.out, HasSubstr(line));
  EXPECT_NEAR(json["perplexity"].get<double>(), std::exp(json["loss"].get<double>()), 1e-9);
  EXPECT_NEAR(json["bits_per_byte"].get<double>(), json["loss"].get<double>() / std::log(2.0),
              1e-9);
  // The parts of the targets make up the whole.
  for (const char* by : {"context", "document"}) {
    const ProcessResult parts =
        Krait({"eval", tiny / "run", "--data", tiny / "more.h5", "--json", "--by", by});
    ASSERT_EQ(parts.code, 0) << parts.err;
    const auto whole = nlohmann::json::parse(parts.out);
    EXPECT_EQ(whole["loss"], json["loss"]);
    double sum = 0;
    int64_t targets = 0;
    for (const auto& part : whole["parts"]) {
      const auto count = part["targets"].get<int64_t>();
      targets += count;
      if (count > 0) sum += part["loss"].get<double>() * static_cast<double>(count);
    }
    EXPECT_EQ(targets, json["targets"].get<int64_t>()) << by;
    EXPECT_NEAR(sum / static_cast<double>(targets), json["loss"].get<double>(), 1e-5) << by;
  }
  // No pass is larger than the file, whatever is asked for.
  const ProcessResult large = Krait({"eval", tiny / "run", "--data", tiny / "more.h5", "--json",
                                     "--micro-batch", "9223372036854775807"});
  ASSERT_EQ(large.code, 0) << large.err;
  EXPECT_NEAR(nlohmann::json::parse(large.out)["loss"].get<double>(), json["loss"].get<double>(),
              1e-6);
  EXPECT_EQ(Krait({"eval", tiny / "run", "--data", tiny / "none.h5"}).code, 21);
  EXPECT_EQ(Krait({"eval", tiny / "none", "--data", tiny / "more.h5"}).code, 30);
}

TEST(Cli, AnOutputNeverReplacesAnInput) {
  const TinyRun tiny;
  const auto content_of = [](const std::string& path) {
    const auto text = ReadFile(path, int64_t{1} << 30, ExitCode::kInternal);
    return text.ok() ? *text : "unreadable";
  };
  const std::string text = tiny.folder().Write("notes.md", "kept"), golden = KRAIT_TEST_GOLDEN;
  const std::string config = content_of(tiny.config());
  EXPECT_EQ(Krait({"data", "build", "--tokenizer", "bytes", "--out", text, text}).code, 20);
  EXPECT_EQ(Krait({"bench", "step", tiny.config(), "--json", tiny.config()}).code, 20);
  EXPECT_EQ(Krait({"bench", "kernels", "--only", "norm", "--json", text}).code, 20);
  const std::string batches = tiny / "batches.safetensors";
  std::filesystem::copy_file(golden + "/jamba-micro/forward.safetensors", batches);
  const std::string before = content_of(batches);
  EXPECT_EQ(
      Krait({"probe", "--hf", golden + "/jamba-micro", "--batches", batches, "--out", batches})
          .code,
      20);
  EXPECT_EQ(content_of(text), "kept");
  EXPECT_EQ(content_of(tiny.config()), config);
  EXPECT_EQ(content_of(batches), before);
  // A device is written to.
  const ProcessResult full =
      Krait({"bench", "kernels", "--only", "residual_rms_norm", "--json", "/dev/full"});
  EXPECT_EQ(full.code, 31) << full.err;
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/full"));
}

TEST(Cli, DataOfAnotherTokenizerIsRefused) {
  const TinyRun tiny;
  const std::string letters = WriteTokens(tiny / "letters.h5", "letters", 100);
  const ProcessResult train = tiny.Train("run", {"data.validation=[{path: " + letters + "}]"});
  EXPECT_EQ(train.code, 21);
  EXPECT_THAT(train.err, HasSubstr("letters.h5: its tokenizer is letters"));
  EXPECT_FALSE(std::filesystem::exists(tiny / "run"));
  ASSERT_EQ(tiny.Train("run", {"train.steps=1", "schedule.warmup_steps=1"}).code, 0);
  const ProcessResult eval = Krait({"eval", tiny / "run", "--data", letters});
  EXPECT_EQ(eval.code, 21);
  EXPECT_THAT(eval.err, HasSubstr("its tokenizer is letters"));
}

TEST(Cli, EvalOfWeightsThatAreNotFiniteEndsWith40) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=1", "schedule.warmup_steps=1"}).code, 0);
  ASSERT_EQ(Krait({"export", tiny / "run", "--hf", tiny / "hf", "--dtype", "bf16"}).code, 0);
  {
    std::fstream file(tiny / "hf/model.safetensors",
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-2, std::ios::end);
    file.write("\xc0\x7f", 2);  // a NaN
    ASSERT_TRUE(file.good());
  }
  ASSERT_EQ(Krait({"import", "--hf", tiny / "hf", "--out", tiny / "nan"}).code, 0);
  const ProcessResult eval = Krait({"eval", tiny / "nan", "--data", tiny / "more.h5"});
  EXPECT_EQ(eval.code, 40);
  EXPECT_THAT(eval.err, HasSubstr("the loss is not finite"));
}

TEST(Cli, GenerateIsAFunctionOfItsSeed) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  const std::vector<std::string> words = {"generate", tiny / "run", "--prompt", "krait ",
                                          "--tokens", "40",         "--seed",   "5"};
  const ProcessResult first = Krait(words), again = Krait(words);
  EXPECT_EQ(first.code, 0) << first.err;
  EXPECT_EQ(first.out, again.out);
  EXPECT_EQ(first.out.size(), 6u + 40 + 1);  // bytes in, bytes out, newline
  EXPECT_TRUE(first.out.starts_with("krait "));
  std::vector<std::string> other = words;
  other.back() = "6";
  EXPECT_NE(Krait(other).out, first.out);
  EXPECT_EQ(Krait({"generate", tiny / "run", "--prompt", ""}).code, 20);
  EXPECT_EQ(Krait({"generate", tiny / "run", "--prompt", "a", "--tokenizer", "bpe"}).code, 20);
  EXPECT_EQ(Krait({"generate", tiny / "run", "--prompt", "a", "--top-p", "2"}).code, 20);
}

// From text by a tokenizer.json to a run, words, an export and back.
TEST(Cli, ATokenizerTravelsWithTheModel) {
  const TinyRun tiny;
  const std::string file = std::string(KRAIT_TEST_GOLDEN) + "/tokenizers/llama3.json";
  const ProcessResult built =
      Krait({"data", "build", "--tokenizer", file, "--out", tiny / "words.h5", tiny / "train"});
  ASSERT_EQ(built.code, 0) << built.err;
  const ProcessResult inspect = Krait({"data", "inspect", tiny / "words.h5"});
  EXPECT_THAT(inspect.out, AllOf(HasSubstr("tokenizer     bpe-"), HasSubstr("end token     1\n"),
                                 HasSubstr("bytes per token"), HasSubstr("<|begin_of_text|>")));
  const std::string sources = "[{path: " + tiny / "words.h5" + "}]";
  // The model's vocabulary of 256 does not hold the ids.
  const ProcessResult small = tiny.Train("small", {"data.train=" + sources});
  EXPECT_EQ(small.code, 21);
  EXPECT_THAT(small.err, HasSubstr("its vocab_size 700 is above the model's vocab_size 256"));
  const ProcessResult train =
      tiny.Train("run", {"model.vocab_size=704", "train.steps=3", "schedule.warmup_steps=1",
                         "data.train=" + sources, "data.validation=" + sources});
  ASSERT_EQ(train.code, 0) << train.err;
  EXPECT_THAT(train.out, HasSubstr("val bpb "));
  const std::vector<std::string> words = {"--prompt", "krait scan",    "--tokens",
                                          "12",       "--temperature", "0"};
  const auto generate = [&](const std::string& checkpoint) {
    std::vector<std::string> line = {"generate", checkpoint};
    line.insert(line.end(), words.begin(), words.end());
    const ProcessResult result = Krait(line);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_TRUE(result.out.starts_with("krait scan")) << result.out;
    return result.out;
  };
  const std::string text = generate(tiny / "run");
  ASSERT_EQ(Krait({"export", tiny / "run", "--hf", tiny / "hf"}).code, 0);
  EXPECT_EQ(ReadText(tiny / "hf/tokenizer.json"), ReadText(file));
  const auto config = nlohmann::json::parse(ReadText(tiny / "hf/tokenizer_config.json"));
  EXPECT_EQ(config["eos_token"], "<|end_of_text|>");
  const auto generation = nlohmann::json::parse(ReadText(tiny / "hf/generation_config.json"));
  EXPECT_EQ(generation["eos_token_id"], 1);
  EXPECT_EQ(generation["bos_token_id"], 0);
  ASSERT_EQ(Krait({"import", "--hf", tiny / "hf", "--out", tiny / "again"}).code, 0);
  EXPECT_EQ(generate(tiny / "again"), text);
  // Without the files there is a sentence.
  std::filesystem::remove_all(tiny / "again/tokenizer");
  const ProcessResult lost = Krait({"generate", tiny / "again", "--prompt", "a"});
  EXPECT_EQ(lost.code, 20);
  EXPECT_THAT(lost.err, AllOf(HasSubstr("its tokenizer bpe-"), HasSubstr("add --tokenizer FILE")));
  // A byte model's export has a tokenizer of bytes.
  ASSERT_EQ(tiny.Train("bytes", {"train.steps=2", "schedule.warmup_steps=1"}).code, 0);
  ASSERT_EQ(Krait({"export", tiny / "bytes", "--hf", tiny / "bytes-hf"}).code, 0);
  const auto tokenizer = MakeTokenizer(tiny / "bytes-hf");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::vector<int32_t> ids;
  ASSERT_TRUE((*tokenizer)->Encode("\xC3\xA9 \n", &ids).ok());
  EXPECT_THAT(ids, ::testing::ElementsAre(0xC3, 0xA9, 32, 10));
}

TEST(Cli, BenchStepWritesItsFields) {
  const TinyRun tiny;
  const ProcessResult result = Krait({"bench", "step", tiny.config(), "--steps", "2", "--json",
                                      tiny / "bench.json", "data.seq_len=16"});
  ASSERT_EQ(result.code, 0) << result.err;
  std::ifstream in(tiny / "bench.json");
  const auto json = nlohmann::json::parse(in);
  for (const char* key :
       {"tokens_per_s", "tokens_per_s_per_rank", "step_ms", "flops_per_token", "tflops_per_rank",
        "mfu", "peak_tflops", "peak_memory_bytes", "params_total", "params_active", "routing",
        "breakdown_ms", "exposed_comm_ms"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["routing"], "natural");
  EXPECT_GT(json["breakdown_ms"]["gemm"].get<double>(), 0);
  EXPECT_GT(json["breakdown_ms"]["scan"].get<double>(), 0);
}

// A trace has the ops of one step, one after another, in the form that chrome://tracing opens.
TEST(Cli, BenchStepWritesATrace) {
  const TinyRun tiny;
  const std::string trace = tiny / "trace.json";
  const ProcessResult result =
      Krait({"bench", "step", tiny.config(), "--steps", "1", "--trace", trace, "train.device=cpu"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto json = nlohmann::json::parse(ReadText(trace));
  double end = 0;
  std::map<std::string, int> calls;
  for (const auto& event : json["traceEvents"]) {
    if (event["ph"] == "M") continue;
    ASSERT_EQ(event["ph"], "X");
    ASSERT_GE(event["ts"].get<double>(), end - 1e-3) << event;
    ASSERT_GE(event["dur"].get<double>(), 0);
    end = event["ts"].get<double>() + event["dur"].get<double>();
    ++calls[event["name"].get<std::string>()];
  }
  // Three Mamba layers, two passes of a step.
  EXPECT_EQ(calls["SelectiveScanForward"], 6);
  EXPECT_EQ(calls["SelectiveScanBackward"], 6);
  EXPECT_EQ(calls["AdamWPrepare"], 1);
  EXPECT_EQ(json["traceEvents"].front()["ts"], 0);
  // Once more it is replaced only by force; it is no place for the figures, and no config.
  const auto again = [&](const std::vector<std::string>& words) {
    std::vector<std::string> all = {"bench", "step", tiny.config(), "--steps", "1"};
    all.insert(all.end(), words.begin(), words.end());
    return Krait(all).code;
  };
  EXPECT_EQ(again({"--trace", trace}), 20);
  EXPECT_EQ(again({"--trace", "-"}), 20);
  EXPECT_EQ(again({"--trace", tiny.config(), "--force"}), 20);
  EXPECT_EQ(again({"--trace", tiny / "a.json", "--json", tiny / "a.json"}), 20);
}

TEST(Cli, BenchKernelsMeasuresTheNamedOp) {
  const ProcessResult result =
      Krait({"bench", "kernels", "--only", "residual_rms_norm", "--json", "-"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  ASSERT_EQ(json["kernels"].size(), 2u);
  EXPECT_GT(json["kernels"][0]["gbytes_per_s"].get<double>(), 0);
  EXPECT_GT(json["kernels"][1]["of_limit"].get<double>(), 0);
  EXPECT_EQ(Krait({"bench", "kernels", "--only", "nosuch"}).code, 20);
}

}  // namespace
}  // namespace krait
