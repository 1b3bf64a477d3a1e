// Saving: shards, manifest, publication by rename, retention.
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <exception>
#include <map>
#include <new>
#include <optional>
#include <system_error>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "kernels/base/h5.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_boxes.h"
#include "trainer/checkpoint/checkpoint_manifest.h"
#include "trainer/checkpoint/checkpoint_ranks.h"
#include "trainer/checkpoint/checkpoint_read.h"
#include "trainer/checkpoint/checkpoint_save.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kCannotSave;

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

// What a rank's file takes on disk: data, and per dataset HDF5's headers, alignment and a line of
// the table.
int64_t BytesNeeded(const std::vector<CheckpointBox>& boxes, int64_t box_bytes) {
  int64_t bytes = 1 << 16;
  for (const CheckpointBox& box : boxes) {
    bytes += box.bytes() + 6000 * (box.bytes() / box_bytes + 1);
  }
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

// The names that a save uses beside the final one.
struct SaveNames {
  std::string dir, name, save_id;
  explicit SaveNames(const BegunSave& save)
      : dir(save.options.dir),
        name(save.options.name.empty() ? StepFolderName(save.meta.step) : save.options.name),
        save_id(save.save_id) {}
  std::string final_path() const { return dir + "/" + name; }
  std::string temporary() const { return dir + "/" + name + "." + save_id + ".tmp"; }
  std::string old() const { return dir + "/old-" + name + "." + save_id; }
  std::string trash(const std::string& folder) const {
    return dir + "/trash-" + folder + "." + save_id;
  }
};

// HDF5 lays out a rank's file; the places go to the boxes and to the table in `shard`.
absl::Status LayOut(const std::string& path, const BegunSave& save, int rank,
                    std::vector<ManifestBox>* boxes, ManifestFile* shard) {
  KRAIT_ASSIGN_OR_RETURN(H5File h5, H5File::Create(path, kCode));
  KRAIT_RETURN_IF_ERROR(
      h5.WriteAttribute("format_version", static_cast<uint64_t>(kCheckpointFormat)));
  // Bytes outside boxes carry a CRC too: with the save id among them, a file of another save does
  // not fit this manifest even where all its tensors are equal.
  KRAIT_RETURN_IF_ERROR(h5.WriteAttribute("save_id", save.save_id));
  KRAIT_RETURN_IF_ERROR(h5.WriteAttribute("step", static_cast<uint64_t>(save.meta.step)));
  KRAIT_RETURN_IF_ERROR(h5.WriteAttribute("rank", static_cast<uint64_t>(rank)));
  std::map<std::pair<std::string, std::string>, int64_t> count;
  for (ManifestBox& box : *boxes) {
    const std::string dataset =
        "/" + box.slot + "/" + box.name + "/" + std::to_string(count[{box.slot, box.name}]++);
    KRAIT_ASSIGN_OR_RETURN(box.file_offset, h5.CreateContiguous(dataset, box.dtype, box.extent));
  }
  // The last one: its length depends on where the boxes are.
  shard->table_size = static_cast<int64_t>(TableText(save.save_id, *boxes).size());
  if (shard->table_size > kMaxTableBytes) {
    return Error(kCode, path + ": " + std::to_string(boxes->size()) +
                            " boxes are more than one file may have");
  }
  KRAIT_ASSIGN_OR_RETURN(shard->table_at,
                         h5.CreateContiguous(kTableDataset, DType::kU8, {shard->table_size}));
  return h5.Close();
}

// A part of one of the caller's boxes. The CRC is taken from its memory, before the bytes go
// anywhere.
absl::Status WriteBox(const File& file, const CheckpointBox& values, const BoxPart& part,
                      const BoxSource& source, std::vector<char>* buffer, ManifestBox* box) {
  const int64_t size = box->bytes(), width = SizeOf(values.dtype);
  box->crc = 0;
  for (int64_t done = 0; done < size; done += kPiece) {
    const auto n = static_cast<size_t>(std::min(kPiece, size - done));
    const char* data = buffer->data();
    if (values.data != nullptr) {
      data = static_cast<const char*>(values.data) + part.begin * width + done;
    } else {
      KRAIT_RETURN_IF_ERROR(source(part.box, part.begin + done / width,
                                   static_cast<int64_t>(n) / width, buffer->data()));
    }
    box->crc = Crc32c(data, n, box->crc);
    KRAIT_RETURN_IF_ERROR(file.WriteAt(data, n, box->file_offset + done));
  }
  return absl::OkStatus();
}

absl::StatusOr<ManifestFile> Write(const BegunSave& save, int rank,
                                   const std::vector<CheckpointBox>& sources,
                                   const BoxSource& source) {
  ManifestFile shard{absl::StrFormat("rank-%05d.h5", rank), 0, 0};
  const std::string path = SaveNames(save).temporary() + "/" + shard.name;
  const std::vector<BoxPart> parts = CutBoxes(sources, save.options.box_bytes);
  std::vector<ManifestBox> boxes;
  boxes.reserve(parts.size());
  for (const BoxPart& part : parts) {
    const CheckpointBox& box = sources[part.box];
    boxes.push_back({box.slot, box.name, box.dtype, box.shape, part.offset, part.extent, 0, 0, 0});
  }
  KRAIT_RETURN_IF_ERROR(LayOut(path, save, rank, &boxes, &shard));
  KRAIT_ASSIGN_OR_RETURN(File file, File::OpenWrite(path, kCode));
  KRAIT_ASSIGN_OR_RETURN(shard.size, file.Size());
  KRAIT_RETURN_IF_ERROR(Reserve(file, shard.size));
  std::vector<char> buffer(static_cast<size_t>(kPiece));
  for (size_t i = 0; i < parts.size(); ++i) {
    KRAIT_RETURN_IF_ERROR(
        WriteBox(file, sources[parts[i].box], parts[i], source, &buffer, &boxes[i]));
  }
  const std::string table = TableText(save.save_id, boxes);
  KRAIT_CHECK(static_cast<int64_t>(table.size()) == shard.table_size);
  shard.table_crc = Crc32c(table.data(), table.size());
  KRAIT_RETURN_IF_ERROR(file.WriteAt(table.data(), table.size(), shard.table_at));
  const auto outside = RangesOutsideBoxes({shard}, boxes);
  for (const auto& [begin, end] : outside[0]) {
    for (int64_t at = begin; at < end; at += kPiece) {
      const auto n = static_cast<size_t>(std::min(kPiece, end - at));
      KRAIT_RETURN_IF_ERROR(file.ReadAt(buffer.data(), n, at));
      shard.crc_rest = Crc32c(buffer.data(), n, shard.crc_rest);
    }
  }
  KRAIT_RETURN_IF_ERROR(file.Sync());
  KRAIT_RETURN_IF_ERROR(file.Close());
  return shard;
}

// Runs what must not throw, since an exception that leaves a thread ends the process, unsaved.
template <typename Work>
absl::Status Catching(const Work& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return Error(ExitCode::kOutOfMemory, "out of memory");
  } catch (const std::exception& error) {
    return Error(kCode, error.what());
  }
}

