// manifest.json of a checkpoint: text and back, with every check that needs no other file.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_MANIFEST_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_MANIFEST_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

// 1: the boxes stand in the manifest. 2: in a table in each rank's file.
inline constexpr int64_t kCheckpointFormat = 2;
inline constexpr int64_t kMaxManifestBytes = int64_t{64} << 20;
inline constexpr char kManifestName[] = "manifest.json";

// JSON of format 2, one file per line, its last member the CRC32C of all text before it.
// kCannotSave when a text of `meta` is not UTF-8 or the manifest would be above 64 MiB.
absl::StatusOr<std::string> ManifestText(const Checkpoint& checkpoint);

// `path` (of the manifest) is for messages and, without its last part, Checkpoint::path. Errors are
// kNoCheckpoint. Beyond syntax and the CRC: a format version up to this one, names of a fixed
// alphabet, no overflow; in format 1, which has boxes here, CheckBoxes. Members that are not known
// are ignored, so that one may be added without a new version: a new version is for what an older
// reader would misunderstand. Of the members known here those without which a checkpoint still has
// its meaning may be missing (kMetaInts, kMetaTexts).
absl::StatusOr<Checkpoint> ParseManifest(std::string_view text, const std::string& path);

// The entry of a file, as a rank sends it to the one that writes the manifest.
std::string FileText(const ManifestFile& file);
absl::StatusOr<ManifestFile> ParseFileText(std::string_view text, const std::string& place);

// step-00001000, and whether a name is one.
std::string StepFolderName(int64_t step);
bool IsStepFolderName(std::string_view name, int64_t* step = nullptr);

// The 128 random bits of a save, as hexadecimal digits.
inline constexpr size_t kSaveIdDigits = 32;
bool IsSaveId(std::string_view text);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_MANIFEST_H_
