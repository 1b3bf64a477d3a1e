#include "trainer/config/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/number.h"
#include "kernels/base/shell.h"
#include "kernels/cuda/runtime.h"
#include "kernels/hardware.h"
#include "parallel/gpu.h"
#include "parallel/world.h"
#include "trainer/config/config_check.h"
#include "trainer/config/config_keys.h"
#include "trainer/config/config_print.h"
#include "trainer/config/config_reader.h"
#include "trainer/config/config_tree.h"

namespace krait {
namespace {

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

// What a pattern of `words` words names beyond the layers: an error where the model lacks a kind by
// it, else a note.
void CheckPatternLength(const std::vector<LayerKinds>& layers, int64_t words, int64_t n_layers,
                        ConfigReader* reader) {
  if (words <= n_layers) return;
  const auto lost = [&](const auto& is_kind) {
    return std::none_of(layers.begin(), layers.begin() + n_layers, is_kind) &&
           std::any_of(layers.begin() + n_layers, layers.end(), is_kind);
  };
  const char* missing = nullptr;
  if (lost([](const LayerKinds& layer) { return layer.attention; })) missing = "attention";
  if (lost([](const LayerKinds& layer) { return !layer.attention; })) missing = "Mamba";
  if (lost([](const LayerKinds& layer) { return layer.moe; })) missing = "experts";
  const std::string length =
      absl::StrCat("model.pattern has ", words, " words for ", n_layers, " layers");
  if (missing != nullptr) {
    reader->Fail("model.pattern", absl::StrCat(length, ": no layer has ", missing));
  } else {
    reader->Note("model.pattern",
                 absl::StrCat(length, ": the last ", words - n_layers, " have no effect"));
  }
}

std::vector<LayerKinds> LayersFromPattern(const std::string& pattern, int64_t n_layers,
                                          ConfigReader* reader) {
  if (!reader->Good({"model.pattern", "model.n_layers"})) return {};
  absl::Status status;
  if (pattern.size() <= 4 * kMaxLayers) {
    const int64_t words = PatternWords(pattern);
    auto layers = ParsePattern(pattern, std::max(words, n_layers));
    if (layers.ok()) {
      CheckPatternLength(*layers, words, n_layers, reader);
      layers->resize(static_cast<size_t>(n_layers));
      return *std::move(layers);
    }
    status = layers.status();
  } else {
    status = Error(ExitCode::kConfig, "more words than a model can have layers");
  }
  reader->Fail("model.pattern", absl::StrCat("model.pattern: ", MessageOf(status)));
  return {};
}

// The layers by model.pattern, or by model.mixer and model.moe; empty after reporting an error.
std::vector<LayerKinds> ResolveLayers(const ConfigDraft& draft, int64_t n_layers,
                                      ConfigReader* reader) {
  if (reader->Has("model.pattern")) return LayersFromPattern(draft.pattern, n_layers, reader);

  const auto counts = ParseRatio(draft.ratio);
  if (!counts.has_value() && reader->Good({"model.mixer.ratio"})) {
    reader->Fail("model.mixer.ratio",
                 absl::StrCat("model.mixer.ratio: ", Quote(draft.ratio),
                              " is no ratio; expected \"ATTENTION:MAMBA\" such as \"1:7\", each "
                              "from 0 to ",
                              kMaxPeriod, ", not both 0"));
  }
  std::vector<LayerKinds> layers;
  if (!reader->Good({"model.n_layers", "model.mixer.ratio", "model.mixer.offset"})) return layers;
  const bool one_kind = counts->first == 0 || counts->second == 0;
  if (one_kind && reader->Has("model.mixer.offset")) {
    reader->Note("model.mixer.offset", absl::StrCat("model.mixer.offset has no effect: by ratio ",
                                                    draft.ratio, " all layers are of one kind"));
  }
  const auto attention =
      AttentionLayers(counts->first, counts->second, one_kind ? -1 : draft.mixer_offset, n_layers);
  if (!attention.ok()) {
    const char* key =
        reader->Has("model.mixer.offset") ? "model.mixer.offset" : "model.mixer.ratio";
    reader->Fail(key, absl::StrCat("model.mixer: ", MessageOf(attention.status())));
  }
  if (!reader->Good({"model.moe.every", "model.moe.offset"})) return layers;
  const auto moe =
      MoeLayers(draft.moe_every, draft.moe_every == 0 ? -1 : draft.moe_offset, n_layers);
  if (!moe.ok()) {
    reader->Fail("model.moe.offset", absl::StrCat("model.moe: ", MessageOf(moe.status())));
  }
  if (!attention.ok() || !moe.ok()) return layers;
  if (draft.moe_every > 0 && std::none_of(moe->begin(), moe->end(), [](bool e) { return e; })) {
    reader->Fail(
        "model.moe.every",
        absl::StrCat("model.moe: every ", draft.moe_every,
                     draft.moe_offset < 0 ? "" : absl::StrCat(" with offset ", draft.moe_offset),
                     " yields no layer with experts in ", n_layers,
                     " layers (moe: none is a dense model)"));
    return layers;
  }
  for (size_t i = 0; i < attention->size(); ++i) layers.push_back({(*attention)[i], (*moe)[i]});
  return layers;
}

// Settings of kinds of layers that the model lacks.
void NoteAbsentKinds(const ModelSpec& model, ConfigReader* reader) {
  struct Section {
    SublayerKind kind;
    const char *key, *what;
  };
  for (const Section& section :
       {Section{SublayerKind::kAttention, "model.attention", "no layer has attention"},
        Section{SublayerKind::kMamba, "model.mamba", "no layer is a Mamba layer"},
        Section{SublayerKind::kMoe, "model.moe", "no layer has experts"}}) {
    if (model.Has(section.kind)) continue;
    const bool moe = section.kind == SublayerKind::kMoe;
    if (moe && !reader->Has("model.moe.every") && !reader->Has("model.pattern")) {
      const std::string key = reader->FirstGiven("model.moe");
      if (key.empty()) continue;
      reader->Fail(key, absl::StrCat(key,
                                     " has no effect without model.moe.every: give it too "
                                     "(2: every second layer has experts; none: none has)"));
      continue;
    }
    const std::string key =
        reader->FirstGiven(section.key, moe ? std::vector<std::string>{"every", "offset"}
                                            : std::vector<std::string>());
    if (!key.empty()) reader->Note(key, absl::StrCat(key, " has no effect: ", section.what));
  }
}

void ResolveModel(const ConfigDraft& draft, ModelSpec* model, ConfigReader* reader) {
  for (const char* key :
       {"model.vocab_size", "model.d_model", "model.n_layers", "model.mlp.d_ff"}) {
    reader->Require(key);
  }
  model->sublayers = MakeSublayers(ResolveLayers(draft, model->n_layers, reader));

  AttentionSpec* attention = &model->attention;
  if (model->Has(SublayerKind::kAttention)) {
    reader->Require("model.attention.heads", "the model has attention layers");
  }
  if (attention->kv_heads == 0) attention->kv_heads = attention->heads;
  if (attention->head_dim == 0 && attention->heads > 0) {
    attention->head_dim = model->d_model / attention->heads;
  }
  model->mamba.d_inner = model->mamba.expand * model->d_model;
  if (model->mamba.dt_rank == 0) model->mamba.dt_rank = (model->d_model + 15) / 16;
  if (model->moe.d_ff == 0) model->moe.d_ff = model->mlp_d_ff;
  if (reader->complete()) CheckModel(*model, reader);
  if (!model->sublayers.empty()) NoteAbsentKinds(*model, reader);

  // Settings of kinds that the model lacks are checked above and then dropped, so that equal models
  // have equal specs.
  if (!model->Has(SublayerKind::kAttention)) model->attention = {};
  if (!model->Has(SublayerKind::kMamba)) model->mamba = {};
  if (!model->Has(SublayerKind::kMoe)) model->moe = {};
}

void ResolveSchedule(const ConfigDraft& draft, int64_t steps, ScheduleConfig* schedule,
                     ConfigReader* reader) {
  // A share of the steps below 1, and 1 where it is written with a point (1.0); else a count.
  const double decay = draft.decay_steps;
  const bool point = reader->TextOf("schedule.decay_steps").find('.') != std::string::npos;
  if (decay < 1 || (decay == 1 && point)) {
    schedule->decay_steps = std::llround(decay * static_cast<double>(steps));
  } else {
    schedule->decay_steps = std::llround(decay);
    if (decay != std::floor(decay)) {
      reader->Fail("schedule.decay_steps",
                   absl::StrCat("schedule.decay_steps: ", PrintNumber(decay),
                                " is neither a share of the steps up to 1.0 nor a whole number"));
    }
  }
  if (!reader->Good({"schedule.name", "schedule.decay_steps"})) return;
  // Settings that this course of the learning rate does not use are checked above and then dropped,
  // so that equal runs have equal configs.
  const auto unused = [reader](const char* key, const char* why) {
    if (reader->Has(key)) reader->Note(key, absl::StrCat(key, " has no effect: ", why));
  };
  if (schedule->kind != ScheduleKind::kWsd) {
    unused("schedule.decay_steps", "it is for schedule.name wsd only");
    unused("schedule.decay", "it is for schedule.name wsd only");
    schedule->decay_steps = 0;
  }
  if (schedule->kind == ScheduleKind::kConstant) {
    unused("schedule.min_lr_ratio", "schedule.name constant keeps the learning rate");
    schedule->min_lr_ratio = ScheduleConfig().min_lr_ratio;
  }
}

void ResolveTrain(const ConfigDraft& draft, ConfigUse use, RunConfig* config,
                  ConfigReader* reader) {
  TrainConfig* train = &config->train;
  if (use == ConfigUse::kTrain) {
    reader->Require("data.train", "give the token files, such as [{path: data/train.h5}]");
    if (config->data.train.empty() && reader->Good({"data.train"})) {
      reader->Fail("data.train", "data.train is empty; training needs at least one token file");
    }
  }
  if (train->tokens > 0) {
    train->steps = train->batch_tokens.Steps(0, train->tokens);
  }
  if (use == ConfigUse::kTrain && !reader->Has("train.tokens")) {
    reader->Require("train.steps", "give train.steps or train.tokens");
  }

  if (train->spike_guard.window == 0) {
    if (reader->Has("train.spike_guard.z") && !reader->Has("train.spike_guard.window")) {
      reader->Note(
          "train.spike_guard.z",
          "train.spike_guard.z has no effect without train.spike_guard.window: give it too "
          "(128: compare with the last 128 steps)");
    }
    train->spike_guard = {};
  }
  ResolveSchedule(draft, train->steps, &config->schedule, reader);
  if (config->data.validation.empty()) {
    const std::string key = reader->FirstGiven("evaluation");
    if (!key.empty()) {
      reader->Note(key, absl::StrCat(key, " has no effect: data.validation names no file"));
    }
    config->evaluation = {};
  }
}

// Fills the config from the tree.
class KeyReader : public ConfigVisitor {
 public:
  explicit KeyReader(ConfigReader* reader) : reader_(reader) {}
  void Whole(const ConfigKey& key, int64_t* value, const WholeRange& range) override {
    reader_->Whole(key.path, value, range);
  }
  void Number(const ConfigKey& key, double* value, const Range& range) override {
    reader_->Number(key.path, value, range);
  }
  void Bool(const ConfigKey& key, bool* value) override { reader_->Bool(key.path, value); }
  void String(const ConfigKey& key, std::string* value) override {
    reader_->String(key.path, value);
  }
  void Choice(const ConfigKey& key, const std::vector<const char*>& names, size_t* index) override {
    reader_->Choice(key.path, names, index);
  }
  void Numbers(const ConfigKey& key, const std::vector<double*>& values,
               const Range& range) override {
    reader_->Numbers(key.path, values, range);
  }
  void Sources(const ConfigKey& key, std::vector<SourceSpec>* value) override {
    reader_->Sources(key.path, value);
  }
  void Ramp(const ConfigKey& key, BatchRamp* value) override { reader_->Ramp(key.path, value); }