// A report is the file's entry, or the exit code of an error and its message behind this mark.
constexpr char kFailed = '!';

std::string FailedReport(const absl::Status& status) {
  return kFailed + std::to_string(static_cast<int>(ExitCodeOf(status))) + " " + MessageOf(status);
}

// The files that the reports name, or what they say is wrong.
absl::StatusOr<std::vector<ManifestFile>> ReadReports(const std::vector<std::string>& reports) {
  constexpr size_t kTold = 3;
  std::vector<ManifestFile> files;
  std::vector<std::string> wrong;
  ExitCode code = kCode;
  for (size_t r = 0; r < reports.size(); ++r) {
    const std::string& report = reports[r];
    if (report.empty()) continue;
    if (report[0] != kFailed) {
      KRAIT_ASSIGN_OR_RETURN(ManifestFile file,
                             ParseFileText(report, "the report of rank " + std::to_string(r)));
      files.push_back(std::move(file));
      continue;
    }
    const size_t space = report.find(' ');
    if (wrong.empty()) code = static_cast<ExitCode>(std::stoi(report.substr(1, space - 1)));
    wrong.push_back(report.substr(space + 1));
  }
  if (wrong.empty()) return files;
  std::string text = wrong[0];
  for (size_t i = 1; i < std::min(kTold, wrong.size()); ++i) text += "; " + wrong[i];
  if (wrong.size() > kTold) text += absl::StrFormat("; and %d more ranks", wrong.size() - kTold);
  return Error(code, text);
}

