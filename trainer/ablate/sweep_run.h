// `krait ablate run`: every run of a sweep that is not finished yet, as child processes.
#ifndef KRAIT_TRAINER_ABLATE_SWEEP_RUN_H_
#define KRAIT_TRAINER_ABLATE_SWEEP_RUN_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "trainer/ablate/sweep_plan.h"

namespace krait {

struct SweepRunOptions {
  int64_t jobs = 0;           // runs at once; 0: one per core or GPU, as far as memory goes
  int64_t ranks = 1;          // of each run, by mpirun
  bool keep_moments = false;  // in the checkpoints of finished runs
  std::function<absl::Status(const std::string& line)> say;
};

// A place for one run at a time: its share of the machine.
struct RunSlot {
  std::vector<std::string> gpus;  // by CUDA's names for them: numbers, or "GPU-..."
  std::vector<int> cores;
};
// `jobs` places of disjoint shares: of `ranks` GPUs each, the first ones of `gpus`, which are
// jobs * ranks or more, or none, and of as many cores; where there are fewer cores than places,
// some share one.
std::vector<RunSlot> ShareOut(size_t jobs, size_t ranks, const std::vector<std::string>& gpus,
                              const std::vector<int>& cores);

// The step times that runs of OUT were measured with (equal.seconds).
StepSeconds ReadStepSeconds(const std::string& out);

// A run's folder OUT/runs/NAME has its config.yaml's text as run.yaml, its output in output.log and
// summary.json (report/run_summary.h), which says whether it is finished. A second call goes on
// with what is not; a run that failed is tried once a call. SIGUSR1, SIGTERM, SIGHUP and SIGINT
// make the runs save and stop (kStopped). Where this process is killed, they save and stop, too.
//
// Of a finished run the last checkpoint is kept, without the optimizer's moments.
//
// kOk when all are finished, kNo when some failed.
absl::StatusOr<ExitCode> RunSweep(const Sweep& sweep, const SweepRunOptions& options);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_SWEEP_RUN_H_
