// Broken configs: each is refused with exit code 20 and a sentence that names its place.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <ctime>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "paths.h"
#include "support/temp_folder.h"
#include "trainer/config/config.h"

namespace krait {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// A valid config, one setting per line so that lines can be replaced by number.
constexpr const char* kValid[] = {
    "run_dir: runs/x",                               // 1
    "model:",                                        // 2
    "  vocab_size: 256",                             // 3
    "  d_model: 64",                                 // 4
    "  n_layers: 8",                                 // 5
    "  mixer: {ratio: \"1:7\", offset: 4}",          // 6
    "  attention: {heads: 4, kv_heads: 2}",          // 7
    "  mamba: {d_state: 16, d_conv: 4}",             // 8
    "  mlp: {d_ff: 128}",                            // 9
    "  moe: {every: 2, experts: 4, top_k: 2}",       // 10
    "data:",                                         // 11
    "  train: [{path: a.h5}]",                       // 12
    "  seq_len: 128",                                // 13
    "train:",                                        // 14
    "  steps: 100",                                  // 15
    "  batch_tokens: 1Ki",                           // 16
    "  micro_batch: 4",                              // 17
    "optimizer: {lr: 1e-3, betas: [0.9, 0.95]}",     // 18
    "schedule: {name: cosine, warmup_steps: 10}",    // 19
    "checkpoint: {every: 50, keep: 2, async: true}"  // 20
};

#ifdef KRAIT_SANITIZE
constexpr double kSeconds = 10;  // sanitizers cost several times the work
#else
constexpr double kSeconds = 1;
#endif

struct Case {
  int line;          // of kValid, replaced by `text`; 0: `text` is appended
  const char* text;  // "" removes the line
  const char* place;
  const char* sentence;
};

constexpr Case kCases[] = {
    // misspelt
    {4, "  d_modle: 64", ":4:3: ", "unknown key \"model.d_modle\"; did you mean model.d_model?"},
    {7, "  atention: {heads: 4}", ":7:3: ", "did you mean model.attention?"},
    {14, "trian:", ":14:1: ", "unknown key \"trian\"; did you mean train?"},
    {20, "checkpoint: {evry: 50}", ":20:14: ", "did you mean checkpoint.every?"},
    {18, "lr: 1e-3", ":18:1: ", "did you mean optimizer.lr?"},
    {12, "  train: [{path: a.h5, wieght: 2}]", ":12:24: ", "did you mean weight?"},
    {9, "  mlp: {d_ff: 128, zebra: 1}",
     ":9:20: ", "unknown key \"model.mlp.zebra\"; known here: d_ff"},
    // missing
    {3, "", ":2:1: ", "model.vocab_size is missing"},
    {4, "", ":2:1: ", "model.d_model is missing"},
    {5, "", ":2:1: ", "model.n_layers is missing"},
    {7, "", ":2:1: ", "model.attention.heads is missing; the model has attention layers"},
    {9, "", ":2:1: ", "model.mlp.d_ff is missing"},
    {12, "", ":11:1: ", "data.train is missing"},
    {15, "", ":14:1: ", "train.steps is missing; give train.steps or train.tokens"},
    {12, "  train: []", ":12:10: ", "data.train is empty"},
    {12, "  train: [{weight: 1}]", ":12:11: ", "path is missing"},
    {15, "  steps:", ":15:3: ", "train.steps: expected a whole number"},
    // duplicate
    {5, "  d_model: 64", ":5:3: ", "duplicate key \"d_model\", first given at"},
    {19, "optimizer: {lr: 1}", ":19:1: ", "duplicate key \"optimizer\", first given at"},
    {9, "  mlp: {d_ff: 128, d_ff: 128}", ":9:20: ", "duplicate key \"d_ff\""},
    // wrong type
    {4, "  d_model: wide", ":4:12: ", "model.d_model: \"wide\" is not a number"},
    {4, "  d_model: \"64\"", ":4:12: ", "found the quoted string \"64\""},
    {4, "  d_model: 64.5", ":4:12: ", "\"64.5\" is not a whole number"},
    {4, "  d_model: [64]", ":4:12: ", "found a list"},
    {4, "  d_model: {x: 64}", ":4:12: ", "found a map"},
    {4, "  d_model: 064", ":4:12: ", "has a leading zero"},
    {4, "  d_model: 0x40", ":4:12: ", "is not a number"},
    {4, "  d_model: 64k b", ":4:12: ", "is not a number"},
    {20, "checkpoint: {async: yes}", ":20:21: ", "expected true or false, found \"yes\""},
    {20, "checkpoint: {async: 1}", ":20:21: ", "expected true or false, found \"1\""},
    {20, "checkpoint: 50", ":20:13: ", "checkpoint: expected a map of keys, found \"50\""},
    {12, "  train: a.h5", ":12:10: ", "expected a list of sources such as"},
    {12, "  train: [a.h5]", ":12:11: ", "expected {path: FILE}, found \"a.h5\""},
    {18, "optimizer: {betas: 0.9}", ":18:20: ", "expected a list of 2 numbers"},
    {18, "optimizer: {betas: [0.9]}", ":18:20: ", "expected a list of 2 numbers"},
    {19, "schedule: {name: cosin}", ":19:18: ", "expected cosine | wsd | linear | constant"},
    {18, "optimizer: {name: sgd}", ":18:19: ", "optimizer.name: expected adamw, found \"sgd\""},
    {1, "run_dir: [x]", ":1:10: ", "run_dir: expected text, found a list"},
    // out of range, not finite
    {4, "  d_model: 0", ":4:12: ", "\"0\" is out of range; expected a whole number from 1 to"},
    {5, "  n_layers: -8", ":5:13: ", "\"-8\" is out of range"},
    {15, "  steps: 1e30", ":15:10: ", "\"1e30\" is out of range"},
    {18, "optimizer: {lr: .nan}", ":18:17: ", "\".nan\" is not a finite number"},
    {18, "optimizer: {lr: .inf}", ":18:17: ", "\".inf\" is not a finite number"},
    {18, "optimizer: {lr: 1e400}", ":18:17: ", "\"1e400\" is out of range"},
    {18, "optimizer: {lr: 0}", ":18:17: ", "expected a number above 0"},
    {18, "optimizer: {betas: [0.9, 1]}", ":18:26: ", "optimizer.betas[1]: \"1\" is out of range"},
    {18, "optimizer: {clip: -1}", ":18:19: ", "expected a number of at least 0"},
    {19, "schedule: {min_lr_ratio: 1.5}", ":19:26: ", "at least 0 and at most 1"},
    {20, "checkpoint: {keep: 1}", ":20:20: ", "expected a whole number of at least 2"},
    {20, "checkpoint: {every: 4, keep_every: 6}",
     ":20:36: ", "checkpoint.keep_every 6 must be a multiple of checkpoint.every 4"},
    {8, "  mamba: {d_conv: 9}", ":8:19: ", "expected a whole number from 1 to 8"},
    {8, "  mamba: {d_state: 512}", ":8:20: ", "expected a whole number from 1 to 256"},
    {12, "  train: [{path: a.h5, weight: 0}]", ":12:32: ", "expected a number above 0"},
    // rules over keys
    {7, "  attention: {heads: 5}",
     ":7:22: ", "model.d_model 64 must be a multiple of model.attention.heads 5"},
    {7, "  attention: {heads: 4, kv_heads: 3}",
     ":7:35: ", "model.attention.heads 4 must be a multiple of kv_heads 3"},
    {7, "  attention: {heads: 4, head_dim: 15, rope_theta: 1e4}",
     ":7:51: ", "so head_dim 15 must be even"},
    {10, "  moe: {every: 2, experts: 1}",
     ":10:3: ", "model.moe.top_k 2 (the default) must not be above model.moe.experts 1"},
    {10, "  moe: {every: 2, aux_sequences: 3}",
     ":10:34: ", "model.moe.aux_sequences 3 must divide train.micro_batch 4, or be `pass`"},
    {18, "optimizer: {mup: {base_d_model: 0}}",
     ":18:33: ", "expected a whole number from 1 to 1048576 or none"},
    {18, "optimizer: {mup: {base_width: 64}}", ":18:19: ", "base_d_model"},
    {10, "  moe: {experts: 4, offset: 1}",
     ":10:18: ", "model.moe.experts has no effect without model.moe.every"},
    {10, "  moe: {every: 9}",
     ":10:16: ", "model.moe: every 9 yields no layer with experts in 8 layers"},
    {10, "  moe: {every: 2, offset: 2}", ":10:27: ", "offset 2 must be below every 2"},
    {6, "  mixer: {ratio: \"1:7\", offset: 8}", ":6:33: ", "offset 8 must be below the period 8"},
    {6, "  mixer: {ratio: \"1:63\"}", ":6:18: ", "yields no attention layer in 8 layers"},
    {6, "  mixer: {ratio: \"1/7\"}", ":6:18: ", "is no ratio; expected \"ATTENTION:MAMBA\""},
    {6, "  pattern: m mE b", ":6:3: ", "model.pattern stands instead of"},
    {15, "  steps: 100\n  tokens: 1M", ":16:3: ", "are alternatives: keep one of them"},
    {16, "  batch_tokens: 1000", ":16:17: ",
     "train.batch_tokens 1000 must be a multiple of data.seq_len 128 x train.micro_batch 4 x 1 "
     "data "
     "rank = 512; the nearest valid values are 512 and 1024"},
    {16, "", ":14:1: ", nullptr},  // the default 4Mi is a multiple: valid
    {16, "  batch_tokens: 100", ":16:17: ", "the nearest valid value is 512"},
    {19, "schedule: {warmup_steps: 101}",
     ":19:26: ", "schedule.warmup_steps 101 must not be above train.steps 100"},
    {19, "schedule: {name: cosine}",
     ":19:1: ", "schedule.warmup_steps 2000 (the default) must not be above train.steps 100"},
    {19, "schedule: {name: wsd, warmup_steps: 10, decay_steps: 95}",
     ":19:54: ", "wsd needs at least 1 and at most train.steps 100 less warmup_steps 10 = 90"},
    {19, "schedule: {name: wsd, warmup_steps: 10, decay_steps: 2.5}",
     ":19:54: ", "neither a share of the steps up to 1.0 nor a whole number"},
    {17, "  micro_batch: 4\n  device: cuda", ":18:11: ", nullptr},
    {18, "optimizer: {betas: [0.9, 0.999], moments: bf16}", ":18:43: ",
     "optimizer.moments: bf16 takes a beta2 of at most 0.996, not 0.999: second moments rounded to "
     "nearest would stop decaying"},
    {18, "optimizer: {betas: [0.9, 0.996], moments: bf16}", ":18:1: ", nullptr},
    {0, "parallel: {tensor: 2}",
     ":21:20: ", "parallel.tensor 2 needs 2 ranks or a multiple of that"},
    {0, "parallel: {expert: 4}", ":21:20: ", "parallel.expert 4 does not divide the ranks"},
    {0, "parallel: {data: 8}", ":21:18: ", "parallel.data 8 needs 8 ranks, but there is 1"},
    // YAML that is refused
    {7, "  attention: &a {heads: 4}", ":7:14: ", "anchors (&name) are not supported"},
    {7, "  attention: *a", ":7:14: ", "anchor"},
    {20, "<<: {every: 3}", ":20:1: ", "merge keys (<<) are not supported"},
    {7, "  attention: !!map {heads: 4}", ":7:14: ", "tags ("},
    {0, "---\nmodel: {}", ":21:1: ", "a second document begins here"},
    {7, "  attention: {heads: 4", ":8:", "not valid YAML"},
    {4, "\td_model: 64", ":4:", "not valid YAML: a tab in front of the line"},
    {4, "  d_model 64", ":", "not valid YAML"},
    {0, "? [a, b]\n: 5", ":21:3: ", "a key must be a word, found a list"},
    {0, "model.d_model: 5", ":21:1: ", "dotted keys belong on the command line"},
    {3, "  vocab_size: 2\xff", ":3:16: ", "byte 0xff is not text"},
    {3, "  vocab_size: 2\x01", ":3:16: ", "byte 0x01 is not text"},
    {1, "run_dir: \"a\\_b\"", ":1:10: ", "an escape in this text yields a byte that is not UTF-8"},
    {1, "run_dir: \"a\\0b\"", ":1:10: ", "run_dir: control characters in \"a\\x00b\""},
    {1, "base: nowhere.yaml", ":1:7: ", "there is no such file"},
    {1, "base: [[x]]", ":1:8: ", "base must be the path of a YAML file"},
};

class BadConfig : public ::testing::Test {
 protected:
  void Write(const std::string& text) { folder_.Write("bad.yaml", text); }

