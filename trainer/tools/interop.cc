#include "trainer/tools/interop.h"

#include <algorithm>
#include <set>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "kernels/transfer.h"
#include "model/hf.h"
#include "model/names.h"
#include "trainer/tools/inference.h"
#include "trainer/train/optimizer_state.h"

namespace krait {
namespace {

constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr char kTokenizerKey[] = "krait.tokenizer";  // in the safetensors metadata

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrFormat("[%s]", absl::StrJoin(shape, ","));
}

// "a/b/c/" -> "c".
std::string LastPart(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path.substr(path.rfind('/') + 1);
}

// The first few names of a list.
std::string Some(const std::vector<std::string>& names) {
  constexpr size_t kShown = 5;
  std::vector<std::string> shown(names.begin(), names.begin() + std::min(kShown, names.size()));
  return absl::StrJoin(shown, ", ") +
         (names.size() > kShown ? absl::StrFormat(" and %d more", names.size() - kShown) : "");
}

}  // namespace

absl::StatusOr<ModelSpec> ReadHfSpec(const std::string& folder) {
  const std::string path = folder + "/config.json";
  std::string text;
  KRAIT_ASSIGN_OR_RETURN(text, ReadFile(path, kMaxConfigBytes, ExitCode::kNoCheckpoint));
  return SpecFromHfConfig(text, path);
}

absl::Status LoadHfWeights(const SafetensorsReader& reader, const ModelSpec& spec,
                           const ParamTable& table, const std::function<Tensor(int)>& target,
                           const Context& ctx) {
  const auto& entries = reader.entries();
  const auto& params = table.params();
  ErrorList errors;
  std::vector<std::string> missing, unknown;
  std::set<std::string> used;
  std::vector<HfSource> sources;
  for (const Param& param : params) {
    const std::vector<HfSource> places = HfSources(param, spec);
    const auto place = std::find_if(places.begin(), places.end(), [&](const HfSource& candidate) {
      return entries.contains(candidate.name);
    });
    if (place == places.end()) {
      missing.push_back(param.name);
      continue;
    }
    const SafetensorsEntry& entry = entries.at(place->name);
    if (entry.shape != place->shape && !used.contains(place->name)) {
      errors.Add(ExitCode::kNoCheckpoint,
                 absl::StrFormat("%s: %s has shape %s, but the config makes it %s", entry.file,
                                 place->name, ShapeText(entry.shape), ShapeText(place->shape)));
    }
    used.insert(place->name);
    sources.push_back(*place);
  }
  for (const auto& [name, entry] : entries) {
    // A tied head is sometimes stored a second time.
    if (!used.contains(name) && !(spec.tie_embeddings && name == kHeadName)) {
      unknown.push_back(name);
    }
  }
  if (!missing.empty()) {
    errors.Add(ExitCode::kNoCheckpoint, reader.path() + ": lacks " + Some(missing));
  }
  if (!unknown.empty()) {
    errors.Add(ExitCode::kNoCheckpoint,
               reader.path() + ": holds what the config does not: " + Some(unknown));
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  for (size_t p = 0; p < params.size(); ++p) {
    std::vector<float> values(static_cast<size_t>(params[p].numel()));
    KRAIT_RETURN_IF_ERROR(
        reader.ReadF32(sources[p].name, sources[p].begin, params[p].numel(), values.data()));
    Upload(target(static_cast<int>(p)), values.data(), ctx);
  }
  return absl::OkStatus();
}

absl::Status ImportHf(const ImportOptions& options) {
  if (Exists(options.out)) {
    const bool checkpoint = Exists(options.out + "/manifest.json");
    if (!checkpoint || !options.force) {
      return Error(ExitCode::kConfig, "--out " + options.out +
                                          " exists already; name another folder" +
                                          (checkpoint ? ", or add --force to replace it" : ""));
    }
  }
  if (!options.tokenizer.empty()) {
    KRAIT_RETURN_IF_ERROR(MakeTokenizer(options.tokenizer).status());
  }
  RunConfig config;
  KRAIT_ASSIGN_OR_RETURN(config.model, ReadHfSpec(options.hf));
  // What no config may say makes a checkpoint that nothing can read.
  KRAIT_RETURN_IF_ERROR(ParseConfig(config.ToYaml(), options.hf + "/config.json, as a config", {},
                                    ConfigUse::kPlan, /*ranks=*/1)
                            .status());
  auto reader = SafetensorsReader::OpenFolder(options.hf);
  if (!reader.ok()) return reader.status();
  const ParamTable table(config.model);
  std::unique_ptr<Arena> arena;
  const std::unique_ptr<Weights> weights = NewWeights(&table, Placement(), &arena);
  KRAIT_RETURN_IF_ERROR(LoadHfWeights(
      *reader, config.model, table, [&](int p) { return weights->Param(p); }, Context()));

  CheckpointMeta meta;
  meta.config_yaml = config.ToYaml();
  meta.tokenizer = options.tokenizer;
  const auto stored = reader->metadata().find(kTokenizerKey);
  if (meta.tokenizer.empty() && stored != reader->metadata().end()) {
    meta.tokenizer = stored->second;
  }
  SaveOptions save;
  save.dir = ParentFolder(options.out);
  save.name = LastPart(options.out);
  return SaveCheckpoint(save, meta, StateBoxes(*weights, nullptr));
}

}  // namespace krait
