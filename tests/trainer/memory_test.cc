// The memory that `krait plan` promises against what `krait train` takes.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "trainer/config.h"
#include "trainer/memory_plan.h"

extern char** environ;

namespace krait {
namespace {

// Peak resident bytes of `krait ARGS...`, or -1 when it failed; its output goes to `log`.
int64_t PeakOf(const std::vector<std::string>& args, const std::string& log) {
  std::vector<char*> argv;
  std::string program = KRAIT_BINARY;
  argv.push_back(program.data());
  std::vector<std::string> copies = args;
  for (std::string& arg : copies) argv.push_back(arg.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t child = -1;
  const int error = posix_spawn(&child, KRAIT_BINARY, &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return -1;
  int status = 0;
  rusage usage{};
  if (wait4(child, &status, 0, &usage) != child) return -1;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? usage.ru_maxrss * 1024 : -1;
}

class PeakMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() / absl::StrCat("krait-memory-", getpid());
    std::filesystem::create_directories(dir_);
    std::ofstream text(dir_ / "text.txt");
    for (int i = 0; i < 60'000; ++i) text << "line " << i << " of a long text\n";
    text.close();
    ASSERT_GE(PeakOf({"data", "build", "--tokenizer", "bytes", "--out", Path("train.h5"),
                      Path("text.txt")},
                     Path("log")),
              0)
        << KRAIT_BINARY;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string Path(const std::string& name) { return (dir_ / name).string(); }
  std::string Log() {
    std::ifstream file(Path("log"));
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  // Trains two steps with evaluation and a checkpoint after each.
  void Check(std::vector<std::string> words) {
    const std::string config = KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml";
    for (const std::string& word :
         {absl::StrCat("run_dir=", Path("run")),
          absl::StrCat("data.train=[{path: ", Path("train.h5"), "}]"),
          absl::StrCat("data.validation=[{path: ", Path("train.h5"), "}]"),
          std::string("train.steps=2"), std::string("schedule.warmup_steps=0"),
          std::string("checkpoint.every=1"), std::string("evaluation.every=1")}) {
      words.push_back(word);
    }
    const auto resolved = LoadConfig(config, words, ConfigUse::kTrain, 1);
    ASSERT_TRUE(resolved.ok()) << resolved.status();
    const auto planned = static_cast<double>(PlanTraining(*resolved).total());
    ASSERT_GT(planned, 1 << 30);

    std::vector<std::string> args = {"train", config};
    args.insert(args.end(), words.begin(), words.end());
    const int64_t peak = PeakOf(args, Path("log"));
    ASSERT_GE(peak, 0) << Log();
    // 10 % and the 100 MiB that a process takes besides the plan: code, libraries, HDF5, and the
    // matrix product's own copies of its operands (up to 1.5 KiB per token of a pass).
    EXPECT_LT(std::abs(static_cast<double>(peak) - planned), 0.1 * planned + (100 << 20))
        << "peak " << peak << ", planned " << planned;
    RecordProperty("peak_bytes", std::to_string(peak));
    RecordProperty("planned_bytes", std::to_string(static_cast<int64_t>(planned)));
  }

  std::filesystem::path dir_;
};

TEST_F(PeakMemory, MostlyActivations) {
  Check({"train.micro_batch=384", "train.batch_tokens=48Ki", "evaluation.tokens=48Ki"});
}

TEST_F(PeakMemory, MostlyWeightsAndTheirCopy) {
  Check({"model.vocab_size=160k", "model.d_model=128", "data.seq_len=64", "train.micro_batch=4",
         "train.batch_tokens=256", "evaluation.tokens=256"});
}

TEST_F(PeakMemory, WithRecompute) {
  Check({"train.micro_batch=640", "train.batch_tokens=80Ki", "evaluation.tokens=80Ki",
         "train.recompute=layer", "model.mlp.d_ff=256"});
}

}  // namespace
}  // namespace krait
