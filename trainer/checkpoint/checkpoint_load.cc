// Verifying and loading: only bytes at the places that the boxes name.
#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/base/crc32c.h"
#include "kernels/transfer.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_boxes.h"
#include "trainer/checkpoint/checkpoint_read.h"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kNoCheckpoint;  // damage
constexpr ExitCode kMisfit = ExitCode::kConfig;
constexpr int64_t kStreamed = int64_t{16} << 20;  // bytes of a tensor in memory at a time

std::string Place(const Checkpoint& checkpoint, const ManifestBox& box) {
  return checkpoint.path + "/" + checkpoint.files[static_cast<size_t>(box.file)].name +
         ": tensor '" + box.name + "' (" + box.slot + ")";
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

// CRC of several ranges of a file, one after the other.
using Ranges = std::vector<std::pair<int64_t, int64_t>>;
absl::Status CheckRanges(const File& file, const Ranges& ranges, uint32_t saved,
                         const std::string& what, std::vector<char>* buffer) {
  uint32_t crc = 0;
  for (const auto& [begin, end] : ranges) {
    KRAIT_RETURN_IF_ERROR(Stream(file, begin, end, buffer, &crc, nullptr));
  }
  if (crc == saved) return absl::OkStatus();
  return Error(
      kCode, file.path() + absl::StrFormat(": %s (the first byte is %d) have CRC32C %08x, "
                                           "saved was %08x",
                                           what, ranges.empty() ? 0 : ranges[0].first, crc, saved));
}

absl::Status CheckOutside(const File& file, const ManifestFile& entry, const Ranges& outside,
                          std::vector<char>* buffer) {
  return CheckRanges(file, outside, entry.crc_rest,
                     "the bytes outside tensors, of headers and padding", buffer);
}

// File number `f`, open, its bytes outside boxes and table checked.
absl::StatusOr<File> OpenFile(const Checkpoint& checkpoint, size_t f, const Ranges& outside,
                              std::vector<char>* buffer) {
  const ManifestFile& entry = checkpoint.files[f];
  KRAIT_ASSIGN_OR_RETURN(File file, OpenRegular(checkpoint.path + "/" + entry.name));
  KRAIT_RETURN_IF_ERROR(CheckOutside(file, entry, outside, buffer));
  return file;
}

// Indices of boxes by the file that they are in, in the order of their places there.
std::map<size_t, std::vector<size_t>> ByFile(const Checkpoint& checkpoint,
                                             const std::vector<size_t>& indices) {
  std::map<size_t, std::vector<size_t>> of_file;
  for (const size_t i : indices) {
    of_file[static_cast<size_t>(checkpoint.boxes[i].file)].push_back(i);
  }
  for (auto& entry : of_file) {
    std::sort(entry.second.begin(), entry.second.end(), [&](size_t a, size_t b) {
      return checkpoint.boxes[a].file_offset < checkpoint.boxes[b].file_offset;
    });
  }
  return of_file;
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

absl::Status VerifyCheckpoint(const Checkpoint& checkpoint) {
  ErrorList errors;
  std::vector<char> buffer;
  const auto outside = RangesOutsideBoxes(checkpoint.files, checkpoint.boxes);
  std::vector<size_t> all(checkpoint.boxes.size());
  std::iota(all.begin(), all.end(), size_t{0});
  std::map<size_t, std::vector<size_t>> of_file = ByFile(checkpoint, all);
  for (size_t f = 0; f < checkpoint.files.size(); ++f) {
    const ManifestFile& entry = checkpoint.files[f];
    const auto file = OpenRegular(checkpoint.path + "/" + entry.name);
    errors.Add(file.status());
    if (!file.ok()) continue;
    errors.Add(CheckOutside(*file, entry, outside[f], &buffer));
    if (entry.table_size > 0) {
      errors.Add(CheckRanges(*file, {{entry.table_at, entry.table_at + entry.table_size}},
                             entry.table_crc, "the bytes of the table of boxes", &buffer));
    }
    for (const size_t i : of_file[f]) {
      errors.Add(ReadBox(checkpoint, *file, checkpoint.boxes[i], nullptr, &buffer, nullptr));
    }
  }
  return errors.ToStatus();
}

absl::Status LoadBoxes(const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted,
                       const Context& ctx, const Progress& progress) {
  KRAIT_ASSIGN_OR_RETURN(auto plan, PlanScatter(checkpoint, wanted));
  std::vector<size_t> touched;
  int64_t done = 0, total = 0;
  for (const auto& entry : plan) {
    touched.push_back(entry.first);
    total += checkpoint.boxes[entry.first].bytes();
  }
  const auto outside = RangesOutsideBoxes(checkpoint.files, checkpoint.boxes);
  std::vector<char> buffer;
  for (const auto& [f, indices] : ByFile(checkpoint, touched)) {
    KRAIT_ASSIGN_OR_RETURN(const File file, OpenFile(checkpoint, f, outside[f], &buffer));
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
absl::Status StreamTensor(const Checkpoint& checkpoint, const std::vector<size_t>& stored,
                          CheckpointBox wanted, size_t number, std::vector<char>* piece,
                          const TensorSink& take) {
  const int64_t rows = wanted.shape[0], row = wanted.bytes() / SizeOf(wanted.dtype) / rows;
  const int64_t at_once = std::max<int64_t>(1, kStreamed / (row * SizeOf(wanted.dtype)));
  std::vector<uint32_t> crc(stored.size());
  std::vector<char> buffer;
  // One file is open at a time: there may be more of them than a process may open.
  int64_t open = -1;
  File file;
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
      if (box.file != std::exchange(open, box.file)) {
        const std::string& name = checkpoint.files[static_cast<size_t>(box.file)].name;
        KRAIT_ASSIGN_OR_RETURN(file, OpenRegular(checkpoint.path + "/" + name));
      }
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
  std::vector<size_t> touched;
  {
    KRAIT_ASSIGN_OR_RETURN(const auto plan, PlanScatter(checkpoint, wanted));
    for (const auto& entry : plan) touched.push_back(entry.first);
  }
  const TensorIndex index = IndexTensors(checkpoint.boxes);
  const auto outside = RangesOutsideBoxes(checkpoint.files, checkpoint.boxes);
  std::vector<char> piece;
  for (const auto& entry : ByFile(checkpoint, touched)) {
    const size_t f = entry.first;
    KRAIT_RETURN_IF_ERROR(OpenFile(checkpoint, f, outside[f], &piece).status());
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    KRAIT_CHECK(wanted[i].extent == wanted[i].shape && !wanted[i].shape.empty());
    KRAIT_RETURN_IF_ERROR(StreamTensor(checkpoint, index.at({wanted[i].slot, wanted[i].name}),
                                       wanted[i], i, &piece, take));
  }
  return absl::OkStatus();
}

}  // namespace krait
