// The optimizer step: accumulation, clipping, skipped steps, starting points.
#include "trainer/train/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/activation.h"
#include "kernels/optimizer.h"
#include "kernels/transfer.h"
#include "support/tiny_run.h"
#include "support/training_batch.h"
#include "trainer/train/evaluate.h"
#include "trainer/train/resume.h"
#include "trainer/train/schedule.h"

namespace krait {
namespace {

class TrainerTest : public testing::Test {
 protected:
  // The passes are too small for threads, and tests share the machine.
  TrainerTest() { omp_set_num_threads(1); }
  RunConfig Config(const std::vector<std::string>& overrides = {}) const {
    auto config = LoadConfig(tiny_.config(), overrides, ConfigUse::kTrain, 1);
    KRAIT_CHECK(config.ok());
    return *config;
  }
  std::unique_ptr<Dataset> Data(const RunConfig& config) const {
    auto data = Dataset::Open(config.data.train, config.data.seq_len, config.model.vocab_size,
                              config.train.seed, config.data.reset_at_documents);
    KRAIT_CHECK(data.ok());
    return std::move(*data);
  }
  static float* FirstWeight(const Trainer& trainer) {
    return trainer.weights().Param(0).data<float>();
  }
  TinyRun tiny_;
};

TEST_F(TrainerTest, StepIsDeterministic) {
  const RunConfig config = Config();
  Trainer a(config), b(config);
  a.Init();
  b.Init();
  for (int64_t s = 0; s < 5; ++s) {
    const TokenBatch batch = BatchAt(config, 4 * s);
    const StepReport ra = a.Step(batch), rb = b.Step(batch);
    EXPECT_EQ(ra.total_loss, rb.total_loss);
    EXPECT_EQ(ra.grad_norm, rb.grad_norm);
  }
  EXPECT_EQ(Bits(a), Bits(b));
  EXPECT_EQ(a.state().step, 5);
  EXPECT_EQ(a.state().adam_steps, 5);
  EXPECT_EQ(a.state().sequences, 20);
  EXPECT_EQ(a.state().tokens, 5 * 128);
}

// Of the whole gradient, between the first steps of two runs; their losses agree.
double GradientDifference(const RunConfig& one, const RunConfig& two) {
  Trainer a(one), b(two);
  a.Init();
  b.Init();
  const TokenBatch batch = BatchAt(one, 0);
  const StepReport ra = a.Gradients(batch), rb = b.Gradients(batch);
  EXPECT_NEAR(ra.loss, rb.loss, 1e-6 * ra.loss);
  double difference = 0, norm = 0;
  for (size_t p = 0; p < a.weights().table().params().size(); ++p) {
    const Tensor ga = a.weights().ParamGrad(static_cast<int>(p));
    const Tensor gb = b.weights().ParamGrad(static_cast<int>(p));
    for (int64_t i = 0; i < ga.numel(); ++i) {
      const double d = ga.data<float>()[i] - gb.data<float>()[i];
      difference += d * d;
      norm += std::pow(ga.data<float>()[i], 2);
    }
  }
  return std::sqrt(difference / norm);
}

TEST_F(TrainerTest, AccumulationGivesTheGradientOfTheWholeStep) {
  // Without MoE statistics, which are pooled per pass, one pass of four rows equals two of two: the
  // sums are in fp32 in another order, so the gradients agree to a few hundred roundings (1e-5).
  const RunConfig one = Config({"model.moe=none", "train.micro_batch=4"});
  const RunConfig two = Config({"model.moe=none", "train.micro_batch=2"});
  EXPECT_LT(GradientDifference(one, two), 1e-5);
}

// Pooled over sequences, the statistics are the same in any pass. A large coefficient makes the
// difference that pooling per pass makes plain.
TEST_F(TrainerTest, RouterStatisticsOfSequencesDoNotDependOnTheMicroBatch) {
  const auto config = [&](const std::string& sequences, int micro_batch) {
    return Config({"model.moe.aux_loss=1", "model.moe.z_loss=0.1",
                   "model.moe.aux_sequences=" + sequences,
                   "train.micro_batch=" + std::to_string(micro_batch)});
  };
  EXPECT_LT(GradientDifference(config("1", 1), config("1", 2)), 1e-5);
  EXPECT_LT(GradientDifference(config("1", 1), config("1", 4)), 1e-5);
  EXPECT_LT(GradientDifference(config("2", 2), config("2", 4)), 1e-5);
  EXPECT_EQ(GradientDifference(config("1", 1), config("pass", 1)), 0);
  EXPECT_GT(GradientDifference(config("pass", 1), config("pass", 4)), 1e-3);
}

TEST_F(TrainerTest, LossIsTheMeanOverAllTargetsOfTheStep) {
  const RunConfig config = Config();
  Trainer trainer(config);
  trainer.Init();
  // A step with documents that start inside its rows.
  TokenBatch batch;
  do {
    batch = BatchAt(config, trainer.state().sequences += 4);
  } while (batch.target_count == batch.sequences * (batch.seq_len - 1));
  const auto targets = std::count_if(batch.targets.begin(), batch.targets.end(),
                                     [](int32_t target) { return target >= 0; });
  EXPECT_EQ(targets, batch.target_count);
  const Evaluator evaluator = trainer.evaluator();
  Fill(evaluator.sums, 0, evaluator.ctx);
  for (int64_t row = 0; row < batch.sequences; ++row) {
    trainer.model().Evaluate(evaluator.batch.Of(batch, row, 1, evaluator.ctx), evaluator.sums,
                             evaluator.ctx);
  }
  const double sum = PassSumsOf(DownloadDoubles(evaluator.sums, evaluator.ctx)).cross_entropy;
  // fp32 losses, summed in double.
  EXPECT_NEAR(trainer.Gradients(batch).loss, sum / static_cast<double>(targets), 1e-5);
}

TEST_F(TrainerTest, NonFiniteStepChangesNothingButScheduleAndData) {
  const RunConfig config = Config();
  Trainer trainer(config);
  trainer.Init();
  trainer.Step(BatchAt(config, 0));

  const float good = *FirstWeight(trainer);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    *FirstWeight(trainer) = bad;
    const TokenBatch batch = BatchAt(config, 4);
    // Token 0 is embedded by the poisoned row only if it occurs: make it.
    TokenBatch poisoned = batch;
    poisoned.tokens[0] = 0;
    const std::string before = Bits(trainer);
    const StepReport report = trainer.Step(poisoned);
    EXPECT_TRUE(report.was_skipped);
    EXPECT_EQ(Bits(trainer), before);
  }
  EXPECT_EQ(trainer.state().step, 3);
  EXPECT_EQ(trainer.state().adam_steps, 1);
  EXPECT_EQ(trainer.state().skipped, 2);
  EXPECT_EQ(trainer.state().skipped_in_row, 2);
  EXPECT_EQ(trainer.state().sequences, 12);

