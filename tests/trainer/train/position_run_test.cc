// `krait train` whose data, weights, batch or length change between starts: each source goes on
// where it stood.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "absl/strings/str_format.h"
#include "kernels/base/crc32c.h"
#include "nlohmann/json.hpp"
#include "support/tiny_run.h"
#include "support/tokens.h"
#include "support/training_batch.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// The value of `key` in the record of a step; NaN for null or none.
double Recorded(const std::string& run, int64_t step, const std::string& key) {
  std::istringstream lines(ReadText(run + "/metrics.jsonl"));
  double value = std::nan("");
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (record["step"] == step && record.contains(key) && record[key].is_number()) {
      value = record[key];
    }
  }
  return value;
}

class PositionRun : public ::testing::Test {
 protected:
  PositionRun() {
    // As TinyRun's processes: other numbers of threads are other bits.
    omp_set_num_threads(2);
  }
  // data.train=[...] of names of token files and their weights.
  std::string Train(const std::vector<std::pair<std::string, double>>& sources) const {
    std::string word = "data.train=[";
    for (const auto& [name, weight] : sources) {
      absl::StrAppendFormat(&word, "%s{path: %s, weight: %g}", word.back() == '[' ? "" : ", ",
                            tiny_ / (name + ".h5"), weight);
    }
    return word + "]";
  }
  ProcessResult Run(int steps, std::vector<std::string> words,
                    const std::vector<std::string>& allow = {}) const {
    words.push_back("train.steps=" + std::to_string(steps));
    words.insert(words.end(), {"log.every=1", "checkpoint.every=1000"});
    for (const std::string& key : allow) words.insert(words.end(), {"--allow-change", key});
    return tiny_.Train(run_, words);
  }
  std::string Saved(int64_t step) const {
    return absl::StrFormat("%s/checkpoints/step-%08d", tiny_ / run_, step);
  }
  // Makes a checkpoint one of the first version, which kept the number of sequences only.
  static void ToFirstVersion(const std::string& checkpoint) {
    const std::string path = checkpoint + "/manifest.json";
    auto root = nlohmann::json::parse(ReadText(path));
    for (const char* key : {"sources", "mix_start", "validation", "crc32c"}) root.erase(key);
    std::string body = root.dump();
    body.back() = ',';
    std::ofstream(path, std::ios::binary)
        << body << absl::StrFormat("\"crc32c\":\"%08x\"}\n", Crc32c(body.data(), body.size()));
  }

  TinyRun tiny_;
  std::string run_ = "run";
};

// What a run reads, counted: each start's data is opened at what the checkpoint before it says, its
// sequences are counted, and training on them gives the bits that the process saved.
class Counted {
 public:
  void Start(const std::string& config_path, const std::string& before, const std::string& after) {
    auto reached = OpenCheckpoint(after);
    ASSERT_TRUE(reached.ok()) << reached.status();
    const auto config =
        ParseConfig(reached->meta.config_yaml, config_path, {}, ConfigUse::kTrain, 1);
    ASSERT_TRUE(config.ok()) << config.status();
    auto opened = Dataset::Open(config->data.train, config->data.seq_len, 256, config->train.seed,
                                config->data.reset_at_documents);
    ASSERT_TRUE(opened.ok()) << opened.status();
    Dataset& data = **opened;
    Trainer trainer(*config);
    if (before.empty()) {
      trainer.Init();
    } else {
      const auto checkpoint = OpenCheckpoint(before);
      ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
      const CheckpointMeta& meta = checkpoint->meta;
      auto next = data.ContinueFrom({meta.sequences, meta.mix_start, meta.sources});
      ASSERT_TRUE(next.ok()) << next.status();
      data.Seek(*std::move(next));
      ASSERT_TRUE(LoadBoxes(*checkpoint, trainer.Boxes()).ok());
      trainer.Loaded();
      trainer.state() = meta;
    }
    const int64_t rows = config->train.batch_tokens.largest() / config->data.seq_len;
    while (trainer.state().step < reached->meta.step) {
      const int64_t first = trainer.state().sequences;
      for (int64_t q = first; q < first + rows; ++q) {
        const SequenceRef ref = data.At(q);
        const TokenFile& file = *data.files()[static_cast<size_t>(ref.source)];
        ++reads_[file.content_hash()][{ref.epoch, ref.sequence}];
        counts_[file.content_hash()] = file.tokens() / config->data.seq_len;
      }
      TokenBatch batch;
      ASSERT_TRUE(data.ReadTraining(first, rows, &batch).ok());
      trainer.Step(batch);
    }
    EXPECT_EQ(trainer.state().sequences, reached->meta.sequences);
    EXPECT_EQ(data.PositionAt(reached->meta.sequences).sources, reached->meta.sources);
    const std::string trained = Bits(trainer);
    Trainer saved(*config);
    ASSERT_TRUE(LoadBoxes(*reached, saved.Boxes()).ok());
    EXPECT_EQ(Bits(saved) == trained, true) << "the process read something else";
    sources_ = reached->meta.sources;
  }
  // Each sequence of each source was read once in each of its epochs, but for those of the last
  // that are still to come.
  void ExpectAsOftenAsTheEpochsSay() const {
    for (const SourcePosition& source : sources_) {
      const auto found = reads_.find(source.content);
      ASSERT_NE(found, reads_.end());
      const int64_t count = counts_.at(source.content);
      std::map<int64_t, int64_t> times;  // of each sequence
      for (const auto& [key, n] : found->second) {
        EXPECT_EQ(n, 1) << source.path << " epoch " << key.first << " sequence " << key.second;
        times[key.second] += n;
      }
      int64_t once_more = 0;
      for (int64_t k = 0; k < count; ++k) {
        EXPECT_TRUE(times[k] == source.epoch || times[k] == source.epoch + 1) << source.path;
        once_more += times[k] - source.epoch;
      }
      EXPECT_EQ(once_more, source.place) << source.path;
    }
  }
  size_t sources() const { return sources_.size(); }

