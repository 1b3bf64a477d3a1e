// Where a run starts: at a checkpoint of its own, at a named one, from another run's weights, or
// from fresh weights.
#ifndef KRAIT_TRAINER_TRAIN_RESUME_H_
#define KRAIT_TRAINER_TRAIN_RESUME_H_

#include <string>
#include <vector>

#include "trainer/checkpoint/checkpoint.h"
#include "trainer/config/config.h"
#include "trainer/train/trainer.h"

namespace krait {

struct ResumeOptions {
  std::string resume = "auto";            // auto | never | PATH of a checkpoint
  std::string init;                       // checkpoint whose weights start the run, "" for none
  std::vector<std::string> allow_change;  // seq_len, batch_tokens, data, seed
};

// Of the two ways to begin that take long.
struct StartProgress {
  Progress loading;       // bytes
  Progress initialising;  // weights
};

// The token files of a run.
struct RunData {
  Dataset* train = nullptr;             // at its beginning
  std::vector<std::string> validation;  // content hashes, in the order of the config
};

// Brings `trainer` to its starting point: weights, moments and state, and the training data to
// where it stands. Errors: kConfig for a config or data that do not fit the checkpoint, kData for
// data of another tokenizer, kNoCheckpoint when checkpoints exist and none is whole (a run never
// starts anew beside them by itself). Of several ranks all call it with the same options; the first
// one alone looks at folders, moves them and has the notices, and an error is one that all agree
// on.
absl::Status StartRun(const ResumeOptions& options, const RunData& data, Trainer* trainer,
                      const Notice& notice, const StartProgress& progress = {},
                      World* world = nullptr);

// The differences between a checkpoint's config and the run's: one notice per change that applies;
// kConfig with all changes that are refused or need `allow_change`. A key of `free` needs no
// permission.
absl::Status CheckChanges(const RunConfig& saved, const RunConfig& now,
                          const std::vector<std::string>& free,
                          const std::vector<std::string>& allow_change, const Notice& notice);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_RESUME_H_
