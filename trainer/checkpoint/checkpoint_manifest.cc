#include "trainer/checkpoint/checkpoint_manifest.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <set>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;
constexpr size_t kMaxRank = 4;  // of Tensor
constexpr size_t kMaxName = 512;
constexpr char kLetters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF64, DType::kI32, DType::kI64,
                             DType::kU8,  DType::kU16,  DType::kU32, DType::kU64};

// The end of a manifest whose text before it has this CRC.
std::string Tail(uint32_t crc) { return absl::StrFormat("\"crc32c\":\"%08x\"}\n", crc); }

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

json SourceJson(const SourcePosition& source) {
  json shuffles = json::array();
  for (const Shuffle& shuffle : source.shuffles) {
    shuffles.push_back({{"from", shuffle.from}, {"seed", shuffle.seed}});
  }
  return {{"content", source.content}, {"path", source.path},       {"weight", source.weight},
          {"key", source.key},         {"seq_len", source.seq_len}, {"epoch", source.epoch},
          {"place", source.place},     {"shuffles", shuffles}};
}

json BoxJson(const ManifestBox& box) {
  return {{"slot", box.slot},   {"name", box.name},      {"dtype", Name(box.dtype)},
          {"shape", box.shape}, {"offset", box.offset},  {"extent", box.extent},
          {"file", box.file},   {"at", box.file_offset}, {"crc32c", box.crc}};
}

// Reads members of one JSON object; the first thing wrong is kept as a sentence about `place`.
class Members {
 public:
  Members(const json& object, std::string place) : object_(object), place_(std::move(place)) {
    if (!object_.is_object()) Wrong("is not an object");
  }

  int64_t Count(const char* key, int64_t limit = INT64_MAX) {
    const json* value = Find(key);
    if (value == nullptr) return 0;
    if (!value->is_number_unsigned() || value->get<uint64_t>() > static_cast<uint64_t>(limit)) {
      Wrong(std::string("'") + key + "' is not a count up to " + std::to_string(limit));
      return 0;
    }
    return static_cast<int64_t>(value->get<uint64_t>());
  }
  double NotNegative(const char* key) {
    const json* value = Find(key);
    if (value == nullptr) return 0;
    if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() < 0) {
      Wrong(std::string("'") + key + "' is not a number of at least 0");
      return 0;
    }
    return value->get<double>();
  }
  // null, after saying so, when it is no list.
  const json* List(const char* key) {
    const json* value = Find(key);
    if (value == nullptr || value->is_array()) return value;
    Wrong(std::string("'") + key + "' is not a list");
    return nullptr;
  }
  std::string Text(const char* key) {
    const json* value = Find(key);
    if (value == nullptr) return "";
    if (!value->is_string()) {
      Wrong(std::string("'") + key + "' is not a text");
      return "";
    }
    return value->get<std::string>();
  }
  // Of the fixed alphabet, so that it is safe in paths and messages.
  std::string Identifier(const char* key) {
    std::string text = Text(key);
    if (problem_.empty() && (text.empty() || text.size() > kMaxName || text[0] == '.' ||
                             text.find_first_not_of(kLetters) != std::string::npos)) {
      Wrong(std::string("'") + key + "' is not a name of letters, digits, '.', '_', '-'");
      return "";
    }
    return text;
  }
  std::vector<int64_t> Counts(const char* key) {
    std::vector<int64_t> out;
    const json* value = Find(key);
    if (value == nullptr) return out;
    bool good = value->is_array() && value->size() <= kMaxRank;
    for (size_t i = 0; good && i < value->size(); ++i) {
      const json& item = (*value)[i];
      good = item.is_number_unsigned() && item.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
      if (good) out.push_back(static_cast<int64_t>(item.get<uint64_t>()));
    }
    if (!good) Wrong(std::string("'") + key + "' is not a list of up to 4 counts");
    return out;
  }
  const json* Find(const char* key) {
    if (!problem_.empty()) return nullptr;
    const auto found = object_.find(key);
    if (found == object_.end()) {
      Wrong(std::string("'") + key + "' is missing");
      return nullptr;
    }
    return &*found;
  }
  void Wrong(const std::string& what) {
    if (problem_.empty()) problem_ = place_ + ": " + what;
  }
  bool good() const { return problem_.empty(); }
  bool Has(const char* key) const { return object_.is_object() && object_.contains(key); }
  absl::Status Done() const { return problem_.empty() ? absl::OkStatus() : Error(kCode, problem_); }

 private:
  const json& object_;
  std::string place_, problem_;
};

// Bytes of a box or tensor, or -1 on overflow or where an extent is 0.
int64_t BytesOf(const std::vector<int64_t>& extent, DType dtype) {
  int64_t bytes = SizeOf(dtype);
  for (const int64_t n : extent) {
    if (n <= 0 || __builtin_mul_overflow(bytes, n, &bytes)) return -1;
  }
  return bytes;
}

std::string Place(const std::string& path, const ManifestBox& box) {
  return path + ": tensor '" + box.name + "' (" + box.slot + ")";
}

