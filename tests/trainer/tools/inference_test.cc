// A checkpoint's model in eval, generate and export: in the run's precision, from its masters.
#include "trainer/tools/inference.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <string>

#include "nlohmann/json.hpp"
#include "support/tiny_run.h"

namespace krait {
namespace {

// The last val/loss of metrics.jsonl.
double ValidationLoss(const std::string& run) {
  std::ifstream in(run + "/metrics.jsonl");
  double loss = 0;
  for (std::string line; std::getline(in, line);) {
    const auto record = nlohmann::json::parse(line);
    if (record.contains("val/loss")) loss = record["val/loss"].get<double>();
  }
  return loss;
}

TEST(Inference, ComputesInTheRunsPrecision) {
  const TinyRun tiny;
  for (const std::string precision : {"bf16", "fp32"}) {
    const std::string run = tiny / precision;
    const ProcessResult trained =
        tiny.Train(precision, {"train.steps=20", "train.precision=" + precision});
    ASSERT_EQ(trained.code, 0) << trained.err;
    const auto model = InferenceModel::Load(run, [](const std::string&) {});
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ((*model)->weights().dtype(), precision == "bf16" ? DType::kBF16 : DType::kF32);
    // The same sequences in the same passes: the run's own figure, to the bit.
    const ProcessResult eval =
        TinyRun::Krait({"eval", run, "--data", tiny / "more.h5", "--tokens", "512", "--json"});
    ASSERT_EQ(eval.code, 0) << eval.err;
    EXPECT_EQ(nlohmann::json::parse(eval.out)["loss"].get<double>(), ValidationLoss(run));
    const ProcessResult text =
        TinyRun::Krait({"generate", run, "--prompt", "krait ", "--tokens", "20"});
    EXPECT_EQ(text.code, 0) << text.err;
  }
}

TEST(Inference, ExportsTheMastersOfARoundedModel) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=20", "train.precision=bf16"}).code, 0);
  ASSERT_EQ(TinyRun::Krait({"export", tiny / "run", "--hf", tiny / "hf"}).code, 0);
  ASSERT_EQ(TinyRun::Krait({"import", "--hf", tiny / "hf", "--out", tiny / "back"}).code, 0);
  const ProcessResult diff =
      TinyRun::Krait({"checkpoint", "diff", tiny / "run", tiny / "back", "--json"});
  int weights = 0, rounded = 0;
  const auto report = nlohmann::json::parse(diff.out);
  for (const auto& tensor : report["tensors"]) {
    if (tensor["slot"] != "weight") continue;
    ++weights;
    EXPECT_TRUE(tensor["equal_bits"].get<bool>()) << tensor["name"];
  }
  EXPECT_GT(weights, 20);
  // The masters are not bf16 values by chance.
  const auto masters = InferenceModel::Load(
      tiny / "run", [](const std::string&) {}, Placement());
  ASSERT_TRUE(masters.ok()) << masters.status();
  const Weights& values = (*masters)->weights();
  const Tensor head = values.Param(values.table().Find("lm_head.weight"));
  for (int64_t i = 0; i < head.numel(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, head.data<float>() + i, sizeof(bits));
    rounded += (bits & 0xffff) == 0;
  }
  EXPECT_LT(rounded, head.numel() / 10);
}

}  // namespace
}  // namespace krait
