// Sharded checkpoints: one HDF5 file per writing rank and manifest.json, in a folder step-NNNNNNNN.
//
// The contract is design section 5 ("Checkpoint"), restated in the README. A checkpoint is
// described in global, published tensors: each slot (weight, exp_avg, exp_avg_sq) holds boxes
// (offset, extent) that tile every tensor once, whichever ranks wrote them. Loading reads only the
// manifest, the files' tables of boxes and the boxes, never HDF5.
//
// Where a function takes a World, all ranks call it with arguments that are alike, but for boxes
// and files' contents, from their main threads; the results are alike too, and of errors the first
// rank has the message (Agree). Null: this process alone. What does not take one communicates
// nothing.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/position.h"
#include "kernels/base/dtype.h"
#include "kernels/base/progress.h"
#include "kernels/base/status.h"
#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

class World;

// A box of a published tensor in one slot, and its bytes on `device` (contiguous, row-major).
struct CheckpointBox {
  std::string slot;  // "weight", "exp_avg", "exp_avg_sq"
  std::string name;  // published
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;   // of the whole tensor
  std::vector<int64_t> offset;  // of the box
  std::vector<int64_t> extent;
  void* data = nullptr;  // read when saving, written when loading
  Device device = Device::kCpu;
  int64_t bytes() const;
  Tensor values() const;  // flat
};

// What a checkpoint carries besides tensors.
struct CheckpointMeta {
  int64_t step = 0;        // schedule steps done
  int64_t adam_steps = 0;  // updates applied (skipped steps are not counted)
  int64_t skipped = 0;     // steps so far that were not applied
  int64_t skipped_in_row = 0;
  // Of the last steps that were applied, oldest first (trainer/train/spike_guard.h).
  std::vector<double> recent_losses, recent_norms;
  int64_t sequences = 0;  // training positions consumed
  int64_t tokens = 0;
  std::string data_fingerprint;
  // Where the training data stands: DataPosition at `sequences`. The first version wrote none.
  int64_t mix_start = 0;
  std::vector<SourcePosition> sources;
  std::vector<std::string> validation;  // content hashes of the validation files
  std::string config_yaml;              // resolved
  std::string tokenizer;                // name stored in the token files
  std::string hardware;  // what the last steps ran on (kernels/hardware.h); "": not known
  // What an imported Hugging Face folder said beyond the model, for export: members of its
  // config.json, and its generation_config.json; JSON in Python's dialect, "" for none.
  std::string hf_config, hf_generation_config;
};

struct SaveOptions {
  std::string dir;   // .../checkpoints
  int64_t keep = 3;  // whole checkpoints to keep; >= 2
  // The folder's name instead of step-NNNNNNNN, for a single checkpoint outside a run (import).
  // Then `latest` is not written and nothing is pruned, and only a checkpoint is replaced.
  std::string name;
  int64_t keep_every = 0;  // those of every so many steps stay for good; 0: none
  // Larger boxes are cut, into parts of at most so many bytes: a reader of another layout reads,
  // for the CRC, all of a box that it needs a row of. 64 MiB is the most that the format allows.
  int64_t box_bytes = int64_t{16} << 20;
};

// Writes step-N.SAVEID.tmp/ (each rank a file with its boxes, if it has any, and fsync; then the
// first rank alone: manifest, fsync, folder fsync), renames to step-N, fsyncs the parent, points
// `latest` (a text file with the folder's name) at it by rename, then removes old checkpoints:
// never the one just written, never below `keep` whole ones, never those that `keep_every` names.
// An existing step-N is moved aside as old-step-N.SAVEID first, which ListCheckpoints takes for it
// until the new one is in place. What killed saves left behind goes at the start.
//
// On failure of any rank nothing new is under the final name, the temporary folder is gone and
// older checkpoints are untouched; only where the failure came after the rename (parent fsync,
// `latest`) does the message say that the checkpoint is in place. The error, kCannotSave, names the
// path, the reason, and needed/free bytes. Failures to delete what is no longer a checkpoint are
// not errors: they go to the first rank's `warnings`, and the next save tries again. SIGXFSZ is
// ignored from the first call on, so that a file size limit is an error and not a death.
//
// The boxes are in host memory (AsyncSaver copies those of a device there first); elements of those
// without data come from `source`, piece by piece and in order. No two ranks have an element: each
// passes what it owns. One save at a time per folder (RunLock). Blocks until all is on disk.
using BoxSource =
    std::function<absl::Status(size_t box, int64_t begin, int64_t count, void* values)>;
