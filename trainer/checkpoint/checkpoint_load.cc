// Opening, verifying and loading: the manifest first, then only bytes at the places it names.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <set>
#include <system_error>

#include "absl/strings/cord.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/base/crc32c.h"
#include "kernels/base/file.h"
#include "kernels/transfer.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_manifest.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;  // damage
constexpr ExitCode kMisfit = ExitCode::kConfig;
// Bytes, a multiple of every element size; read, CRC and copy of a piece share the cache.
constexpr int64_t kPiece = int64_t{256} << 10;
constexpr int64_t kStreamed = int64_t{16} << 20;  // bytes of a tensor in memory at a time

std::string WithoutSlashes(std::string path) {
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  return path;
}

// What the system refuses says nothing about the bytes: not damage, which a load passes over, but
// an error that ends it (IsUnreadable).
constexpr char kUnreadable[] = "krait/unreadable";
absl::Status Unreadable(const std::string& message) {
  absl::Status status = Error(kCode, message);
  status.SetPayload(kUnreadable, absl::Cord());
  return status;
}
absl::Status Unreadable(const std::string& path, int error) {
  return Unreadable("cannot read " + path + ": " + std::generic_category().message(error));
}
bool IsUnreadable(const absl::Status& status) { return status.GetPayload(kUnreadable).has_value(); }

bool NotThere(int error) { return error == ENOENT || error == ENOTDIR; }

// Whether there is anything of that name; what keeps this from being known is an error.
absl::StatusOr<bool> IsThere(const std::string& path) {
  struct stat info;
  if (lstat(path.c_str(), &info) == 0) return true;
  if (NotThere(errno)) return false;
  return Unreadable(path, errno);
}

// A regular file that can be opened, not a link to one.
absl::Status CheckRegular(const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(const bool there, IsThere(path));
  if (!there) return Error(kCode, path + " is missing");
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return Unreadable(path, errno);
  if (S_ISLNK(info.st_mode)) return Error(kCode, path + " is a symbolic link; not followed");
  if (!S_ISREG(info.st_mode)) return Error(kCode, path + " is not a regular file");
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return Unreadable(path, errno);
  close(fd);
  return absl::OkStatus();
}

std::string Place(const Checkpoint& checkpoint, const ManifestBox& box) {
  return checkpoint.path + "/" + checkpoint.files[static_cast<size_t>(box.file)].name +
         ": tensor '" + box.name + "' (" + box.slot + ")";
}

// Reads bytes [begin, end) of a file into `out` and continues `crc` over them.
absl::Status ReadInto(const File& file, int64_t begin, int64_t end, char* out, uint32_t* crc) {
  for (int64_t at = begin; at < end; at += kPiece, out += kPiece) {
    const auto n = static_cast<size_t>(std::min(kPiece, end - at));
    if (const absl::Status status = file.ReadAt(out, n, at); !status.ok()) {
      // A file that is too short is damaged; one that is long enough was refused by the system.
      const auto size = file.Size();
      const bool cut_off = size.ok() && *size < at + static_cast<int64_t>(n);
      return cut_off ? status : Unreadable(MessageOf(status));
    }
    *crc = Crc32c(out, n, *crc);
  }
  return absl::OkStatus();
}

// Passes bytes [begin, end) of a file through `take(data, offset from begin, size)` in order and
// continues `crc` over them.
using Take = std::function<void(char*, int64_t, int64_t)>;
absl::Status Stream(const File& file, int64_t begin, int64_t end, std::vector<char>* buffer,
                    uint32_t* crc, const Take& take) {
  buffer->resize(std::max(buffer->size(), static_cast<size_t>(std::min(kPiece, end - begin))));
  for (int64_t at = begin; at < end; at += kPiece) {
    const int64_t n = std::min(kPiece, end - at);
    KRAIT_RETURN_IF_ERROR(ReadInto(file, at, at + n, buffer->data(), crc));
    if (take) take(buffer->data(), at - begin, n);
  }
  return absl::OkStatus();
}

absl::Status CheckBox(const Checkpoint& checkpoint, const ManifestBox& box, uint32_t crc) {
  if (crc == box.crc) return absl::OkStatus();
  return Error(kCode,
               Place(checkpoint, box) +
                   absl::StrFormat(": bytes %d to %d have CRC32C %08x, saved was %08x",
                                   box.file_offset, box.file_offset + box.bytes(), crc, box.crc));
}