 private:
  ConfigReader* reader_;
};

// What the user set and what changes nothing on this device or with so many ranks.
void NoteIdleSettings(const RunConfig& config, int64_t ranks, ConfigReader* reader) {
  const RunConfig defaults;
  const auto note = [reader](const std::string& key, const char* why) {
    reader->Note(key, absl::StrCat(key, " has no effect ", why));
  };
  if (config.train.hang_timeout != defaults.train.hang_timeout && ranks == 1) {
    note("train.hang_timeout", "on a run of one process");
  }
  if (config.parallel.expert == 1 &&
      config.parallel.expert_slack != defaults.parallel.expert_slack) {
    note("parallel.expert_slack", "where no experts are shared");
  }
  // Elsewhere there is nothing that is faster in another order.
  const bool on_gpu = config.train.device == DevicePreference::kCuda;
  if (!config.train.deterministic && !(on_gpu && config.model.Has(SublayerKind::kAttention))) {
    note("train.deterministic", on_gpu ? "without attention layers" : "on the CPU");
  }
}

absl::StatusOr<RunConfig> Read(const ConfigNode& root, bool complete, const std::string& path,
                               ConfigUse use, int64_t ranks, ConfigErrors* errors) {
  ConfigReader reader(root, complete, errors);
  RunConfig config;
  ConfigDraft draft;
  config.path = path;
  config.run_dir = absl::StrCat("runs/", std::filesystem::path(path).stem().string());
  reader.Find("base");  // consumed before, and known to suggestions
  KeyReader keys(&reader);
  VisitKeys(&config, &draft, &keys);
  config.run_dir = UserPath(config.run_dir);
  config.checkpoint.dir = UserPath(config.checkpoint.dir);
  if (config.checkpoint.dir.empty()) config.checkpoint.dir = config.run_dir + "/checkpoints";
  ResolveModel(draft, &config.model, &reader);
  ResolveTrain(draft, use, &config, &reader);
  reader.Finish();
  if (complete) CheckRun(config, use, ranks, &reader);
  if (!errors->empty()) return errors->ToStatus();
  TrainConfig& train = config.train;
  if (train.device == DevicePreference::kAuto) {
    train.device = cuda::Available() ? DevicePreference::kCuda : DevicePreference::kCpu;
  }
  if (train.precision == Precision::kAuto) {
    train.precision = train.device == DevicePreference::kCuda ? Precision::kBf16 : Precision::kFp32;
  }
  if (use == ConfigUse::kTrain) NoteIdleSettings(config, ranks, &reader);
  config.notes = errors->notes();
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

Placement PlacementOf(const RunConfig& config) {
  const bool cuda = config.train.device == DevicePreference::kCuda;
  const bool bf16 = config.train.precision == Precision::kBf16;
  return {.device = cuda ? Device::kCuda : Device::kCpu,
          .compute = bf16 ? DType::kBF16 : DType::kF32};
}

absl::Status CheckDevice(const RunConfig& config, World* world) {
  KRAIT_RETURN_IF_ERROR(Agree(world, CheckDevice(config)));
  const bool cuda = config.train.device == DevicePreference::kCuda;
  if (!cuda && !world->carries_tensors()) {
    return Agree(world, Error(ExitCode::kConfig,
                              "train.device: several ranks on the CPU need MPI: start them with "
                              "mpirun (with srun: --mpi=pmix)"));
  }
  return cuda ? CheckGpus(world) : absl::OkStatus();
}

absl::Status CheckDevice(const RunConfig& config) {
  std::string reason;
  if (config.train.device != DevicePreference::kCuda || cuda::Available(&reason)) {
    return PrepareDevice(PlacementOf(config).device);
  }
  return Error(ExitCode::kConfig,
               "train.device: cuda cannot be used: " + reason + "; cpu and auto work here");
}

Mesh MeshOf(const ParallelConfig& parallel, int ranks, int rank) {
  Mesh mesh;
  mesh.tensor = static_cast<int>(parallel.tensor);
  mesh.data = ranks / mesh.tensor;
  mesh.expert = static_cast<int>(parallel.expert);
  mesh.rank = rank;
  return mesh;
}

int64_t LeastRanks(const ParallelConfig& parallel) {
  const int64_t ranks = parallel.tensor * std::max<int64_t>(1, parallel.data);
  return parallel.data > 0 ? ranks : std::lcm(ranks, parallel.expert);
}

DType ReduceDType(const RunConfig& config) {
  return config.parallel.reduce == GradReduce::kBf16 ? DType::kBF16
                                                     : Wide(PlacementOf(config).compute);
}

absl::StatusOr<std::string> ExplainConfig(const std::string& path,
                                          const std::vector<std::string>& overrides,
                                          int64_t ranks) {
  ConfigErrors errors;
  ConfigNode root;
  const bool complete = LoadLayers(path, overrides, &root, &errors);
  RunConfig config;
  KRAIT_ASSIGN_OR_RETURN(config, Read(root, complete, path, ConfigUse::kPlan, ranks, &errors));
  std::vector<ConfigEntry> entries = Flatten(config);
  for (ConfigEntry& entry : entries) {
    entry.comment = OriginOf(root, entry);
    if (entry.key == "train.tokens") {
      absl::StrAppend(&entry.comment, "; ", config.train.steps, " steps");
    }
  }
  std::string text;
  for (const std::string& note : config.notes) text += "# note: " + note + "\n";
  return text + YamlText(entries);
}

}  // namespace krait
