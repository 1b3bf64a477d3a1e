// Sharded checkpoints: one HDF5 file per writing rank and manifest.json, in a folder step-NNNNNNNN.
//
// The contract is design section 5 ("Checkpoint"), restated in the README. A checkpoint is
// described in global, published tensors: each slot (weight, exp_avg, exp_avg_sq) holds boxes
// (offset, extent) that tile every tensor once. Loading reads only the manifest and the boxes,
// never HDF5.
#ifndef KRAIT_TRAINER_CHECKPOINT_H_
#define KRAIT_TRAINER_CHECKPOINT_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace krait {

// A box of a published tensor in one slot, and its bytes in host memory (contiguous, row-major).
struct CheckpointBox {
  std::string slot;  // "weight", "exp_avg", "exp_avg_sq"
  std::string name;  // published
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;   // of the whole tensor
  std::vector<int64_t> offset;  // of the box
  std::vector<int64_t> extent;
  void* data = nullptr;  // read when saving, written when loading
  int64_t bytes() const;
};

// What a checkpoint carries besides tensors.
struct CheckpointMeta {
  int64_t step = 0;        // schedule steps done
  int64_t adam_steps = 0;  // updates applied (skipped steps are not counted)
  int64_t skipped = 0;     // non-finite steps so far
  int64_t skipped_in_row = 0;
  int64_t sequences = 0;  // training positions consumed
  int64_t tokens = 0;
  std::string data_fingerprint;
  std::string config_yaml;  // resolved
  std::string tokenizer;    // name stored in the token files
};

struct SaveOptions {
  std::string dir;   // .../checkpoints
  int64_t keep = 3;  // whole checkpoints to keep; >= 2
};

// Writes step-N.SAVEID.tmp/ (shard, fsync, manifest, fsync, folder fsync), renames to step-N,
// fsyncs the parent, points `latest` at it by rename, then removes old checkpoints (never the one
// just written, never below `keep` whole ones) and stale .tmp folders. An existing whole step-N is
// replaced by way of a trash name. On failure nothing under the final name exists and older
// checkpoints are untouched; error kCannotSave names the path, the reason, and needed/free bytes.
absl::Status SaveCheckpoint(const SaveOptions& options, const CheckpointMeta& meta,
                            const std::vector<CheckpointBox>& boxes);

// A manifest that passed its own checks (CRC, sizes, box tiling), not yet its files' bytes.
struct ManifestBox {
  std::string slot, name;
  DType dtype;
  std::vector<int64_t> shape, offset, extent;
  int file;             // index into files
  int64_t file_offset;  // of the data
  uint32_t crc;
};
struct ManifestFile {
  std::string name;  // inside the folder, no path separators
  int64_t size;
  uint32_t crc_rest;  // of all bytes outside boxes, in order
};
struct Checkpoint {
  std::string path;  // of the folder
  std::string save_id;
  CheckpointMeta meta;
  std::vector<ManifestFile> files;
  std::vector<ManifestBox> boxes;
};
// Reads and checks `folder`/manifest.json and the files' sizes. kNoCheckpoint with the reason.
absl::StatusOr<Checkpoint> OpenCheckpoint(const std::string& folder);

// Every byte of every file against its CRC; all damage found, each with file, tensor and offset.
absl::Status VerifyCheckpoint(const Checkpoint& checkpoint);

// Fills the wanted boxes from those stored (any tiling), checking the CRC of every stored box that
// is touched while reading it, and the bytes outside boxes too. Dtypes must agree, except that an
// f32 target may be filled from bf16.
absl::Status LoadBoxes(const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted);

// Folders of `dir` that look like checkpoints, newest step first ("step-N" with a manifest).
absl::StatusOr<std::vector<std::string>> ListCheckpoints(const std::string& dir);

// Exclusive use of a run folder: a lock file with host, pid and start time, held with flock.
class RunLock {
 public:
  RunLock() = default;
  RunLock(RunLock&& other) noexcept;
  RunLock& operator=(RunLock&& other) noexcept;
  ~RunLock();
  // kConfig when another live process holds it, naming it.
  static absl::StatusOr<RunLock> Acquire(const std::string& run_dir);

 private:
  int fd_ = -1;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_H_
