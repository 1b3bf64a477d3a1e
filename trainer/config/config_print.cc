// The resolved config as text, and what differs between two of them.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/number.h"
#include "trainer/config/config.h"

namespace krait {
namespace {

// A dotted key and its value as YAML.
struct Entry {
  std::string key, value;
};

// As a double-quoted scalar.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

const char* Text(bool value) { return value ? "true" : "false"; }
std::string Text(int64_t value) { return std::to_string(value); }
std::string Text(double value) { return PrintNumber(value); }

std::string Text(const std::vector<SourceSpec>& sources) {
  std::string text = "[";
  for (const SourceSpec& source : sources) {
    absl::StrAppend(&text, text.size() > 1 ? ", " : "", "{path: ", Quoted(source.path),
                    ", weight: ", PrintNumber(source.weight), "}");
  }
  return text + "]";
}

const char* Text(DevicePreference device) {
  switch (device) {
    case DevicePreference::kAuto:
      return "auto";
    case DevicePreference::kCpu:
      return "cpu";
    case DevicePreference::kCuda:
      return "cuda";
  }
  return "?";
}

const char* Text(Precision precision) {
  switch (precision) {
    case Precision::kAuto:
      return "auto";
    case Precision::kFp32:
      return "fp32";
    case Precision::kBf16:
      return "bf16";
  }
  return "?";
}

const char* Text(Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return "none";
    case Recompute::kNorms:
      return "norms";
    case Recompute::kMixers:
      return "mixers";
    case Recompute::kLayer:
      return "layer";
  }
  return "?";
}

const char* Text(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::kCosine:
      return "cosine";
    case ScheduleKind::kWsd:
      return "wsd";
    case ScheduleKind::kLinear:
      return "linear";
    case ScheduleKind::kConstant:
      return "constant";
  }
  return "?";
}

void AddModel(const ModelSpec& model, std::vector<Entry>* entries) {
  const auto add = [entries](const char* key, std::string value) {
    entries->push_back({absl::StrCat("model.", key), std::move(value)});
  };
  add("vocab_size", Text(model.vocab_size));
  add("d_model", Text(model.d_model));
  add("n_layers", Text(model.n_layers));
  add("tie_embeddings", Text(model.tie_embeddings));
  add("norm_eps", Text(model.norm_eps));
  add("pattern", Quoted(LayoutPattern(model)));
  if (model.Has(SublayerKind::kAttention)) {
    add("attention.heads", Text(model.attention.heads));
    add("attention.kv_heads", Text(model.attention.kv_heads));
    add("attention.head_dim", Text(model.attention.head_dim));
    if (model.attention.rope_theta > 0) {
      add("attention.rope_theta", Text(model.attention.rope_theta));
    }
  }
  if (model.Has(SublayerKind::kMamba)) {
    add("mamba.d_state", Text(model.mamba.d_state));
    add("mamba.d_conv", Text(model.mamba.d_conv));
    add("mamba.expand", Text(model.mamba.expand));
    add("mamba.dt_rank", Text(model.mamba.dt_rank));
    add("mamba.inner_norms", Text(model.mamba.inner_norms));
    add("mamba.conv_bias", Text(model.mamba.conv_bias));
    add("mamba.proj_bias", Text(model.mamba.proj_bias));
  }
  add("mlp.d_ff", Text(model.mlp_d_ff));
  if (model.Has(SublayerKind::kMoe)) {
    add("moe.experts", Text(model.moe.experts));
    add("moe.top_k", Text(model.moe.top_k));
    add("moe.d_ff", Text(model.moe.d_ff));
    add("moe.renormalize", Text(model.moe.renormalize));
    add("moe.aux_loss", Text(model.moe.aux_loss));
    add("moe.z_loss", Text(model.moe.z_loss));
    add("moe.aux_pool", model.moe.aux_pool == AuxPool::kModel ? "model" : "layer");
  }
  add("init.std", Text(model.init_std));
  add("init.scheme", model.init_scheme == InitScheme::kMamba ? "mamba" : "hf");
}

// Every setting, in the order of the sections.
std::vector<Entry> Flatten(const RunConfig& config) {
  std::vector<Entry> entries;
  const auto add = [&entries](const char* key, std::string value) {
    entries.push_back({key, std::move(value)});
  };
  if (!config.run_dir.empty()) add("run_dir", Quoted(config.run_dir));
  AddModel(config.model, &entries);
  add("parallel.tensor", Text(config.parallel.tensor));
  add("parallel.expert", Text(config.parallel.expert));
  add("parallel.data", config.parallel.data == 0 ? "auto" : Text(config.parallel.data));
  add("parallel.expert_slack", Text(config.parallel.expert_slack));
  if (!config.data.train.empty()) add("data.train", Text(config.data.train));
  add("data.validation", Text(config.data.validation));
  add("data.seq_len", Text(config.data.seq_len));
  add("data.reset_at_documents", Text(config.data.reset_at_documents));
  add("train.device", Text(config.train.device));
  add("train.precision", Text(config.train.precision));
  add("train.deterministic", Text(config.train.deterministic));
  if (config.train.steps > 0) add("train.steps", Text(config.train.steps));
  add("train.batch_tokens", Text(config.train.batch_tokens));
  add("train.micro_batch", Text(config.train.micro_batch));
  add("train.seed", std::to_string(config.train.seed));
  add("train.recompute", Text(config.train.recompute));
  add("train.hang_timeout", Text(config.train.hang_timeout));
  add("optimizer.name", "adamw");
  add("optimizer.lr", Text(config.optimizer.lr));
  add("optimizer.betas", absl::StrCat("[", PrintNumber(config.optimizer.beta1), ", ",
                                      PrintNumber(config.optimizer.beta2), "]"));
  add("optimizer.eps", Text(config.optimizer.eps));
  add("optimizer.weight_decay", Text(config.optimizer.weight_decay));
  add("optimizer.clip", Text(config.optimizer.clip));
  add("optimizer.moments", config.optimizer.moments == MomentDType::kFp32 ? "fp32" : "bf16");
  add("schedule.name", Text(config.schedule.kind));
  add("schedule.warmup_steps", Text(config.schedule.warmup_steps));
  add("schedule.min_lr_ratio", Text(config.schedule.min_lr_ratio));
  add("schedule.decay_steps", Text(config.schedule.decay_steps));
  add("schedule.decay", "linear");
  add("checkpoint.every", Text(config.checkpoint.every));
  add("checkpoint.keep", Text(config.checkpoint.keep));
  add("checkpoint.async", Text(config.checkpoint.async));
  // The default follows run_dir, so that a moved run keeps its checkpoints inside.
  if (!config.checkpoint.dir.empty() && config.checkpoint.dir != config.run_dir + "/checkpoints") {
    add("checkpoint.dir", Quoted(config.checkpoint.dir));
  }
  add("log.every", Text(config.log.every));
  add("log.tensorboard", Text(config.log.tensorboard));
  add("evaluation.every", Text(config.evaluation.every));
  add("evaluation.tokens", Text(config.evaluation.tokens));
  return entries;
}

