// What a run saves, and how it ends when it cannot go on.
#include <utility>

#include "parallel/watchdog.h"
#include "trainer/checkpoint/run_record.h"
#include "trainer/train/run.h"

namespace krait {

// The end of a run whose numbers are of no use any more.
absl::Status Run::Diverged(const std::string& what) {
  if (saver_.busy()) KRAIT_RETURN_IF_ERROR(SaveEnded(saver_.Wait(), saver_.warnings()));
  return OnFirst([&]() -> absl::Status {
    std::optional<RunRecord> record;
    KRAIT_ASSIGN_OR_RETURN(record, ReadRunRecord(config_.run_dir));
    std::string message = what + ": lower optimizer.lr, or look at the data. ";
    message += record.has_value()
                   ? absl::StrFormat("The last good step is %d, in %s; to resume there: %s",
                                     record->step, record->path, options_.continue_line)
                   : "No step was saved before";
    return Error(ExitCode::kNumerics, message);
  });
}

// Saves the state at this step boundary, and what was reported up to it; in the background unless
// `wait`.
absl::Status Run::Save(bool wait) {
  if (saver_.busy()) KRAIT_RETURN_IF_ERROR(SaveEnded(saver_.Wait(), saver_.warnings()));
  const auto look = [&]() -> absl::Status {
    KRAIT_RETURN_IF_ERROR(CheckFolder());
    // A folder that somebody removed is made again.
    if (!checkpoint_lock_.Holds()) KRAIT_RETURN_IF_ERROR(LockCheckpoints());
    return metrics_->Sync();
  };
  KRAIT_RETURN_IF_ERROR(OnFirst(look));
  return SaveState(wait);
}

// The last step that is worth it, before the run ends with an error that has nothing to do with it:
// a disk that fails under data, evaluation or logs. Gives the error back, with what became of it.
absl::Status Run::SaveBeforeEnding(const absl::Status& error) {
  if (first()) console_.ClearStatus();
  if (saver_.busy()) SaveEnded(saver_.Wait(), saver_.warnings()).IgnoreError();
  const int64_t step = state().step;
  const bool tried = saving_step_ == step || ExitCodeOf(error) == ExitCode::kNumerics;
  const bool locked = world_->AllGather(int64_t{checkpoint_lock_.Holds()})[0] != 0;
  if (tried || !sound_ || !locked) return error;
  const absl::Status saved = SaveState(/*wait=*/true);
  const std::string what =
      saved_step_ == step
          ? absl::StrFormat("step %d was saved before the end: %s", step, CheckpointPath(step))
          : absl::StrFormat("step %d could not be saved: %s", step, MessageOf(saved));
  return StatusOfFirst(world_, Error(ExitCodeOf(error), MessageOf(error) + "\n" + what));
}

absl::Status Run::SaveState(bool wait) {
  const LongPhase phase;
  if (!trainer_->WeightsFinite()) {
    return Diverged(
        absl::StrFormat("after step %d there are weights that are not finite", state().step));
  }
  SaveOptions options;
  options.dir = config_.checkpoint.dir;
  options.keep = config_.checkpoint.keep;
  options.keep_every = config_.checkpoint.keep_every;
  saving_step_ = state().step;
  DataPosition position = train_data_->PositionAt(state().sequences);
  state().mix_start = position.mix_start;
  state().sources = std::move(position.sources);
  const std::vector<CheckpointBox> boxes = trainer_->Boxes();
  const bool now = wait || !config_.checkpoint.async;
  if (now) Show("saving ...");
  if (now && trainer_->ctx().device == Device::kCpu) {
    std::vector<std::string> warnings;
    const absl::Status saved =
        SaveCheckpoint(options, state(), boxes, &warnings, /*source=*/nullptr, world_);
    return SaveEnded(saved, warnings);
  }
  const Tensor copy = staging_->Alloc(DType::kU8, {staging_->capacity()});
  staging_->Release(0);
  KRAIT_RETURN_IF_ERROR(
      saver_.Start(options, state(), boxes, copy.raw(), copy.bytes(), trainer_->ctx()));
  return now ? SaveEnded(saver_.Wait(), saver_.warnings()) : absl::OkStatus();
}

absl::Status Run::SaveEnded(const absl::Status& result, const std::vector<std::string>& warnings) {
  if (!result.ok()) {
    KRAIT_RETURN_IF_ERROR(OnFirst([&] { return CheckFolder(); }));  // the cause, where it is one
    return result;
  }
  return OnFirst([&] { return RecordSave(warnings); });
}

absl::Status Run::RecordSave(const std::vector<std::string>& warnings) {
  for (const std::string& warning : warnings) KRAIT_RETURN_IF_ERROR(Say(warning));
  const std::string path = CheckpointPath(saving_step_);
  const auto saved = ReadManifest(path);
  if (!saved.ok()) return Error(ExitCode::kCannotSave, MessageOf(saved.status()));
  saved_step_ = saving_step_;
  KRAIT_RETURN_IF_ERROR(CheckFolder());
  std::optional<RunRecord> record;
  KRAIT_ASSIGN_OR_RETURN(record, ReadRunRecord(config_.run_dir));
  if (!record.has_value()) record.emplace();
  record->path = path;
  record->save_id = saved->save_id;
  record->step = saving_step_;
  KRAIT_RETURN_IF_ERROR(WriteRunRecord(config_.run_dir, *record));
  return Say("saved " + path);
}

}  // namespace krait
