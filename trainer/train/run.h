// A training run from its folder to its summary: what train_run.cc (its beginning), run_steps.cc
// and run_save.cc share. RunTraining (train_run.h) is what others call.
#ifndef KRAIT_TRAINER_TRAIN_RUN_H_
#define KRAIT_TRAINER_TRAIN_RUN_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/arena.h"
#include "kernels/base/clock.h"
#include "kernels/base/progress.h"
#include "kernels/base/stop_signals.h"
#include "kernels/cuda/runtime.h"
#include "parallel/mesh.h"
#include "parallel/world.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_ranks.h"
#include "trainer/report/metrics.h"
#include "trainer/train/train_run.h"
#include "trainer/train/trainer.h"

namespace krait {

// On several ranks every rank has one and goes the same way through it: what one rank finds, and
// what the first rank alone does (the run folder, the log, what is printed), is agreed upon where
// it happens, so that all errors here are those of all ranks.
class Run {
 public:
  Run(const RunConfig& config, const TrainOptions& options)
      : config_(config),
        options_(options),
        world_(OrAlone(options.world)),
        mesh_(MeshOf(config.parallel, world_->size(), world_->rank())),
        signals_("stopping after this step; once more to end at once", LaunchOfThisProcess().mpi),
        saver_(world_) {}

  absl::Status Open();
  // After an Open that failed: a run folder that it made goes again.
  void RemoveEmptyFolder();
  absl::StatusOr<ExitCode> Loop();
  // summary.json, however the run ended; nothing where the folder is not this run's. A run that
  // cannot say how it ended has ended as it has.
  void WriteSummary(const absl::StatusOr<ExitCode>& end);

 private:
  bool first() const { return world_->first(); }
  // What the first rank does alone, for all.
  template <typename Work>
  absl::Status OnFirst(const Work& work) {
    return StatusOfFirst(world_, first() ? work() : absl::OkStatus());
  }
  absl::Status CheckMemory();
  absl::Status OpenData();
  absl::Status OpenFolder();
  absl::Status TakeStaging();
  absl::Status LockCheckpoints();
  absl::Status CheckFolder() const;
  Progress ShowProgress(const std::string& what);
  absl::Status WriteRunFolder();
  std::string DataLine() const;
  absl::Status Describe();
  absl::Status Steps();
  // What the ranks tell each other before and after a step.
  struct Boundary {
    int64_t targets = 0;       // of all ranks' rows
    bool stop = false;         // some rank was asked to
    bool saver_ready = false;  // on all ranks
  };
  absl::StatusOr<Boundary> Exchange(const absl::Status& mine, int64_t targets);
  bool LogDue(const StepReport& report) const;
  absl::Status Report(StepReport report, int64_t tokens, double seconds,
                      const std::vector<Metric>& layers);
  bool EvaluationDue() const;
  absl::Status Evaluate();
  absl::Status Save(bool wait);
  absl::Status SaveState(bool wait);
  absl::Status SaveEnded(const absl::Status& result, const std::vector<std::string>& warnings);
  absl::Status RecordSave(const std::vector<std::string>& warnings);
  absl::Status SaveBeforeEnding(const absl::Status& error);
  absl::Status Diverged(const std::string& what);
  absl::Status PrintSummary();
  absl::Status Say(const std::string& line) {
    return first() ? console_.Line(line) : absl::OkStatus();
  }
  void Show(const std::string& status) {
    if (first()) console_.Status(status);
  }
  CheckpointMeta& state() const { return trainer_->state(); }
  std::string CheckpointPath(int64_t step) const {
    return absl::StrFormat("%s/step-%08d", config_.checkpoint.dir, step);
  }

  const RunConfig& config_;
  const TrainOptions& options_;
  World* const world_;
  const Mesh mesh_;
  bool made_run_folder_ = false;
  RunLock lock_, checkpoint_lock_;  // the first rank's, as the next three
  StopSignals signals_;
  Console console_;
  std::optional<MetricsLog> metrics_;
  std::unique_ptr<Dataset> train_data_, validation_;
  std::unique_ptr<Trainer> trainer_;
  std::optional<Arena> staging_;  // the copy that saver_ writes from
  std::optional<cuda::PinnedHost> pinned_staging_;
  AsyncSaver saver_;

  int64_t first_step_ = 0, first_tokens_ = 0;  // of this process
  int64_t saving_step_ = 0;                    // of the save under way, or the last one
  int64_t saved_step_ = -1;         // the last one that is in place; the first rank knows
  bool sound_ = true;               // the last step was not skipped
  bool evaluation_missed_ = false;  // of the last step: a stop request came first
  double start_ = MonotonicSeconds();
  double drawn_ = 0;           // the live line
  double window_seconds_ = 0;  // since the last log line
  int64_t window_steps_ = 0, window_tokens_ = 0;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_RUN_H_
