#include "trainer/ablate/weights_only.h"

#include <algorithm>
#include <map>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {
namespace {

constexpr char kWeight[] = "weight";

absl::Status DropMoments(const std::string& dir, const Checkpoint& checkpoint) {
  std::vector<CheckpointBox> boxes;
  std::map<std::string, bool> seen;  // by published name
  int64_t bytes = 0;
  for (const ManifestBox& stored : checkpoint.boxes) {
    if (stored.slot != kWeight || !seen.insert({stored.name, true}).second) continue;
    CheckpointBox box;
    box.slot = stored.slot;
    box.name = stored.name;
    box.dtype = stored.dtype;
    box.shape = box.extent = stored.shape;
    box.offset.assign(stored.shape.size(), 0);
    bytes += box.bytes();
    boxes.push_back(std::move(box));
  }
  std::vector<unsigned char> memory(static_cast<size_t>(bytes));
  unsigned char* next = memory.data();
  for (CheckpointBox& box : boxes) {
    box.data = next;
    next += box.bytes();
  }
  KRAIT_RETURN_IF_ERROR(LoadBoxes(checkpoint, boxes));
  SaveOptions options;
  options.dir = dir;
  options.keep = 1'000'000;  // others are removed afterwards
  return SaveCheckpoint(options, checkpoint.meta, boxes);
}

}  // namespace

absl::Status KeepFinal(const std::string& dir, bool keep_moments) {
  std::vector<std::string> folders;
  KRAIT_ASSIGN_OR_RETURN(folders, ListCheckpoints(dir));
  if (folders.empty()) return absl::OkStatus();
  const auto newest = OpenCheckpoint(folders.front());
  if (!newest.ok()) return absl::OkStatus();
  const bool moments = std::any_of(newest->boxes.begin(), newest->boxes.end(),
                                   [](const ManifestBox& box) { return box.slot != kWeight; });
  if (moments && !keep_moments) {
    const absl::Status dropped = DropMoments(dir, *newest);
    if (ExitCodeOf(dropped) == ExitCode::kNoCheckpoint) return absl::OkStatus();  // damaged
    KRAIT_RETURN_IF_ERROR(dropped);
  }
  for (size_t i = 1; i < folders.size(); ++i) {
    KRAIT_RETURN_IF_ERROR(RemoveAll(folders[i], ExitCode::kCannotSave));
  }
  return absl::OkStatus();
}

}  // namespace krait