// A stored box through `take`, or straight to `direct` where that is not null.
absl::Status ReadBox(const Checkpoint& checkpoint, const File& file, const ManifestBox& box,
                     char* direct, std::vector<char>* buffer, const Take& take) {
  uint32_t crc = 0;
  const int64_t end = box.file_offset + box.bytes();
  KRAIT_RETURN_IF_ERROR(direct != nullptr ? ReadInto(file, box.file_offset, end, direct, &crc)
                                          : Stream(file, box.file_offset, end, buffer, &crc, take));
  return CheckBox(checkpoint, box, crc);
}

absl::Status CheckOutsideBoxes(const Checkpoint& checkpoint, const File& file, size_t index,
                               const std::vector<std::pair<int64_t, int64_t>>& ranges,
                               std::vector<char>* buffer) {
  uint32_t crc = 0;
  for (const auto& [begin, end] : ranges) {
    KRAIT_RETURN_IF_ERROR(Stream(file, begin, end, buffer, &crc, nullptr));
  }
  const ManifestFile& entry = checkpoint.files[index];
  if (crc == entry.crc_rest) return absl::OkStatus();
  return Error(kCode, file.path() + absl::StrFormat(": the bytes outside tensors (headers, the "
                                                    "first at byte %d) have CRC32C %08x, saved "
                                                    "was %08x",
                                                    ranges.empty() ? 0 : ranges[0].first, crc,
                                                    entry.crc_rest));
}

// Copies the common part of a stored and a wanted box while the stored box's elements stream by in
// order. The part is a sequence of runs that are contiguous in both.
class Scatter {
 public:
  Scatter(const ManifestBox& stored, const CheckpointBox& wanted)
      : target_(static_cast<char*>(wanted.data)),
        device_(wanted.device),
        from_(stored.dtype),
        to_(wanted.dtype) {
    const size_t rank = stored.shape.size();
    std::vector<int64_t> from_stride(rank, 1), to_stride(rank, 1);
    extent_.resize(rank);
    for (size_t d = rank; d-- > 0;) {
      if (d + 1 < rank) {
        from_stride[d] = from_stride[d + 1] * stored.extent[d + 1];
        to_stride[d] = to_stride[d + 1] * wanted.extent[d + 1];
      }
      const int64_t begin = std::max(stored.offset[d], wanted.offset[d]);
      extent_[d] =
          std::min(stored.offset[d] + stored.extent[d], wanted.offset[d] + wanted.extent[d]) -
          begin;
      if (extent_[d] <= 0) return;  // run_length_ stays 0: nothing in common
      from_start_ += (begin - stored.offset[d]) * from_stride[d];
      to_start_ += (begin - wanted.offset[d]) * to_stride[d];
    }
    // Inner dimensions that both boxes have whole belong to the run.
    run_length_ = 1;
    outer_ = rank;
    while (outer_ > 0) {
      --outer_;
      run_length_ *= extent_[outer_];
      if (extent_[outer_] != stored.extent[outer_] || extent_[outer_] != wanted.extent[outer_]) {
        break;
      }
    }
    from_stride_ = std::move(from_stride);
    to_stride_ = std::move(to_stride);
    index_.assign(outer_, 0);
  }

  bool empty() const { return run_length_ == 0; }

  // Where in host memory the stored box goes as it is, byte for byte and in one run; null when it
  // does not.
  char* direct(const ManifestBox& stored) const {
    const bool whole =
        device_ == Device::kCpu && from_ == to_ && run_length_ * SizeOf(from_) == stored.bytes();
    return whole ? target_ + to_start_ * SizeOf(to_) : nullptr;
  }

  // Elements [begin, begin + count) of the stored box, each call behind the previous one.
  void Take(char* data, int64_t begin, int64_t count, const Context& ctx) {
    while (!done_) {
      const int64_t at = from_start_ + run_done_;
      const int64_t n = std::min(run_length_ - run_done_, begin + count - at);
      if (n <= 0) return;
      Put(data + (at - begin) * SizeOf(from_), to_start_ + run_done_, n, ctx);
      run_done_ += n;
      if (run_done_ == run_length_) NextRun();
    }
  }

