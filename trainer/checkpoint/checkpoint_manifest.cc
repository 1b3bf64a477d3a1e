#include "trainer/checkpoint/checkpoint_manifest.h"

#include <charconv>
#include <cmath>
#include <cstdint>
#include <set>

#include "absl/strings/str_format.h"
#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint_boxes.h"
#include "trainer/checkpoint/checkpoint_json.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;

enum Need { kRequired, kOptional };  // optional: 0 or "" where it is missing
struct MetaInt {
  const char* key;
  int64_t CheckpointMeta::*field;
  Need need;
};
constexpr MetaInt kMetaInts[] = {
    {"step", &CheckpointMeta::step, kRequired},
    {"adam_steps", &CheckpointMeta::adam_steps, kRequired},
    {"skipped", &CheckpointMeta::skipped, kOptional},
    {"skipped_in_row", &CheckpointMeta::skipped_in_row, kOptional},
    {"sequences", &CheckpointMeta::sequences, kRequired},
    {"tokens", &CheckpointMeta::tokens, kRequired},
    {"mix_start", &CheckpointMeta::mix_start, kOptional},
};
struct MetaText {
  const char* key;
  std::string CheckpointMeta::*field;
  Need need;
};
constexpr MetaText kMetaTexts[] = {
    {"data_fingerprint", &CheckpointMeta::data_fingerprint, kRequired},
    {"tokenizer", &CheckpointMeta::tokenizer, kOptional},
    {"hardware", &CheckpointMeta::hardware, kOptional},
    {"hf_config", &CheckpointMeta::hf_config, kOptional},
    {"hf_generation_config", &CheckpointMeta::hf_generation_config, kOptional},
    {"config", &CheckpointMeta::config_yaml, kRequired},
};

struct MetaList {
  const char* key;
  std::vector<double> CheckpointMeta::*field;
};
constexpr MetaList kMetaLists[] = {
    // all optional
    {"recent_losses", &CheckpointMeta::recent_losses},
    {"recent_norms", &CheckpointMeta::recent_norms},
};

json SourceJson(const SourcePosition& source) {
  json shuffles = json::array();
  for (const Shuffle& shuffle : source.shuffles) {
    shuffles.push_back({{"from", shuffle.from}, {"seed", shuffle.seed}});
  }
  return {{"content", source.content}, {"path", source.path},       {"weight", source.weight},
          {"key", source.key},         {"seq_len", source.seq_len}, {"epoch", source.epoch},
          {"place", source.place},     {"shuffles", shuffles}};
}

json FileJson(const ManifestFile& file) {
  return {{"name", file.name},
          {"size", file.size},
          {"table_at", file.table_at},
          {"table_size", file.table_size},
          {"crc32c_table", file.table_crc},
          {"crc32c_rest", file.crc_rest}};
}

absl::StatusOr<ManifestFile> ParseFile(const json& value, int64_t version,
                                       const std::string& place) {
  Members members(value, place);
  ManifestFile file;
  file.name = members.Identifier("name");
  file.size = members.Count("size");
  file.crc_rest = members.Crc("crc32c_rest");
  if (version >= 2) {
    file.table_at = members.Count("table_at");
    file.table_size = members.Count("table_size", kMaxTableBytes);
    file.table_crc = members.Crc("crc32c_table");
    if (file.table_size == 0) members.Wrong("'table_size' is 0");
    if (file.table_at > file.size || file.table_size > file.size - file.table_at) {
      members.Wrong("the table of boxes is not inside the file");
    }
  }
  if (file.name == kManifestName) members.Wrong("the manifest cannot list itself");
  KRAIT_RETURN_IF_ERROR(members.Done());
  return file;
}

