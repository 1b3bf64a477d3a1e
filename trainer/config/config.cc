#include "trainer/config/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/number.h"
#include "trainer/config/config_check.h"
#include "trainer/config/config_reader.h"
#include "trainer/config/config_tree.h"

namespace krait {
namespace {

constexpr double kNoMax = std::numeric_limits<double>::max();
constexpr Range kPositive = {0, kNoMax, /*min_open=*/true};
constexpr Range kNotNegative = {0, kNoMax};
constexpr Range kShare = {0, 1};
// Far above any model, and small enough for every product of sizes to fit in 64 bits.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 1000;
constexpr int64_t kMaxPeriod = 1000;
constexpr int64_t kMaxSteps = 1'000'000'000'000;
constexpr int64_t kMaxTokens = 1'000'000'000'000'000;

// "a:b" of model.mixer.ratio.
std::optional<std::pair<int64_t, int64_t>> ParseRatio(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos) return std::nullopt;
  const auto attention = ParseInteger(text.substr(0, colon));
  const auto mamba = ParseInteger(text.substr(colon + 1));
  if (!attention.has_value() || !mamba.has_value()) return std::nullopt;
  if (*attention < 0 || *mamba < 0 || *attention + *mamba == 0) return std::nullopt;
  if (*attention > kMaxPeriod || *mamba > kMaxPeriod) return std::nullopt;
  return std::pair(*attention, *mamba);
}

std::vector<LayerKinds> LayersFromPattern(const std::string& pattern, int64_t n_layers,
                                          ConfigReader* reader) {
  if (!reader->Good({"model.pattern", "model.n_layers"})) return {};
  absl::Status status;
  if (pattern.size() <= 4 * kMaxLayers) {
    auto layers = ParsePattern(pattern, n_layers);
    if (layers.ok()) return *std::move(layers);
    status = layers.status();
  } else {
    status = Error(ExitCode::kConfig, "more words than a model can have layers");
  }
  reader->Fail("model.pattern", absl::StrCat("model.pattern: ", MessageOf(status)));
  return {};
}

// The layers by model.pattern, or by model.mixer and model.moe; empty after reporting an error.
std::vector<LayerKinds> ReadLayers(int64_t n_layers, ConfigReader* reader) {
  std::string pattern;
  std::string ratio = "1:7";
  int64_t mixer_offset = -1;
  int64_t every = 0;
  int64_t moe_offset = -1;
  reader->String("model.pattern", &pattern);
  reader->String("model.mixer.ratio", &ratio);
  reader->Integer("model.mixer.offset", &mixer_offset, 0, kMaxPeriod);
  reader->IntegerOr("model.moe.every", "none", 0, &every, 1, kMaxPeriod);
  reader->Integer("model.moe.offset", &moe_offset, 0, kMaxPeriod);
  if (reader->Has("model.pattern")) return LayersFromPattern(pattern, n_layers, reader);

  const auto counts = ParseRatio(ratio);
  if (!counts.has_value() && reader->Good({"model.mixer.ratio"})) {
    reader->Fail("model.mixer.ratio",
                 absl::StrCat("model.mixer.ratio: ", Quote(ratio),
                              " is no ratio; expected \"ATTENTION:MAMBA\" such as \"1:7\", each "
                              "from 0 to ",
                              kMaxPeriod, ", not both 0"));
  }
  std::vector<LayerKinds> layers;
  if (!reader->Good({"model.n_layers", "model.mixer.ratio", "model.mixer.offset"})) return layers;
  const auto attention = AttentionLayers(counts->first, counts->second, mixer_offset, n_layers);
  if (!attention.ok()) {
    const char* key =
        reader->Has("model.mixer.offset") ? "model.mixer.offset" : "model.mixer.ratio";
    reader->Fail(key, absl::StrCat("model.mixer: ", MessageOf(attention.status())));
  }
  if (!reader->Good({"model.moe.every", "model.moe.offset"})) return layers;
  const auto moe = MoeLayers(every, every == 0 ? -1 : moe_offset, n_layers);
  if (!moe.ok()) {
    reader->Fail("model.moe.offset", absl::StrCat("model.moe: ", MessageOf(moe.status())));
  }
  if (!attention.ok() || !moe.ok()) return layers;
  for (size_t i = 0; i < attention->size(); ++i) layers.push_back({(*attention)[i], (*moe)[i]});
  return layers;
}

void ReadAttention(ModelSpec* model, ConfigReader* reader) {
  AttentionSpec* attention = &model->attention;
  reader->Integer("model.attention.heads", &attention->heads, 1, kMaxWidth);
  reader->Integer("model.attention.kv_heads", &attention->kv_heads, 1, kMaxWidth);
  reader->Integer("model.attention.head_dim", &attention->head_dim, 1, kMaxWidth);
  reader->Number("model.attention.rope_theta", &attention->rope_theta, kNotNegative);
  if (model->Has(SublayerKind::kAttention)) {
    reader->Require("model.attention.heads", "the model has attention layers");
  }
  if (attention->kv_heads == 0) attention->kv_heads = attention->heads;
  if (attention->head_dim == 0 && attention->heads > 0) {
    attention->head_dim = model->d_model / attention->heads;
  }
}

void ReadMamba(ModelSpec* model, ConfigReader* reader) {
  MambaSpec* mamba = &model->mamba;
  reader->Integer("model.mamba.d_state", &mamba->d_state, 1, 256);
  reader->Integer("model.mamba.d_conv", &mamba->d_conv, 1, 8);
  reader->Integer("model.mamba.expand", &mamba->expand, 1, 64);
  reader->IntegerOr("model.mamba.dt_rank", "auto", 0, &mamba->dt_rank, 1, kMaxWidth);
  reader->Bool("model.mamba.inner_norms", &mamba->inner_norms);
  reader->Bool("model.mamba.conv_bias", &mamba->conv_bias);
  reader->Bool("model.mamba.proj_bias", &mamba->proj_bias);
  mamba->d_inner = mamba->expand * model->d_model;
  if (mamba->dt_rank == 0) mamba->dt_rank = (model->d_model + 15) / 16;
}

void ReadMoe(ModelSpec* model, ConfigReader* reader) {
  MoeSpec* moe = &model->moe;
  reader->Integer("model.moe.experts", &moe->experts, 1, 4096);
  reader->Integer("model.moe.top_k", &moe->top_k, 1, 4096);
  reader->Integer("model.moe.d_ff", &moe->d_ff, 1, 16 * kMaxWidth);
  reader->Bool("model.moe.renormalize", &moe->renormalize);
  reader->Number("model.moe.aux_loss", &moe->aux_loss, kNotNegative);
  reader->Number("model.moe.z_loss", &moe->z_loss, kNotNegative);
  reader->Enum("model.moe.aux_pool", &moe->aux_pool,
               {{"model", AuxPool::kModel}, {"layer", AuxPool::kLayer}});
  if (moe->d_ff == 0) moe->d_ff = model->mlp_d_ff;
}

void ReadModel(ModelSpec* model, ConfigReader* reader) {
  reader->Integer("model.vocab_size", &model->vocab_size, 2, 1 << 24);
  reader->Integer("model.d_model", &model->d_model, 1, kMaxWidth);
  reader->Integer("model.n_layers", &model->n_layers, 1, kMaxLayers);
  reader->Bool("model.tie_embeddings", &model->tie_embeddings);
  reader->Number("model.norm_eps", &model->norm_eps, kPositive);
  reader->Integer("model.mlp.d_ff", &model->mlp_d_ff, 1, 16 * kMaxWidth);
  for (const char* key :
       {"model.vocab_size", "model.d_model", "model.n_layers", "model.mlp.d_ff"}) {
    reader->Require(key);
  }
  model->sublayers = MakeSublayers(ReadLayers(model->n_layers, reader));
  ReadAttention(model, reader);
  ReadMamba(model, reader);
  ReadMoe(model, reader);
  reader->Number("model.init.std", &model->init_std, kPositive);
  reader->Enum("model.init.scheme", &model->init_scheme,
               {{"mamba", InitScheme::kMamba}, {"hf", InitScheme::kHf}});
  if (reader->complete()) CheckModel(*model, reader);

  // Settings of kinds that the model lacks are checked above and then dropped, so that equal models
  // have equal specs.
  if (!model->Has(SublayerKind::kAttention)) model->attention = {};
  if (!model->Has(SublayerKind::kMamba)) model->mamba = {};
  if (!model->Has(SublayerKind::kMoe)) model->moe = {};
}

void ReadData(DataConfig* data, ConfigUse use, ConfigReader* reader) {
  reader->Sources("data.train", &data->train);
  reader->Sources("data.validation", &data->validation);
  reader->Integer("data.seq_len", &data->seq_len, 2, 1 << 24);
  reader->Bool("data.reset_at_documents", &data->reset_at_documents);
  if (use == ConfigUse::kPlan) return;
  reader->Require("data.train", "give the token files, such as [{path: data/train.h5}]");
  if (data->train.empty() && reader->Good({"data.train"})) {
    reader->Fail("data.train", "data.train is empty; training needs at least one token file");
  }
}

void ReadTrain(TrainConfig* train, ConfigUse use, ConfigReader* reader) {
  reader->Enum("train.device", &train->device,
               {{"auto", DevicePreference::kAuto},
                {"cpu", DevicePreference::kCpu},
                {"cuda", DevicePreference::kCuda}});
  reader->Enum(
      "train.precision", &train->precision,
      {{"auto", Precision::kAuto}, {"fp32", Precision::kFp32}, {"bf16", Precision::kBf16}});
  reader->Bool("train.deterministic", &train->deterministic);
  reader->Integer("train.steps", &train->steps, 1, kMaxSteps);
  reader->Integer("train.batch_tokens", &train->batch_tokens, 1, kMaxTokens);
  reader->Integer("train.micro_batch", &train->micro_batch, 1, 1 << 20);
  auto seed = static_cast<int64_t>(train->seed);
  reader->Integer("train.seed", &seed, 0);
  train->seed = static_cast<uint64_t>(seed);
  reader->Enum("train.recompute", &train->recompute,
               {{"none", Recompute::kNone},
                {"norms", Recompute::kNorms},
                {"mixers", Recompute::kMixers},
                {"layer", Recompute::kLayer}});
  reader->Number("train.hang_timeout", &train->hang_timeout, kPositive);

  int64_t tokens = 0;
  reader->Integer("train.tokens", &tokens, 1, kMaxTokens);
  if (tokens > 0) train->steps = (tokens + train->batch_tokens - 1) / train->batch_tokens;
  if (use == ConfigUse::kTrain && !reader->Has("train.tokens")) {
    reader->Require("train.steps", "give train.steps or train.tokens");
  }
}

void ReadOptimizer(OptimizerConfig* optimizer, ConfigReader* reader) {
  int adamw = 0;
  reader->Enum("optimizer.name", &adamw, {{"adamw", 0}});
  reader->Number("optimizer.lr", &optimizer->lr, kPositive);
  reader->NumberList("optimizer.betas", {&optimizer->beta1, &optimizer->beta2},
                     {0, 1, /*min_open=*/false, /*max_open=*/true});
  reader->Number("optimizer.eps", &optimizer->eps, kPositive);
  reader->Number("optimizer.weight_decay", &optimizer->weight_decay, kNotNegative);
  reader->Number("optimizer.clip", &optimizer->clip, kNotNegative);
  reader->Enum("optimizer.moments", &optimizer->moments,
               {{"fp32", MomentDType::kFp32}, {"bf16", MomentDType::kBf16}});
}

void ReadSchedule(ScheduleConfig* schedule, int64_t steps, ConfigReader* reader) {
  reader->Enum("schedule.name", &schedule->kind,
               {{"cosine", ScheduleKind::kCosine},
                {"wsd", ScheduleKind::kWsd},
                {"linear", ScheduleKind::kLinear},
                {"constant", ScheduleKind::kConstant}});
  reader->Integer("schedule.warmup_steps", &schedule->warmup_steps, 0, kMaxSteps);
  reader->Number("schedule.min_lr_ratio", &schedule->min_lr_ratio, kShare);
  int linear = 0;
  reader->Enum("schedule.decay", &linear, {{"linear", 0}});
  // Below 1 a share of the steps, else a count.
  double decay = 0.1;
  reader->Number("schedule.decay_steps", &decay, {0, static_cast<double>(kMaxSteps)});
  if (decay < 1) {
    schedule->decay_steps = std::llround(decay * static_cast<double>(steps));
  } else {
    schedule->decay_steps = std::llround(decay);
    if (decay != std::floor(decay)) {
      reader->Fail("schedule.decay_steps",
                   absl::StrCat("schedule.decay_steps: ", PrintNumber(decay),
                                " is neither a share of the steps below 1 nor a whole number"));
    }
  }
}

absl::StatusOr<RunConfig> Read(const ConfigNode& root, bool complete, const std::string& path,
                               ConfigUse use, int64_t ranks, ConfigErrors* errors) {
  ConfigReader reader(root, complete, errors);
  RunConfig config;
  config.path = path;
  config.run_dir = absl::StrCat("runs/", std::filesystem::path(path).stem().string());
  reader.Find("base");  // consumed before, and known to suggestions
  reader.String("run_dir", &config.run_dir);
  ReadModel(&config.model, &reader);
  reader.Integer("parallel.tensor", &config.parallel.tensor, 1, 1 << 20);
  reader.Integer("parallel.expert", &config.parallel.expert, 1, 1 << 20);
  reader.IntegerOr("parallel.data", "auto", 0, &config.parallel.data, 1, 1 << 20);
  reader.Number("parallel.expert_slack", &config.parallel.expert_slack, {1, 1e6});
  ReadData(&config.data, use, &reader);
  ReadTrain(&config.train, use, &reader);
  ReadOptimizer(&config.optimizer, &reader);
  ReadSchedule(&config.schedule, config.train.steps, &reader);
  reader.Integer("checkpoint.every", &config.checkpoint.every, 1);
  reader.Integer("checkpoint.keep", &config.checkpoint.keep, 2);
  reader.Bool("checkpoint.async", &config.checkpoint.async);
  config.checkpoint.dir = config.run_dir + "/checkpoints";
  reader.String("checkpoint.dir", &config.checkpoint.dir);
  reader.Integer("log.every", &config.log.every, 1);
  reader.Bool("log.tensorboard", &config.log.tensorboard);
  reader.Integer("evaluation.every", &config.evaluation.every, 1);
  reader.Integer("evaluation.tokens", &config.evaluation.tokens, 1, kMaxTokens);
  reader.Finish();
  if (complete) CheckRun(config, use, ranks, &reader);
  if (!errors->empty()) return errors->ToStatus();

  config.train.device = DevicePreference::kCpu;
  config.train.precision = Precision::kFp32;
  return config;
}

}  // namespace

absl::StatusOr<RunConfig> LoadConfig(const std::string& path,
                                     const std::vector<std::string>& overrides, ConfigUse use,
                                     int64_t ranks) {
  ConfigErrors errors;
  ConfigNode root;
  const bool complete = LoadLayers(path, overrides, &root, &errors);
  return Read(root, complete, path, use, ranks, &errors);
}

absl::StatusOr<RunConfig> ParseConfig(const std::string& text, const std::string& name,
                                      const std::vector<std::string>& overrides, ConfigUse use,
                                      int64_t ranks) {
  ConfigErrors errors;
  ConfigNode root;
  const bool complete = LoadText(text, name, overrides, &root, &errors);
  return Read(root, complete, name, use, ranks, &errors);
}

}  // namespace krait
