// What a run folder remembers of its checkpoints, so that a start notices when they are not where
// they were: RUN_DIR/last_checkpoint.json.
#ifndef KRAIT_TRAINER_CHECKPOINT_RUN_RECORD_H_
#define KRAIT_TRAINER_CHECKPOINT_RUN_RECORD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

struct RunRecord {
  // The checkpoint that the run saved last, or that it resumed from since.
  std::string path, save_id;
  int64_t step = 0;
  // The absolute PATH of the last `--resume PATH`, and the step that it led to; "" without one.
  std::string followed;
  int64_t followed_step = 0;
  bool operator==(const RunRecord&) const = default;
};

std::string RunRecordPath(const std::string& run_dir);

// Nothing when the folder has no record. kNoCheckpoint, with the reason, for one that cannot be
// read: a run must not start as if it had none.
absl::StatusOr<std::optional<RunRecord>> ReadRunRecord(const std::string& run_dir);
absl::Status WriteRunRecord(const std::string& run_dir, const RunRecord& record);

// kNoCheckpoint, with what to do, unless the recorded checkpoint is among `folders`, the ones of
// `dir`, newest first: otherwise a run would start anew or go back without a word. A damaged folder
// of its name counts as it.
absl::Status CheckRecorded(const RunRecord& record, const std::string& dir,
                           const std::vector<std::string>& folders);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_RUN_RECORD_H_