  // The message, after checking exit code and time.
  std::string Refused(const std::string& path) {
    const std::clock_t start = std::clock();
    const auto config = LoadConfig(path, {}, ConfigUse::kTrain, 1);
    // Processor time, so that a busy machine does not fail it; nothing here waits.
    EXPECT_LT(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC, kSeconds);
    EXPECT_FALSE(config.ok());
    EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig);
    return MessageOf(config.status());
  }

  TempFolder folder_;
  const std::string path_ = folder_ / "bad.yaml";
};

std::string Broken(const Case& c) {
  std::string text;
  int line = 0;
  for (const char* valid : kValid) {
    const std::string kept = ++line == c.line ? c.text : valid;
    if (!kept.empty()) absl::StrAppend(&text, kept, "\n");
  }
  if (c.line == 0) absl::StrAppend(&text, c.text, "\n");
  return text;
}

TEST_F(BadConfig, EachIsNamedWithItsPlace) {
  Write(Broken({0, "", "", ""}));
  ASSERT_TRUE(LoadConfig(path_, {}, ConfigUse::kTrain, 1).ok());
  int refused = 0;
  for (const Case& c : kCases) {
    SCOPED_TRACE(c.text);
    const std::string text = Broken(c);
    Write(text);
    if (c.sentence == nullptr) {
      const auto config = LoadConfig(path_, {}, ConfigUse::kTrain, 1);
      EXPECT_TRUE(config.ok()) << config.status();
      continue;
    }
    const std::string message = Refused(path_);
    // The sentence stands on the line that begins with its place.
    bool found = false;
    for (size_t begin = 0; begin < message.size();) {
      const size_t end = std::min(message.find('\n', begin), message.size());
      const std::string line = message.substr(begin, end - begin);
      found = found || (line.rfind(absl::StrCat(path_, c.place), 0) == 0 &&
                        line.find(c.sentence) != std::string::npos);
      begin = end + 1;
    }
    EXPECT_TRUE(found) << "expected " << c.place << c.sentence << "\nfound " << message;
    ++refused;
  }
  EXPECT_GE(refused, 60);
}

