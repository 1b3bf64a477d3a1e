#include "kernels/base/safetensors.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/json.h"

namespace krait {
namespace {

constexpr int64_t kMaxHeader = 100'000'000;
constexpr size_t kMaxRank = 32;
constexpr ExitCode kCode = ExitCode::kNoCheckpoint;

// The dtypes of the format, with what Krait calls them. Those that it has no tensors of may still
// lie in a file beside what is read.
struct StoredType {
  const char* name;
  int bits;
  std::optional<DType> dtype;
};
constexpr StoredType kStoredTypes[] = {
    {"F32", 32, DType::kF32}, {"BF16", 16, DType::kBF16},
    {"F64", 64, DType::kF64}, {"I32", 32, DType::kI32},
    {"I64", 64, DType::kI64}, {"U8", 8, DType::kU8},
    {"U16", 16, DType::kU16}, {"U32", 32, DType::kU32},
    {"U64", 64, DType::kU64}, {"F16", 16, {}},
    {"I16", 16, {}},          {"I8", 8, {}},
    {"BOOL", 8, {}},          {"C64", 64, {}},
    {"F8_E4M3", 8, {}},       {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}},       {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},   {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},       {"F4", 4, {}},
};
constexpr char kHalf[] = "F16";

std::string FileName(DType dtype) {
  for (const StoredType& type : kStoredTypes) {
    if (type.dtype == dtype) return type.name;
  }
  KRAIT_FATAL("dtype without a safetensors name");
}

// One non-negative integer below 2^63; nullopt for anything else.
std::optional<int64_t> AsCount(const nlohmann::json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(number);
}

// Fills all of `entry` but its file; `data_begin` is where the header ends in the file of `size`
// bytes. Returns what is wrong, or "".
std::string ParseEntry(const nlohmann::json& value, int64_t data_begin, int64_t size,
                       SafetensorsEntry* entry) {
  if (!value.is_object()) return "is not an object";
  const auto dtype = value.find("dtype");
  if (dtype == value.end() || !dtype->is_string()) return "has no dtype";
  const std::string name = dtype->get<std::string>().substr(0, 20);
  const auto* known = std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes),
                                   [&](const StoredType& type) { return type.name == name; });
  if (known == std::end(kStoredTypes)) return "has the unknown dtype " + name;
  entry->stored = name;
  entry->dtype = known->dtype;

  const auto shape = value.find("shape");
  if (shape == value.end() || !shape->is_array()) return "has no shape";
  if (shape->size() > kMaxRank) return "has " + std::to_string(shape->size()) + " dimensions";
  // Overflow is judged on the bits; a zero among the dimensions must not hide it, as other
  // readers multiply in other orders.
  int64_t bits = known->bits;
  bool empty = false;
  for (const nlohmann::json& extent : *shape) {
    const std::optional<int64_t> count = AsCount(extent);
    if (!count.has_value()) return "has a shape that is not made of counts";
    entry->shape.push_back(*count);
    if (*count == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(bits, *count, &bits)) {
      return "has a shape whose size overflows";
    }
  }
  if (empty) bits = 0;
  if (bits % 8 != 0) return "ends inside a byte";
  const int64_t bytes = bits / 8;

  const auto offsets = value.find("data_offsets");
  if (offsets == value.end() || !offsets->is_array() || offsets->size() != 2) {
    return "has no data_offsets [begin, end]";
  }
  const std::optional<int64_t> begin = AsCount((*offsets)[0]), end = AsCount((*offsets)[1]);
  if (!begin.has_value() || !end.has_value() || *begin > *end) return "has broken data_offsets";
  if (*end > size - data_begin) {
    return "ends " + std::to_string(*end - (size - data_begin)) + " bytes behind the file's end (" +
           std::to_string(size) + ")";
  }
  if (*end - *begin != bytes) {
    return "has " + std::to_string(*end - *begin) + " bytes, its shape and dtype need " +
           std::to_string(bytes);
  }
  entry->begin = data_begin + *begin;
  entry->bytes = bytes;
  return "";
}