absl::Status WriteManifest(const std::string& folder, const Checkpoint& checkpoint) {
  KRAIT_ASSIGN_OR_RETURN(const std::string text, ManifestText(checkpoint));
  const std::string path = folder + "/" + kManifestName;
  KRAIT_ASSIGN_OR_RETURN(File file, File::Create(path, /*exclusive=*/true, kCode));
  KRAIT_RETURN_IF_ERROR(file.WriteAt(text.data(), text.size(), 0));
  KRAIT_RETURN_IF_ERROR(file.Sync());
  KRAIT_RETURN_IF_ERROR(file.Close());
  // What a reader would refuse must not be published: files that this rank does not see as they
  // were written, and, a bug of the caller, boxes that do not tile a tensor.
  KRAIT_ASSIGN_OR_RETURN(const Checkpoint written, ReadCheckpoint(folder, OrAlone(nullptr)));
  const absl::Status boxes = CheckBoxes(written);
  return boxes.ok() ? boxes : Error(ExitCode::kInternal, MessageOf(boxes));
}

bool EndsWithSaveId(std::string_view name) {
  return name.size() > kSaveIdDigits + 1 && IsSaveId(name.substr(name.size() - kSaveIdDigits)) &&
         name[name.size() - kSaveIdDigits - 1] == '.';
}

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
      if (ReadManifest(folder).ok()) ++whole;
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

// What must hold before anything is written, and the temporary folder.
absl::Status Prepare(BegunSave* save, std::vector<std::string>* warnings) {
  const SaveOptions& options = save->options;
  KRAIT_RETURN_IF_ERROR(MakeDirectories(options.dir, kCode));
  const std::string final_path = SaveNames(*save).final_path();
  if (!options.name.empty() && Exists(final_path) && !Exists(final_path + "/" + kManifestName)) {
    return Error(kCode, final_path + " exists and is not a checkpoint");
  }
  RemoveLeftovers(options, warnings);
  KRAIT_RETURN_IF_ERROR(CheckSpace(options.dir, save->needed));
  KRAIT_ASSIGN_OR_RETURN(save->save_id, NewSaveId());
  const std::string temporary = SaveNames(*save).temporary();
  if (mkdir(temporary.c_str(), 0777) != 0) {
    return Error(kCode, "cannot create folder " + temporary + ": " + Reason(errno));
  }
  return absl::OkStatus();
}

// " (5000 bytes needed, 3000 free)".
std::string SpaceText(const std::string& dir, int64_t needed) {
  const std::optional<Space> space = FreeSpace(dir);
  return " (" + std::to_string(needed) + " bytes needed" +
         (space.has_value() ? ", " + std::to_string(space->bytes) + " free)" : ")");
}

absl::Status Failed(const BegunSave& save, const absl::Status& status, const std::string& more) {
  const ExitCode code = ExitCodeOf(status);
  const bool other = code == ExitCode::kInternal || code == ExitCode::kOutOfMemory;
  return Error(other ? code : kCode,
               "cannot save " + SaveNames(save).final_path() + ": " + MessageOf(status) + more);
}

}  // namespace

