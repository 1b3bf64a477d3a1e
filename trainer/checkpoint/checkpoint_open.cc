// Which checkpoints there are, and opening them: the manifest first, then each file's table of
// boxes.
#include <algorithm>
#include <set>

#include "kernels/base/file.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_boxes.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_ranks.h"
#include "trainer/checkpoint/checkpoint_read.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;

std::string WithoutSlashes(std::string path) {
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  return path;
}

absl::StatusOr<std::string> ManifestIn(const std::string& folder) {
  const std::string path = folder + "/" + kManifestName;
  KRAIT_RETURN_IF_ERROR(OpenRegular(path).status());
  return ReadFile(path, kMaxManifestBytes, kCode);
}

// The manifest of `folder`, and what its name says.
absl::StatusOr<Checkpoint> Parse(const std::string& text, const std::string& folder) {
  const std::string path = folder + "/" + kManifestName;
  KRAIT_ASSIGN_OR_RETURN(Checkpoint checkpoint, ParseManifest(text, path));
  checkpoint.path = folder;
  int64_t step = 0;
  const std::string name = folder.substr(folder.find_last_of('/') + 1);
  // One that no run has saved (step 0, of an import) may have any name.
  if (IsStepFolderName(name, &step) && step != checkpoint.meta.step && checkpoint.meta.step != 0) {
    return Error(kCode, path + " is of step " + std::to_string(checkpoint.meta.step) +
                            ", not of the step in the folder's name");
  }
  return checkpoint;
}

// Whether a file is there with its size; appends the bytes of its table of boxes to `tables`, where
// that is not null.
absl::Status CheckFile(const Checkpoint& checkpoint, const ManifestFile& entry,
                       std::string* tables) {
  const std::string path = checkpoint.path + "/" + entry.name;
  KRAIT_ASSIGN_OR_RETURN(const File file, OpenRegular(path));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
  if (size != entry.size) {
    return Error(kCode, path + " has " + std::to_string(size) + " bytes; the manifest says " +
                            std::to_string(entry.size));
  }
  if (tables == nullptr || entry.table_size == 0) return absl::OkStatus();
  const size_t before = tables->size();
  tables->resize(before + static_cast<size_t>(entry.table_size));
  uint32_t crc = 0;
  return ReadInto(file, entry.table_at, entry.table_at + entry.table_size, tables->data() + before,
                  &crc);
}

}  // namespace

absl::StatusOr<Checkpoint> ReadManifest(const std::string& path_of_folder) {
  const std::string folder = WithoutSlashes(path_of_folder);
  KRAIT_ASSIGN_OR_RETURN(const std::string text, ManifestIn(folder));
  KRAIT_ASSIGN_OR_RETURN(Checkpoint checkpoint, Parse(text, folder));
  for (const ManifestFile& entry : checkpoint.files) {
    KRAIT_RETURN_IF_ERROR(CheckFile(checkpoint, entry, nullptr));
  }
  return checkpoint;
}

absl::StatusOr<Checkpoint> ReadCheckpoint(const std::string& path_of_folder, World* world) {
  const std::string folder = WithoutSlashes(path_of_folder);
  absl::StatusOr<std::string> text("");
  if (world->first()) text = ManifestIn(folder);
  KRAIT_RETURN_IF_ERROR(AgreeOnReading(world, text.status()));
  text = world->Broadcast(*text);
  absl::StatusOr<Checkpoint> checkpoint = Parse(*text, folder);
  KRAIT_RETURN_IF_ERROR(AgreeOnReading(world, checkpoint.status()));
  // A file's table is read by one rank, which sends it to the others.
  const auto ranks = static_cast<size_t>(world->size()), rank = static_cast<size_t>(world->rank());
  const size_t files = checkpoint->files.size();
  std::string mine;
  absl::Status status;
  for (size_t f = rank; f < files && status.ok(); f += ranks) {
    status = CheckFile(*checkpoint, checkpoint->files[f], &mine);
  }
  KRAIT_RETURN_IF_ERROR(AgreeOnReading(world, status));
  const std::vector<std::string> tables = world->AllGather(mine);
  std::vector<size_t> done(ranks, 0);
  for (size_t f = 0; f < files && status.ok(); ++f) {
    const auto size = static_cast<size_t>(checkpoint->files[f].table_size);
    if (size == 0) continue;
    const std::string_view table(tables[f % ranks]);
    status = ParseTable(table.substr(done[f % ranks], size), f, &*checkpoint);
    done[f % ranks] += size;
  }
  KRAIT_RETURN_IF_ERROR(AgreeOnReading(world, status));
  return checkpoint;
}

absl::StatusOr<Checkpoint> OpenCheckpoint(const std::string& folder, World* world) {
  world = OrAlone(world);
  absl::StatusOr<Checkpoint> checkpoint = ReadCheckpoint(folder, world);
  if (!checkpoint.ok()) return checkpoint;
  KRAIT_RETURN_IF_ERROR(AgreeOnReading(world, CheckBoxes(*checkpoint)));
  return checkpoint;
}