TEST_F(BadConfig, PathsThatAreNoConfigs) {
  EXPECT_THAT(Refused(folder_.path()), HasSubstr("this is a directory"));
  EXPECT_THAT(Refused(folder_ / "none.yaml"), HasSubstr("there is no such file"));
  EXPECT_THAT(Refused(""), HasSubstr("there is no such file"));
  EXPECT_THAT(Refused("/dev/zero"), HasSubstr("no regular file"));
  EXPECT_THAT(Refused(folder_ / "bad.yaml/x"), HasSubstr("bad.yaml/x: "));
  EXPECT_THAT(Refused(folder_ / "none.yaml"), Not(HasSubstr(":1:1")));
  const std::string pipe = folder_ / "pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THAT(Refused(pipe), HasSubstr("no regular file"));
  Write("");
  EXPECT_THAT(Refused(path_), HasSubstr("model.vocab_size is missing"));
  Write("# nothing but a comment\n");
  EXPECT_THAT(Refused(path_), HasSubstr("data.train is missing"));
  Write("[model, data]");
  EXPECT_THAT(Refused(path_), HasSubstr(":1:1: a config is a map of sections"));
  Write("just words");
  EXPECT_THAT(Refused(path_), HasSubstr(":1:1: a config is a map of sections"));
  Write(std::string("\x89HDF\r\n\x1a\n\0\0\0", 11));
  EXPECT_THAT(Refused(path_), HasSubstr(":1:1: byte 0x89 is not text"));
  Write(std::string("\xff\xfem\0o\0", 6));
  EXPECT_THAT(Refused(path_), HasSubstr(":1:1: byte 0xff is not text"));
  Write(std::string("a: \0", 4));
  EXPECT_THAT(Refused(path_), HasSubstr(":1:4: byte 0x00 is not text"));
}