absl::StatusOr<ManifestFile> ParseFile(const json& value, const std::string& place) {
  Members members(value, place);
  ManifestFile file;
  file.name = members.Identifier("name");
  file.size = members.Count("size");
  file.crc_rest = static_cast<uint32_t>(members.Count("crc32c_rest", UINT32_MAX));
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

absl::StatusOr<ManifestBox> ParseBox(const json& value, const std::string& place,
                                     const std::vector<ManifestFile>& files) {
  Members members(value, place);
  ManifestBox box;
  box.slot = members.Identifier("slot");
  box.name = members.Identifier("name");
  const std::string dtype = members.Text("dtype");
  const auto* known = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                   [&](DType d) { return dtype == Name(d); });
  if (known == std::end(kDTypes)) {
    members.Wrong("'dtype' is unknown");
  } else {
    box.dtype = *known;
  }
  box.shape = members.Counts("shape");
  box.offset = members.Counts("offset");
  box.extent = members.Counts("extent");
  box.file = members.Count("file");
  box.file_offset = members.Count("at");
  box.crc = static_cast<uint32_t>(members.Count("crc32c", UINT32_MAX));
  KRAIT_RETURN_IF_ERROR(members.Done());

  if (BytesOf(box.shape, box.dtype) < 0) members.Wrong("'shape' has a 0 or overflows");
  if (box.offset.size() != box.shape.size() || box.extent.size() != box.shape.size()) {
    members.Wrong("'shape', 'offset' and 'extent' have different lengths");
  } else {
    for (size_t d = 0; d < box.shape.size(); ++d) {
      if (box.extent[d] < 1 || box.extent[d] > box.shape[d] ||
          box.offset[d] > box.shape[d] - box.extent[d]) {
        members.Wrong("the box is empty or not inside the tensor");
      }
    }
  }
  KRAIT_RETURN_IF_ERROR(members.Done());
  if (box.file >= static_cast<int64_t>(files.size())) {
    members.Wrong("'file' is not one of the files listed");
  } else {
    const int64_t size = files[static_cast<size_t>(box.file)].size;
    if (box.file_offset > size || box.bytes() > size - box.file_offset) {
      members.Wrong("the box is not inside its file");
    }
  }
  KRAIT_RETURN_IF_ERROR(members.Done());
  return box;
}

// Boxes tile a tensor exactly once iff the sum of their indicator functions is that of the tensor.
// A function of finite support is determined by its mixed differences, and those of a box are +1
// and -1 at its corners: so the signed corners of the boxes must add up to those of the tensor.
bool TilesOnce(const std::vector<ManifestBox>& boxes, const std::vector<size_t>& indices) {
  const std::vector<int64_t>& shape = boxes[indices[0]].shape;
  if (indices.size() == 1) return boxes[indices[0]].extent == shape;
  std::vector<size_t> split;  // the other dimensions contribute the same factor everywhere
  for (size_t d = 0; d < shape.size(); ++d) {
    if (std::any_of(indices.begin(), indices.end(),
                    [&](size_t i) { return boxes[i].extent[d] != shape[d]; })) {
      split.push_back(d);
    }
  }
  std::map<std::vector<int64_t>, int64_t> corners;
  const auto add = [&](const std::vector<int64_t>& offset, const std::vector<int64_t>& extent,
                       int64_t sign) {
    for (unsigned corner = 0; corner < 1u << split.size(); ++corner) {
      std::vector<int64_t> at;
      int64_t value = sign;
      for (size_t k = 0; k < split.size(); ++k) {
        const bool upper = (corner >> k & 1) != 0;
        at.push_back(offset[split[k]] + (upper ? extent[split[k]] : 0));
        if (upper) value = -value;
      }
      corners[at] += value;
    }
  };
  for (const size_t i : indices) add(boxes[i].offset, boxes[i].extent, 1);
  add(std::vector<int64_t>(shape.size(), 0), shape, -1);
  return std::all_of(corners.begin(), corners.end(), [](const auto& c) { return c.second == 0; });
}