 private:
  void NextRun() {
    run_done_ = 0;
    for (size_t d = outer_; d-- > 0;) {
      from_start_ += from_stride_[d];
      to_start_ += to_stride_[d];
      if (++index_[d] < extent_[d]) return;
      from_start_ -= extent_[d] * from_stride_[d];
      to_start_ -= extent_[d] * to_stride_[d];
      index_[d] = 0;
    }
    done_ = true;
  }

  void Put(char* data, int64_t element, int64_t count, const Context& ctx) {
    char* out = target_ + element * SizeOf(to_);
    if (device_ == Device::kCpu && from_ == to_) {
      std::memcpy(out, data, static_cast<size_t>(count * SizeOf(to_)));
      return;
    }
    if (from_ != to_) {
      if (device_ != Device::kCpu) converted_.resize(static_cast<size_t>(count * SizeOf(to_)));
      char* host = device_ == Device::kCpu ? out : converted_.data();
      Copy(Tensor(host, to_, Device::kCpu, {count}), Tensor(data, from_, Device::kCpu, {count}),
           Context());
      data = host;
    }
    if (device_ != Device::kCpu) Upload(Tensor(out, to_, device_, {count}), data, ctx);
  }

  char* target_;
  Device device_;
  DType from_, to_;
  int64_t from_start_ = 0, to_start_ = 0;  // of the current run, in elements
  int64_t run_length_ = 0, run_done_ = 0;
  size_t outer_ = 0;  // dimensions before the run
  std::vector<int64_t> extent_, index_, from_stride_, to_stride_;
  std::vector<char> converted_;  // of a piece for device memory
  bool done_ = false;
};

// Between these a load converts.
bool Converts(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

// Which stored boxes each wanted box needs; all that is missing or does not fit is reported.
absl::StatusOr<std::map<size_t, std::vector<Scatter>>> PlanScatter(
    const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted) {
  const TensorIndex index = IndexTensors(checkpoint.boxes);
  std::map<size_t, std::vector<Scatter>> plan;
  ErrorList errors;
  for (const CheckpointBox& want : wanted) {
    if (errors.errors().size() >= 10) break;
    const std::string tensor = checkpoint.path + ": tensor '" + want.name + "' (" + want.slot + ")";
    const auto found = index.find({want.slot, want.name});
    if (found == index.end()) {
      errors.Add(kMisfit, tensor + " is not in the checkpoint");
      continue;
    }
    const ManifestBox& first = checkpoint.boxes[found->second[0]];
    if (first.shape != want.shape) {
      errors.Add(kMisfit, tensor + " has shape [" + absl::StrJoin(first.shape, ", ") + "]; [" +
                              absl::StrJoin(want.shape, ", ") + "] is needed");
      continue;
    }
    if (first.dtype != want.dtype && !(Converts(first.dtype) && Converts(want.dtype))) {
      errors.Add(kMisfit, tensor + " has dtype " + Name(first.dtype) + "; " + Name(want.dtype) +
                              " is needed");
      continue;
    }
    KRAIT_CHECK(want.offset.size() == want.shape.size());
    KRAIT_CHECK(want.extent.size() == want.shape.size());
    for (size_t d = 0; d < want.shape.size(); ++d) {
      KRAIT_CHECK(want.offset[d] >= 0 && want.extent[d] > 0 &&
                  want.offset[d] + want.extent[d] <= want.shape[d]);
    }
    for (const size_t i : found->second) {
      Scatter scatter(checkpoint.boxes[i], want);
      if (!scatter.empty()) plan[i].push_back(std::move(scatter));
    }
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  return plan;
}

}  // namespace

absl::StatusOr<Checkpoint> OpenCheckpoint(const std::string& path_of_folder) {
  const std::string folder = WithoutSlashes(path_of_folder);
  const std::string path = folder + "/" + kManifestName;
  KRAIT_RETURN_IF_ERROR(CheckRegular(path));
  KRAIT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxManifestBytes, kCode));
  KRAIT_ASSIGN_OR_RETURN(Checkpoint checkpoint, ParseManifest(text, path));
  checkpoint.path = folder;
  int64_t step = 0;
  const std::string name = folder.substr(folder.find_last_of('/') + 1);
  // One that no run has saved (step 0, of an import) may have any name.
  if (IsStepFolderName(name, &step) && step != checkpoint.meta.step && checkpoint.meta.step != 0) {
    return Error(kCode, path + " is of step " + std::to_string(checkpoint.meta.step) +
                            ", not of the step in the folder's name");
  }
  for (const ManifestFile& entry : checkpoint.files) {
    const std::string shard = folder + "/" + entry.name;
    KRAIT_RETURN_IF_ERROR(CheckRegular(shard));
    KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(shard, kCode));
    KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
    if (size != entry.size) {
      return Error(kCode, shard + " has " + std::to_string(size) + " bytes; the manifest says " +
                              std::to_string(entry.size));
    }
  }
  return checkpoint;
}