  *FirstWeight(trainer) = good;
  const StepReport report = trainer.Step(BatchAt(config, 12));
  EXPECT_FALSE(report.was_skipped);
  EXPECT_EQ(report.step, 4);
  EXPECT_EQ(report.lr, LearningRate(config.schedule, config.optimizer.lr, 4, 200));
  EXPECT_EQ(trainer.state().adam_steps, 2);
  EXPECT_EQ(trainer.state().skipped, 2);
  EXPECT_EQ(trainer.state().skipped_in_row, 0);
}

TEST_F(TrainerTest, ClipFactor) {
  const Context ctx;
  const auto factor = [&](double clip, double norm) {
    double control[kAdamWControlSize] = {}, squared = norm * norm, loss = 1;
    const auto view = [](double* data, int64_t n) {
      return Tensor(data, DType::kF64, Device::kCpu, {n});
    };
    AdamWPrepare(view(control, kAdamWControlSize), view(&squared, 1), view(&loss, 1),
                 {.lr = 1e-3, .clip = clip}, ctx);
    EXPECT_DOUBLE_EQ(control[kAdamWNorm], norm);
    return control[kAdamWGradScale];
  };
  EXPECT_EQ(factor(0, 100), 1);
  EXPECT_EQ(factor(1, 0.5), 1);
  EXPECT_DOUBLE_EQ(factor(1, 4), 1 / (4 + 1e-6));
}

TEST_F(TrainerTest, DecayLeavesNormsBiasesAndScanParametersAlone) {
  // With a learning rate and no gradient only decay moves a weight: zero the moments' effect by a
  // step whose gradient is zero, which a batch without targets has (the aux loss is off).
  const RunConfig config =
      Config({"model.moe.aux_loss=0", "optimizer.weight_decay=0.5", "schedule.warmup_steps=0"});
  Trainer trainer(config);
  trainer.Init();
  TokenBatch batch = BatchAt(config, 0);
  std::fill(batch.targets.begin(), batch.targets.end(), -1);
  batch.target_count = 0;
  std::vector<float> before;
  const auto& params = trainer.weights().table().params();
  for (size_t p = 0; p < params.size(); ++p) {
    // Zeros do not show decay.
    float* values = trainer.weights().Param(static_cast<int>(p)).data<float>();
    if (values[0] == 0) values[0] = 0.25f;
    before.push_back(values[0]);
  }
  const StepReport report = trainer.Step(batch);
  EXPECT_EQ(report.grad_norm, 0);
  EXPECT_FALSE(report.was_skipped);
  EXPECT_TRUE(std::isnan(report.loss) && std::isnan(report.total_loss));
  for (size_t p = 0; p < params.size(); ++p) {
    const std::string& name = params[p].name;
    const bool exempt = name.find("norm") != std::string::npos || name.ends_with(".bias") ||
                        name.ends_with(".A_log") || name.ends_with(".D");
    const float after = trainer.weights().Param(static_cast<int>(p)).data<float>()[0];
    const float expected = exempt ? before[p] : before[p] * static_cast<float>(1 - report.lr * 0.5);
    EXPECT_NEAR(after, expected, 1e-7 * std::abs(before[p]) + 1e-12) << name;
  }
}

TEST_F(TrainerTest, EvaluateStoredWeighsTargetsAndNotPasses) {
  const RunConfig config = Config();
  Trainer trainer(config);
  trainer.Init();
  const auto data = Data(config);
  const auto five = EvaluateStored(trainer.evaluator(), *data, 0, 5, 2);
  const auto single = EvaluateStored(trainer.evaluator(), *data, 0, 5, 1);
  ASSERT_TRUE(five.ok() && single.ok());
  EXPECT_EQ(five->sequences, 5);
  EXPECT_EQ(five->targets, single->targets);
  EXPECT_NEAR(five->loss, single->loss, 1e-6);
  const auto all = EvaluateStored(trainer.evaluator(), *data, 0, data->sequences(), 2);
  ASSERT_TRUE(all.ok());
  EXPECT_NEAR(*BitsPerByte(all->loss, 1.0), all->loss / std::log(2.0), 1e-12);
  EXPECT_FALSE(BitsPerByte(all->loss, std::nullopt).has_value());
}

TEST_F(TrainerTest, EvaluationTakesOfEachSourceItsShare) {
  const RunConfig config = Config();  // two sources, weights 3 and 1
  const auto data = Data(config);
  const auto shares = EvalShares(*data, config.data.train, 512);
  ASSERT_EQ(shares.size(), 2U);
  EXPECT_EQ(shares[0].name, "train");
  EXPECT_EQ(shares[0].first, 0);
  EXPECT_EQ(shares[0].count, 12);
  EXPECT_EQ(shares[1].name, "more");
  EXPECT_EQ(shares[1].first, data->SequencesOf(0));
  EXPECT_EQ(shares[1].count, 4);
  // At least one, at most all, and names apart.
  EXPECT_EQ(EvalShares(*data, config.data.train, 33)[1].count, 1);
  EXPECT_EQ(EvalShares(*data, config.data.train, 1 << 30)[1].count, data->SequencesOf(1));
  const auto& source = config.data.train[0];
  EXPECT_EQ(EvalShares(*data, {source, source}, 512)[1].name, "train-2");
}

TEST_F(TrainerTest, InitLoadsTheWeightsOfTheOtherRunBitForBit) {
  const RunConfig first_config = Config({"run_dir=" + (tiny_ / "first")});
  Trainer first(first_config);
  first.Init();
  first.Step(BatchAt(first_config, 0));
  first.state().config_yaml = first_config.ToYaml();
  SaveOptions save;
  save.dir = first_config.checkpoint.dir;
  ASSERT_TRUE(SaveCheckpoint(save, first.state(), first.Boxes()).ok());

  const RunConfig config = Config({"run_dir=" + (tiny_ / "second")});
  Trainer second(config);
  ResumeOptions options;
  options.init = tiny_ / "first";
  std::vector<std::string> notices;
  const absl::Status started = StartRun(options, RunData(), &second,
                                        [&](const std::string& line) { notices.push_back(line); });
  ASSERT_TRUE(started.ok()) << started;
  EXPECT_EQ(second.state().step, 0);
  EXPECT_EQ(second.state().adam_steps, 0);
  for (size_t p = 0; p < first.weights().table().params().size(); ++p) {
    const Tensor a = first.weights().Param(static_cast<int>(p));
    const Tensor b = second.weights().Param(static_cast<int>(p));
    EXPECT_EQ(std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())), 0);
  }
  int64_t moments = 0;
  for (const CheckpointBox& box : second.Boxes()) {
    if (box.slot == "weight") continue;
    ASSERT_EQ(box.dtype, DType::kF32);
    const auto* values = static_cast<const float*>(box.data);
    const int64_t n = box.bytes() / static_cast<int64_t>(sizeof(float));
    EXPECT_TRUE(std::all_of(values, values + n, [](float x) { return x == 0; })) << box.name;
    moments += n;
  }
  EXPECT_EQ(moments, 2 * second.weights().table().total());
}

TEST_F(TrainerTest, Bf16MomentsTrainAndAreHalfAsLarge) {
  const RunConfig full = Config(), half = Config({"optimizer.moments=bf16"});
  Trainer a(full), b(half);
  a.Init();
  b.Init();
  EXPECT_LT(b.memory().optimizer, a.memory().optimizer * 6 / 10);
  double first = 0, last = 0;
  for (int64_t s = 0; s < 30; ++s) {
    last = b.Step(BatchAt(half, 4 * s)).loss;
    if (s == 0) first = last;
  }
  EXPECT_LT(last, first - 0.5);
}

}  // namespace
}  // namespace krait
