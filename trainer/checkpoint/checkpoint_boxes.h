// The boxes of a checkpoint: the table of them that stands in each rank's file, and what must hold
// of all together.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_BOXES_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_BOXES_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/json.h"
#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

inline constexpr int64_t kMaxTableBytes = int64_t{64} << 20;
inline constexpr int64_t kMaxBoxBytes = int64_t{64} << 20;  // that a save writes

// The dataset of a rank's file that holds its table of boxes.
inline constexpr char kTableDataset[] = "/boxes";

// JSON, one box per line, its last member the CRC32C of all text before it. Its length does not
// depend on the boxes' CRCs, so that it has a place in the file before the data is written.
std::string TableText(const std::string& save_id, const std::vector<ManifestBox>& boxes);

// Adds the boxes of file number `file` of the checkpoint, whose table is `text`. Beyond syntax and
// the CRCs (its own, the manifest's): the manifest's save id, names of a fixed alphabet, no
// overflow, boxes inside the file. kNoCheckpoint.
absl::Status ParseTable(std::string_view text, size_t file, Checkpoint* checkpoint);

// A box of the list in a manifest of format 1; `place` is for messages.
absl::StatusOr<ManifestBox> ParseManifestBox(const nlohmann::json& value, const std::string& place,
                                             const std::vector<ManifestFile>& files);

// Of all boxes together: every tensor of a slot tiled exactly once, by boxes of one shape and
// dtype; no overlap in a file. kNoCheckpoint.
absl::Status CheckBoxes(const Checkpoint& checkpoint);

// Indices of the boxes of each (slot, published name), in the checkpoint's order.
using TensorIndex = std::map<std::pair<std::string, std::string>, std::vector<size_t>>;
TensorIndex IndexTensors(const std::vector<ManifestBox>& boxes);

// Byte ranges [begin, end) of each file that neither a box nor the table covers, in order: what
// crc_rest is taken over.
std::vector<std::vector<std::pair<int64_t, int64_t>>> RangesOutsideBoxes(
    const std::vector<ManifestFile>& files, const std::vector<ManifestBox>& boxes);

// A part of box number `box`, consecutive in its memory, from element `begin` of it on.
struct BoxPart {
  size_t box = 0;
  int64_t begin = 0;
  std::vector<int64_t> offset, extent;  // in the tensor
};
// Boxes above `max_bytes` cut at rows, or inside a row that is above that itself; the others whole.
std::vector<BoxPart> CutBoxes(const std::vector<CheckpointBox>& boxes, int64_t max_bytes);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_BOXES_H_