 private:
  std::map<std::string, std::map<std::pair<int64_t, int64_t>, int64_t>> reads_;
  std::map<std::string, int64_t> counts_;
  std::vector<SourcePosition> sources_;
};

TEST_F(PositionRun, ChangesOfMixBatchAndFilesReadEachSequenceAsOftenAsItsEpochsSay) {
  WriteText(tiny_.folder(), "third", 12, 5);
  Counted counted;
  const auto start = [&](int from, int to, const std::vector<std::string>& words,
                         const std::vector<std::string>& allow) {
    const ProcessResult result = Run(to, words, allow);
    ASSERT_EQ(result.code, 0) << result.out << result.err;
    counted.Start(tiny_.config(), from > 0 ? Saved(from) : "", Saved(to));
  };
  start(0, 15, {Train({{"train", 3}, {"more", 1}})}, {});
  // The mix: other weights, in another order.
  start(15, 30, {Train({{"more", 1}, {"train", 1}})}, {"data"});
  // The batch, of two passes more.
  const std::string batch = "train.batch_tokens=256";
  start(30, 42, {Train({{"more", 1}, {"train", 1}}), batch}, {"batch_tokens"});
  // A file: rebuilt in place.
  WriteText(tiny_.folder(), "more", 17, 9);
  start(42, 55, {Train({{"more", 1}, {"train", 1}}), batch}, {"data"});
  // The mix again: one source more, at the front.
  start(55, 90, {Train({{"third", 2}, {"more", 1}, {"train", 1}}), batch}, {"data"});
  // And a start without any change, by way of another seed for the rest.
  start(90, 100, {Train({{"train", 1}, {"third", 2}, {"more", 1}}), batch, "train.seed=8"},
        {"seed"});
  counted.ExpectAsOftenAsTheEpochsSay();
  EXPECT_EQ(counted.sources(), 4u);
}

TEST_F(PositionRun, MovedRenamedAndReorderedFilesNeedNoFlagAndGiveTheSameBits) {
  run_ = "whole";
  ASSERT_EQ(Run(20, {}).code, 0);
  const std::string whole = Saved(20);
  run_ = "moved";
  ASSERT_EQ(Run(10, {}).code, 0);
  std::filesystem::create_directory(tiny_ / "elsewhere");
  for (const char* name : {"train", "more"}) {
    std::filesystem::rename(tiny_ / (std::string(name) + ".h5"),
                            tiny_ / (std::string("elsewhere/other-") + name + ".h5"));
  }
  const ProcessResult result =
      Run(20, {Train({{"elsewhere/other-more", 1}, {"elsewhere/other-train", 3}}),
               "data.validation=[{path: " + (tiny_ / "elsewhere/other-more.h5") + "}]"});
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("resuming at step 10"), HasSubstr("other-train.h5: epoch 0."),
                    HasSubstr("75 % of the mix")));
  const ProcessResult diff = TinyRun::Krait({"checkpoint", "diff", whole, Saved(20)});
  EXPECT_EQ(diff.code, 0) << diff.out;
}