absl::StatusOr<SourcePosition> ParseSource(const json& value, const std::string& place) {
  // Sums of two of them, and a step more, stay below 2^63.
  constexpr int64_t kMost = int64_t{1} << 61;
  Members members(value, place);
  SourcePosition source;
  source.content = members.Text("content");
  source.path = members.Text("path");
  source.weight = members.NotNegative("weight");
  source.key = members.Count("key", (int64_t{1} << 24) - 1);
  source.seq_len = members.Count("seq_len", kMost);
  source.epoch = members.Count("epoch", kMost);
  source.place = members.Count("place", kMost);
  if (source.seq_len == 0) members.Wrong("'seq_len' is 0");
  const json* shuffles = members.List("shuffles");
  KRAIT_RETURN_IF_ERROR(members.Done());
  int64_t least = 0;
  for (const json& item : *shuffles) {
    Members shuffle(item, place + ": 'shuffles'");
    source.shuffles.push_back(
        {shuffle.Count("from", source.place), static_cast<uint64_t>(shuffle.Count("seed"))});
    KRAIT_RETURN_IF_ERROR(shuffle.Done());
    const int64_t from = source.shuffles.back().from;
    if (from < least || (source.shuffles.size() == 1 && from > 0)) {
      shuffle.Wrong("'from' does not ascend from 0");
    }
    least = from + 1;
    KRAIT_RETURN_IF_ERROR(shuffle.Done());
  }
  if (source.shuffles.empty()) members.Wrong("'shuffles' is empty");
  KRAIT_RETURN_IF_ERROR(members.Done());
  return source;
}

}  // namespace

std::string StepFolderName(int64_t step) { return absl::StrFormat("step-%08d", step); }

bool IsStepFolderName(std::string_view name, int64_t* step) {
  if (!name.starts_with("step-") || name.size() > 5 + 18) return false;
  const std::string_view digits = name.substr(5);
  int64_t value = -1;
  const auto [end, error] = std::from_chars(digits.begin(), digits.end(), value);
  if (error != std::errc() || end != digits.end() || value < 0) return false;
  if (StepFolderName(value) != name) return false;
  if (step != nullptr) *step = value;
  return true;
}