absl::StatusOr<std::vector<std::string>> ListCheckpoints(const std::string& dir) {
  // Only a folder that is known not to be there holds none: any other failure must not look like a
  // run without checkpoints.
  KRAIT_ASSIGN_OR_RETURN(const bool there, IsThere(dir));
  if (!there) return std::vector<std::string>();
  KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(dir, kCode));
  const std::set<std::string> present(names.begin(), names.end());
  std::vector<std::pair<int64_t, std::string>> found;
  for (const std::string& name : names) {
    int64_t step = 0;
    if (IsStepFolderName(name, &step)) {
      found.emplace_back(step, name);
    } else if (name.starts_with("old-") && name.size() > 5 + kSaveIdDigits) {
      // step-N moved aside by a save that was killed before its own step-N was in place.
      const std::string stem = name.substr(4, name.size() - 5 - kSaveIdDigits);
      if (IsStepFolderName(stem, &step) && !present.contains(stem)) found.emplace_back(step, name);
    }
  }
  std::sort(found.rbegin(), found.rend());
  std::vector<std::string> folders;
  for (const auto& entry : found) folders.push_back(dir + "/" + entry.second);
  return folders;
}

absl::StatusOr<std::vector<std::string>> FindCheckpoints(const std::string& given) {
  std::string path = WithoutSlashes(given);
  KRAIT_RETURN_IF_ERROR(IsThere(path).status());
  if (path.ends_with("/latest") && !IsDirectory(path)) path = ParentFolder(path);
  if (!IsDirectory(path)) return Error(kCode, path + " is not a folder; a checkpoint is one");
  if (Exists(path + "/" + kManifestName) ||
      IsStepFolderName(path.substr(path.find_last_of('/') + 1))) {
    return std::vector<std::string>{path};
  }
  for (const std::string& dir : {path, path + "/checkpoints"}) {
    KRAIT_ASSIGN_OR_RETURN(std::vector<std::string> folders, ListCheckpoints(dir));
    if (!folders.empty()) return folders;
  }
  return Error(kCode, path + " holds no checkpoint (" + kManifestName +
                          "), no step-N folders and no checkpoints/step-N");
}

absl::StatusOr<Checkpoint> LoadNewestWhole(const std::vector<std::string>& given,
                                           const CheckpointLoader& load,
                                           std::vector<PassedOver>* passed_over, World* world) {
  world = OrAlone(world);
  std::vector<std::string> folders;
  KRAIT_ASSIGN_OR_RETURN(folders, PathsOfFirst(world, given));
  ErrorList errors;
  for (const std::string& folder : folders) {
    absl::StatusOr<Checkpoint> checkpoint = OpenCheckpoint(folder, world);
    const absl::Status status =
        checkpoint.ok() ? AgreeOnReading(world, load(*checkpoint)) : checkpoint.status();
    if (status.ok()) return checkpoint;
    if (IsUnreadable(status)) {
      return StatusOfFirst(
          world, Error(kCode, MessageOf(status) +
                                  "\nwhat cannot be read may be whole: it is not passed over; make "
                                  "it readable, or move it away"));
    }
    if (ExitCodeOf(status) != kCode) return status;
    errors.Add(status);
    passed_over->push_back({folder, MessageOf(status)});
  }
  const std::string none = errors.empty()
                               ? "there is no checkpoint"
                               : "no checkpoint is whole:\n" + MessageOf(errors.ToStatus());
  return StatusOfFirst(world, Error(kCode, none));
}

absl::StatusOr<Checkpoint> LoadNewest(const std::vector<std::string>& folders,
                                      const CheckpointLoader& load, const Notice& notice,
                                      std::vector<PassedOver>* passed_over, World* world) {
  std::vector<PassedOver> own;
  if (passed_over == nullptr) passed_over = &own;
  auto loaded = LoadNewestWhole(folders, load, passed_over, world);
  // An error names all reasons itself.
  for (size_t i = 0; loaded.ok() && OrAlone(world)->first() && i < passed_over->size(); ++i) {
    notice("passed over " + (*passed_over)[i].path + ": " + (*passed_over)[i].reason);
  }
  return loaded;
}

absl::Status MendLatest(const std::string& dir) {
  const std::string path = dir + "/latest";
  KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> folders, ListCheckpoints(dir));
  if (folders.empty()) return RemoveFile(path, ExitCode::kCannotSave);
  return WriteFileAtomic(path, folders.front().substr(dir.size() + 1) + "\n",
                         ExitCode::kCannotSave);
}

std::string CheckLatest(const std::string& dir, bool* damaged) {
  const auto folders = ListCheckpoints(dir);
  const std::string path = dir + "/latest";
  if (damaged != nullptr) *damaged = false;
  if (folders.ok() && !Exists(path)) return folders->empty() ? "" : path + " is missing";
  const auto text = ReadFile(path, 100, kCode);
  if (folders.ok() && text.ok()) {
    for (size_t i = 0; i < folders->size(); ++i) {
      if (*text != (*folders)[i].substr(dir.size() + 1) + "\n") continue;
      return i == 0 ? "" : path + " names an older checkpoint; the newest is " + folders->front();
    }
  }
  if (damaged != nullptr) *damaged = true;
  if (!folders.ok()) return MessageOf(folders.status());
  if (!text.ok()) return MessageOf(text.status());
  return path + " does not name a checkpoint" +
         (folders->empty() ? "" : "; the newest is " + folders->front());
}

}  // namespace krait