bool StartsWith(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// The kind of a difference, or false when the key is free to change.
bool Classify(const std::string& key, ConfigDifference::Kind* kind) {
  if (StartsWith(key, "model.")) {
    *kind = ConfigDifference::Kind::kRefused;
  } else if (StartsWith(key, "data.") || key == "train.batch_tokens" || key == "train.seed") {
    *kind = ConfigDifference::Kind::kNeedsAllow;
  } else if (StartsWith(key, "optimizer.") || StartsWith(key, "schedule.") ||
             key == "train.steps" || key == "train.device" || key == "train.precision" ||
             key == "train.deterministic") {
    *kind = ConfigDifference::Kind::kApplies;
  } else {
    return false;
  }
  return true;
}

const std::string* FindValue(const std::vector<Entry>& entries, const std::string& key) {
  const auto it = std::find_if(entries.begin(), entries.end(),
                               [&key](const Entry& entry) { return entry.key == key; });
  return it == entries.end() ? nullptr : &it->value;
}

}  // namespace

std::string LayoutPattern(const ModelSpec& model) {
  std::vector<std::string> words;
  for (size_t i = 0; i + 1 < model.sublayers.size(); i += 2) {
    words.push_back(absl::StrCat(model.sublayers[i].kind == SublayerKind::kAttention ? "a" : "m",
                                 model.sublayers[i + 1].kind == SublayerKind::kMoe ? "E" : ""));
  }
  // The shortest period that divides them.
  size_t period = 1;
  while (period < words.size() &&
         (words.size() % period != 0 ||
          !std::equal(words.begin() + static_cast<int64_t>(period), words.end(), words.begin()))) {
    ++period;
  }
  std::string pattern;
  for (size_t i = 0; i < std::min(period, words.size()); ++i) {
    absl::StrAppend(&pattern, i > 0 ? " " : "", words[i]);
  }
  return pattern;
}

std::string RunConfig::ToYaml() const {
  std::string text;
  std::vector<std::string> open;  // sections around the last key
  for (const Entry& entry : Flatten(*this)) {
    std::vector<std::string> parts;
    for (size_t begin = 0; begin <= entry.key.size();) {
      const size_t end = std::min(entry.key.find('.', begin), entry.key.size());
      parts.push_back(entry.key.substr(begin, end - begin));
      begin = end + 1;
    }
    const std::string name = parts.back();
    parts.pop_back();
    size_t common = 0;
    while (common < std::min(open.size(), parts.size()) && open[common] == parts[common]) ++common;
    for (size_t i = common; i < parts.size(); ++i) {
      absl::StrAppend(&text, std::string(2 * i, ' '), parts[i], ":\n");
    }
    absl::StrAppend(&text, std::string(2 * parts.size(), ' '), name, ": ", entry.value, "\n");
    open = std::move(parts);
  }
  return text;
}

std::vector<ConfigDifference> CompareForResume(const RunConfig& saved, const RunConfig& now) {
  const std::vector<Entry> before = Flatten(saved);
  const std::vector<Entry> after = Flatten(now);
  std::vector<ConfigDifference> differences;
  const auto compare = [&differences](const std::string& key, const std::string* a,
                                      const std::string* b) {
    ConfigDifference difference;
    if (!Classify(key, &difference.kind) || (a != nullptr && b != nullptr && *a == *b)) return;
    difference.key = key;
    difference.before = a == nullptr ? "none" : *a;
    difference.after = b == nullptr ? "none" : *b;
    differences.push_back(std::move(difference));
  };
  for (const Entry& entry : before) compare(entry.key, &entry.value, FindValue(after, entry.key));
  for (const Entry& entry : after) {
    if (FindValue(before, entry.key) == nullptr) compare(entry.key, nullptr, &entry.value);
  }
  return differences;
}

bool AllowsChange(const std::string& word, const std::string& key) {
  const size_t dot = key.rfind('.');
  return word == key ||
         (dot != std::string::npos && (word == key.substr(dot + 1) || word == key.substr(0, dot)));
}

}  // namespace krait
