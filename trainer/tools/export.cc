// Export to a Hugging Face folder (interop.h).
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "kernels/base/safetensors.h"
#include "model/hf.h"
#include "model/params.h"
#include "trainer/config/config.h"
#include "trainer/tools/hf_folder.h"
#include "trainer/tools/interop.h"
#include "trainer/tools/model_tokenizer.h"
#include "trainer/tools/output_lock.h"

namespace krait {
namespace {

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

// Writes tensors into shards while they stream by in table order.
class ShardWriter {
 public:
  ShardWriter(std::string folder, const ParamTable& table, DType dtype, std::vector<Shard> shards,
              std::map<std::string, std::string> metadata)
      : folder_(std::move(folder)),
        table_(table),
        dtype_(dtype),
        shards_(std::move(shards)),
        metadata_(std::move(metadata)) {}

  // The next `count` elements, of parameter `p`.
  absl::Status Write(size_t p, int64_t count, const void* values) {
    if (!file_.has_value() || static_cast<int>(p) > shards_[next_ - 1].params.back()) {
      KRAIT_RETURN_IF_ERROR(Finish());
      KRAIT_RETURN_IF_ERROR(Begin(shards_[next_++]));
    }
    return file_->Write(values, count * SizeOf(dtype_));
  }
  absl::Status Finish() {
    const absl::Status finished = file_.has_value() ? file_->Finish() : absl::OkStatus();
    file_.reset();
    return finished;
  }

 private:
  absl::Status Begin(const Shard& shard) {
    std::vector<SafetensorsWriter::Item> items;
    for (const int p : shard.params) {
      const Param& param = table_.params()[static_cast<size_t>(p)];
      items.push_back({.name = param.name, .dtype = dtype_, .shape = param.shape});
    }
    auto created = SafetensorsWriter::Create(folder_ + "/" + shard.file, items, metadata_);
    if (!created.ok()) return created.status();
    file_.emplace(std::move(*created));
    return absl::OkStatus();
  }

  std::string folder_;
  const ParamTable& table_;
  DType dtype_;
  std::vector<Shard> shards_;
  std::map<std::string, std::string> metadata_;
  size_t next_ = 0;  // the shard to begin
  std::optional<SafetensorsWriter> file_;
};

absl::Status WriteJson(const std::string& path, const nlohmann::ordered_json& json) {
  return WriteFileAtomic(path, DumpPythonJson(json, 2) + "\n", ExitCode::kCannotSave);
}

absl::Status WriteWeights(const std::string& folder, const Checkpoint& checkpoint,
                          const ParamTable& table, const ExportOptions& options,
                          ExportReport* report) {
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!checkpoint.meta.tokenizer.empty()) metadata[kTokenizerKey] = checkpoint.meta.tokenizer;
  const std::vector<Shard> shards = CutShards(table, options.dtype, options.shard_bytes);
  ShardWriter writer(folder, table, options.dtype, shards, metadata);
  int64_t done = 0;
  const auto write = [&](size_t p, int64_t /*begin*/, int64_t count,
                         const void* values) -> absl::Status {
    if (options.progress) KRAIT_RETURN_IF_ERROR(options.progress(done, table.total()));
    done += count;
    return writer.Write(p, count, values);
  };
  KRAIT_RETURN_IF_ERROR(StreamTensors(checkpoint, WholeTensors(table, options.dtype), write));
  KRAIT_RETURN_IF_ERROR(writer.Finish());
  report->files = static_cast<int64_t>(shards.size());
  report->tensors = static_cast<int64_t>(table.params().size());
  report->bytes = table.total() * SizeOf(options.dtype);
  if (shards.size() == 1) return absl::OkStatus();
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  for (const Shard& shard : shards) {
    for (const int p : shard.params) {
      weight_map[table.params()[static_cast<size_t>(p)].name] = shard.file;
    }
  }
  return WriteJson(folder + "/model.safetensors.index.json",
                   {{"metadata", {{"total_size", report->bytes}}}, {"weight_map", weight_map}});
}

// generation_config.json: the imported one, or the token ids of the config.
absl::StatusOr<nlohmann::ordered_json> GenerationConfig(const std::string& imported,
                                                        const nlohmann::ordered_json& config) {
  if (!imported.empty()) {
    return ParsePythonJson(imported, "the imported generation_config.json",
                           ExitCode::kNoCheckpoint);
  }
  nlohmann::ordered_json generation = {{"_from_model_config", true}};
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
    if (config.contains(key)) generation[key] = config[key];
  }
  return generation;
}

// The tokenizer, and where no imported config says them its special ids.
absl::Status WriteTokenizer(const std::string& folder, const Checkpoint& checkpoint,
                            const ExportOptions& options, int64_t vocab_size, const Notice& notice,
                            nlohmann::ordered_json* config) {
  if (checkpoint.meta.tokenizer.empty() && options.tokenizer.empty()) return absl::OkStatus();
  auto own = TokenizerOf(checkpoint, options.tokenizer);
  if (!own.ok()) {
    if (!options.tokenizer.empty()) return own.status();
    notice("the export has no tokenizer: " + MessageOf(own.status()));
    return absl::OkStatus();
  }
  const Tokenizer& tokenizer = *own->tokenizer;
  KRAIT_RETURN_IF_ERROR(CheckVocabulary(tokenizer, vocab_size, checkpoint.path));
  if (checkpoint.meta.hf_config.empty()) {
    if (!tokenizer.prefix().empty()) (*config)["bos_token_id"] = tokenizer.prefix().front();
    if (tokenizer.end_token().has_value()) (*config)["eos_token_id"] = *tokenizer.end_token();
  }
  return WriteTokenizerFiles(FilesForHf(*own), folder, ExitCode::kCannotSave);
}