// The data must be covered from `data_begin` to `size` without overlap and without holes.
absl::Status CheckCovered(const std::string& path, int64_t data_begin, int64_t size,
                          const std::map<std::string, SafetensorsEntry>& entries) {
  std::vector<const std::pair<const std::string, SafetensorsEntry>*> order;
  for (const auto& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.bytes) <
           std::pair(b->second.begin, b->second.bytes);
  });
  int64_t at = data_begin;
  for (const auto* entry : order) {
    const int64_t begin = entry->second.begin;
    if (begin != at) {
      return Error(
          kCode,
          path + ": tensor '" + entry->first + "' starts at byte " + std::to_string(begin) + ", " +
              (begin < at ? "inside the tensor that ends at byte " : "leaving a hole after byte ") +
              std::to_string(at));
    }
    at += entry->second.bytes;
  }
  if (at != size) {
    return Error(kCode, path + ": the tensors end at byte " + std::to_string(at) +
                            " but the file has " + std::to_string(size) + " bytes");
  }
  return absl::OkStatus();
}

// Exact: every half is a float.
float HalfToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  uint32_t exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 0x1f) {  // infinity, or NaN with its payload
    exponent = 0xff;
  } else if (exponent != 0) {
    exponent += 127 - 15;
  } else if (mantissa != 0) {  // a denormal half, mantissa * 2^-24, is a normal float
    const int shift = __builtin_clz(mantissa) - 21;
    mantissa = mantissa << shift & 0x3ffu;
    exponent = static_cast<uint32_t>(127 - 15 + 1 - shift);
  }
  return std::bit_cast<float>(sign | exponent << 23 | mantissa << 13);
}

template <typename T>
T At(const unsigned char* in, int64_t i) {
  T value;
  std::memcpy(&value, in + static_cast<int64_t>(sizeof(T)) * i, sizeof(T));
  return value;
}

// From all but F32; false when a finite number is beyond f32.
bool ToFloat(const unsigned char* in, const SafetensorsEntry& entry, int64_t count, float* out) {
  bool fits = true;
  if (entry.dtype == DType::kF64) {
    for (int64_t i = 0; i < count; ++i) {
      const auto value = At<double>(in, i);
      out[i] = static_cast<float>(value);
      fits = fits && (std::isfinite(out[i]) || !std::isfinite(value));
    }
  } else if (entry.stored == kHalf) {
    for (int64_t i = 0; i < count; ++i) out[i] = HalfToFloat(At<uint16_t>(in, i));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = std::bit_cast<float>(static_cast<uint32_t>(At<uint16_t>(in, i)) << 16);
    }
  }
  return fits;
}

// False when a value is outside i32.
bool ToInt(const unsigned char* in, DType dtype, int64_t count, int32_t* out) {
  if (dtype == DType::kI32) {
    std::memcpy(out, in, static_cast<size_t>(count) * sizeof(int32_t));
  } else if (dtype == DType::kU8) {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const auto value = At<int64_t>(in, i);
      if (value < INT32_MIN || value > INT32_MAX) return false;
      out[i] = static_cast<int32_t>(value);
    }
  }
  return true;
}

// Calls convert(bytes, first element, count) for pieces of elements [begin, begin + count).
template <typename Fn>
absl::Status ReadPieces(const SafetensorsEntry& entry, int64_t begin, int64_t count,
                        const Fn& convert) {
  const int64_t numel = entry.numel(), width = numel == 0 ? 1 : entry.bytes / numel;
  KRAIT_CHECK(begin >= 0 && count >= 0 && begin <= numel && count <= numel - begin);
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(entry.file, kCode));
  constexpr int64_t kPiece = 1 << 18;  // bytes: in the cache while they are converted
  const auto buffer = std::make_unique_for_overwrite<unsigned char[]>(
      static_cast<size_t>(std::min(kPiece, count * width)));
  for (int64_t done = 0; done < count;) {
    const int64_t n = std::min(count - done, kPiece / width);
    KRAIT_RETURN_IF_ERROR(file.ReadAt(buffer.get(), static_cast<size_t>(n * width),
                                      entry.begin + (begin + done) * width));
    KRAIT_RETURN_IF_ERROR(convert(buffer.get(), done, n));
    done += n;
  }
  return absl::OkStatus();
}

}  // namespace

int64_t SafetensorsEntry::numel() const {
  int64_t numel = 1;
  for (const int64_t extent : shape) numel *= extent;
  return numel;
}

bool SafetensorsEntry::IsFloat() const {
  return dtype == DType::kF32 || dtype == DType::kF64 || dtype == DType::kBF16 || stored == kHalf;
}