absl::Status SaveCheckpoint(const SaveOptions& options, const CheckpointMeta& meta,
                            const std::vector<CheckpointBox>& boxes,
                            std::vector<std::string>* warnings = nullptr,
                            const BoxSource& source = nullptr, World* world = nullptr);

// For the start of a run: creates `dir`, and kCannotSave unless it can be written and has room for
// a checkpoint of `bytes`.
absl::Status CheckCanSave(const std::string& dir, int64_t bytes);

struct ManifestBox {
  std::string slot, name;
  DType dtype;
  std::vector<int64_t> shape, offset, extent;
  int64_t file;         // index into files
  int64_t file_offset;  // of the data
  uint32_t crc;
  int64_t bytes() const;
};
struct ManifestFile {
  std::string name;  // inside the folder, no path separators
  int64_t size;
  uint32_t crc_rest;  // of all bytes outside boxes and table, in order (HDF5's own, and padding)
  // The table of boxes; size 0 in format 1, which has them in the manifest.
  int64_t table_at = 0, table_size = 0;
  uint32_t table_crc = 0;
};
struct Checkpoint {
  std::string path;  // of the folder
  int64_t format_version = 0;
  std::string save_id;
  CheckpointMeta meta;
  int64_t ranks = 1;                // that saved it; those without boxes have no file
  std::vector<ManifestFile> files;  // in the order of the ranks
  std::vector<ManifestBox> boxes;   // of all files, in their order
};
// Reads and checks `folder`/manifest.json, the files' sizes and their tables of boxes (CRCs, sizes,
// tiling), not yet the boxes' bytes. kNoCheckpoint with the reason; what the system refuses to read
// (any errno but that of a missing file) is no damage: a load that meets it ends there.
// Nothing is followed out of the folder: file names have no separators, symbolic links are refused.
// Of several ranks each reads the tables of some files and sends them to the others.
absl::StatusOr<Checkpoint> OpenCheckpoint(const std::string& folder, World* world = nullptr);
// The same without the boxes, which there may be many of: step, save id, meta data.
absl::StatusOr<Checkpoint> ReadManifest(const std::string& folder);

// Every byte of every file against its CRC; all damage found, each with file, tensor and offset.
absl::Status VerifyCheckpoint(const Checkpoint& checkpoint);

// Fills the wanted boxes from those stored (any tiling), checking the CRC of every stored box that
// is touched while reading it, and the bytes outside boxes of the files touched; opens no others. A
// box is read once, in pieces below 1 MiB; pieces for device memory are uploaded one by one on
// ctx.stream, behind earlier work, and have arrived when the call returns. f32 and bf16 are
// converted into each other, rounded to nearest even. kNoCheckpoint for damage; kConfig for what
// does not fit: tensors that the checkpoint lacks, has in another shape, or in a dtype that cannot
// be converted. After an error the targets hold garbage. `progress` counts bytes.
absl::Status LoadBoxes(const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted,
                       const Context& ctx = Context(), const Progress& progress = nullptr);

// The wanted boxes, all of them whole tensors without data, through `take` in pieces: one tensor
// after the other, consecutive elements in the box's dtype, converted as by LoadBoxes. Errors are
// those of LoadBoxes, and what `take` returns; the CRC of a stored box is compared when its last
// byte was read, so that pieces taken before an error may be damaged ones.
using TensorSink =
    std::function<absl::Status(size_t box, int64_t begin, int64_t count, const void* values)>;
