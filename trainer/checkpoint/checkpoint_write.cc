// Saving: shard, manifest, publication by rename, retention.
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <map>
#include <optional>
#include <system_error>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "kernels/base/h5.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kCannotSave;
constexpr int64_t kPiece = int64_t{256} << 10;  // CRC and write of a piece share the cache

std::string Reason(int error) { return std::generic_category().message(error); }

// A file size limit sends SIGXFSZ, whose default is death; ignored, the write fails with EFBIG.
void IgnoreFileSizeSignal() {
  static const bool done = [] {
    struct sigaction action;
    if (sigaction(SIGXFSZ, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) {
      action.sa_handler = SIG_IGN;
      return sigaction(SIGXFSZ, &action, nullptr) == 0;
    }
    return true;
  }();
  (void)done;  // where it cannot be ignored, the limit keeps its usual meaning
}

// Names the save, so that files of different saves are never taken for one; no number of the
// training depends on it.
absl::StatusOr<std::string> NewSaveId() {
  unsigned char bytes[kSaveIdDigits / 2];
  ssize_t got;
  do {
    got = getrandom(bytes, sizeof(bytes), 0);
  } while (got < 0 && errno == EINTR);
  if (got != sizeof(bytes)) return Error(kCode, "cannot get random bits: " + Reason(errno));
  std::string id;
  for (const unsigned char byte : bytes) id += absl::StrFormat("%02x", byte);
  return id;
}

struct Space {
  int64_t bytes;
  bool inodes;  // a handful of files can be created
};
std::optional<Space> FreeSpace(const std::string& dir) {
  struct statvfs info;
  if (statvfs(dir.c_str(), &info) != 0) return std::nullopt;
  // Some file systems count no inodes and report 0 of 0.
  return Space{static_cast<int64_t>(info.f_bavail * info.f_frsize),
               info.f_files == 0 || info.f_favail >= 8};
}

// What a save takes on disk: data, and per dataset HDF5's headers, alignment and a manifest line.
int64_t BytesNeeded(const std::vector<CheckpointBox>& boxes) {
  int64_t bytes = 1 << 16;
  for (const CheckpointBox& box : boxes) bytes += box.bytes() + 6000;
  return bytes;
}

absl::Status CheckSpace(const std::string& dir, int64_t needed) {
  const std::optional<Space> space = FreeSpace(dir);
  if (!space.has_value()) return Error(kCode, "cannot look up the free space of " + dir);
  if (space->bytes < needed) return Error(kCode, "not enough space in " + dir);
  if (!space->inodes) return Error(kCode, "no free inodes in " + dir);
  return absl::OkStatus();
}

// Space for the whole file, so that a full disk shows before the data is written. File systems
// without the call find out while writing.
absl::Status Reserve(const File& file, int64_t size) {
  while (fallocate(file.fd(), 0, 0, size) != 0) {
    if (errno == EINTR) continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS) break;
    return Error(kCode, "cannot reserve " + std::to_string(size) + " bytes for " + file.path() +
                            ": " + Reason(errno));
  }
  return absl::OkStatus();
}

// HDF5 lays out the file of this rank; the datasets' offsets go to `boxes`.
absl::Status LayOut(const std::string& path, const std::string& save_id, int64_t step,
                    std::vector<ManifestBox>* boxes) {
  KRAIT_ASSIGN_OR_RETURN(H5File h5, H5File::Create(path, kCode));
  KRAIT_RETURN_IF_ERROR(
      h5.WriteAttribute("format_version", static_cast<uint64_t>(kCheckpointFormat)));
  // Bytes outside boxes carry a CRC too: with the save id among them, a file of another save does
  // not fit this manifest even where all its tensors are equal.
  KRAIT_RETURN_IF_ERROR(h5.WriteAttribute("save_id", save_id));
  KRAIT_RETURN_IF_ERROR(h5.WriteAttribute("step", static_cast<uint64_t>(step)));
  std::map<std::pair<std::string, std::string>, int64_t> count;
  for (ManifestBox& box : *boxes) {
    const std::string dataset =
        "/" + box.slot + "/" + box.name + "/" + std::to_string(count[{box.slot, box.name}]++);
    KRAIT_ASSIGN_OR_RETURN(box.file_offset, h5.CreateContiguous(dataset, box.dtype, box.extent));
  }
  return h5.Close();
}