absl::StatusOr<SafetensorsReader> SafetensorsReader::OpenFile(const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(path, kCode));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
  if (size < 8) {
    return Error(kCode, path + " has " + std::to_string(size) +
                            " bytes; a safetensors file starts with an 8-byte header length");
  }
  uint64_t length;  // little-endian, as are all machines Krait runs on
  KRAIT_RETURN_IF_ERROR(file.ReadAt(&length, 8, 0));
  if (std::memcmp(&length, "version ", 8) == 0) {
    return Error(kCode, path +
                            " is a Git LFS pointer, not the file that it stands for: fetch that "
                            "with `git lfs pull`");
  }
  if (length > static_cast<uint64_t>(kMaxHeader) || static_cast<int64_t>(length) > size - 8) {
    return Error(kCode, path + ": byte 0: a header of " + std::to_string(length) +
                            " bytes; the file has " + std::to_string(size) + ", at most " +
                            std::to_string(kMaxHeader) +
                            " are allowed. Not a safetensors file, or one cut off");
  }
  std::string header(length, '\0');
  KRAIT_RETURN_IF_ERROR(file.ReadAt(header.data(), header.size(), 8));
  const std::string place = path + ": header (from byte 8)";
  KRAIT_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(header, place, kCode, 4));
  if (header.empty() || header[0] != '{') return Error(kCode, place + " does not start with '{'");

  SafetensorsReader reader;
  reader.path_ = path;
  const int64_t data_begin = 8 + static_cast<int64_t>(length);
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) return Error(kCode, place + ": __metadata__ is not an object");
      for (const auto& [key, text] : value.items()) {
        if (!text.is_string()) return Error(kCode, place + ": __metadata__ holds more than texts");
        reader.metadata_[key] = text.get<std::string>();
      }
      continue;
    }
    SafetensorsEntry entry;
    entry.file = path;
    if (const std::string problem = ParseEntry(value, data_begin, size, &entry); !problem.empty()) {
      return Error(kCode, place + ": tensor '" + name.substr(0, 200) + "' " + problem);
    }
    reader.entries_.emplace(name, std::move(entry));
  }
  KRAIT_RETURN_IF_ERROR(CheckCovered(path, data_begin, size, reader.entries_));
  return reader;
}

absl::StatusOr<SafetensorsReader> SafetensorsReader::OpenFolder(const std::string& folder) {
  const std::string single = folder + "/model.safetensors";
  const std::string index = single + ".index.json";
  if (Exists(single)) return OpenFile(single);
  if (!Exists(index)) {
    return Error(kCode,
                 folder + " holds neither model.safetensors nor " + "model.safetensors.index.json");
  }
  KRAIT_ASSIGN_OR_RETURN(const std::string text, ReadFile(index, kMaxHeader, kCode));
  KRAIT_ASSIGN_OR_RETURN(const nlohmann::json json, ParsePythonJson(text, index, kCode));
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (map == json.end() || !map->is_object()) {
    return Error(kCode, index + " has no object 'weight_map'");
  }

  ErrorList errors;
  std::map<std::string, SafetensorsReader> shards;
  SafetensorsReader reader;
  reader.path_ = folder;
  for (const auto& [name, value] : map->items()) {
    const std::string file = value.is_string() ? value.get<std::string>() : "";
    if (file.empty() || file == "." || file == ".." || file.find('/') != std::string::npos ||
        file.find('\0') != std::string::npos) {
      return Error(kCode, index + ": tensor '" + name.substr(0, 200) +
                              "' is not in a file beside the index");
    }
    if (!shards.contains(file)) {
      const std::string path = folder + "/" + file;
      auto shard = Exists(path) ? OpenFile(path)
                                : Error(kCode, path + " is missing; " + index + " lists it");
      if (!shard.ok()) errors.Add(shard.status());
      shards.emplace(file, shard.ok() ? std::move(shard).value() : SafetensorsReader());
    }
    const SafetensorsReader& shard = shards.at(file);
    if (shard.path_.empty()) continue;  // said once
    const auto entry = shard.entries_.find(name);
    if (entry == shard.entries_.end()) {
      errors.Add(kCode, shard.path_ + " has no tensor '" + name.substr(0, 200) + "'; " + index +
                            " lists it there");
      continue;
    }
    reader.entries_.insert(*entry);
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  for (const auto& [file, shard] : shards) {
    reader.metadata_.insert(shard.metadata_.begin(), shard.metadata_.end());
  }
  return reader;
}

absl::Status SafetensorsReader::ReadF32(const std::string& name, int64_t begin, int64_t count,
                                        float* out) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return Error(kCode, path_ + " has no tensor '" + name + "'");
  const SafetensorsEntry& entry = found->second;
  if (!entry.IsFloat()) {
    return Error(kCode, entry.file + ": tensor '" + name + "' has dtype " + entry.stored +
                            "; F32, F64, BF16 or F16 is needed");
  }
  if (entry.dtype == DType::kF32) return ReadRaw(name, begin, count, out);
  return ReadPieces(entry, begin, count, [&](const unsigned char* data, int64_t at, int64_t n) {
    if (ToFloat(data, entry, n, out + at)) return absl::OkStatus();
    return Error(kCode, entry.file + ": tensor '" + name +
                            "' holds a number beyond f32 at or behind its element " +
                            std::to_string(begin + at));
  });
}

