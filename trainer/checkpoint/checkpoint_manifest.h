// manifest.json of a checkpoint: text and back, with every check that needs no other file.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_MANIFEST_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_MANIFEST_H_

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

inline constexpr int64_t kCheckpointFormat = 1;
inline constexpr int64_t kMaxManifestBytes = int64_t{64} << 20;
inline constexpr char kManifestName[] = "manifest.json";

// JSON, one box per line, its last member the CRC32C of all text before it. kCannotSave when a
// text of `meta` is not UTF-8 or the manifest would be above 64 MiB.
absl::StatusOr<std::string> ManifestText(const Checkpoint& checkpoint);

// `path` (of the manifest) is for messages and, without its last part, Checkpoint::path. Errors are
// kNoCheckpoint. Beyond syntax and the CRC: a format version up to this one, names of a fixed
// alphabet, no overflow, boxes inside their files without overlap, every tensor of a slot tiled
// exactly once. Members that are not known are ignored, so that one may be added without a new
// version: a new version is for what an older reader would misunderstand. Of the members known here
// those without which a checkpoint still has its meaning may be missing (kMetaInts, kMetaTexts).
absl::StatusOr<Checkpoint> ParseManifest(std::string_view text, const std::string& path);

// Indices of the boxes of each (slot, published name), in the manifest's order.
using TensorIndex = std::map<std::pair<std::string, std::string>, std::vector<size_t>>;
TensorIndex IndexTensors(const std::vector<ManifestBox>& boxes);

// Byte ranges [begin, end) of each file that no box covers, in order: what crc_rest is taken over.
std::vector<std::vector<std::pair<int64_t, int64_t>>> RangesOutsideBoxes(
    const std::vector<ManifestFile>& files, const std::vector<ManifestBox>& boxes);

// step-00001000, and whether a name is one.
std::string StepFolderName(int64_t step);
bool IsStepFolderName(std::string_view name, int64_t* step = nullptr);

// The 128 random bits of a save, as hexadecimal digits.
inline constexpr size_t kSaveIdDigits = 32;
bool IsSaveId(std::string_view text);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_MANIFEST_H_