absl::StatusOr<BegunSave> BeginSave(const SaveOptions& options, const CheckpointMeta& meta,
                                    const std::vector<CheckpointBox>& boxes,
                                    std::vector<std::string>* warnings, World* given) {
  KRAIT_CHECK(options.keep >= 2 || !options.name.empty());
  KRAIT_CHECK(options.box_bytes > 0 && options.box_bytes <= kMaxBoxBytes);
  IgnoreFileSizeSignal();
  World* const world = OrAlone(given);
  BegunSave save{options, meta, "", 0};
  for (const int64_t bytes : world->AllGather(BytesNeeded(boxes, options.box_bytes))) {
    save.needed += bytes;
  }
  absl::Status status;
  if (world->first()) status = Prepare(&save, warnings);
  if (!status.ok()) status = Failed(save, status, SpaceText(options.dir, save.needed));
  KRAIT_RETURN_IF_ERROR(StatusOfFirst(world, status));
  save.save_id = world->Broadcast(save.save_id);
  const std::string temporary = SaveNames(save).temporary();
  if (!world->first() && !IsDirectory(temporary)) {
    status = Failed(save, Error(kCode, temporary + ", which the first rank has made, is not there"),
                    ": checkpoint.dir must be one folder for all ranks");
  }
  status = Agree(world, status);
  if (!status.ok() && world->first()) Warn(warnings, RemoveAll(temporary, kCode));
  KRAIT_RETURN_IF_ERROR(status);
  return save;
}

std::string WriteShard(const BegunSave& save, int rank, const std::vector<CheckpointBox>& boxes,
                       const BoxSource& source) {
  if (boxes.empty()) return "";
  for (const CheckpointBox& box : boxes) {
    KRAIT_CHECK(box.device == Device::kCpu && (box.data != nullptr || source != nullptr));
  }
  std::string report;
  const absl::Status status = Catching([&]() -> absl::Status {
    KRAIT_ASSIGN_OR_RETURN(const ManifestFile file, Write(save, rank, boxes, source));
    report = FileText(file);
    return absl::OkStatus();
  });
  return status.ok() ? report : FailedReport(status);
}

absl::Status EndSave(const BegunSave& save, const std::vector<std::string>& reports,
                     std::vector<std::string>* warnings) {
  const SaveNames names(save);
  absl::Status status = Catching([&]() -> absl::Status {
    Checkpoint checkpoint;
    checkpoint.save_id = save.save_id;
    checkpoint.meta = save.meta;
    checkpoint.ranks = static_cast<int64_t>(reports.size());
    KRAIT_ASSIGN_OR_RETURN(checkpoint.files, ReadReports(reports));
    KRAIT_RETURN_IF_ERROR(WriteManifest(names.temporary(), checkpoint));
    KRAIT_RETURN_IF_ERROR(SyncDirectory(names.temporary(), kCode));
    return Publish(names);
  });
  if (!status.ok()) {
    status = Failed(save, status, SpaceText(names.dir, save.needed));  // before the removal
    Warn(warnings, RemoveAll(names.temporary(), kCode));
    return status;
  }
  status = Catching([&] { return Finish(save.options, names, warnings); });
  return status.ok() ? status : Failed(save, status, "; the checkpoint itself is in place");
}

absl::Status SaveCheckpoint(const SaveOptions& options, const CheckpointMeta& meta,
                            const std::vector<CheckpointBox>& boxes,
                            std::vector<std::string>* warnings, const BoxSource& source,
                            World* given) {
  World* const world = OrAlone(given);
  KRAIT_ASSIGN_OR_RETURN(const BegunSave save, BeginSave(options, meta, boxes, warnings, world));
  const std::vector<std::string> reports =
      world->AllGather(WriteShard(save, world->rank(), boxes, source));
  absl::Status status;
  if (world->first()) status = EndSave(save, reports, warnings);
  return StatusOfFirst(world, status);
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
