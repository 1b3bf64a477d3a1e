// The resolved config as text, what a resume compares, suggestions for every key, mutated texts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "paths.h"
#include "trainer/config/config.h"
#include "trainer/config/config_testing.h"

namespace krait {
namespace {

using ::testing::HasSubstr;

// Every setting away from its default.
constexpr char kEverything[] = R"(
run_dir: "/tmp/a run \"x\" \\ é"
model:
  vocab_size: 300
  d_model: 48
  n_layers: 6
  tie_embeddings: true
  pad_token: 299
  norm_eps: 1.5e-5
  pattern: "m aE a mE mE m"
  attention: {heads: 6, kv_heads: 2, head_dim: 10, rope_theta: 12345.678}
  mamba: {d_state: 7, d_conv: 3, expand: 3, dt_rank: 5, inner_norms: false, conv_bias: false, proj_bias: true}
  mlp: {d_ff: 100}
  moe: {experts: 5, top_k: 3, d_ff: 60, renormalize: true, aux_loss: 0.0123, z_loss: 1e-3, aux_pool: layer,
        aux_sequences: 5}
  init: {std: 0.013, scheme: hf}
parallel: {data: 1, expert_slack: 1.7}
data:
  train: [{path: a.h5, weight: 0.1}, {path: "b,c: {d}.h5", weight: 3}]
  validation: [{path: v.h5}]
  seq_len: 96
  reset_at_documents: false
train:
  device: cpu
  precision: bf16
  deterministic: false
  steps: 777
  batch_tokens: 960
  micro_batch: 5
  seed: 9223372036854775807
  recompute: mixers
  hang_timeout: 12.5
optimizer: {name: adamw, lr: 0.00123, betas: [0.85, 0.99], eps: 1e-9, weight_decay: 0.07, clip: 0, moments: bf16}
schedule: {name: wsd, warmup_steps: 11, min_lr_ratio: 0.3, decay_steps: 99, decay: linear}
checkpoint: {every: 7, keep: 2, keep_every: 21, async: false, dir: elsewhere}
log: {every: 3, tensorboard: false}
evaluation: {every: 9, tokens: 480}
)";

void ExpectSame(const RunConfig& a, const RunConfig& b) {
  const auto same_sources = [](const std::vector<SourceSpec>& x, const std::vector<SourceSpec>& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), [](const auto& p, const auto& q) {
      return p.path == q.path && p.weight == q.weight;
    });
  };
  EXPECT_EQ(a.run_dir, b.run_dir);
  EXPECT_EQ(a.model.vocab_size, b.model.vocab_size);
  EXPECT_EQ(a.model.d_model, b.model.d_model);
  EXPECT_EQ(a.model.n_layers, b.model.n_layers);
  EXPECT_EQ(a.model.tie_embeddings, b.model.tie_embeddings);
  EXPECT_EQ(a.model.pad_token, b.model.pad_token);
  EXPECT_EQ(a.model.norm_eps, b.model.norm_eps);
  EXPECT_EQ(a.model.attention.heads, b.model.attention.heads);
  EXPECT_EQ(a.model.attention.kv_heads, b.model.attention.kv_heads);
  EXPECT_EQ(a.model.attention.head_dim, b.model.attention.head_dim);
  EXPECT_EQ(a.model.attention.rope_theta, b.model.attention.rope_theta);
  EXPECT_EQ(a.model.mamba.d_state, b.model.mamba.d_state);
  EXPECT_EQ(a.model.mamba.d_conv, b.model.mamba.d_conv);
  EXPECT_EQ(a.model.mamba.expand, b.model.mamba.expand);
  EXPECT_EQ(a.model.mamba.d_inner, b.model.mamba.d_inner);
  EXPECT_EQ(a.model.mamba.dt_rank, b.model.mamba.dt_rank);
  EXPECT_EQ(a.model.mamba.inner_norms, b.model.mamba.inner_norms);
  EXPECT_EQ(a.model.mamba.conv_bias, b.model.mamba.conv_bias);
  EXPECT_EQ(a.model.mamba.proj_bias, b.model.mamba.proj_bias);
  EXPECT_EQ(a.model.mlp_d_ff, b.model.mlp_d_ff);
  EXPECT_EQ(a.model.moe.experts, b.model.moe.experts);
  EXPECT_EQ(a.model.moe.top_k, b.model.moe.top_k);
  EXPECT_EQ(a.model.moe.d_ff, b.model.moe.d_ff);
  EXPECT_EQ(a.model.moe.renormalize, b.model.moe.renormalize);
  EXPECT_EQ(a.model.moe.aux_loss, b.model.moe.aux_loss);
  EXPECT_EQ(a.model.moe.z_loss, b.model.moe.z_loss);
  EXPECT_EQ(a.model.moe.aux_pool, b.model.moe.aux_pool);
  EXPECT_EQ(a.model.moe.aux_sequences, b.model.moe.aux_sequences);
  EXPECT_EQ(a.model.init_std, b.model.init_std);
  EXPECT_EQ(a.model.init_scheme, b.model.init_scheme);
  EXPECT_TRUE(std::equal(
      a.model.sublayers.begin(), a.model.sublayers.end(), b.model.sublayers.begin(),
      b.model.sublayers.end(),
      [](const Sublayer& x, const Sublayer& y) { return x.kind == y.kind && x.layer == y.layer; }));
  EXPECT_EQ(a.parallel.tensor, b.parallel.tensor);
  EXPECT_EQ(a.parallel.expert, b.parallel.expert);
  EXPECT_EQ(a.parallel.data, b.parallel.data);
  EXPECT_EQ(a.parallel.expert_slack, b.parallel.expert_slack);
  EXPECT_EQ(a.parallel.reduce, b.parallel.reduce);
  EXPECT_TRUE(same_sources(a.data.train, b.data.train));
  EXPECT_TRUE(same_sources(a.data.validation, b.data.validation));
  EXPECT_EQ(a.data.seq_len, b.data.seq_len);
  EXPECT_EQ(a.data.reset_at_documents, b.data.reset_at_documents);
  EXPECT_EQ(a.train.device, b.train.device);
  EXPECT_EQ(a.train.precision, b.train.precision);
  EXPECT_EQ(a.train.deterministic, b.train.deterministic);
  EXPECT_EQ(a.train.steps, b.train.steps);
  EXPECT_EQ(a.train.batch_tokens, b.train.batch_tokens);
  EXPECT_EQ(a.train.micro_batch, b.train.micro_batch);
  EXPECT_EQ(a.train.seed, b.train.seed);
  EXPECT_EQ(a.train.recompute, b.train.recompute);
  EXPECT_EQ(a.train.hang_timeout, b.train.hang_timeout);
  EXPECT_EQ(a.optimizer.lr, b.optimizer.lr);
  EXPECT_EQ(a.optimizer.beta1, b.optimizer.beta1);
  EXPECT_EQ(a.optimizer.beta2, b.optimizer.beta2);
  EXPECT_EQ(a.optimizer.eps, b.optimizer.eps);
  EXPECT_EQ(a.optimizer.weight_decay, b.optimizer.weight_decay);
  EXPECT_EQ(a.optimizer.clip, b.optimizer.clip);
  EXPECT_EQ(a.optimizer.moments, b.optimizer.moments);
  EXPECT_EQ(a.schedule.kind, b.schedule.kind);
  EXPECT_EQ(a.schedule.warmup_steps, b.schedule.warmup_steps);
  EXPECT_EQ(a.schedule.min_lr_ratio, b.schedule.min_lr_ratio);
  EXPECT_EQ(a.schedule.decay_steps, b.schedule.decay_steps);
  EXPECT_EQ(a.checkpoint.every, b.checkpoint.every);
  EXPECT_EQ(a.checkpoint.keep, b.checkpoint.keep);
  EXPECT_EQ(a.checkpoint.keep_every, b.checkpoint.keep_every);
  EXPECT_EQ(a.checkpoint.async, b.checkpoint.async);
  EXPECT_EQ(a.checkpoint.dir, b.checkpoint.dir);
  EXPECT_EQ(a.log.every, b.log.every);
  EXPECT_EQ(a.log.tensorboard, b.log.tensorboard);
  EXPECT_EQ(a.evaluation.every, b.evaluation.every);
  EXPECT_EQ(a.evaluation.tokens, b.evaluation.tokens);
}

