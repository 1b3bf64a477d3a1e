// `krait train`: the run folder, the loop over steps, evaluation, checkpoints and the summary.
#ifndef KRAIT_TRAINER_TRAIN_TRAIN_RUN_H_
#define KRAIT_TRAINER_TRAIN_TRAIN_RUN_H_

#include <string>

#include "kernels/base/status.h"
#include "parallel/world.h"
#include "trainer/config/config.h"
#include "trainer/train/resume.h"

namespace krait {

struct TrainOptions {
  World* world = nullptr;  // the ranks that run it; null: this process alone
  ResumeOptions resume;
  std::string program = "krait";  // as typed, for the commands named in the summary
  std::string command_line;       // as typed, for command.txt
  std::string continue_line;      // the same without --resume: what goes on from the newest save
  bool force = false;             // try what the plan says does not fit the memory
};

// Trains to the last step (kOk), or to the step at which SIGUSR1, SIGTERM, SIGHUP or SIGINT
// arrived, which is saved (kStopped). An evaluation ends early then, and the next start makes it
// up; a start that is still loading ends at once. A finished run says so and is left alone. Errors:
// kConfig, kData, kNoCheckpoint, kCannotSave, kOutOfMemory before anything is allocated for a plan
// that does not fit, and kNumerics after ten steps in a row without a finite gradient or when
// weights to be saved are not finite. After any other error between steps the last step is saved
// first. Nothing is saved while the last step was skipped, but for the last step of all.
absl::StatusOr<ExitCode> RunTraining(const RunConfig& config, const TrainOptions& options);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_TRAIN_RUN_H_
