// Forward values and gradients of tests/golden/jamba-micro: Hugging Face transformers' Jamba in
// fp32. The bounds and where they come from: tests/golden/README.md.
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/safetensors.h"
#include "model/hf.h"
#include "model/support/tiny_model.h"
#include "paths.h"

namespace krait {
namespace {

using testing::Set;

constexpr double kForwardBound = 2e-6;
constexpr double kGradientBound = 2e-5;

const std::string kFolder = std::string(KRAIT_TEST_GOLDEN) + "/jamba-micro/";

SafetensorsReader Open(const std::string& name) {
  auto reader = SafetensorsReader::OpenFile(kFolder + name);
  KRAIT_CHECK(reader.ok());
  return *std::move(reader);
}

std::vector<double> Read(const SafetensorsReader& file, const std::string& name) {
  const auto it = file.entries().find(name);
  KRAIT_CHECK(it != file.entries().end());
  int64_t n = 1;
  for (const int64_t extent : it->second.shape) n *= extent;
  std::vector<float> values(static_cast<size_t>(n));
  KRAIT_CHECK(file.ReadF32(name, 0, n, values.data()).ok());
  return {values.begin(), values.end()};
}

ModelSpec GoldenSpec() {
  std::ifstream file(kFolder + "config.json");
  std::stringstream text;
  text << file.rdbuf();
  auto config = ReadHfConfig(text.str(), kFolder + "config.json");
  KRAIT_CHECK(config.ok());
  return config->spec;
}

class GoldenTest : public ::testing::TestWithParam<std::tuple<DType, Recompute>> {};

TEST_P(GoldenTest, ForwardAndGradients) {
  const auto [dtype, recompute] = GetParam();
  testing::TinyModel model(GoldenSpec(), dtype, recompute);
  const SafetensorsReader weights = Open("model.safetensors");
  const auto& params = model.table().params();
  ASSERT_EQ(weights.entries().size(), params.size());
  for (size_t p = 0; p < params.size(); ++p) {
    EXPECT_EQ(weights.entries().at(params[p].name).shape, params[p].shape) << params[p].name;
    const auto values = Read(weights, params[p].name);
    for (size_t i = 0; i < values.size(); ++i) {
      Set(model.weights().Param(static_cast<int>(p)), static_cast<int64_t>(i), values[i]);
    }
  }

  const SafetensorsReader forward = Open("forward.safetensors");
  testing::TestBatch batch(2, 37, 256, 1);
  std::vector<int32_t> ids(74);
  ASSERT_TRUE(forward.ReadI32("input_ids", 0, 74, ids.data()).ok());
  for (int64_t i = 0; i < 74; ++i) {
    Set(batch.value().tokens, i, ids[static_cast<size_t>(i)]);
    Set(batch.value().targets, i, i % 37 == 36 ? -1 : ids[static_cast<size_t>(i) + 1]);
  }
  std::map<std::string, std::vector<double>> seen;
  ProbeSink probe;
  probe.on_tensor = [&](const std::string& name, Tensor value) {
    const auto values = testing::Values(value);
    seen[name].insert(seen[name].end(), values.begin(), values.end());
  };
  PassSums sums;
  const double loss = model.Step(batch, /*backward=*/true, &probe, &sums);
  seen["cross_entropy"] = {sums.cross_entropy / 72};
  seen["aux_loss"] = {sums.aux_loss};
  seen["loss"] = {loss};
  EXPECT_EQ(seen.size(), forward.entries().size() - 1);  // all but input_ids
  double worst = 0;
  for (const auto& [name, values] : seen) {
    const double error = testing::RelativeError(values, Read(forward, name));
    EXPECT_LE(error, kForwardBound) << name;
    worst = std::max(worst, error);
  }
  RecordProperty("worst_forward", std::to_string(worst));

  const SafetensorsReader gradients = Open("gradients.safetensors");
  ASSERT_EQ(gradients.entries().size(), params.size());
  double worst_gradient = 0;
  for (size_t p = 0; p < params.size(); ++p) {
    const double error =
        testing::RelativeError(testing::Values(model.weights().ParamGrad(static_cast<int>(p))),
                               Read(gradients, params[p].name));
    EXPECT_LE(error, kGradientBound) << params[p].name;
    worst_gradient = std::max(worst_gradient, error);
  }
  std::printf("worst relative error: forward %.1e, gradients %.1e\n", worst, worst_gradient);
}

INSTANTIATE_TEST_SUITE_P(JambaMicro, GoldenTest,
                         ::testing::Values(std::tuple(DType::kF32, Recompute::kNone),
                                           std::tuple(DType::kF32, Recompute::kLayer),
                                           std::tuple(DType::kF64, Recompute::kNone)),
                         [](const auto& test) {
                           return std::string(Name(std::get<0>(test.param))) +
                                  (std::get<1>(test.param) == Recompute::kNone ? ""
                                                                               : "_recomputed");
                         });

}  // namespace
}  // namespace krait
