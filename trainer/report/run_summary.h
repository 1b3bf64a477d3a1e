// RUN/summary.json: how a run stands after its last start, so that nobody has to load a checkpoint
// or read a log to learn it.
#ifndef KRAIT_TRAINER_REPORT_RUN_SUMMARY_H_
#define KRAIT_TRAINER_REPORT_RUN_SUMMARY_H_

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/base/status.h"

namespace krait {

struct RunSummary {
  bool finished = false;
  int exit_code = 0;
  std::string error;  // "" without one
  int64_t step = 0, steps = 0, tokens = 0;
  int64_t params_total = 0, params_active = 0;
  double flops_per_token = 0;
  double seconds = 0;  // in steps, of all starts (TrainingSeconds)
  // The last ones recorded; NaN: not finite.
  std::optional<double> train_loss, val_loss, val_accuracy;
};

// Replaces the file as a whole: kCannotSave.
absl::Status WriteRunSummary(const std::string& run_dir, const RunSummary& summary);
// None where there is no such file, or one that cannot be read.
std::optional<RunSummary> ReadRunSummary(const std::string& run_dir);

// The time of the steps that metrics.jsonl has, in seconds: each record's mean step time over the
// steps since the record before.
double TrainingSeconds(const std::string& run_dir);

}  // namespace krait

#endif  // KRAIT_TRAINER_REPORT_RUN_SUMMARY_H_
