// The optimizer step with bf16 weights over f32 masters, on the CPU.
#include <gtest/gtest.h>
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/gradcheck.h"
#include "support/tiny_run.h"
#include "support/training_batch.h"
#include "trainer/train/resume.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

class TrainerBf16Test : public ::testing::Test {
 protected:
  TrainerBf16Test() { omp_set_num_threads(1); }
  RunConfig Config(std::vector<std::string> overrides = {},
                   const std::string& precision = "bf16") const {
    overrides.push_back("train.precision=" + precision);
    auto config = LoadConfig(tiny_.config(), overrides, ConfigUse::kTrain, 1);
    KRAIT_CHECK(config.ok());
    return *config;
  }
  // Every weight is its master, rounded; returns how many tensors have a master of their own.
  static int ExpectRoundedMasters(Trainer* trainer) {
    int masters = 0;
    const auto& params = trainer->weights().table().params();
    for (size_t p = 0; p < params.size(); ++p) {
      const Tensor weight = trainer->weights().Param(static_cast<int>(p));
      const Tensor master = trainer->optimizer().Master(static_cast<int>(p));
      EXPECT_EQ(master.dtype(), DType::kF32);
      if (params[p].dtype_class == DTypeClass::kFp32) {
        EXPECT_EQ(weight.raw(), master.raw()) << params[p].name;
        continue;
      }
      EXPECT_EQ(weight.dtype(), DType::kBF16) << params[p].name;
      ++masters;
      for (int64_t i = 0; i < weight.numel(); ++i) {
        const auto rounded = testing::ToBF16(static_cast<float>(testing::Get(master, i)));
        EXPECT_EQ(testing::Get(weight, i), testing::FromBF16(rounded)) << params[p].name;
      }
    }
    return masters;
  }
  TinyRun tiny_;
};

TEST_F(TrainerBf16Test, TrainsOverMastersThatCheckpointsHold) {
  const RunConfig config = Config();
  Trainer trainer(config);
  trainer.Init();
  EXPECT_GT(ExpectRoundedMasters(&trainer), 10);
  const std::string before = Bits(trainer);
  double first = 0, last = 0;
  for (int64_t s = 0; s < 30; ++s) {
    last = trainer.Step(BatchAt(config, 4 * s)).loss;
    if (s == 0) first = last;
  }
  EXPECT_LT(last, first - 0.5);
  EXPECT_NE(Bits(trainer), before);
  ExpectRoundedMasters(&trainer);

  // The weight slot is the master, which is finer than bf16.
  const ParamTable& table = trainer.weights().table();
  int weights = 0, finer = 0;
  for (const CheckpointBox& box : trainer.Boxes()) {
    EXPECT_EQ(box.dtype, DType::kF32) << box.slot << " " << box.name;
    if (box.slot != "weight") continue;
    ++weights;
    const Tensor master = trainer.optimizer().Master(table.Find(box.name));
    ASSERT_EQ(box.bytes(), master.bytes());
    EXPECT_EQ(std::memcmp(box.data, master.raw(), static_cast<size_t>(box.bytes())), 0);
    for (int64_t i = 0; i < master.numel(); ++i) {
      const auto value = static_cast<float>(testing::Get(master, i));
      finer += testing::FromBF16(testing::ToBF16(value)) != value;
    }
  }
  EXPECT_EQ(weights, static_cast<int>(table.params().size()));
  EXPECT_GT(finer, table.total() / 2);
}

TEST_F(TrainerBf16Test, LossesStayNearFloat32) {
  const RunConfig narrow = Config(), wide = Config({}, "fp32");
  Trainer a(narrow), b(wide);
  a.Init();
  b.Init();
  for (int64_t s = 0; s < 10; ++s) {
    const StepReport ra = a.Step(BatchAt(narrow, 4 * s)), rb = b.Step(BatchAt(narrow, 4 * s));
    EXPECT_NEAR(ra.loss, rb.loss, 0.02 * rb.loss) << "step " << s;
    EXPECT_NE(ra.loss, rb.loss);
    EXPECT_NEAR(ra.grad_norm, rb.grad_norm, 0.1 * rb.grad_norm) << "step " << s;
  }
}

TEST_F(TrainerBf16Test, NonFiniteStepKeepsMastersAndMoments) {
  const RunConfig config = Config();
  Trainer trainer(config);
  trainer.Init();
  trainer.Step(BatchAt(config, 0));
  // An embedding row that the batch reads; the master stays finite.
  const Tensor embedding = trainer.weights().Param(0);
  ASSERT_EQ(embedding.dtype(), DType::kBF16);
  const double good = testing::Get(embedding, 0);
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    testing::Set(embedding, 0, bad);
    TokenBatch batch = BatchAt(config, 4);
    batch.tokens[0] = 0;
    const std::string before = Bits(trainer);
    EXPECT_TRUE(trainer.Step(batch).was_skipped);
    EXPECT_EQ(Bits(trainer), before);
  }
  EXPECT_EQ(trainer.state().step, 3);
  EXPECT_EQ(trainer.state().adam_steps, 1);
  EXPECT_EQ(trainer.state().skipped_in_row, 2);

  // With the weight restored the run goes on as one that never had the two steps, but for the
  // schedule.
  testing::Set(embedding, 0, good);
  const std::string before = Bits(trainer);
  EXPECT_FALSE(trainer.Step(BatchAt(config, 12)).was_skipped);
  EXPECT_NE(Bits(trainer), before);
  EXPECT_EQ(trainer.state().adam_steps, 2);
  ExpectRoundedMasters(&trainer);
}

TEST_F(TrainerBf16Test, ResumeIsBitEqual) {
  for (const char* moments : {"fp32", "bf16"}) {
    SCOPED_TRACE(moments);
    const std::vector<std::string> words = {std::string("optimizer.moments=") + moments,
                                            "run_dir=" + (tiny_ / moments)};
    const RunConfig config = Config(words);
    auto data = Dataset::Open(config.data.train, config.data.seq_len, config.model.vocab_size,
                              config.train.seed, config.data.reset_at_documents);
    ASSERT_TRUE(data.ok()) << data.status();
    Trainer whole(config);
    whole.Init();
    for (int64_t s = 0; s < 3; ++s) whole.Step(BatchAt(config, 4 * s));
    whole.state().config_yaml = config.ToYaml();
    whole.state().data_fingerprint = (*data)->Fingerprint();
    SaveOptions save;
    save.dir = config.checkpoint.dir;
    ASSERT_TRUE(SaveCheckpoint(save, whole.state(), whole.Boxes()).ok());

    Trainer resumed(config);
    const absl::Status started =
        StartRun({}, {data->get(), {}}, &resumed, [](const std::string&) {});
    ASSERT_TRUE(started.ok()) << started;
    EXPECT_EQ(resumed.state().step, 3);
    EXPECT_EQ(Bits(resumed), Bits(whole));
    ExpectRoundedMasters(&resumed);
    for (int64_t s = 3; s < 6; ++s) {
      const StepReport a = whole.Step(BatchAt(config, 4 * s));
      const StepReport b = resumed.Step(BatchAt(config, 4 * s));
      EXPECT_EQ(a.total_loss, b.total_loss);
      EXPECT_EQ(a.grad_norm, b.grad_norm);
    }
    EXPECT_EQ(Bits(resumed), Bits(whole));
  }
}

}  // namespace
}  // namespace krait
