// The command line: help on every level, misuse, refusals.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "kernels/base/file.h"
#include "kernels/cuda/runtime.h"
#include "nlohmann/json.hpp"
#include "support/tiny_run.h"
#include "support/tokens.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

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
  ASSERT_EQ(list.size(), 7U);
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
      {"eval", "x"},
      {"generate", "x", "--prompt", "a", "--temperature", "warm"},
      {"export", "x", "--hf", "y", "--dtype", "f16"},
      {"checkpoint", "diff", "x"},
      {"checkpoint", "inspect", "x", "y"},
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

TEST(Cli, MissingSubcommandsShowHelpAnd20) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{}, {"data"}, {"bench"}, {"checkpoint"}}) {
    const ProcessResult result = Krait(words);
    EXPECT_EQ(result.code, 20);
    EXPECT_THAT(result.err, HasSubstr("Usage:"));
  }
}

TEST(Cli, LaterCommandsSaySo) {
  for (const char* name : {"ablate", "doctor"}) {
    const ProcessResult result = Krait({name, "run", "sweep.yaml"});
    EXPECT_EQ(result.code, 20);
    EXPECT_THAT(result.err, HasSubstr(std::string(name) + " is not there yet"));
  }
}

TEST(Cli, SeveralRanksAreRefused) {
  for (const std::map<std::string, std::string>& launcher :
       {std::map<std::string, std::string>{{"OMPI_COMM_WORLD_SIZE", "2"}},
        {{"PMI_SIZE", "4"}},
        {{"SLURM_STEP_NUM_TASKS", "8"}, {"SLURM_PROCID", "0"}}}) {
    const ProcessResult result = RunProcess(
        {KRAIT_BINARY, "plan", KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml"}, launcher);
    EXPECT_EQ(result.code, 20) << result.err;
    EXPECT_THAT(result.err, HasSubstr("several ranks are not supported yet"));
  }
  const ProcessResult second =
      RunProcess({KRAIT_BINARY, "plan", KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml"},
                 {{"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_RANK", "1"}});
  EXPECT_EQ(second.code, 20);
  EXPECT_THAT(second.err, IsEmpty());  // said once, by rank 0
  EXPECT_EQ(
      RunProcess({KRAIT_BINARY, "plan", KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml"},
                 {{"OMPI_COMM_WORLD_SIZE", "1"}, {"SLURM_NTASKS", "8"}, {"SLURM_PROCID", "0"}})
          .code,
      0);
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