std::string Repeat(const std::string& text, size_t bytes) {
  std::string all;
  while (all.size() + text.size() <= bytes) all += text;
  return all;
}

// Inputs that are small on disk and large to walk, or long where the parser looks ahead.
TEST_F(BadConfig, HostileTextsEndSoon) {
  constexpr size_t kMiB = 1 << 20;
  const std::string texts[] = {
      Repeat("[", kMiB),
      Repeat("{", kMiB),
      Repeat("- ", kMiB),
      Repeat("? ", kMiB),
      Repeat("a: ", kMiB),
      Repeat("a: 1\n", kMiB),
      Repeat("{a: ", kMiB),
      Repeat("[a, ", kMiB),
      Repeat(":", kMiB),
      Repeat("&", kMiB),
      Repeat("&a ", kMiB),
      Repeat("!", kMiB),
      Repeat("!a ", kMiB),
      Repeat("---\n", kMiB),
      Repeat("%YAML 1.2\n", kMiB),
      Repeat("'", kMiB - 1),
      Repeat("\"", kMiB - 1),
      Repeat("\\", kMiB),
      Repeat("|\n", kMiB),
      Repeat(">", kMiB),
      Repeat("#", kMiB),
      Repeat("\n", kMiB),
      Repeat(" ", kMiB),
      Repeat("x", kMiB),
      "x: \"" + Repeat("\\x", kMiB - 5),
      "x: |\n" + Repeat(" a\n", kMiB - 5),
      "x: >\n" + Repeat(" a\n\n", kMiB - 5),
      "x: [" + Repeat("1, ", kMiB - 5),
      "x: {" + Repeat("a, ", kMiB - 5),
      "run_dir: " + Repeat("a/", kMiB - 10),
      "model: {pattern: " + Repeat("m ", kMiB - 20) + "}",
      "model: {d_model: " + Repeat("9", kMiB - 20) + "}",
      "optimizer: {lr: 0." + Repeat("0", kMiB - 40) + "1}",
      "data: {train: [" + Repeat("{path: x}, ", kMiB - 20) + "]}",
      // The billion laughs.
      "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: &d [*c, *c, *c]\n",
      "a: &a [*a]\n",
      "a: *nobody\n",
  };
  for (const std::string& text : texts) {
    SCOPED_TRACE(text.substr(0, 40));
    Write(text);
    EXPECT_NE(Refused(path_), "");
  }
  Write(Repeat("# too large\n", kMiB) + "# too large\n");
  EXPECT_THAT(Refused(path_), HasSubstr("at most 1048576"));
}