// Box number i of the caller. The CRC is taken from its memory, before the bytes go anywhere.
absl::Status WriteBox(const File& file, const CheckpointBox& values, size_t i,
                      const BoxSource& source, std::vector<char>* buffer, ManifestBox* box) {
  const int64_t size = values.bytes(), width = SizeOf(values.dtype);
  box->crc = 0;
  for (int64_t done = 0; done < size; done += kPiece) {
    const auto n = static_cast<size_t>(std::min(kPiece, size - done));
    const char* data = buffer->data();
    if (values.data != nullptr) {
      data = static_cast<const char*>(values.data) + done;
    } else {
      KRAIT_RETURN_IF_ERROR(
          source(i, done / width, static_cast<int64_t>(n) / width, buffer->data()));
    }
    box->crc = Crc32c(data, n, box->crc);
    KRAIT_RETURN_IF_ERROR(file.WriteAt(data, n, box->file_offset + done));
  }
  return absl::OkStatus();
}

// This rank's file in `folder`, on disk when the call returns; fills files and boxes.
absl::Status WriteShard(const std::string& folder, const std::vector<CheckpointBox>& sources,
                        const BoxSource& source, Checkpoint* checkpoint) {
  ManifestFile shard{"rank-00000.h5", 0, 0};
  const std::string path = folder + "/" + shard.name;
  for (const CheckpointBox& box : sources) {
    checkpoint->boxes.push_back(
        {box.slot, box.name, box.dtype, box.shape, box.offset, box.extent, 0, 0, 0});
  }
  KRAIT_RETURN_IF_ERROR(
      LayOut(path, checkpoint->save_id, checkpoint->meta.step, &checkpoint->boxes));
  KRAIT_ASSIGN_OR_RETURN(File file, File::OpenWrite(path, kCode));
  KRAIT_ASSIGN_OR_RETURN(shard.size, file.Size());
  KRAIT_RETURN_IF_ERROR(Reserve(file, shard.size));
  std::vector<char> buffer(static_cast<size_t>(kPiece));
  for (size_t i = 0; i < sources.size(); ++i) {
    KRAIT_RETURN_IF_ERROR(WriteBox(file, sources[i], i, source, &buffer, &checkpoint->boxes[i]));
  }
  checkpoint->files = {shard};
  const auto outside = RangesOutsideBoxes(checkpoint->files, checkpoint->boxes);
  for (const auto& [begin, end] : outside[0]) {
    for (int64_t at = begin; at < end; at += kPiece) {
      const auto n = static_cast<size_t>(std::min(kPiece, end - at));
      KRAIT_RETURN_IF_ERROR(file.ReadAt(buffer.data(), n, at));
      shard.crc_rest = Crc32c(buffer.data(), n, shard.crc_rest);
    }
  }
  checkpoint->files = {shard};
  KRAIT_RETURN_IF_ERROR(file.Sync());
  return file.Close();
}

absl::Status WriteManifest(const std::string& folder, const Checkpoint& checkpoint) {
  KRAIT_ASSIGN_OR_RETURN(const std::string text, ManifestText(checkpoint));
  const std::string path = folder + "/" + kManifestName;
  // A manifest that the reader would refuse must not be published: boxes that do not tile a tensor
  // are a bug of the caller.
  if (absl::Status status = ParseManifest(text, path).status(); !status.ok()) {
    return Error(ExitCode::kInternal, MessageOf(status));
  }
  KRAIT_ASSIGN_OR_RETURN(File file, File::Create(path, /*exclusive=*/true, kCode));
  KRAIT_RETURN_IF_ERROR(file.WriteAt(text.data(), text.size(), 0));
  KRAIT_RETURN_IF_ERROR(file.Sync());
  return file.Close();
}

bool EndsWithSaveId(std::string_view name) {
  return name.size() > kSaveIdDigits + 1 && IsSaveId(name.substr(name.size() - kSaveIdDigits)) &&
         name[name.size() - kSaveIdDigits - 1] == '.';
}

