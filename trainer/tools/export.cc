// Export to a Hugging Face folder (interop.h).
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/activation.h"
#include "kernels/base/file.h"
#include "model/hf.h"
#include "nlohmann/json.hpp"
#include "trainer/tools/inference.h"
#include "trainer/tools/interop.h"

namespace krait {
namespace {

constexpr char kTokenizerKey[] = "krait.tokenizer";

struct Shard {
  std::string file;
  std::vector<int> params;
};

// Whole tensors in table order, a new file where the next one would pass the limit.
std::vector<Shard> CutShards(const ParamTable& table, DType dtype, int64_t limit) {
  std::vector<Shard> shards(1);
  int64_t filled = 0;
  for (size_t p = 0; p < table.params().size(); ++p) {
    const int64_t bytes = table.params()[p].numel() * SizeOf(dtype);
    if (filled > 0 && filled + bytes > limit) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().params.push_back(static_cast<int>(p));
    filled += bytes;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].file = shards.size() == 1
                         ? "model.safetensors"
                         : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards.size());
  }
  return shards;
}

absl::Status WriteShard(const std::string& folder, const Shard& shard, const Weights& weights,
                        DType dtype, const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter::Item> items;
  for (int p : shard.params) {
    const Param& param = weights.table().params()[p];
    items.push_back({.name = param.name, .dtype = dtype, .shape = param.shape});
  }
  auto writer = SafetensorsWriter::Create(folder + "/" + shard.file, items, metadata);
  if (!writer.ok()) return writer.status();
  std::vector<BF16> rounded;
  for (int p : shard.params) {
    const Tensor values = weights.Param(p);  // f32, of the host
    if (dtype == DType::kF32) {
      KRAIT_RETURN_IF_ERROR(writer->Write(values.raw(), values.bytes()));
      continue;
    }
    rounded.resize(static_cast<size_t>(values.numel()));
    Copy(Tensor(rounded.data(), dtype, Device::kCpu, {values.numel()}), values, Context());
    KRAIT_RETURN_IF_ERROR(writer->Write(rounded.data(), values.numel() * SizeOf(dtype)));
  }
  return writer->Finish();
}

absl::Status WriteJson(const std::string& path, const nlohmann::ordered_json& json) {
  return WriteFileAtomic(path, json.dump(2) + "\n", ExitCode::kCannotSave);
}

absl::Status WriteFolder(const std::string& folder, const std::string& config_json,
                         const InferenceModel& model, const ExportOptions& options,
                         ExportReport* report) {
  KRAIT_RETURN_IF_ERROR(MakeDirectories(folder, ExitCode::kCannotSave));
  const Weights& weights = model.weights();
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  const std::string& tokenizer = model.checkpoint().meta.tokenizer;
  if (!tokenizer.empty()) metadata[kTokenizerKey] = tokenizer;

  const std::vector<Shard> shards = CutShards(weights.table(), options.dtype, options.shard_bytes);
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  for (const Shard& shard : shards) {
    KRAIT_RETURN_IF_ERROR(WriteShard(folder, shard, weights, options.dtype, metadata));
    for (int p : shard.params) weight_map[weights.table().params()[p].name] = shard.file;
  }
  report->files = static_cast<int64_t>(shards.size());
  report->tensors = static_cast<int64_t>(weights.table().params().size());
  report->bytes = weights.table().total() * SizeOf(options.dtype);
  if (shards.size() > 1) {
    KRAIT_RETURN_IF_ERROR(
        WriteJson(folder + "/model.safetensors.index.json",
                  {{"metadata", {{"total_size", report->bytes}}}, {"weight_map", weight_map}}));
  }
  auto config = nlohmann::ordered_json::parse(config_json);
  config["dtype"] = options.dtype == DType::kF32 ? "float32" : "bfloat16";
  config["torch_dtype"] = config["dtype"];  // the name before transformers 4.56
  KRAIT_RETURN_IF_ERROR(WriteJson(folder + "/config.json", config));
  nlohmann::ordered_json generation = {{"_from_model_config", true}};
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
    if (config.contains(key)) generation[key] = config[key];
  }
  return WriteJson(folder + "/generation_config.json", generation);
}

// A name that an export writes.
bool IsExportFile(const std::string& name) {
  return name == "config.json" || name == "generation_config.json" ||
         name == "model.safetensors.index.json" ||
         (name.starts_with("model") && name.ends_with(".safetensors"));
}

}  // namespace

absl::StatusOr<ExportReport> ExportHf(const ExportOptions& options) {
  if (Exists(options.hf)) {
    std::vector<std::string> names;
    KRAIT_ASSIGN_OR_RETURN(names, ListDirectory(options.hf, ExitCode::kConfig));
    const auto foreign = std::find_if_not(names.begin(), names.end(), IsExportFile);
    if (foreign != names.end()) {
      return Error(ExitCode::kConfig, "--hf " + options.hf + " exists and holds " + *foreign +
                                          ", which no export writes: name another folder");
    }
    if (!names.empty() && !options.force) {
      return Error(ExitCode::kConfig, "--hf " + options.hf +
                                          " exists and is not empty: name another folder, or add "
                                          "--force to replace the export in it");
    }
  }
  // The values as stored, whatever the run computed in.
  std::unique_ptr<InferenceModel> model;
  KRAIT_ASSIGN_OR_RETURN(
      model, InferenceModel::Load(
                 options.checkpoint,
                 [](const std::string& line) { std::fprintf(stderr, "krait: %s\n", line.c_str()); },
                 Placement()));
  std::string config_json;
  KRAIT_ASSIGN_OR_RETURN(config_json, HfConfigFromSpec(model->config().model));

  ExportReport report{.checkpoint = model->checkpoint().path};
  const std::string staging = options.hf + ".export-" + std::to_string(getpid());
  absl::Status status = WriteFolder(staging, config_json, *model, options, &report);
  if (status.ok()) status = SyncDirectory(staging, ExitCode::kCannotSave);
  // An older export keeps its place until the new one is whole.
  const std::string replaced = options.hf + ".replaced-" + std::to_string(getpid());
  const bool replaces = Exists(options.hf);
  if (status.ok() && replaces) status = Rename(options.hf, replaced, ExitCode::kCannotSave);
  if (status.ok()) {
    status = Rename(staging, options.hf, ExitCode::kCannotSave);
    if (!status.ok() && replaces) {
      Rename(replaced, options.hf, ExitCode::kCannotSave).IgnoreError();
    } else if (replaces) {
      status = RemoveAll(replaced, ExitCode::kCannotSave);
    }
  }
  if (status.ok()) status = SyncDirectory(ParentFolder(options.hf), ExitCode::kCannotSave);
  if (!status.ok()) {
    status.Update(RemoveAll(staging, ExitCode::kCannotSave));
    return status;
  }
  return report;
}

}  // namespace krait