absl::Status WriteFolder(const std::string& folder, const Checkpoint& checkpoint,
                         const ExportOptions& options, const Notice& notice, ExportReport* report) {
  RunConfig run;
  KRAIT_ASSIGN_OR_RETURN(
      run, ParseConfig(checkpoint.meta.config_yaml, checkpoint.path + "/manifest.json: config", {},
                       ConfigUse::kStored, /*ranks=*/1));
  std::string text;
  KRAIT_ASSIGN_OR_RETURN(text, WriteHfConfig(run.model, checkpoint.meta.hf_config));
  nlohmann::ordered_json config, generation;
  KRAIT_ASSIGN_OR_RETURN(config, ParsePythonJson(text, "config.json", ExitCode::kInternal));
  config["dtype"] = options.dtype == DType::kF32 ? "float32" : "bfloat16";
  config["torch_dtype"] = config["dtype"];  // the name before transformers 4.56
  KRAIT_RETURN_IF_ERROR(
      WriteTokenizer(folder, checkpoint, options, run.model.vocab_size, notice, &config));
  KRAIT_ASSIGN_OR_RETURN(generation,
                         GenerationConfig(checkpoint.meta.hf_generation_config, config));
  KRAIT_RETURN_IF_ERROR(WriteWeights(folder, checkpoint, ParamTable(run.model), options, report));
  KRAIT_RETURN_IF_ERROR(WriteJson(folder + "/config.json", config));
  return WriteJson(folder + "/generation_config.json", generation);
}

// A name that an export writes.
bool IsExportFile(const std::string& name) {
  return IsTokenizerFile(name) || name == "config.json" || name == "generation_config.json" ||
         name == "model.safetensors.index.json" ||
         (name.starts_with("model") && name.ends_with(".safetensors"));
}

// Removes what killed exports to `hf` left behind: half-written folders, and older exports that
// were replaced. One that was moved away for a new one that did not come stays, it may be the only
// one. What cannot be removed is no reason not to export.
void RemoveLeftovers(const std::string& hf) {
  const std::string folder = ParentFolder(hf);
  const std::string base = std::filesystem::path(hf).filename().string();
  const auto names = ListDirectory(folder, ExitCode::kCannotSave);
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    for (const std::string& begin : {base + ".export-", base + ".replaced-"}) {
      if (!name.starts_with(begin) || name.size() == begin.size() ||
          name.find_first_not_of("0123456789", begin.size()) != std::string::npos ||
          (begin.ends_with("replaced-") && !Exists(hf))) {
        continue;
      }
      (void)RemoveAll(folder + "/" + name, ExitCode::kCannotSave);
    }
  }
}

// What lies at --hf may be replaced, or nothing does.
absl::Status CheckHf(const ExportOptions& options) {
  if (!Exists(options.hf)) return absl::OkStatus();
  std::vector<std::string> names;
  KRAIT_ASSIGN_OR_RETURN(names, ListDirectory(options.hf, ExitCode::kConfig));
  const auto foreign = std::find_if_not(names.begin(), names.end(), IsExportFile);
  if (foreign != names.end()) {
    return Error(ExitCode::kConfig, "--hf " + options.hf + " exists and holds " + *foreign +
                                        ", which no export writes: name another folder");
  }
  if (names.empty() || options.force) return absl::OkStatus();
  return Error(ExitCode::kConfig, "--hf " + options.hf +
                                      " exists and is not empty: name another folder, or add "
                                      "--force to replace the export in it");
}

}  // namespace

absl::StatusOr<ExportReport> ExportHf(const ExportOptions& options, const Notice& notice) {
  KRAIT_RETURN_IF_ERROR(CheckHf(options));
  std::vector<std::string> candidates;
  KRAIT_ASSIGN_OR_RETURN(candidates, FindCheckpoints(options.checkpoint));
  OutputLock output;
  KRAIT_ASSIGN_OR_RETURN(output, OutputLock::Acquire("--hf", options.hf));
  KRAIT_RETURN_IF_ERROR(CheckHf(options));  // of another one, a moment ago
  ExportReport report;
  if (output.held()) RemoveLeftovers(options.hf);
  const std::string staging = options.hf + ".export-" + std::to_string(getpid());
  // The values as stored, whatever the run computed in.
  const auto write = [&](const Checkpoint& checkpoint) -> absl::Status {
    KRAIT_RETURN_IF_ERROR(RemoveAll(staging, ExitCode::kCannotSave));
    KRAIT_RETURN_IF_ERROR(MakeDirectories(staging, ExitCode::kCannotSave));
    report = {.checkpoint = checkpoint.path};
    return WriteFolder(staging, checkpoint, options, notice, &report);
  };
  absl::Status status = LoadNewest(candidates, write, notice).status();
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