absl::Status CheckBoxes(const std::string& path, const Checkpoint& checkpoint) {
  const std::vector<ManifestBox>& boxes = checkpoint.boxes;
  std::map<std::string, const std::vector<int64_t>*> shapes;
  for (const auto& [key, indices] : IndexTensors(boxes)) {
    const ManifestBox& first = boxes[indices[0]];
    const auto* shape = shapes.emplace(first.name, &first.shape).first->second;
    for (const size_t i : indices) {
      if (boxes[i].shape != *shape) {
        return Error(kCode, Place(path, boxes[i]) + " has two shapes");
      }
      if (boxes[i].dtype != first.dtype) {
        return Error(kCode, Place(path, boxes[i]) + " has two dtypes");
      }
    }
    if (!TilesOnce(boxes, indices)) {
      return Error(kCode, Place(path, first) + ": its boxes do not tile [" +
                              absl::StrJoin(first.shape, ", ") + "] exactly once");
    }
  }

  std::vector<const ManifestBox*> order;
  for (const ManifestBox& box : boxes) order.push_back(&box);
  std::sort(order.begin(), order.end(), [](const ManifestBox* a, const ManifestBox* b) {
    return std::pair(a->file, a->file_offset) < std::pair(b->file, b->file_offset);
  });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i]->file == order[i - 1]->file &&
        order[i]->file_offset < order[i - 1]->file_offset + order[i - 1]->bytes()) {
      return Error(kCode, Place(path, *order[i]) + " overlaps '" + order[i - 1]->name + "' in " +
                              checkpoint.files[static_cast<size_t>(order[i]->file)].name);
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t CheckpointBox::bytes() const { return BytesOf(extent, dtype); }
Tensor CheckpointBox::values() const { return {data, dtype, device, {bytes() / SizeOf(dtype)}}; }
int64_t ManifestBox::bytes() const { return BytesOf(extent, dtype); }

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

TensorIndex IndexTensors(const std::vector<ManifestBox>& boxes) {
  TensorIndex index;
  for (size_t i = 0; i < boxes.size(); ++i) index[{boxes[i].slot, boxes[i].name}].push_back(i);
  return index;
}

std::vector<std::vector<std::pair<int64_t, int64_t>>> RangesOutsideBoxes(
    const std::vector<ManifestFile>& files, const std::vector<ManifestBox>& boxes) {
  std::vector<std::vector<std::pair<int64_t, int64_t>>> covered(files.size()), out(files.size());
  for (const ManifestBox& box : boxes) {
    covered[static_cast<size_t>(box.file)].emplace_back(box.file_offset,
                                                        box.file_offset + box.bytes());
  }
  for (size_t f = 0; f < files.size(); ++f) {
    std::sort(covered[f].begin(), covered[f].end());
    int64_t at = 0;
    for (const auto& [begin, end] : covered[f]) {
      if (at < begin) out[f].emplace_back(at, begin);
      at = end;
    }
    if (at < files[f].size) out[f].emplace_back(at, files[f].size);
  }
  return out;
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
    text += std::string("\"") + key + "\":[";
    const char* separator = "\n";
    for (const auto& item : items) {
      text += separator + to_json(item).dump(-1, ' ', false, json::error_handler_t::replace);
      separator = ",\n";
    }
    text += "],\n";
  };
  if (!checkpoint.meta.sources.empty()) list("sources", checkpoint.meta.sources, SourceJson);
  if (!checkpoint.meta.validation.empty()) {
    list("validation", checkpoint.meta.validation,
         [](const std::string& hash) { return json(hash); });
  }
  list("files", checkpoint.files, [](const ManifestFile& file) {
    return json{{"name", file.name}, {"size", file.size}, {"crc32c_rest", file.crc_rest}};
  });
  list("boxes", checkpoint.boxes, BoxJson);
  text += Tail(Crc32c(text.data(), text.size()));
  if (static_cast<int64_t>(text.size()) > kMaxManifestBytes) {
    return Error(ExitCode::kCannotSave, "the manifest would be above 64 MiB");
  }
  return text;
}

absl::StatusOr<Checkpoint> ParseManifest(std::string_view text, const std::string& path) {
  const size_t tail = Tail(0).size();
  if (text.size() < tail) {
    return Error(kCode, path + " has " + std::to_string(text.size()) + " bytes: cut off or empty");
  }
  const std::string_view body = text.substr(0, text.size() - tail);
  if (text.substr(body.size()) != Tail(Crc32c(body.data(), body.size()))) {
    return Error(kCode, path + " does not match its own CRC32C: damaged or cut off");
  }
  KRAIT_ASSIGN_OR_RETURN(const json root, ParseJson(text, path, kCode, 6));

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
  out.save_id = members.Text("save_id");
  if (!IsSaveId(out.save_id)) members.Wrong("'save_id' is not 32 hexadecimal digits");
  for (const MetaInt& m : kMetaInts) {
    if (m.need == kRequired || members.Has(m.key)) out.meta.*m.field = members.Count(m.key);
  }
  for (const MetaText& m : kMetaTexts) {
    if (m.need == kRequired || members.Has(m.key)) out.meta.*m.field = members.Text(m.key);
  }
  const json* sources = members.Has("sources") ? members.List("sources") : nullptr;
  const json* validation = members.Has("validation") ? members.List("validation") : nullptr;
  const json* files = members.List("files");
  const json* boxes = members.List("boxes");
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
    KRAIT_ASSIGN_OR_RETURN(ManifestFile file, ParseFile(value, place));
    if (!names.insert(file.name).second) {
      return Error(kCode, place + ": '" + file.name + "' is listed twice");
    }
    out.files.push_back(std::move(file));
  }
  out.boxes.reserve(boxes->size());
  for (const json& value : *boxes) {
    const std::string place = path + ": box " + std::to_string(out.boxes.size());
    KRAIT_ASSIGN_OR_RETURN(ManifestBox box, ParseBox(value, place, out.files));
    out.boxes.push_back(std::move(box));
  }
  KRAIT_RETURN_IF_ERROR(CheckBoxes(path, out));
  return out;
}

}  // namespace krait
