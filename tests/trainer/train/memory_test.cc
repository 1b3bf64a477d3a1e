// The memory that `krait plan` promises against what `krait train` takes.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "paths.h"
#include "support/process.h"
#include "support/temp_folder.h"
#include "trainer/config/config.h"
#include "trainer/train/memory_plan.h"

namespace krait {
namespace {

class PeakMemory : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef KRAIT_SANITIZE
    GTEST_SKIP() << "the sanitizers' shadow memory counts as the process's own";
#endif
    std::string text;
    for (int i = 0; i < 60'000; ++i) absl::StrAppend(&text, "line ", i, " of a long text\n");
    const ProcessResult built = RunProcess({KRAIT_BINARY, "data", "build", "--tokenizer", "bytes",
                                            "--out", data_, folder_.Write("text.txt", text)});
    ASSERT_EQ(built.code, 0) << KRAIT_BINARY << ": " << built.err;
  }

  // Trains two steps with evaluation and a checkpoint after each.
  void Check(std::vector<std::string> words) {
    const std::string config = KRAIT_SOURCE_DIR "/configs/models/jamba-tiny.yaml";
    for (const std::string& word :
         {absl::StrCat("run_dir=", folder_ / "run"),
          absl::StrCat("data.train=[{path: ", data_, "}]"),
          absl::StrCat("data.validation=[{path: ", data_, "}]"), std::string("train.steps=2"),
          std::string("schedule.warmup_steps=0"), std::string("checkpoint.every=1"),
          std::string("evaluation.every=1")}) {
      words.push_back(word);
    }
    const auto resolved = LoadConfig(config, words, ConfigUse::kTrain, 1);
    ASSERT_TRUE(resolved.ok()) << resolved.status();
    const auto planned = static_cast<double>(PlanTraining(*resolved).total());
    ASSERT_GT(planned, 1 << 30);

    std::vector<std::string> args = {KRAIT_BINARY, "train", config};
    args.insert(args.end(), words.begin(), words.end());
    const ProcessResult run = RunProcess(args);
    ASSERT_EQ(run.code, 0) << run.out << run.err;
    const auto peak = static_cast<double>(run.peak_bytes);
    // 10 % and the 100 MiB that a process takes besides the plan: code, libraries, HDF5, and the
    // matrix product's own copies of its operands (up to 1.5 KiB per token of a pass).
    EXPECT_LT(std::abs(peak - planned), 0.1 * planned + (100 << 20))
        << "peak " << peak << ", planned " << planned;
    RecordProperty("peak_bytes", std::to_string(run.peak_bytes));
    RecordProperty("planned_bytes", std::to_string(static_cast<int64_t>(planned)));
  }

  TempFolder folder_;
  const std::string data_ = folder_ / "train.h5";
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