TEST_F(PositionRun, CheckpointsOfTheFirstVersionGoOn) {
  const std::string constant = "schedule.name=constant";
  run_ = "whole";
  ASSERT_EQ(Run(40, {constant}).code, 0);
  const std::string whole = Saved(40);
  run_ = "old";
  ASSERT_EQ(Run(20, {constant}).code, 0);
  ToFirstVersion(Saved(20));
  std::filesystem::copy(tiny_ / "old", tiny_ / "changed", std::filesystem::copy_options::recursive);
  ProcessResult result = Run(40, {constant});
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  const ProcessResult diff = TinyRun::Krait({"checkpoint", "diff", whole, Saved(40)});
  EXPECT_EQ(diff.code, 0) << diff.out;
  // With another mix: what was read is not read again, as its new position shows.
  run_ = "changed";
  result = Run(21, {Train({{"train", 1}, {"more", 1}})});
  EXPECT_EQ(result.code, 20) << result.out;
  result = Run(21, {Train({{"train", 1}, {"more", 1}})}, {"data"});
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  const auto position = OpenCheckpoint(Saved(21));
  ASSERT_TRUE(position.ok());
  EXPECT_EQ(position->meta.sources[0].epoch * 1000 + position->meta.sources[0].place, 60 + 2);
  EXPECT_EQ(position->meta.mix_start, 80);
}

TEST_F(PositionRun, RebuiltFilesAreNamed) {
  ASSERT_EQ(Run(10, {}).code, 0);
  WriteText(tiny_.folder(), "train", 41, 7);
  WriteText(tiny_.folder(), "more", 16, 8);
  ProcessResult result = Run(20, {"train.seed=9"}, {"seed"});
  EXPECT_EQ(result.code, 20) << result.out;
  const auto names_both = AllOf(HasSubstr("train.h5 holds other tokens than in the checkpoint"),
                                HasSubstr("more.h5 holds other tokens than in the checkpoint"),
                                HasSubstr("data.validation: other tokens"));
  EXPECT_THAT(result.err, AllOf(names_both, HasSubstr("--allow-change data")));
  // The flag given for the sake of something else.
  result = Run(20, {"data.reset_at_documents=false"}, {"data"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(names_both, HasSubstr("changed: data.reset_at_documents")));
  const ProcessResult inspect = TinyRun::Krait({"checkpoint", "inspect", Saved(20)});
  EXPECT_THAT(inspect.out, AllOf(HasSubstr("30 sequences of 32 tokens into epoch 0"),
                                 HasSubstr("into epoch 0, left out")));
}

TEST_F(PositionRun, AnotherSeqLenSaysWhatBecomesOfTheOrder) {
  ASSERT_EQ(Run(10, {}).code, 0);
  ProcessResult result = Run(20, {"data.seq_len=16"});
  EXPECT_EQ(result.code, 20) << result.out;
  result = Run(20, {"data.seq_len=16"}, {"seq_len"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("data.seq_len is 16 now: the sequences are cut anew"),
                    HasSubstr("train.h5 was at epoch 0."), HasSubstr("and begins epoch 1")));
}

TEST_F(PositionRun, AnotherTokenizerIsRefusedWhateverIsAllowed) {
  ASSERT_EQ(Run(10, {}).code, 0);
  WriteTokens(tiny_ / "letters.h5", "letters", 4000);
  const std::string all = "data.train=[{path: " + (tiny_ / "letters.h5") + "}]";
  for (const std::vector<std::string>& allow : {std::vector<std::string>{}, {"data"}}) {
    const ProcessResult result = Run(20, {all, "data.validation=[]"}, allow);
    EXPECT_EQ(result.code, 21) << result.out << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr("letters.h5: its tokenizer is letters"),
                                  HasSubstr("step-00000010"), HasSubstr("bytes")));
  }
  EXPECT_EQ(Run(20, {}).code, 0);
  const ProcessResult eval = TinyRun::Krait({"eval", Saved(20), "--data", tiny_ / "letters.h5"});
  EXPECT_EQ(eval.code, 21) << eval.err;
}

TEST_F(PositionRun, TheSameTokensTwiceAreAWarning) {
  std::filesystem::copy(tiny_ / "train.h5", tiny_ / "copy.h5");
  const ProcessResult result =
      Run(10, {Train({{"train", 1}, {"more", 1}, {"copy", 1}, {"train", 1}})});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("warning: " + (tiny_ / "copy.h5") +
                                          " holds the same tokens as " + (tiny_ / "train.h5")),
                                HasSubstr("warning: " + (tiny_ / "train.h5") + " is named twice")));
  run_ = "single";
  EXPECT_THAT(Run(10, {}).out, Not(HasSubstr("warning: ")));
}