absl::Status SafetensorsReader::ReadRaw(const std::string& name, int64_t begin, int64_t count,
                                        void* out) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return Error(kCode, path_ + " has no tensor '" + name + "'");
  const SafetensorsEntry& entry = found->second;
  const int64_t numel = entry.numel(), width = numel == 0 ? 1 : entry.bytes / numel;
  KRAIT_CHECK(width > 0 && begin >= 0 && count >= 0 && begin <= numel - count);
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(entry.file, kCode));
  return file.ReadAt(out, static_cast<size_t>(count * width), entry.begin + begin * width);
}

absl::Status SafetensorsReader::ReadI32(const std::string& name, int64_t begin, int64_t count,
                                        int32_t* out) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return Error(kCode, path_ + " has no tensor '" + name + "'");
  const SafetensorsEntry& entry = found->second;
  if (entry.dtype != DType::kI32 && entry.dtype != DType::kI64 && entry.dtype != DType::kU8) {
    return Error(kCode, entry.file + ": tensor '" + name + "' has dtype " + entry.stored +
                            "; I32, I64 or U8 is needed");
  }
  return ReadPieces(entry, begin, count, [&](const unsigned char* data, int64_t at, int64_t n) {
    if (ToInt(data, *entry.dtype, n, out + at)) return absl::OkStatus();
    return Error(kCode, entry.file + ": tensor '" + name + "' holds a value outside i32 at byte " +
                            std::to_string(entry.begin + (begin + at) * 8) + " or behind it");
  });
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(
    const std::string& path, const std::vector<Item>& items,
    const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer;
  nlohmann::json json = nlohmann::json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  int64_t end = 0;
  for (const Item& item : items) {
    int64_t bytes = SizeOf(item.dtype);
    for (const int64_t extent : item.shape) bytes *= extent;
    KRAIT_CHECK(!json.contains(item.name));
    json[item.name] = {{"dtype", FileName(item.dtype)},
                       {"shape", item.shape},
                       {"data_offsets", {end, end + bytes}}};
    end += bytes;
    writer.ends_.push_back(end);
  }
  std::string header = json.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
  const uint64_t length = header.size();

  const std::string temporary = path + ".tmp";
  KRAIT_RETURN_IF_ERROR(RemoveFile(temporary, ExitCode::kCannotSave));
  KRAIT_ASSIGN_OR_RETURN(writer.file_,
                         File::Create(temporary, /*exclusive=*/true, ExitCode::kCannotSave));
  writer.final_path_ = path;
  writer.offset_ = static_cast<int64_t>(8 + length);
  for (int64_t& item_end : writer.ends_) item_end += writer.offset_;
  KRAIT_RETURN_IF_ERROR(writer.file_.WriteAt(&length, 8, 0));
  KRAIT_RETURN_IF_ERROR(writer.file_.WriteAt(header.data(), header.size(), 8));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (file_.fd() >= 0) unlink(file_.path().c_str());
}

absl::Status SafetensorsWriter::Write(const void* data, int64_t bytes) {
  KRAIT_CHECK(next_ < ends_.size() && bytes <= ends_[next_] - offset_);
  KRAIT_RETURN_IF_ERROR(file_.WriteAt(data, static_cast<size_t>(bytes), offset_));
  offset_ += bytes;
  if (offset_ == ends_[next_]) ++next_;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  KRAIT_CHECK(next_ == ends_.size());
  KRAIT_RETURN_IF_ERROR(file_.Sync());
  KRAIT_RETURN_IF_ERROR(Rename(file_.path(), final_path_, ExitCode::kCannotSave));
  KRAIT_RETURN_IF_ERROR(file_.Close());
  return SyncDirectory(ParentFolder(final_path_), ExitCode::kCannotSave);
}

}  // namespace krait
