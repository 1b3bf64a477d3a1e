// The three parts of a save, of which only the first communicates: so that each rank's thread can
// write its part while the training goes on, and the first rank's thread end the save once all
// parts are there. SaveCheckpoint (checkpoint.h) and AsyncSaver are made of them.
#ifndef KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_SAVE_H_
#define KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_SAVE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

struct BegunSave {
  SaveOptions options;
  CheckpointMeta meta;
  std::string save_id;  // 32 hexadecimal digits
  int64_t needed = 0;   // bytes on disk, of all ranks
};

// Clears up, looks for space, makes the temporary folder (the first rank) and sees it (the others).
// On an error there is no folder, and nothing to end.
absl::StatusOr<BegunSave> BeginSave(const SaveOptions& options, const CheckpointMeta& meta,
                                    const std::vector<CheckpointBox>& boxes,
                                    std::vector<std::string>* warnings, World* world = nullptr);

// This rank's file, on disk when the call returns. Gives its report for EndSave: the file's entry
// in the manifest, "" where there are no boxes, or an error. From any thread; throws nothing.
std::string WriteShard(const BegunSave& save, int rank, const std::vector<CheckpointBox>& boxes,
                       const BoxSource& source = nullptr);

// For the first rank alone, from any thread: given the reports of all ranks, in their order, the
// manifest and all that SaveCheckpoint says of what follows it; or, where a report is an error, the
// end of the save. Throws nothing.
absl::Status EndSave(const BegunSave& save, const std::vector<std::string>& reports,
                     std::vector<std::string>* warnings);

}  // namespace krait

#endif  // KRAIT_TRAINER_CHECKPOINT_CHECKPOINT_SAVE_H_