TEST_F(PositionRun, TokensCountWhateverTheBatch) {
  const std::vector<std::string> words = {"data.seq_len=16",         "train.micro_batch=1",
                                          "optimizer.lr=1e-3",       "log.every=1",
                                          "schedule.name=linear",    "schedule.warmup_steps=0",
                                          "schedule.min_lr_ratio=0", "evaluation.every=1000",
                                          "evaluation.tokens=64"};
  const auto train = [&](const std::string& run, std::vector<std::string> more) {
    more.insert(more.begin(), words.begin(), words.end());
    return tiny_.Train(run, more);
  };
  const auto half = [&](const std::string& run) {
    // Stopped half-way: 16 of 32 steps.
    ASSERT_EQ(train(run, {"train.tokens=512", "train.batch_tokens=32"}).code, 0);
    EXPECT_EQ(Recorded(tiny_ / run, 16, "tokens"), 512);
  };
  half("halved");
  ProcessResult result = train(
      "halved", {"train.tokens=1024", "train.batch_tokens=16", "--allow-change", "batch_tokens"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("512 of 1024 were seen, 32 steps of 16 are left"),
                    HasSubstr("step    17/48"), HasSubstr("finished: 48 steps, 1.02k tokens")));
  EXPECT_EQ(Recorded(tiny_ / "halved", 48, "tokens"), 1024);
  for (const int64_t step : {17, 30, 48}) {
    const double seen = 512 + 16 * static_cast<double>(step - 16);
    EXPECT_NEAR(Recorded(tiny_ / "halved", step, "optim/lr"), 1e-3 * (1 - seen / 1024), 1e-12);
  }
  result = train("halved", {"train.tokens=1024", "train.batch_tokens=16"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("finished: step 48 of 48; to train on, raise train.tokens"));
  // And once more, further.
  result = train("halved",
                 {"train.tokens=2048", "train.batch_tokens=64", "--allow-change", "batch_tokens"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(Recorded(tiny_ / "halved", 64, "tokens"), 2048);

  half("grown");
  result = train("grown",
                 {"train.tokens=1024", "train.batch_tokens=48", "--allow-change", "batch_tokens"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_NEAR(Recorded(tiny_ / "grown", 17, "optim/lr"), 1e-3 * (1 - 560.0 / 1024), 1e-12);
  EXPECT_EQ(Recorded(tiny_ / "grown", 27, "tokens"), 1040);
  EXPECT_EQ(Recorded(tiny_ / "grown", 27, "optim/lr"), 0);

  // While the batch stays, a run in tokens is the run in steps, bit for bit; also where its tokens
  // are no whole number of batches.
  ASSERT_EQ(train("tokens", {"train.tokens=1000", "train.batch_tokens=48"}).code, 0);
  ASSERT_EQ(train("steps", {"train.steps=21", "train.batch_tokens=48"}).code, 0);
  const ProcessResult diff =
      TinyRun::Krait({"checkpoint", "diff", tiny_ / "tokens", tiny_ / "steps"});
  EXPECT_EQ(diff.code, 0) << diff.out;
  for (int64_t step = 1; step <= 21; ++step) {
    EXPECT_EQ(Recorded(tiny_ / "tokens", step, "optim/lr"),
              Recorded(tiny_ / "steps", step, "optim/lr"));
  }
}

TEST_F(PositionRun, AStepWithoutATargetHasNoLoss) {
  // Many documents of one token, and at the end some longer ones.
  for (int i = 0; i < 600; ++i) tiny_.folder().Write("ones/" + std::to_string(i), "x");
  BuildOptions build;
  build.out = tiny_ / "ones.h5";
  build.paths = {tiny_ / "ones"};
  ASSERT_TRUE(BuildTokenFile(build).ok());
  ProcessResult result = Run(10, {Train({{"train", 1}, {"ones", 1}})});
  EXPECT_EQ(result.code, 21) << result.out;
  EXPECT_THAT(result.err, AllOf(HasSubstr("ones.h5"), HasSubstr("has a target")));

  for (const char* name : {"a", "b", "c", "d", "e"}) {
    tiny_.folder().Write(std::string("ones/longer-") + name, "xyz");
  }
  build.out = tiny_ / "few.h5";
  ASSERT_TRUE(BuildTokenFile(build).ok());
  run_ = "few";
  // Nine steps of two of its 19 sequences, of which five at most have a target.
  result = Run(9, {Train({{"few", 1}}), "train.batch_tokens=64", "schedule.warmup_steps=1"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("| loss - |"));
  int null = 0;
  std::istringstream lines(ReadText(tiny_ / "few/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (record.contains("train/loss")) null += record["train/loss"].is_null();
  }
  EXPECT_GE(null, 4);
}

}  // namespace
}  // namespace krait