absl::Status VerifyCheckpoint(const Checkpoint& checkpoint) {
  ErrorList errors;
  std::vector<char> buffer;
  const auto ranges = RangesOutsideBoxes(checkpoint.files, checkpoint.boxes);
  for (size_t f = 0; f < checkpoint.files.size(); ++f) {
    const auto file = File::OpenRead(checkpoint.path + "/" + checkpoint.files[f].name, kCode);
    errors.Add(file.status());
    if (!file.ok()) continue;
    errors.Add(CheckOutsideBoxes(checkpoint, *file, f, ranges[f], &buffer));
    for (const ManifestBox& box : checkpoint.boxes) {
      if (box.file != static_cast<int64_t>(f)) continue;
      errors.Add(ReadBox(checkpoint, *file, box, nullptr, &buffer, nullptr));
    }
  }
  return errors.ToStatus();
}

absl::Status LoadBoxes(const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted,
                       const Context& ctx, const Progress& progress) {
  KRAIT_ASSIGN_OR_RETURN(auto plan, PlanScatter(checkpoint, wanted));
  std::map<int64_t, std::vector<size_t>> of_file;
  for (const auto& entry : plan) of_file[checkpoint.boxes[entry.first].file].push_back(entry.first);
  const auto ranges = RangesOutsideBoxes(checkpoint.files, checkpoint.boxes);
  int64_t done = 0, total = 0;
  for (const auto& entry : plan) total += checkpoint.boxes[entry.first].bytes();
  std::vector<char> buffer;
  for (auto& [f, indices] : of_file) {
    const auto file_index = static_cast<size_t>(f);
    KRAIT_ASSIGN_OR_RETURN(
        const File file,
        File::OpenRead(checkpoint.path + "/" + checkpoint.files[file_index].name, kCode));
    KRAIT_RETURN_IF_ERROR(
        CheckOutsideBoxes(checkpoint, file, file_index, ranges[file_index], &buffer));
    std::sort(indices.begin(), indices.end(), [&](size_t a, size_t b) {
      return checkpoint.boxes[a].file_offset < checkpoint.boxes[b].file_offset;
    });
    for (const size_t i : indices) {
      const ManifestBox& box = checkpoint.boxes[i];
      if (progress) KRAIT_RETURN_IF_ERROR(progress(done, total));
      done += box.bytes();
      const int64_t width = SizeOf(box.dtype);
      std::vector<Scatter>& scatters = plan.at(i);
      const auto take = [&](char* data, int64_t at, int64_t size) {
        for (Scatter& scatter : scatters) scatter.Take(data, at / width, size / width, ctx);
      };
      char* direct = scatters.size() == 1 ? scatters[0].direct(box) : nullptr;
      KRAIT_RETURN_IF_ERROR(ReadBox(checkpoint, file, box, direct, &buffer, take));
    }
  }
  return absl::OkStatus();
}