bool IsSaveId(std::string_view text) {
  return text.size() == kSaveIdDigits &&
         text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

absl::StatusOr<std::string> ManifestText(const Checkpoint& checkpoint) {
  std::string text = absl::StrFormat("{\"format_version\":%d,\n\"save_id\":\"%s\",\n",
                                     kCheckpointFormat, checkpoint.save_id);
  for (const MetaInt& m : kMetaInts) {
    text += absl::StrFormat("\"%s\":%d,\n", m.key, checkpoint.meta.*m.field);
  }
  for (const MetaText& m : kMetaTexts) {
    try {
      text += absl::StrFormat("\"%s\":%s,\n", m.key, json(checkpoint.meta.*m.field).dump());
    } catch (const json::type_error&) {
      return Error(ExitCode::kCannotSave,
                   std::string("the text '") + m.key + "' of the manifest is not valid UTF-8");
    }
  }
  const auto list = [&text](const char* key, const auto& items, const auto& to_json) {
    text += absl::StrFormat("\"%s\":%s,\n", key, ListText(items, to_json));
  };
  for (const MetaList& m : kMetaLists) {
    const std::vector<double>& values = checkpoint.meta.*m.field;
    // The JSON library's shortest text of a double reads back to its bits.
    if (!values.empty()) text += absl::StrFormat("\"%s\":%s,\n", m.key, json(values).dump());
  }
  if (!checkpoint.meta.sources.empty()) list("sources", checkpoint.meta.sources, SourceJson);
  if (!checkpoint.meta.validation.empty()) {
    list("validation", checkpoint.meta.validation,
         [](const std::string& hash) { return json(hash); });
  }
  text += absl::StrFormat("\"ranks\":%d,\n", checkpoint.ranks);
  list("files", checkpoint.files, FileJson);
  Seal(&text);
  if (static_cast<int64_t>(text.size()) > kMaxManifestBytes) {
    return Error(ExitCode::kCannotSave, "the manifest would be above 64 MiB");
  }
  return text;
}

std::string FileText(const ManifestFile& file) { return FileJson(file).dump(); }

absl::StatusOr<ManifestFile> ParseFileText(std::string_view text, const std::string& place) {
  KRAIT_ASSIGN_OR_RETURN(const json value, ParseJson(text, place, kCode));
  return ParseFile(value, kCheckpointFormat, place);
}

absl::StatusOr<Checkpoint> ParseManifest(std::string_view text, const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const json root, Unseal(text, path));
  Members members(root, path);
  const int64_t version = members.Count("format_version");
  if (members.good() && (version < 1 || version > kCheckpointFormat)) {
    return Error(kCode, path + " has format version " + std::to_string(version) +
                            "; this Krait reads versions 1 to " +
                            std::to_string(kCheckpointFormat));
  }
  Checkpoint out;
  out.path = ParentFolder(path);
  out.format_version = version;
  out.save_id = members.SaveId("save_id");
  for (const MetaInt& m : kMetaInts) {
    if (m.need == kRequired || members.Has(m.key)) out.meta.*m.field = members.Count(m.key);
  }
  for (const MetaText& m : kMetaTexts) {
    if (m.need == kRequired || members.Has(m.key)) out.meta.*m.field = members.Text(m.key);
  }
  for (const MetaList& m : kMetaLists) {
    const json* values = members.Has(m.key) ? members.List(m.key) : nullptr;
    for (size_t i = 0; values != nullptr && i < values->size(); ++i) {
      const json& value = (*values)[i];
      if (!value.is_number() || !std::isfinite(value.get<double>())) {
        members.Wrong(std::string("'") + m.key + "' is not a list of numbers");
        break;
      }
      (out.meta.*m.field).push_back(value.get<double>());
    }
  }
  const json* sources = members.Has("sources") ? members.List("sources") : nullptr;
  const json* validation = members.Has("validation") ? members.List("validation") : nullptr;
  const json* files = members.List("files");
  const json* boxes = version == 1 ? members.List("boxes") : nullptr;
  out.ranks = version == 1 ? 1 : members.Count("ranks");
  if (out.meta.mix_start > out.meta.sequences) members.Wrong("'mix_start' is past 'sequences'");
  KRAIT_RETURN_IF_ERROR(members.Done());
  if (sources != nullptr) {
    for (const json& value : *sources) {
      const std::string place = path + ": source " + std::to_string(out.meta.sources.size());
      KRAIT_ASSIGN_OR_RETURN(SourcePosition source, ParseSource(value, place));
      out.meta.sources.push_back(std::move(source));
    }
  }
  if (validation != nullptr) {
    for (const json& value : *validation) {
      if (!value.is_string()) return Error(kCode, path + ": 'validation' is not a list of texts");
      out.meta.validation.push_back(value.get<std::string>());
    }
  }

  std::set<std::string> names;
  for (const json& value : *files) {
    const std::string place = path + ": file " + std::to_string(out.files.size());
    KRAIT_ASSIGN_OR_RETURN(ManifestFile file, ParseFile(value, version, place));
    if (!names.insert(file.name).second) {
      return Error(kCode, place + ": '" + file.name + "' is listed twice");
    }
    out.files.push_back(std::move(file));
  }
  if (static_cast<int64_t>(out.files.size()) > out.ranks) {
    return Error(kCode, path + ": there are more files than 'ranks'");
  }
  if (boxes == nullptr) return out;
  out.boxes.reserve(boxes->size());
  for (const json& value : *boxes) {
    const std::string place = path + ": box " + std::to_string(out.boxes.size());
    KRAIT_ASSIGN_OR_RETURN(ManifestBox box, ParseManifestBox(value, place, out.files));
    out.boxes.push_back(std::move(box));
  }
  KRAIT_RETURN_IF_ERROR(CheckBoxes(out));
  return out;
}

}  // namespace krait
