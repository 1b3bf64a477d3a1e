#include "trainer/checkpoint/checkpoint_boxes.h"

#include <algorithm>
#include <charconv>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/crc32c.h"
#include "trainer/checkpoint/checkpoint_json.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF64, DType::kI32, DType::kI64,
                             DType::kU8,  DType::kU16,  DType::kU32, DType::kU64};

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

// The members that both formats write alike, and what must hold of them.
ManifestBox ParseBox(const std::vector<ManifestFile>& files, int64_t file, Members* members) {
  ManifestBox box;
  box.slot = members->Identifier("slot");
  box.name = members->Identifier("name");
  const std::string dtype = members->Text("dtype");
  const auto* known = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                   [&](DType d) { return dtype == Name(d); });
  if (known == std::end(kDTypes)) {
    members->Wrong("'dtype' is unknown");
  } else {
    box.dtype = *known;
  }
  box.shape = members->Counts("shape");
  box.offset = members->Counts("offset");
  box.extent = members->Counts("extent");
  box.file = file;
  box.file_offset = members->Count("at");
  if (!members->good()) return box;

  if (BytesOf(box.shape, box.dtype) < 0) members->Wrong("'shape' has a 0 or overflows");
  if (box.offset.size() != box.shape.size() || box.extent.size() != box.shape.size()) {
    members->Wrong("'shape', 'offset' and 'extent' have different lengths");
  } else {
    for (size_t d = 0; d < box.shape.size(); ++d) {
      if (box.extent[d] < 1 || box.extent[d] > box.shape[d] ||
          box.offset[d] > box.shape[d] - box.extent[d]) {
        members->Wrong("the box is empty or not inside the tensor");
      }
    }
  }
  if (!members->good()) return box;
  if (file >= static_cast<int64_t>(files.size())) {
    members->Wrong("'file' is not one of the files listed");
    return box;
  }
  const ManifestFile& entry = files[static_cast<size_t>(file)];
  if (box.file_offset > entry.size || box.bytes() > entry.size - box.file_offset) {
    members->Wrong("the box is not inside its file");
  } else if (box.file_offset < entry.table_at + entry.table_size &&
             entry.table_at < box.file_offset + box.bytes()) {
    members->Wrong("the box overlaps the table of boxes");
  }
  return box;
}

// A CRC in a table: 8 hexadecimal digits.
uint32_t ParseCrc(Members* members) {
  const std::string digits = members->Text("crc32c");
  uint32_t crc = 0;
  const auto [end, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), crc, /*base=*/16);
  if (digits.size() != 8 || error != std::errc() || end != digits.data() + digits.size()) {
    members->Wrong("'crc32c' is not 8 hexadecimal digits");
  }
  return crc;
}

json BoxJson(const ManifestBox& box) {
  return {{"slot", box.slot},         {"name", box.name},
          {"dtype", Name(box.dtype)}, {"shape", box.shape},
          {"offset", box.offset},     {"extent", box.extent},
          {"at", box.file_offset},    {"crc32c", absl::StrFormat("%08x", box.crc)}};
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

}  // namespace

int64_t CheckpointBox::bytes() const { return BytesOf(extent, dtype); }
Tensor CheckpointBox::values() const { return {data, dtype, device, {bytes() / SizeOf(dtype)}}; }
int64_t ManifestBox::bytes() const { return BytesOf(extent, dtype); }

std::string TableText(const std::string& save_id, const std::vector<ManifestBox>& boxes) {
  std::string text = absl::StrFormat("{\"save_id\":\"%s\",\n\"boxes\":", save_id);
  text += ListText(boxes, BoxJson) + ",\n";
  Seal(&text);
  return text;
}

absl::Status ParseTable(std::string_view text, size_t file, Checkpoint* checkpoint) {
  const ManifestFile& entry = checkpoint->files[file];
  const std::string place = checkpoint->path + "/" + entry.name + ": its table of boxes";
  const uint32_t crc = Crc32c(text.data(), text.size());
  if (crc != entry.table_crc) {
    return Error(kCode, place + absl::StrFormat(" (bytes %d to %d) has CRC32C %08x, saved was %08x",
                                                entry.table_at, entry.table_at + entry.table_size,
                                                crc, entry.table_crc));
  }
  KRAIT_ASSIGN_OR_RETURN(const json root, Unseal(text, place));
  Members members(root, place);
  const std::string save_id = members.SaveId("save_id");
  const json* boxes = members.List("boxes");
  if (save_id != checkpoint->save_id) members.Wrong("'save_id' is that of another save");
  KRAIT_RETURN_IF_ERROR(members.Done());
  for (size_t i = 0; i < boxes->size(); ++i) {
    Members box_members((*boxes)[i], place + ": box " + std::to_string(i));
    ManifestBox box = ParseBox(checkpoint->files, static_cast<int64_t>(file), &box_members);
    box.crc = ParseCrc(&box_members);
    KRAIT_RETURN_IF_ERROR(box_members.Done());
    checkpoint->boxes.push_back(std::move(box));
  }
  return absl::OkStatus();
}

absl::StatusOr<ManifestBox> ParseManifestBox(const json& value, const std::string& place,
                                             const std::vector<ManifestFile>& files) {
  Members members(value, place);
  ManifestBox box = ParseBox(files, members.Count("file"), &members);
  box.crc = members.Crc("crc32c");
  KRAIT_RETURN_IF_ERROR(members.Done());
  return box;
}

absl::Status CheckBoxes(const Checkpoint& checkpoint) {
  const std::string& path = checkpoint.path;
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
    if (files[f].table_size == 0) continue;
    covered[f].emplace_back(files[f].table_at, files[f].table_at + files[f].table_size);
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

namespace {

// Cuts dimension `d` of a part whose extent is 1 in all dimensions before it.
void Cut(BoxPart part, int64_t width, int64_t max_bytes, size_t d, std::vector<BoxPart>* out) {
  int64_t row = width;  // bytes of one step along d
  for (size_t i = d + 1; i < part.extent.size(); ++i) row *= part.extent[i];
  if (d == part.extent.size() || row * part.extent[d] <= max_bytes) {
    out->push_back(std::move(part));
    return;
  }
  const int64_t rows = std::max<int64_t>(1, max_bytes / row), all = part.extent[d];
  BoxPart piece = part;
  for (int64_t done = 0; done < all; done += rows) {
    piece.offset[d] = part.offset[d] + done;
    piece.extent[d] = std::min(rows, all - done);
    piece.begin = part.begin + done * (row / width);
    Cut(piece, width, max_bytes, piece.extent[d] == 1 ? d + 1 : d, out);
  }
}

}  // namespace

std::vector<BoxPart> CutBoxes(const std::vector<CheckpointBox>& boxes, int64_t max_bytes) {
  std::vector<BoxPart> parts;
  for (size_t i = 0; i < boxes.size(); ++i) {
    Cut({i, 0, boxes[i].offset, boxes[i].extent}, SizeOf(boxes[i].dtype), max_bytes, 0, &parts);
  }
  return parts;
}

}  // namespace krait