TEST_F(BadConfig, NumbersThatFloat32CannotHold) {
  for (const auto& [word, reason] : std::vector<std::pair<std::string, std::string>>{
           {"optimizer.eps=1e-46", "is 0 in float32"},
           {"optimizer.eps=1e-40", "is 0 in float32"},
           {"optimizer.lr=1e-50", "is 0 in float32"},
           {"optimizer.lr=1e39", "is infinite in float32"},
           {"optimizer.weight_decay=1e-60", "is 0 in float32"},
           {"optimizer.weight_decay=3.5e38", "is infinite in float32"},
           {"optimizer.clip=1e-46", "is 0 in float32"},
           {"optimizer.betas=[0.9, 0.9999999999]", "is 1 in float32"},
           {"optimizer.betas=[1e-50, 0.9]", "is 0 in float32"},
           {"schedule.min_lr_ratio=1e-99", "is 0 in float32"},
           {"model.norm_eps=1e-46", "is 0 in float32"},
           {"model.attention.rope_theta=1e300", "is infinite in float32"},
           {"model.moe.aux_loss=1e40", "is infinite in float32"},
           {"model.moe.z_loss=1e-46", "is 0 in float32"},
           {"model.init.std=1e-46", "is 0 in float32"}}) {
    const auto config =
        LoadConfig(KRAIT_SOURCE_DIR "/configs/models/jamba-v0.1.yaml", {word}, ConfigUse::kPlan, 1);
    EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig) << word;
    EXPECT_THAT(MessageOf(config.status()),
                ::testing::AllOf(HasSubstr(word.substr(0, word.find('='))), HasSubstr(reason)));
  }
  for (const char* word :
       {"optimizer.eps=1.2e-38", "optimizer.lr=3.4e38", "optimizer.weight_decay=0",
        "optimizer.clip=0", "optimizer.betas=[0, 0.9999999]",
        "data.train=[{path: a.h5, weight: 1e-300}]", "schedule.min_lr_ratio=1"}) {
    const auto config =
        LoadConfig(KRAIT_SOURCE_DIR "/configs/models/jamba-v0.1.yaml", {word}, ConfigUse::kPlan, 1);
    EXPECT_TRUE(config.ok()) << config.status();
  }
}

