// muP: what a step does to activations does not depend on the width (the coordinate check of Yang
// et al., arXiv:2203.03466, appendix D.1), and at the width of its base nothing changes.
#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "support/training_batch.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

// Mamba, attention, dense and MoE layers on a task; `words` go over it. Heads, d_ff and the inner
// width of Mamba are in proportion to d_model.
RunConfig Config(int64_t d_model, const std::vector<std::string>& words) {
  std::string text = R"(
model:
  vocab_size: 40
  n_layers: 4
  mixer: {ratio: "1:3", offset: 1}
  mamba: {d_state: 4}
  moe: {every: 2, experts: 4, top_k: 2}
data: {train: [{synthetic: {task: recall, items: 8}}], seq_len: 32}
train: {device: cpu, steps: 100, batch_tokens: 256, micro_batch: 8, seed: 3}
optimizer: {lr: 1e-2}
schedule: {name: constant, warmup_steps: 0}
)";
  std::vector<std::string> all = {"model.d_model=" + std::to_string(d_model),
                                  "model.attention.heads=" + std::to_string(d_model / 16),
                                  "model.mlp.d_ff=" + std::to_string(2 * d_model)};
  all.insert(all.end(), words.begin(), words.end());
  const auto config = ParseConfig(text, "mup.yaml", all, ConfigUse::kTrain, 1);
  KRAIT_CHECK(config.ok());
  return *config;
}

using Activations = std::map<std::string, std::vector<float>>;

Activations Probe(Trainer* trainer, const TokenBatch& batch) {
  Activations values;
  ProbeSink sink;
  sink.on_tensor = [&](const std::string& name, Tensor t) {
    std::vector<float>& all = values[name];
    for (int64_t i = 0; i < t.numel(); ++i) all.push_back(t.data<float>()[i]);
  };
  trainer->Gradients(batch, &sink);
  return values;
}

double RootMeanSquare(const std::vector<float>& values, const std::vector<float>* less = nullptr) {
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = values[i] - (less != nullptr ? (*less)[i] : 0);
    sum += x * x;
  }
  return std::sqrt(sum / static_cast<double>(values.size()));
}

constexpr int64_t kWidths[] = {32, 64, 128, 256};

// Of each activation, by width: the size of its change over a few steps, over three seeds.
std::map<std::string, std::vector<double>> Changes(bool mup) {
  omp_set_num_threads(1);
  std::map<std::string, std::vector<double>> changes;
  for (const int64_t width : kWidths) {
    std::map<std::string, double> squares;
    for (const char* seed : {"1", "2", "3"}) {
      std::vector<std::string> words = {std::string("train.seed=") + seed};
      if (mup) words.emplace_back("optimizer.mup.base_d_model=32");
      const RunConfig config = Config(width, words);
      Trainer trainer(config);
      trainer.Init();
      const TokenBatch batch = BatchAt(config, 0);
      const Activations before = Probe(&trainer, batch);
      for (int64_t step = 0; step < 4; ++step) trainer.Step(BatchAt(config, 8 * step));
      for (const auto& [name, values] : Probe(&trainer, batch)) {
        squares[name] += std::pow(RootMeanSquare(values, &before.at(name)), 2) / 3;
      }
    }
    for (const auto& [name, square] : squares) changes[name].push_back(std::sqrt(square));
  }
  return changes;
}

// The slope of log(change) over log(width), by least squares: 0 where the change does not depend on
// the width, 1 where it grows with it.
double Slope(const std::vector<double>& changes) {
  double sx = 0, sy = 0, sxx = 0, sxy = 0, n = 0;
  for (size_t i = 0; i < changes.size(); ++i) {
    const double x = std::log(static_cast<double>(kWidths[i])), y = std::log(changes[i]);
    sx += x, sy += y, sxx += x * x, sxy += x * y, n += 1;
  }
  return (n * sxy - sx * sy) / (n * sxx - sx * sx);
}

TEST(Mup, CoordinateCheckOverFourWidths) {
  const auto with = Changes(/*mup=*/true), without = Changes(/*mup=*/false);
  ASSERT_EQ(with.size(), 5U + 2U + 1U);  // hidden states, routers, logits
  for (const auto& [name, changes] : with) {
    std::printf("%-18s", name.c_str());
    for (const double c : changes) std::printf(" %7.4f", c);
    std::printf("  slope %5.2f | without:", Slope(changes));
    for (const double c : without.at(name)) std::printf(" %7.4f", c);
    std::printf("  slope %5.2f\n", Slope(without.at(name)));
    EXPECT_LT(Slope(changes), 0.25) << name;
    // What reaches four experts in four steps is noise in part, and steps that do not agree add up
    // to less the wider the sum.
    EXPECT_GT(Slope(changes), name.starts_with("router") ? -0.6 : -0.25) << name;
  }
  // The residual stream of a layer in the middle, and what is made of the last.
  for (const char* name : {"hidden_states.3", "router_logits.1", "logits"}) {
    EXPECT_GT(Slope(without.at(name)), 0.4) << name;
  }
}

TEST(Mup, AtTheWidthOfTheBaseNothingChanges) {
  omp_set_num_threads(1);
  const RunConfig plain = Config(32, {}), mup = Config(32, {"optimizer.mup.base_d_model=32"});
  Trainer a(plain), b(mup);
  a.Init();
  b.Init();
  for (int64_t s = 0; s < 3; ++s) {
    const TokenBatch batch = BatchAt(plain, 8 * s);
    EXPECT_EQ(a.Step(batch).total_loss, b.Step(batch).total_loss);
  }
  EXPECT_EQ(Bits(a), Bits(b));
}

TEST(Mup, TiedEmbeddingsAreRefused) {
  const auto config = ParseConfig(
      "model: {vocab_size: 40, d_model: 32, n_layers: 2, mixer: {ratio: \"0:1\"}, mlp: {d_ff: 8}, "
      "tie_embeddings: true}\noptimizer: {mup: {base_d_model: 16}}\n",
      "tied.yaml", {}, ConfigUse::kPlan, 1);
  EXPECT_EQ(MessageOf(config.status()),
            "tied.yaml:2:33: optimizer.mup needs model.tie_embeddings: false: embedding and head "
            "scale differently with the width");
}

}  // namespace
}  // namespace krait