// The names that a save uses beside the final one.
struct SaveNames {
  std::string dir, name, save_id;
  std::string final_path() const { return dir + "/" + name; }
  std::string temporary() const { return dir + "/" + name + "." + save_id + ".tmp"; }
  std::string old() const { return dir + "/old-" + name + "." + save_id; }
  std::string trash(const std::string& folder) const {
    return dir + "/trash-" + folder + "." + save_id;
  }
};

// What a killed save can leave behind: temporary and trash folders, and an old-step-N beside its
// step-N. For a single checkpoint only what carries its own name.
bool IsLeftover(const SaveOptions& options, const std::string& entry) {
  std::string_view name = entry;
  const bool temporary = name.ends_with(".tmp");
  if (temporary) name.remove_suffix(4);
  if (!EndsWithSaveId(name)) return false;
  name.remove_suffix(kSaveIdDigits + 1);
  const auto ours = [&](std::string_view stem) {
    return options.name.empty() ? IsStepFolderName(stem) : stem == options.name;
  };
  if (temporary) return ours(name);
  if (name.starts_with("trash-")) {
    name.remove_prefix(6);
    if (EndsWithSaveId(name)) name.remove_suffix(kSaveIdDigits + 1);  // trash-old-step-N.ID.ID
    if (name.starts_with("old-")) name.remove_prefix(4);
    return ours(name);
  }
  if (!name.starts_with("old-") || !ours(name.substr(4))) return false;
  return Exists(options.dir + "/" + std::string(name.substr(4)));
}

void Warn(std::vector<std::string>* warnings, const absl::Status& status) {
  if (!status.ok() && warnings != nullptr) warnings->push_back(MessageOf(status));
}

void RemoveLeftovers(const SaveOptions& options, std::vector<std::string>* warnings) {
  const auto entries = ListDirectory(options.dir, kCode);
  Warn(warnings, entries.status());
  if (!entries.ok()) return;
  for (const std::string& entry : *entries) {
    if (IsLeftover(options, entry)) Warn(warnings, RemoveAll(options.dir + "/" + entry, kCode));
  }
}

// Keeps the newest `keep` whole checkpoints, the one just written, and those of every keep_every-th
// step; all other older folders go.
absl::Status Prune(const SaveOptions& options, const SaveNames& names,
                   std::vector<std::string>* warnings) {
  KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> folders, ListCheckpoints(options.dir));
  int64_t whole = 0;
  for (const std::string& folder : folders) {
    int64_t step = 0;
    const bool milestone = options.keep_every > 0 &&
                           IsStepFolderName(folder.substr(folder.rfind('/') + 1), &step) &&
                           step % options.keep_every == 0;
    if (folder == names.final_path()) {
      ++whole;
    } else if (whole < options.keep) {
      if (OpenCheckpoint(folder).ok()) ++whole;
    } else if (!milestone) {
      // Renamed first: a folder half deleted must not look like a checkpoint.
      const std::string trash = names.trash(folder.substr(options.dir.size() + 1));
      // Where it cannot be, it stays, and the next save tries again.
      const absl::Status renamed = Rename(folder, trash, kCode);
      Warn(warnings, renamed);
      if (renamed.ok()) Warn(warnings, RemoveAll(trash, kCode));
    }
  }
  return absl::OkStatus();
}

// Everything up to the rename. The caller removes the temporary folder on failure.
absl::Status WriteTemporary(const SaveNames& names, Checkpoint* checkpoint,
                            const std::vector<CheckpointBox>& boxes, const BoxSource& source) {
  const std::string temporary = names.temporary();
  if (mkdir(temporary.c_str(), 0777) != 0) {
    return Error(kCode, "cannot create folder " + temporary + ": " + Reason(errno));
  }
  KRAIT_RETURN_IF_ERROR(WriteShard(temporary, boxes, source, checkpoint));
  KRAIT_RETURN_IF_ERROR(WriteManifest(temporary, *checkpoint));
  return SyncDirectory(temporary, kCode);
}

absl::Status Publish(const SaveNames& names) {
  const std::string final_path = names.final_path();
  const bool replaces = Exists(final_path);
  if (replaces) KRAIT_RETURN_IF_ERROR(Rename(final_path, names.old(), kCode));
  const absl::Status status = Rename(names.temporary(), final_path, kCode);
  if (!status.ok() && replaces) Rename(names.old(), final_path, kCode).IgnoreError();
  return status;
}