// Of runs: sweep_test has the sweeps, in ablations/ beside the configs that they vary.
std::vector<std::string> ShippedConfigs() {
  std::vector<std::string> paths;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(KRAIT_SOURCE_DIR "/configs")) {
    const std::filesystem::path& path = entry.path();
    const bool sweep = path.parent_path().filename() == "ablations" &&
                       !path.filename().string().starts_with("recall-");
    if (path.extension() == ".yaml" && !sweep) paths.push_back(path.string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

TEST(Config, ResolvedTextReadsBackToTheSame) {
  const RunConfig everything = MustParse(kEverything);
  EXPECT_EQ(everything.run_dir, "/tmp/a run \"x\" \\ é");
  EXPECT_EQ(everything.data.train[1].path, "b,c: {d}.h5");
  EXPECT_EQ(everything.optimizer.clip, 0);
  EXPECT_EQ(everything.model.attention.rope_theta, 12345.678);
  ExpectSame(everything, MustParse(everything.ToYaml()));
  EXPECT_EQ(MustParse(everything.ToYaml()).ToYaml(), everything.ToYaml());
  EXPECT_THAT(everything.ToYaml(), HasSubstr("lr: 0.00123\n"));

  ASSERT_GE(ShippedConfigs().size(), 7U);
  for (const std::string& path : ShippedConfigs()) {
    SCOPED_TRACE(path);
    const auto config = LoadConfig(path, {}, ConfigUse::kPlan, /*ranks=*/0);
    ASSERT_TRUE(config.ok()) << config.status();
    ExpectSame(*config, MustParse(config->ToYaml(), {}, ConfigUse::kPlan, /*ranks=*/0));
  }
}

TEST(Config, TheQuickstartTrainsAsItIs) {
  const auto config =
      LoadConfig(KRAIT_SOURCE_DIR "/configs/quickstart.yaml", {}, ConfigUse::kTrain, 1);
  ASSERT_TRUE(config.ok()) << config.status();
  for (const SublayerKind kind :
       {SublayerKind::kAttention, SublayerKind::kMamba, SublayerKind::kMlp, SublayerKind::kMoe}) {
    EXPECT_TRUE(config->model.Has(kind)) << Name(kind);
  }
}

// The keys of a resolved config, dotted, and their lines.
std::vector<std::pair<std::string, size_t>> KeysOf(const std::vector<std::string>& lines) {
  std::vector<std::pair<std::string, size_t>> keys;
  std::vector<std::string> open;
  for (size_t i = 0; i < lines.size(); ++i) {
    const size_t indent = lines[i].find_first_not_of(' ');
    open.resize(indent / 2);
    open.push_back(lines[i].substr(indent, lines[i].find(':') - indent));
    std::string dotted;
    for (const std::string& part : open) dotted += (dotted.empty() ? "" : ".") + part;
    keys.emplace_back(dotted, i);
  }
  return keys;
}

TEST(Config, EveryKeyMisspeltByOneLetterIsSuggested) {
  std::vector<std::string> lines;
  std::string text = MustParse(kEverything).ToYaml();
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  std::mt19937 random(7);
  int tried = 0;
  for (const auto& [dotted, line] : KeysOf(lines)) {
    const std::string key = dotted.substr(dotted.rfind('.') + 1);
    const size_t at = lines[line].find_first_not_of(' ');
    for (size_t i = 0; i < key.size(); ++i) {
      // A letter replaced, left out, doubled.
      for (int edit = 0; edit < 3; ++edit) {
        if (edit == 1 && key.size() == 1) continue;
        std::string wrong = key;
        if (edit == 0) {
          wrong[i] = static_cast<char>('a' + random() % 26);
        } else if (edit == 1) {
          wrong.erase(i, 1);
        } else {
          wrong.insert(i, 1, key[i]);
        }
        if (wrong == key) continue;
        std::vector<std::string> changed = lines;
        changed[line] = changed[line].substr(0, at) + wrong + changed[line].substr(at + key.size());
        std::string broken;
        for (const std::string& l : changed) broken += l + "\n";
        const std::string place =
            "test.yaml:" + std::to_string(line + 1) + ":" + std::to_string(at + 1) + ": ";
        EXPECT_THAT(ErrorOf(Parse(broken)), HasSubstr(place + "unknown key"));
        EXPECT_THAT(ErrorOf(Parse(broken)), HasSubstr("did you mean " + dotted + "?"))
            << wrong << " for " << dotted;
        ++tried;
      }
    }
  }
  EXPECT_GT(tried, 1000);
}

TEST(Config, SettingsOfAbsentKindsDoNotMatter) {
  const RunConfig a = MustParse(kSmall, {"model.moe.experts=4", "model.moe.every=none"});
  ExpectSame(a, MustParse(kSmall));
  ExpectSame(MustParse(kSmall, {"model.mixer.ratio=1:0", "model.mamba.d_state=8"}),
             MustParse(kSmall, {"model.mixer.ratio=1:0"}));
}

TEST(CompareForResume, SortsKeysByWhatAChangeNeeds) {
  using Kind = ConfigDifference::Kind;
  const RunConfig before = MustParse(kSmall);
  EXPECT_TRUE(CompareForResume(before, before).empty());
  const std::pair<const char*, Kind> cases[] = {
      {"model.vocab_size=257", Kind::kRefused},
      {"model.mlp.d_ff=130", Kind::kRefused},
      {"model.pattern=m a", Kind::kRefused},
      {"model.attention.rope_theta=10000", Kind::kRefused},
      {"data.seq_len=256", Kind::kNeedsAllow},
      {"data.train=[{path: y.h5}]", Kind::kNeedsAllow},
      {"data.reset_at_documents=false", Kind::kNeedsAllow},
      {"train.batch_tokens=2Ki", Kind::kNeedsAllow},
      {"train.seed=1", Kind::kNeedsAllow},
      {"train.steps=9000", Kind::kApplies},
      {"optimizer.lr=1e-3", Kind::kApplies},
      {"optimizer.betas=[0.9, 0.99]", Kind::kApplies},
      {"schedule.name=linear", Kind::kApplies},
  };
  for (const auto& [word, kind] : cases) {
    const std::string key = std::string(word).substr(0, std::string(word).find('='));
    const auto differences = CompareForResume(before, MustParse(kSmall, {word}));
    const auto it = std::find_if(differences.begin(), differences.end(),
                                 [&key](const ConfigDifference& d) { return d.key == key; });
    ASSERT_NE(it, differences.end()) << word;
    EXPECT_EQ(it->kind, kind) << word;
    EXPECT_NE(it->before, it->after);
  }
  const auto lr = CompareForResume(before, MustParse(kSmall, {"optimizer.lr=1e-3"}));
  ASSERT_EQ(lr.size(), 1U);
  EXPECT_EQ(lr[0].before, "3e-4");
  EXPECT_EQ(lr[0].after, "0.001");
  EXPECT_EQ(CompareForResume(before, MustParse(kSmall, {"train.steps=9000"})).size(), 1U);
  // More steps move the end of a decay given as a share.
  EXPECT_EQ(CompareForResume(MustParse(kSmall, {"schedule.name=wsd"}),
                             MustParse(kSmall, {"schedule.name=wsd", "train.steps=9000"}))
                .size(),
            2U);
  EXPECT_TRUE(
      CompareForResume(
          before, MustParse(kSmall, {"log.every=3", "checkpoint.keep=9", "evaluation.every=2",
                                     "parallel.expert_slack=2", "train.micro_batch=4", "run_dir=x",
                                     "train.recompute=layer"}))
          .empty());
}

TEST(AllowsChange, WholeKeyLastPartOrData) {
  EXPECT_TRUE(AllowsChange("data.seq_len", "data.seq_len"));
  EXPECT_TRUE(AllowsChange("seq_len", "data.seq_len"));
  EXPECT_TRUE(AllowsChange("data", "data.seq_len"));
  EXPECT_TRUE(AllowsChange("batch_tokens", "train.batch_tokens"));
  EXPECT_FALSE(AllowsChange("seed", "data.seq_len"));
  EXPECT_FALSE(AllowsChange("seq", "data.seq_len"));
  EXPECT_FALSE(AllowsChange("", "data.seq_len"));
  // A section that holds more than what may change at all is no leave for its parts.
  EXPECT_FALSE(AllowsChange("train", "train.seed"));
  EXPECT_FALSE(AllowsChange("train", "train.batch_tokens"));
}

TEST(ConfigFuzz, MutatedBytesNeverCrashOrHang) {
  const std::string valid = kEverything;
  const std::string spice = "{}[]:,&*!|>'\"%@`#?-\n \t\\0x1e9_.\xff\xc3\x00~<";
  std::mt19937 random(20240607);
  const auto below = [&random](size_t n) { return static_cast<size_t>(random()) % n; };
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = valid;
    const size_t edits = 1 + below(4);
    for (size_t e = 0; e < edits && !text.empty(); ++e) {
      const size_t at = below(text.size());
      switch (below(5)) {
        case 0:
          text[at] = static_cast<char>(random() & 0xFF);
          break;
        case 1:
          text[at] = spice[below(spice.size())];
          break;
        case 2:
          text.insert(at, 1, spice[below(spice.size())]);
          break;
        case 3:
          text.erase(at, 1 + below(20));
          break;
        default:
          text.insert(at, text.substr(below(text.size()), below(40)));
          break;
      }
    }
    const auto config = Parse(text);
    if (config.ok()) {
      ++accepted;
      ExpectSame(*config, MustParse(config->ToYaml()));
    } else {
      EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig);
      EXPECT_NE(MessageOf(config.status()), "");
    }
  }
  // Some mutations hit comments, digits or names and stay valid.
  EXPECT_GT(accepted, 40);
  EXPECT_LT(accepted, 3500);
}

}  // namespace
}  // namespace krait