TEST_F(BadConfig, APatternThatLosesAKindIsRefused) {
  const auto refused = [&](const std::string& pattern) {
    std::string text;
    int line = 0;
    for (const char* valid : kValid) {
      ++line;
      if (line == 6) absl::StrAppend(&text, "  pattern: ", pattern, "\n");
      if (line != 6 && line != 10) absl::StrAppend(&text, valid, "\n");
    }
    Write(text);
    return Refused(path_);
  };
  EXPECT_THAT(refused("m m m m m m m m a"),
              HasSubstr("bad.yaml:6:12: model.pattern has 9 words for 8 layers: no layer has "
                        "attention"));
  EXPECT_THAT(refused("a a a a a a a a m"), HasSubstr("no layer has Mamba"));
  EXPECT_THAT(refused("m a m a m a m a mE"), HasSubstr("no layer has experts"));
}

TEST_F(BadConfig, SizesBeyondReason) {
  const auto refused = [](const std::vector<std::string>& words) {
    const auto config =
        LoadConfig(KRAIT_SOURCE_DIR "/configs/models/jamba-v0.1.yaml", words, ConfigUse::kPlan, 1);
    EXPECT_FALSE(config.ok());
    return MessageOf(config.status());
  };
  EXPECT_THAT(refused({"model.d_model=1Mi", "model.mlp.d_ff=16Mi", "model.n_layers=1000"}),
              HasSubstr("parameters; at most 1000T are accepted"));
  EXPECT_THAT(refused({"model.moe.experts=4096", "model.n_layers=1000", "model.moe.every=1",
                       "model.moe.offset=0", "model.mlp.d_ff=1"}),
              HasSubstr("weight tensors"));
  EXPECT_THAT(refused({"data.seq_len=16Mi", "train.micro_batch=1Mi", "train.batch_tokens=16Ti"}),
              HasSubstr("train.batch_tokens"));
  EXPECT_THAT(refused({"data.seq_len=16Mi", "train.micro_batch=64", "train.batch_tokens=1Gi"}),
              HasSubstr("tokens of one pass"));
  EXPECT_THAT(refused({"train.steps=1T", "train.batch_tokens=8192Gi"}),
              HasSubstr("train.steps x train.batch_tokens is too large"));
}

}  // namespace
}  // namespace krait
