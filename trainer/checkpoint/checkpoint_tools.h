// krait checkpoint inspect | verify | diff: the answers as text or JSON.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_TOOLS_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_TOOLS_H_

#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// What goes to standard output (ends with a newline), and the exit code.
struct ToolReport {
  ExitCode code = ExitCode::kOk;
  std::string text;
};

// A PATH is a checkpoint's folder, a folder of checkpoints, or a run folder (FindCheckpoints).
// A PATH without any checkpoint is an error (kNoCheckpoint).

// Meta data, files and tensors of the newest checkpoint of each path whose manifest holds; as JSON
// an object, of several paths a list of them. Reads no tensor data.
absl::StatusOr<ToolReport> InspectCheckpoints(const std::vector<std::string>& paths, bool json);

// Every byte of every checkpoint of every path against its CRC. kNo when one is damaged, or when a
// folder's `latest` names none of its checkpoints; each damage with file, tensor and bytes.
absl::StatusOr<ToolReport> VerifyCheckpoints(const std::vector<std::string>& paths, bool json);

// Compares all tensors of the newest whole checkpoints of `a` and `b`, slot by slot (only those of
// `slot` unless it is ""): equal bits, or the largest absolute difference. kNo when they differ in
// anything but meta data; kConfig when neither has the slot.
absl::StatusOr<ToolReport> DiffCheckpoints(const std::string& a, const std::string& b,
                                           const std::string& slot, bool json);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_TOOLS_H_
