#include "trainer/report/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "kernels/base/crc32c.h"
#include "nlohmann/json.hpp"
#include "trainer/report/tensorboard.h"

namespace krait {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class MetricsTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "metrics_" +
           testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string Read(const std::string& name) const {
    std::ifstream in(dir_ + "/" + name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void Write(const std::string& name, const std::string& text) const {
    std::ofstream(dir_ + "/" + name, std::ios::binary) << text;
  }
  std::string dir_;
};

TEST(LogLine, IsTheContractedLine) {
  StepReport r;
  r.step = 120;
  r.steps = 5000;
  r.loss = 3.21449;
  r.lr = 2.91e-4;
  r.grad_norm = 0.8741;
  r.aux_loss = 2.009;
  r.has_moe = true;
  r.tokens_per_s = 1.2404e6;
  r.mfu = 0.412;
  r.peak_memory = static_cast<int64_t>(62.1 * (1 << 30));
  r.total_memory = static_cast<int64_t>(139.8 * (1 << 30));
  r.step_ms = 422.3;
  r.eta_seconds = 6720;
  EXPECT_EQ(FormatLogLine(r),
            "step   120/5000 | loss 3.2145 | lr 2.91e-04 | gnorm 0.874 | aux 2.01 | 1.24M tok/s | "
            "MFU 41.2% | mem 62.1/139.8 GiB | 422 ms | ETA 1h52m");
}

TEST(LogLine, SaysWhatIsMissingOrSkipped) {
  StepReport r;
  r.step = 7;
  r.steps = 100;
  r.loss = std::numeric_limits<double>::quiet_NaN();
  r.was_skipped = true;
  r.skipped = 3;
  r.skipped_in_row = 2;
  r.tokens_per_s = 900;
  EXPECT_THAT(FormatLogLine(r), HasSubstr("| aux - | 900 tok/s | MFU - |"));
  EXPECT_THAT(FormatLogLine(r), HasSubstr("skipped: not finite (2 in a row, 3 in all)"));
}

TEST(Formats, Durations) {
  EXPECT_EQ(FormatDuration(35.2), "35s");
  EXPECT_EQ(FormatDuration(59.7), "1m00s");
  EXPECT_EQ(FormatDuration(250), "4m10s");
  EXPECT_EQ(FormatDuration(6720), "1h52m");
  EXPECT_EQ(FormatDuration(3 * 86400 + 4 * 3600), "3d04h");
  EXPECT_EQ(FormatDuration(std::nan("")), "-");
}

TEST(Record, IsFlatWithNullsForNonFinite) {
  const std::string line = FormatRecord(5, 12.5,
                                        {{"train/loss", 0.1},
                                         {"optim/grad_norm", std::nan("")},
                                         {"val/loss", std::numeric_limits<double>::infinity()},
                                         {"tokens", int64_t{4096}}});
  EXPECT_EQ(line,
            "{\"step\":5,\"time\":12.5,\"train/loss\":0.1,\"optim/grad_norm\":null,"
            "\"val/loss\":null,\"tokens\":4096}\n");
}

TEST(Record, OfAStepHasTheContractedNames) {
  StepReport r;
  r.has_moe = true;
  r.imbalance = {{1, 1.5}, {13, 2.0}};
  std::vector<std::string> names;
  for (const Metric& metric : StepMetrics(r)) names.push_back(metric.name);
  EXPECT_THAT(names,
              ElementsAre("train/loss", "train/aux_loss", "train/total_loss", "optim/lr",
                          "optim/grad_norm", "optim/skipped", "perf/tokens_per_s", "perf/mfu",
                          "perf/step_ms", "mem/peak_gib", "tokens", "moe/layer_01/imbalance",
                          "moe/layer_13/imbalance", "moe/overflow_rounds"));
}

TEST_F(MetricsTest, RecordsPastTheResumedStepMoveAway) {
  Write("metrics.jsonl",
        "{\"step\":1,\"x\":1}\n{\"step\":10,\"x\":2}\n{\"step\":11,\"x\":3}\n{\"step\":20,\"x\"");
  Write("metrics.discarded.jsonl", "{\"step\":99}\n");
  ASSERT_TRUE(DiscardMetricsAfter(dir_, 10).ok());
  EXPECT_EQ(Read("metrics.jsonl"), "{\"step\":1,\"x\":1}\n{\"step\":10,\"x\":2}\n");
  // The line that a crash cut short goes along, in full.
  EXPECT_EQ(Read("metrics.discarded.jsonl"),
            "{\"step\":99}\n{\"step\":11,\"x\":3}\n{\"step\":20,\"x\"\n");
}

TEST_F(MetricsTest, NothingToDiscardLeavesFilesAlone) {
  ASSERT_TRUE(DiscardMetricsAfter(dir_, 3).ok());
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/metrics.jsonl"));
  Write("metrics.jsonl", "{\"step\":1}\n");
  ASSERT_TRUE(DiscardMetricsAfter(dir_, 1).ok());
  EXPECT_EQ(Read("metrics.jsonl"), "{\"step\":1}\n");
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/metrics.discarded.jsonl"));
}

TEST_F(MetricsTest, LogAppendsAcrossRestarts) {
  for (int64_t step : {1, 2}) {
    auto log = MetricsLog::Open(dir_, step - 1, /*tensorboard=*/false);
    ASSERT_TRUE(log.ok()) << log.status();
    ASSERT_TRUE(log->Write(step, {{"train/loss", 1.0}}).ok());
  }
  std::istringstream lines(Read("metrics.jsonl"));
  std::vector<int> steps;
  for (std::string line; std::getline(lines, line);) {
    steps.push_back(nlohmann::json::parse(line)["step"]);
  }
  EXPECT_THAT(steps, ElementsAre(1, 2));
}

// Reads a file of TFRecords, checking both CRCs of each.
std::vector<std::string> Records(const std::string& file) {
  const auto unmask = [](uint32_t masked) {
    const uint32_t rotated = masked - 0xa282ead8u;
    return rotated >> 17 | rotated << 15;
  };
  std::vector<std::string> records;
  for (size_t at = 0; at < file.size();) {
    uint64_t length;
    uint32_t crc;
    std::memcpy(&length, file.data() + at, 8);
    std::memcpy(&crc, file.data() + at + 8, 4);
    EXPECT_EQ(unmask(crc), Crc32c(file.data() + at, 8));
    records.push_back(file.substr(at + 12, length));
    std::memcpy(&crc, file.data() + at + 12 + length, 4);
    EXPECT_EQ(unmask(crc), Crc32c(records.back().data(), length));
    at += 16 + length;
  }
  return records;
}

TEST_F(MetricsTest, TensorBoardRecordsCarryTheirChecksums) {
  // The known CRC-32C of "123456789" (0xe3069283), masked: rotated right by 15, plus 0xa282ead8.
  const std::string record = TfRecord("123456789");
  uint32_t crc;
  std::memcpy(&crc, record.data() + record.size() - 4, 4);
  EXPECT_EQ(crc, (0xe3069283u >> 15 | 0xe3069283u << 17) + 0xa282ead8u);

  std::string path;
  {
    auto writer = EventWriter::Create(dir_ + "/tensorboard", 11);
    ASSERT_TRUE(writer.ok()) << writer.status();
    ASSERT_TRUE(writer->Scalars(300, {{"train/loss", 2.5}}).ok());
    path = writer->path();
  }
  EXPECT_THAT(path, HasSubstr("/events.out.tfevents."));
  std::ifstream in(path, std::ios::binary);
  const std::vector<std::string> records =
      Records({std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()});
  ASSERT_EQ(records.size(), 3u);
  EXPECT_THAT(records[0], HasSubstr("brain.Event:2"));
  // Event.step (field 2) = 11 and Event.session_log (7) with status (1) START (1).
  EXPECT_EQ(records[1].substr(9), std::string("\x10\x0b\x3a\x02\x08\x01"));
  // step 300; summary (5) of one value (1) with tag (1) and simple_value (2, float 2.5).
  EXPECT_EQ(records[2].substr(9), std::string("\x10\xac\x02\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15"
                                              "\x00\x00\x20\x40",
                                              3 + 2 + 2 + 2 + 10 + 5));
}

TEST_F(MetricsTest, EventFilesSortByTheirStartsWhateverTheClock) {
  const std::string folder = dir_ + "/tensorboard";
  std::filesystem::create_directories(folder);
  // From a clock ahead of this one, of another host and with a short number; and what is no event
  // file.
  const std::string ahead = folder + "/events.out.tfevents.4000000000.zebra.9";
  for (const std::string& path : {ahead, folder + "/events.out.tfevents.5.other.1",
                                  folder + "/events.out.tfevents.x", folder + "/notes"}) {
    std::ofstream(path) << "x";
  }
  std::string last = ahead;
  for (int start = 0; start < 3; ++start) {
    const auto writer = EventWriter::Create(folder, 11);
    ASSERT_TRUE(writer.ok()) << writer.status();
    EXPECT_GT(writer->path(), last);
    last = writer->path();
  }
  EXPECT_THAT(last, HasSubstr("tfevents.4000000003."));
  // Without any, the clock's time.
  const auto fresh = EventWriter::Create(dir_ + "/fresh", 1);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_LT(fresh->path(), dir_ + "/fresh/events.out.tfevents.4000000000");
}

TEST_F(MetricsTest, TheLastValueIsTheLastOneAlsoWhenItIsNotFinite) {
  EXPECT_FALSE(LastRecorded(dir_, "val/loss").has_value());
  Write("metrics.jsonl", "{\"step\":1,\"val/loss\":2.5}\n{\"step\":2,\"x\":1}\n");
  EXPECT_EQ(LastRecorded(dir_, "val/loss"), 2.5);
  Write("metrics.jsonl",
        "{\"step\":1,\"val/loss\":2.5}\n{\"step\":2,\"val/loss\":null}\n{\"step\":2}\n");
  ASSERT_TRUE(LastRecorded(dir_, "val/loss").has_value());
  EXPECT_TRUE(std::isnan(*LastRecorded(dir_, "val/loss")));
  Summary s;
  s.val_loss = LastRecorded(dir_, "val/loss");
  s.val_bpb = std::nan("");
  EXPECT_THAT(FormatSummary(s), Contains("validation loss: not finite"));
  s.val_loss = 2.5;  // of a tokenizer that does not know its bytes
  EXPECT_THAT(FormatSummary(s), Contains("validation loss 2.5000"));
}

TEST(SummaryText, NamesWhatToDoNext) {
  Summary s;
  s.finished = true;
  s.step = s.steps = 200;
  s.tokens = 1234567;
  s.session_tokens = 1000000;
  s.session_seconds = 100;
  s.val_loss = 1.5;
  s.val_bpb = 2.164;
  s.checkpoint = "runs/a/checkpoints/step-00000200";
  s.next_commands = {"krait generate X", "krait eval X"};
  EXPECT_THAT(FormatSummary(s),
              ElementsAre("finished: 200 steps, 1.23M tokens | this session: 1m40s, 10.0k tok/s on "
                          "average",
                          "validation loss 1.5000 (2.164 bits per byte)",
                          "checkpoint: runs/a/checkpoints/step-00000200", "next: krait generate X",
                          "next: krait eval X"));
}

}  // namespace
}  // namespace krait