absl::Status StreamTensors(const Checkpoint& checkpoint, const std::vector<CheckpointBox>& wanted,
                           const TensorSink& take);

// Folders of `dir` named as checkpoints, newest step first, whole or not (a step-N without a
// manifest is a damaged one). A missing `dir` has none.
absl::StatusOr<std::vector<std::string>> ListCheckpoints(const std::string& dir);

// The checkpoints that a user's PATH stands for, newest first: itself when it is a checkpoint's
// folder, else those in it or in its `checkpoints` (a run folder); the file `latest` stands for its
// folder. kNoCheckpoint when there are none, or when PATH is missing.
absl::StatusOr<std::vector<std::string>> FindCheckpoints(const std::string& path);

// Something that a load did not use, and why: the path of a folder or file.
struct PassedOver {
  std::string path, reason;
};
// Takes a checkpoint's contents, by LoadBoxes; communicates nothing, since it may fail on one rank
// and not on others. kNoCheckpoint: damaged, try the next; any other error ends the search
// (kConfig: a model that does not fit), and so does what cannot be read.
using CheckpointLoader = std::function<absl::Status(const Checkpoint&)>;

// Tries `folders` (newest first, from ListCheckpoints or FindCheckpoints) until one loads. Whole
// means: the manifest holds, and all that `load` reads matches its CRC. `passed_over` gets the
// reason for each one that is not. kNoCheckpoint, with all reasons, when none is whole. Of several
// ranks the first one's `folders` count, and one loads when it does on all ranks; reasons are told
// on the first rank.
absl::StatusOr<Checkpoint> LoadNewestWhole(const std::vector<std::string>& folders,
                                           const CheckpointLoader& load,
                                           std::vector<PassedOver>* passed_over,
                                           World* world = nullptr);

// Receives one line for the user.
using Notice = std::function<void(const std::string& line)>;

// Loads the newest whole checkpoint of `folders` (FindCheckpoints, ListCheckpoints), with one
// notice, on the first rank, for each that is passed over.
absl::StatusOr<Checkpoint> LoadNewest(const std::vector<std::string>& folders,
                                      const CheckpointLoader& load, const Notice& notice,
                                      std::vector<PassedOver>* passed_over = nullptr,
                                      World* world = nullptr);

// Points `dir`/latest at the newest folder of a checkpoint, after one was moved away; removes it
// where there is none.
absl::Status MendLatest(const std::string& dir);

// What is wrong with `dir`/latest, which is only a hint that loading does not rely on; "" when it
// names the newest checkpoint, or when there is neither. `damaged` tells whether it is more than
// what a kill just before its update leaves: a missing file, or one that names an older checkpoint.
std::string CheckLatest(const std::string& dir, bool* damaged = nullptr);

// Exclusive use of a folder, a run's or that of its checkpoints: FOLDER/FILE with host, pid and
// start time, held with flock. The kernel lets go of it when the process ends, however that
// happens. On a file system without such locks (Lustre mounted without them) the file's text is the
// lock: it holds while the process that it names lives, as far as this host can tell.
class RunLock {
 public:
  RunLock() = default;
  RunLock(RunLock&& other) noexcept;
  RunLock& operator=(RunLock&& other) noexcept;
  ~RunLock();
  // Creates the folder. kConfig when another live process holds it, naming it; kCannotSave when the
  // file cannot be written.
  static absl::StatusOr<RunLock> Acquire(const std::string& folder,
                                         const std::string& file = "lock");
  // What the user must know of a folder without locks; "" elsewhere.
  const std::string& warning() const { return warning_; }

  // Whether the folder is still the one that was locked: false after it, or the lock file, was
  // removed, moved or replaced. Then another process may have a folder of that name for its own.
  bool Holds() const;

 private:
  void Release();
  // The lock of a file system without locks. kConfig when another process holds it.
  absl::Status TakeByText(const std::string& folder, const std::string& path);

  int fd_ = -1;
  std::string path_;
  bool by_text_ = false;
  std::string warning_;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_H_