namespace {

// Streams one tensor, stored as the boxes of `stored`.
absl::Status StreamTensor(const Checkpoint& checkpoint, const std::vector<File>& files,
                          const std::vector<size_t>& stored, CheckpointBox wanted, size_t number,
                          std::vector<char>* piece, const TensorSink& take) {
  const int64_t rows = wanted.shape[0], row = wanted.bytes() / SizeOf(wanted.dtype) / rows;
  const int64_t at_once = std::max<int64_t>(1, kStreamed / (row * SizeOf(wanted.dtype)));
  std::vector<uint32_t> crc(stored.size());
  std::vector<char> buffer;
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    wanted.offset[0] = begin;
    wanted.extent[0] = std::min(at_once, rows - begin);
    piece->resize(std::max(piece->size(), static_cast<size_t>(wanted.bytes())));
    wanted.data = piece->data();
    for (size_t k = 0; k < stored.size(); ++k) {
      // The box's rows in this piece lie behind those of the piece before.
      const ManifestBox& box = checkpoint.boxes[stored[k]];
      const int64_t first = std::max(begin, box.offset[0]);
      const int64_t end = std::min(begin + wanted.extent[0], box.offset[0] + box.extent[0]);
      if (first >= end) continue;
      const int64_t width = box.bytes() / box.extent[0];  // of a row of the box
      const int64_t skipped = (first - box.offset[0]) * width;
      const int64_t from = box.file_offset + skipped, to = from + (end - first) * width;
      const File& file = files[static_cast<size_t>(box.file)];
      if (stored.size() == 1 && box.dtype == wanted.dtype) {
        KRAIT_RETURN_IF_ERROR(ReadInto(file, from, to, piece->data(), &crc[k]));
        continue;
      }
      Scatter scatter(box, wanted);
      const int64_t element = SizeOf(box.dtype);
      KRAIT_RETURN_IF_ERROR(
          Stream(file, from, to, &buffer, &crc[k], [&](char* data, int64_t at, int64_t size) {
            scatter.Take(data, (skipped + at) / element, size / element, Context());
          }));
    }
    KRAIT_RETURN_IF_ERROR(take(number, begin * row, wanted.extent[0] * row, piece->data()));
  }
  for (size_t k = 0; k < stored.size(); ++k) {
    KRAIT_RETURN_IF_ERROR(CheckBox(checkpoint, checkpoint.boxes[stored[k]], crc[k]));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status StreamTensors(const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted,
                           const TensorSink& take) {
  KRAIT_RETURN_IF_ERROR(PlanScatter(checkpoint, wanted).status());
  const TensorIndex index = IndexTensors(checkpoint.boxes);
  const auto ranges = RangesOutsideBoxes(checkpoint.files, checkpoint.boxes);
  std::vector<File> files;
  std::vector<char> piece;
  for (size_t f = 0; f < checkpoint.files.size(); ++f) {
    files.emplace_back();
    KRAIT_ASSIGN_OR_RETURN(files.back(),
                           File::OpenRead(checkpoint.path + "/" + checkpoint.files[f].name, kCode));
    KRAIT_RETURN_IF_ERROR(CheckOutsideBoxes(checkpoint, files[f], f, ranges[f], &piece));
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    KRAIT_CHECK(wanted[i].extent == wanted[i].shape && !wanted[i].shape.empty());
    KRAIT_RETURN_IF_ERROR(StreamTensor(
        checkpoint, files, index.at({wanted[i].slot, wanted[i].name}), wanted[i], i, &piece, take));
  }
  return absl::OkStatus();
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

absl::StatusOr<Checkpoint> LoadNewestWhole(const std::vector<std::string>& folders,
                                           const CheckpointLoader& load,
                                           std::vector<PassedOver>* passed_over) {
  ErrorList errors;
  for (const std::string& folder : folders) {
    absl::StatusOr<Checkpoint> checkpoint = OpenCheckpoint(folder);
    const absl::Status status = checkpoint.ok() ? load(*checkpoint) : checkpoint.status();
    if (status.ok()) return checkpoint;
    if (IsUnreadable(status)) {
      return Error(kCode, MessageOf(status) +
                              "\nwhat cannot be read may be whole: it is not passed "
                              "over; make it readable, or move it away");
    }
    if (ExitCodeOf(status) != kCode) return status;
    errors.Add(status);
    passed_over->push_back({folder, MessageOf(status)});
  }
  if (errors.empty()) return Error(kCode, "there is no checkpoint");
  return Error(kCode, "no checkpoint is whole:\n" + MessageOf(errors.ToStatus()));
}

absl::StatusOr<Checkpoint> LoadNewest(const std::vector<std::string>& folders,
                                      const CheckpointLoader& load, const Notice& notice,
                                      std::vector<PassedOver>* passed_over) {
  std::vector<PassedOver> own;
  if (passed_over == nullptr) passed_over = &own;
  auto loaded = LoadNewestWhole(folders, load, passed_over);
  // An error names all reasons itself.
  for (size_t i = 0; loaded.ok() && i < passed_over->size(); ++i) {
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