// After the rename: durability of the name, `latest`, clearing up.
absl::Status Finish(const SaveOptions& options, const SaveNames& names,
                    std::vector<std::string>* warnings) {
  KRAIT_RETURN_IF_ERROR(SyncDirectory(names.dir, kCode));
  if (Exists(names.old())) Warn(warnings, RemoveAll(names.old(), kCode));
  if (!options.name.empty()) return absl::OkStatus();
  KRAIT_RETURN_IF_ERROR(WriteFileAtomic(names.dir + "/latest", names.name + "\n", kCode));
  return Prune(options, names, warnings);
}

// Folder, clearing up and space: what must hold before anything is written.
absl::Status Prepare(const SaveOptions& options, SaveNames* names, int64_t needed,
                     std::vector<std::string>* warnings) {
  KRAIT_RETURN_IF_ERROR(MakeDirectories(options.dir, kCode));
  if (!options.name.empty() && Exists(names->final_path()) &&
      !Exists(names->final_path() + "/" + kManifestName)) {
    return Error(kCode, names->final_path() + " exists and is not a checkpoint");
  }
  RemoveLeftovers(options, warnings);
  KRAIT_RETURN_IF_ERROR(CheckSpace(options.dir, needed));
  KRAIT_ASSIGN_OR_RETURN(names->save_id, NewSaveId());
  return absl::OkStatus();
}

// " (5000 bytes needed, 3000 free)".
std::string SpaceText(const std::string& dir, int64_t needed) {
  const std::optional<Space> space = FreeSpace(dir);
  return " (" + std::to_string(needed) + " bytes needed" +
         (space.has_value() ? ", " + std::to_string(space->bytes) + " free)" : ")");
}

}  // namespace

absl::Status SaveCheckpoint(const SaveOptions& options, const CheckpointMeta& meta,
                            const std::vector<CheckpointBox>& boxes,
                            std::vector<std::string>* warnings, const BoxSource& source) {
  KRAIT_CHECK(options.keep >= 2 || !options.name.empty());
  for (const CheckpointBox& box : boxes) {
    KRAIT_CHECK(box.device == Device::kCpu && (box.data != nullptr || source != nullptr));
  }
  IgnoreFileSizeSignal();
  SaveNames names{options.dir, options.name.empty() ? StepFolderName(meta.step) : options.name, ""};
  const int64_t needed = BytesNeeded(boxes);
  const auto failed = [&](const absl::Status& status, const std::string& more) {
    const ExitCode code = ExitCodeOf(status) == ExitCode::kInternal ? ExitCode::kInternal : kCode;
    return Error(code, "cannot save " + names.final_path() + ": " + MessageOf(status) + more);
  };

  absl::Status status = Prepare(options, &names, needed, warnings);
  if (!status.ok()) return failed(status, SpaceText(options.dir, needed));
  Checkpoint checkpoint;
  checkpoint.save_id = names.save_id;
  checkpoint.meta = meta;
  status = WriteTemporary(names, &checkpoint, boxes, source);
  if (status.ok()) status = Publish(names);
  if (!status.ok()) {
    status = failed(status, SpaceText(options.dir, needed));  // the space before the removal
    Warn(warnings, RemoveAll(names.temporary(), kCode));
    return status;
  }
  status = Finish(options, names, warnings);
  return status.ok() ? status : failed(status, "; the checkpoint itself is in place");
}

absl::Status CheckCanSave(const std::string& dir, int64_t bytes) {
  IgnoreFileSizeSignal();
  KRAIT_RETURN_IF_ERROR(MakeDirectories(dir, kCode));
  const std::string probe = dir + "/writable.tmp";
  absl::Status status = WriteFileAtomic(probe, "", kCode);
  if (status.ok()) status = RemoveFile(probe, kCode);
  if (!status.ok()) return Error(kCode, "cannot save in " + dir + ": " + MessageOf(status));
  status = CheckSpace(dir, bytes);
  return status.ok() ? status
                     : Error(kCode, "cannot save: " + MessageOf(status) + SpaceText(dir, bytes));
}

}  // namespace krait
