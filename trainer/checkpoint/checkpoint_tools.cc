#include "trainer/checkpoint/checkpoint_tools.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_boxes.h"

namespace krait {
namespace {

using nlohmann::json;

std::string Dump(const json& value) {
  return value.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

// The newest checkpoint of `path` whose manifest holds; what was passed over goes to `notes`.
absl::StatusOr<Checkpoint> OpenNewest(const std::string& path, std::vector<PassedOver>* notes) {
  KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> folders, FindCheckpoints(path));
  return LoadNewestWhole(
      folders, [](const Checkpoint&) { return absl::OkStatus(); }, notes);
}

struct SlotSum {
  int64_t tensors = 0, boxes = 0, elements = 0, bytes = 0;
};
std::map<std::string, SlotSum> SumSlots(const Checkpoint& checkpoint, const TensorIndex& index) {
  std::map<std::string, SlotSum> slots;
  for (const auto& [key, boxes] : index) {
    SlotSum& sum = slots[key.first];
    ++sum.tensors;
    for (const size_t i : boxes) {
      const ManifestBox& box = checkpoint.boxes[i];
      ++sum.boxes;
      sum.bytes += box.bytes();
      sum.elements += box.bytes() / SizeOf(box.dtype);
    }
  }
  return slots;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return "[" + absl::StrJoin(shape, ", ") + "]";
}

json InspectJson(const Checkpoint& checkpoint, const TensorIndex& index) {
  const CheckpointMeta& meta = checkpoint.meta;
  json out = {{"path", checkpoint.path},
              {"format_version", checkpoint.format_version},
              {"save_id", checkpoint.save_id},
              {"ranks", checkpoint.ranks},
              {"step", meta.step},
              {"adam_steps", meta.adam_steps},
              {"skipped", meta.skipped},
              {"skipped_in_row", meta.skipped_in_row},
              {"sequences", meta.sequences},
              {"tokens", meta.tokens},
              {"data_fingerprint", meta.data_fingerprint},
              {"sources", json::array()},
              {"tokenizer", meta.tokenizer},
              {"config", meta.config_yaml},
              {"files", json::array()},
              {"slots", json::object()},
              {"tensors", json::array()}};
  for (const SourcePosition& source : meta.sources) {
    out["sources"].push_back({{"path", source.path},
                              {"content", source.content},
                              {"weight", source.weight},
                              {"epoch", source.epoch},
                              {"place", source.place},
                              {"seq_len", source.seq_len}});
  }
  for (const ManifestFile& file : checkpoint.files) {
    out["files"].push_back({{"name", file.name}, {"size", file.size}});
  }
  for (const auto& [slot, sum] : SumSlots(checkpoint, index)) {
    out["slots"][slot] = {{"tensors", sum.tensors},
                          {"boxes", sum.boxes},
                          {"elements", sum.elements},
                          {"bytes", sum.bytes}};
  }
  for (const auto& [key, boxes] : index) {
    const ManifestBox& first = checkpoint.boxes[boxes[0]];
    out["tensors"].push_back({{"slot", key.first},
                              {"name", key.second},
                              {"dtype", Name(first.dtype)},
                              {"shape", first.shape},
                              {"boxes", boxes.size()}});
  }
  return out;
}

std::string InspectText(const Checkpoint& checkpoint, const TensorIndex& index) {
  const CheckpointMeta& meta = checkpoint.meta;
  std::string text = checkpoint.path + "\n";
  text += absl::StrFormat("  step %d, %d updates applied, %d skipped\n", meta.step, meta.adam_steps,
                          meta.skipped);
  text += absl::StrFormat("  %d sequences, %d tokens seen; tokenizer %s\n", meta.sequences,
                          meta.tokens, meta.tokenizer.empty() ? "-" : meta.tokenizer);
  for (const SourcePosition& source : meta.sources) {
    text += absl::StrFormat("  source %s (content %s): %d sequences of %d tokens into epoch %d%s\n",
                            source.path, source.content, source.place, source.seq_len, source.epoch,
                            source.weight > 0 ? "" : ", left out");
  }
  text += absl::StrFormat("  format %d, save %s, %d rank%s\n", checkpoint.format_version,
                          checkpoint.save_id, checkpoint.ranks, checkpoint.ranks == 1 ? "" : "s");
  for (const ManifestFile& file : checkpoint.files) {
    text += absl::StrFormat("  file %s: %d bytes\n", file.name, file.size);
  }
  for (const auto& [slot, sum] : SumSlots(checkpoint, index)) {
    text += absl::StrFormat("  slot %s: %d tensors in %d boxes, %d elements, %d bytes\n", slot,
                            sum.tensors, sum.boxes, sum.elements, sum.bytes);
  }
  // The tensors once, with the dtype of each slot that has them.
  std::map<std::string, std::pair<std::string, std::string>> tensors;
  for (const auto& [key, boxes] : index) {
    const ManifestBox& first = checkpoint.boxes[boxes[0]];
    auto& [shape, slots] = tensors[key.second];
    shape = ShapeText(first.shape);
    slots += " " + key.first + ":" + Name(first.dtype);
  }
  for (const auto& [name, entry] : tensors) {
    text += "  " + name + " " + entry.first + entry.second + "\n";
  }
  return text;
}

// Lines of a status that holds several messages.
std::vector<std::string> Lines(const absl::Status& status) {
  std::vector<std::string> lines;
  std::string message = MessageOf(status);
  for (size_t begin = 0; begin < message.size();) {
    const size_t end = std::min(message.find('\n', begin), message.size());
    lines.push_back(message.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

// One tensor of both checkpoints in one slot.
struct Comparison {
  std::string slot, name, problem;  // problem: cannot be compared element by element
  bool equal_bits = false;
  double max_abs_diff = 0;  // NaN where one of two different values is NaN
};

void CompareF32(const std::vector<char>& a, const std::vector<char>& b, Comparison* out) {
  for (size_t at = 0; at < a.size(); at += sizeof(float)) {
    float x, y;
    std::memcpy(&x, a.data() + at, sizeof(x));
    std::memcpy(&y, b.data() + at, sizeof(y));
    if (std::memcmp(&x, &y, sizeof(x)) == 0) continue;
    // Equal infinities of both sides have equal bits, so the difference is NaN only through a NaN.
    const double diff = std::abs(static_cast<double>(x) - static_cast<double>(y));
    if (std::isnan(diff) || diff > out->max_abs_diff) out->max_abs_diff = diff;
    if (std::isnan(diff)) return;
  }
}

CheckpointBox WholeTensor(const ManifestBox& box, DType dtype) {
  return {box.slot,  box.name, dtype, box.shape, std::vector<int64_t>(box.shape.size(), 0),
          box.shape, nullptr};
}

// A group of tensors of about this many bytes is read at once: each call of LoadBoxes also reads
// the files' bytes outside boxes.
constexpr int64_t kGroupBytes = int64_t{512} << 20;

absl::Status CompareGroup(const Checkpoint& a, const Checkpoint& b,
                          const std::vector<std::pair<size_t, size_t>>& pairs,
                          std::vector<Comparison>* out) {
  std::vector<std::vector<char>> data_a(pairs.size()), data_b(pairs.size());
  std::vector<CheckpointBox> want_a, want_b;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const ManifestBox& box_a = a.boxes[pairs[i].first];
    const ManifestBox& box_b = b.boxes[pairs[i].second];
    // Different dtypes are compared as f32, which bf16 fits into.
    const DType dtype = box_a.dtype == box_b.dtype ? box_a.dtype : DType::kF32;
    want_a.push_back(WholeTensor(box_a, dtype));
    want_b.push_back(WholeTensor(box_b, dtype));
    data_a[i].resize(static_cast<size_t>(want_a[i].bytes()));
    data_b[i].resize(data_a[i].size());
    want_a[i].data = data_a[i].data();
    want_b[i].data = data_b[i].data();
  }
  KRAIT_RETURN_IF_ERROR(LoadBoxes(a, want_a));
  KRAIT_RETURN_IF_ERROR(LoadBoxes(b, want_b));
  for (size_t i = 0; i < pairs.size(); ++i) {
    Comparison result{want_a[i].slot, want_a[i].name, "", data_a[i] == data_b[i], 0};
    if (!result.equal_bits && want_a[i].dtype == DType::kF32) {
      CompareF32(data_a[i], data_b[i], &result);
    } else if (!result.equal_bits && want_a[i].dtype == DType::kBF16) {
      const auto widen = [](const std::vector<char>& half) {
        std::vector<char> wide(2 * half.size(), 0);
        for (size_t k = 0; k < half.size(); k += 2) std::memcpy(&wide[2 * k + 2], &half[k], 2);
        return wide;
      };
      CompareF32(widen(data_a[i]), widen(data_b[i]), &result);
    } else if (!result.equal_bits) {
      result.problem = "the values differ";
    }
    out->push_back(std::move(result));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Comparison>> Compare(const Checkpoint& a, const Checkpoint& b,
                                                const std::string& slot) {
  const TensorIndex index_a = IndexTensors(a.boxes), index_b = IndexTensors(b.boxes);
  std::set<std::pair<std::string, std::string>> keys;
  std::set<std::string> slots;
  for (const TensorIndex* index : {&index_a, &index_b}) {
    for (const auto& entry : *index) {
      slots.insert(entry.first.first);
      if (slot.empty() || entry.first.first == slot) keys.insert(entry.first);
    }
  }
  if (keys.empty()) {
    return Error(ExitCode::kConfig, "--slot " + slot + ": neither checkpoint has it; there are " +
                                        absl::StrJoin(slots, ", "));
  }
  std::vector<Comparison> out;
  std::vector<std::pair<size_t, size_t>> group;
  int64_t bytes = 0;
  for (const auto& key : keys) {
    const auto in_a = index_a.find(key), in_b = index_b.find(key);
    Comparison odd{key.first, key.second, "", false, 0};
    if (in_a == index_a.end() || in_b == index_b.end()) {
      odd.problem = "only in " + (in_a == index_a.end() ? b.path : a.path);
    } else {
      const ManifestBox& box_a = a.boxes[in_a->second[0]];
      const ManifestBox& box_b = b.boxes[in_b->second[0]];
      const auto is_float = [](DType d) { return d == DType::kF32 || d == DType::kBF16; };
      if (box_a.shape != box_b.shape) {
        odd.problem = "shapes " + ShapeText(box_a.shape) + " and " + ShapeText(box_b.shape);
      } else if (box_a.dtype != box_b.dtype && !(is_float(box_a.dtype) && is_float(box_b.dtype))) {
        odd.problem = std::string("dtypes ") + Name(box_a.dtype) + " and " + Name(box_b.dtype);
      } else {
        group.emplace_back(in_a->second[0], in_b->second[0]);
        bytes += 2 * WholeTensor(box_a, DType::kF32).bytes();
      }
    }
    if (!odd.problem.empty()) out.push_back(std::move(odd));
    if (bytes >= kGroupBytes) {
      KRAIT_RETURN_IF_ERROR(CompareGroup(a, b, group, &out));
      group.clear();
      bytes = 0;
    }
  }
  KRAIT_RETURN_IF_ERROR(CompareGroup(a, b, group, &out));
  std::sort(out.begin(), out.end(), [](const Comparison& x, const Comparison& y) {
    return std::pair(x.slot, x.name) < std::pair(y.slot, y.name);
  });
  return out;
}

// Of the newest checkpoint of `path`, to the end of `text` or as an object, whichever is not null.
absl::Status Inspect(const std::string& path, std::string* text, json* object) {
  std::vector<PassedOver> notes;
  KRAIT_ASSIGN_OR_RETURN(const Checkpoint checkpoint, OpenNewest(path, &notes));
  const TensorIndex index = IndexTensors(checkpoint.boxes);
  if (object != nullptr) {
    *object = InspectJson(checkpoint, index);
    (*object)["passed_over"] = json::array();
    for (const PassedOver& note : notes) {
      (*object)["passed_over"].push_back({{"path", note.path}, {"reason", note.reason}});
    }
    return absl::OkStatus();
  }
  for (const PassedOver& note : notes) *text += "passed over: " + note.reason + "\n";
  *text += InspectText(checkpoint, index);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ToolReport> InspectCheckpoints(const std::vector<std::string>& paths, bool as_json) {
  ToolReport report;
  json list = json::array();
  for (const std::string& path : paths) {
    if (as_json) {
      list.emplace_back();
      KRAIT_RETURN_IF_ERROR(Inspect(path, nullptr, &list.back()));
    } else {
      if (!report.text.empty()) report.text += "\n";
      KRAIT_RETURN_IF_ERROR(Inspect(path, &report.text, nullptr));
    }
  }
  if (as_json) report.text = Dump(list.size() == 1 ? list.front() : list);
  return report;
}

absl::StatusOr<ToolReport> VerifyCheckpoints(const std::vector<std::string>& paths, bool as_json) {
  ToolReport report;
  json list = json::array(), notes = json::array();
  for (const std::string& path : paths) {
    KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> folders, FindCheckpoints(path));
    for (const std::string& folder : folders) {
      const auto checkpoint = OpenCheckpoint(folder);
      const absl::Status status =
          checkpoint.ok() ? VerifyCheckpoint(*checkpoint) : checkpoint.status();
      const std::vector<std::string> problems = Lines(status);
      json entry = {{"path", folder}, {"whole", status.ok()}, {"problems", problems}};
      if (checkpoint.ok()) entry["step"] = checkpoint->meta.step;
      list.push_back(entry);
      report.text += folder + (status.ok() ? ": whole\n" : ": damaged\n");
      for (const std::string& problem : problems) report.text += "  " + problem + "\n";
      if (!status.ok()) report.code = ExitCode::kNo;
    }
    const std::string dir = ParentFolder(folders.front());
    const bool one = folders.size() == 1 && folders.front() == path;
    bool damaged = false;
    if (const std::string hint = one ? "" : CheckLatest(dir, &damaged); !hint.empty()) {
      if (damaged) report.code = ExitCode::kNo;
      notes.push_back(hint);
      report.text += hint + "\n";
    }
  }
  if (as_json) {
    report.text =
        Dump({{"whole", report.code == ExitCode::kOk}, {"checkpoints", list}, {"notes", notes}});
  }
  return report;
}

absl::StatusOr<ToolReport> DiffCheckpoints(const std::string& path_a, const std::string& path_b,
                                           const std::string& slot, bool as_json) {
  std::vector<PassedOver> notes;
  KRAIT_ASSIGN_OR_RETURN(const Checkpoint a, OpenNewest(path_a, &notes));
  KRAIT_ASSIGN_OR_RETURN(const Checkpoint b, OpenNewest(path_b, &notes));
  KRAIT_ASSIGN_OR_RETURN(const std::vector<Comparison> all, Compare(a, b, slot));
  const auto different = [](const Comparison& c) { return !c.equal_bits; };
  const auto count = std::count_if(all.begin(), all.end(), different);
  ToolReport report;
  if (count > 0) report.code = ExitCode::kNo;
  if (as_json) {
    json tensors = json::array();
    for (const Comparison& c : all) {
      json entry = {{"slot", c.slot}, {"name", c.name}, {"equal_bits", c.equal_bits}};
      if (c.problem.empty()) {
        entry["max_abs_diff"] = std::isfinite(c.max_abs_diff) ? json(c.max_abs_diff) : json();
      } else {
        entry["problem"] = c.problem;
      }
      tensors.push_back(entry);
    }
    report.text = Dump({{"a", {{"path", a.path}, {"step", a.meta.step}}},
                        {"b", {{"path", b.path}, {"step", b.meta.step}}},
                        {"equal", count == 0},
                        {"tensors", tensors}});
    return report;
  }
  for (const PassedOver& note : notes) report.text += "passed over: " + note.reason + "\n";
  report.text +=
      absl::StrFormat("%s (step %d)\n%s (step %d)\n", a.path, a.meta.step, b.path, b.meta.step);
  for (const Comparison& c : all) {
    if (c.equal_bits) continue;
    report.text +=
        "  " + c.slot + " " + c.name + ": " +
        (c.problem.empty() ? absl::StrFormat("max |a-b| %.6g", c.max_abs_diff) : c.problem) + "\n";
  }
  report.text += count == 0 ? absl::StrFormat("all %d tensors have equal bits\n", all.size())
                            : absl::StrFormat("%d of %d tensors differ\n", count, all.size());
  return report;
}

}  // namespace krait
