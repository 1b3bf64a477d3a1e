// Where a run of several ranks starts: the first one looks at the folders, all load or none does.
// Each rank holds the whole model here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "support/ranks.h"
#include "support/tiny_run.h"
#include "support/training_batch.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/run_record.h"
#include "trainer/train/resume.h"
#include "trainer/train/trainer.h"

namespace krait::testing {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ResumeRanksTest : public ::testing::Test {
 protected:
  ResumeRanksTest() {
    if (world_->first()) tiny_.emplace();
    const std::string path = world_->Broadcast(world_->first() ? tiny_->config() : "");
    auto config = LoadConfig(path, {}, ConfigUse::kTrain, 1);
    KRAIT_CHECK(config.ok());
    config_ = *config;
    if (world_->first()) {
      Trainer trainer(config_);
      trainer.Init();
      trainer.state().config_yaml = config_.ToYaml();
      for (int64_t step = 1; step <= 3; ++step) {
        trainer.Step(BatchAt(config_, 4 * (step - 1)));
        trainer.state().sources = Data()->PositionAt(trainer.state().sequences).sources;
        KRAIT_CHECK(
            SaveCheckpoint({config_.checkpoint.dir, 3, ""}, trainer.state(), trainer.Boxes()).ok());
        crc_.push_back(CrcOf(trainer));
      }
    }
    for (size_t i = 0; i < 3; ++i) {
      crc_.resize(3);
      crc_[i] = world_->AllGather(crc_[i])[0];
    }
  }
  ~ResumeRanksTest() override { world_->Barrier(); }

  std::unique_ptr<Dataset> Data() const {
    auto data = Dataset::Open(config_.data.train, config_.data.seq_len, config_.model.vocab_size,
                              config_.train.seed, config_.data.reset_at_documents);
    KRAIT_CHECK(data.ok());
    return std::move(*data);
  }
  static int64_t CrcOf(const Trainer& trainer) {
    uint32_t crc = 0;
    for (const CheckpointBox& box : trainer.Boxes()) {
      crc = Crc32c(box.data, static_cast<size_t>(box.bytes()), crc);
    }
    return crc;
  }
  std::string Step(int64_t step) const {
    return config_.checkpoint.dir + "/step-0000000" + std::to_string(step);
  }
  // A bit of the last box, on the first rank.
  void Damage(int64_t step) {
    world_->Barrier();
    if (world_->first()) {
      const int64_t at = OpenCheckpoint(Step(step))->boxes.back().file_offset;
      auto file = File::OpenWrite(Step(step) + "/rank-00000.h5", ExitCode::kData);
      char byte = 0;
      EXPECT_TRUE(file->ReadAt(&byte, 1, at).ok());
      byte = static_cast<char>(byte ^ 1);
      EXPECT_TRUE(file->WriteAt(&byte, 1, at).ok());
    }
    world_->Barrier();
  }
  struct Started {
    absl::Status status;
    int64_t step = 0, crc = 0;
    std::vector<std::string> notices;
  };
  Started Start(const ResumeOptions& options) {
    Started out;
    Trainer trainer(config_);
    const auto data = Data();
    out.status = StartRun(
        options, {data.get(), {}}, &trainer,
        [&](const std::string& line) { out.notices.push_back(line); }, {}, world_);
    out.step = trainer.state().step;
    out.crc = CrcOf(trainer);
    if (!world_->first()) {
      EXPECT_THAT(out.notices, IsEmpty());
    }
    world_->Barrier();
    return out;
  }

  World* const world_ = TestWorld();
  std::optional<TinyRun> tiny_;  // the first rank's
  RunConfig config_;
  std::vector<int64_t> crc_;  // of the state at steps 1 to 3
};

TEST_F(ResumeRanksTest, AllGoOnFromTheNewestThatIsWholeForAll) {
  Started run = Start({});
  ASSERT_TRUE(run.status.ok()) << run.status;
  EXPECT_EQ(run.step, 3);
  EXPECT_EQ(run.crc, crc_[2]);
  if (world_->first()) {
    EXPECT_THAT(run.notices, Contains(HasSubstr("resuming at step 3")));
  }
  EXPECT_EQ((*ReadRunRecord(config_.run_dir))->step, 3);

  Damage(3);
  run = Start({});
  ASSERT_TRUE(run.status.ok()) << run.status;
  EXPECT_EQ(run.step, 2);
  EXPECT_EQ(run.crc, crc_[1]);
  EXPECT_FALSE(Exists(Step(3)));
  EXPECT_TRUE(Exists(config_.checkpoint.dir + "/damaged-step-00000003"));
  EXPECT_EQ((*ReadRunRecord(config_.run_dir))->step, 2);

  // Back to an older one, which the newer make room for.
  ResumeOptions older;
  older.resume = Step(1);
  run = Start(older);
  ASSERT_TRUE(run.status.ok()) << run.status;
  EXPECT_EQ(run.step, 1);
  EXPECT_EQ(run.crc, crc_[0]);
  EXPECT_FALSE(Exists(Step(2)));

  Damage(1);
  run = Start({});
  EXPECT_EQ(ExitCodeOf(run.status), ExitCode::kNoCheckpoint);
  EXPECT_TRUE(IsAgreed(run.status) || world_->size() == 1);
  EXPECT_THAT(MessageOf(run.status), HasSubstr(world_->first() ? "nothing was started" : ""));
  EXPECT_TRUE(Exists(Step(1)));
}

TEST_F(ResumeRanksTest, AllStartAnewOrFromWeights) {
  ResumeOptions never;
  never.resume = "never";
  Started run = Start(never);
  ASSERT_TRUE(run.status.ok()) << run.status;
  EXPECT_EQ(run.step, 0);
  for (const int64_t crc : world_->AllGather(run.crc)) EXPECT_EQ(crc, run.crc);
  const std::string aside = config_.checkpoint.dir + ".before-1";
  EXPECT_TRUE(Exists(aside));

  ResumeOptions init;
  init.init = aside;
  run = Start(init);
  ASSERT_TRUE(run.status.ok()) << run.status;
  EXPECT_EQ(run.step, 0);
  for (const int64_t crc : world_->AllGather(run.crc)) EXPECT_EQ(crc, run.crc);
  if (world_->first()) {
    EXPECT_THAT(run.notices, Contains(HasSubstr("with the weights of " + aside)));
  }

  init.init = config_.run_dir + "/none";
  run = Start(init);
  EXPECT_EQ(ExitCodeOf(run.status), ExitCode::kNoCheckpoint);
  EXPECT_EQ(MessageOf(run.status).empty(), !world_->first());
  ResumeOptions wrong;
  wrong.allow_change = {"model"};
  run = Start(wrong);
  EXPECT_EQ(ExitCodeOf(run.status), ExitCode::kConfig);
}

}  // namespace
}  // namespace krait::testing
