#include "trainer/train/resume.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "absl/strings/str_format.h"
#include "kernels/base/file.h"
#include "kernels/hardware.h"
#include "trainer/checkpoint/run_record.h"

namespace krait {
namespace {

// The word of --allow-change that a changed key asks for.
std::string AllowWord(const std::string& key) {
  const std::string last = key.substr(key.rfind('.') + 1);
  return key.starts_with("data.") && last != "seq_len" ? "data" : last;
}

absl::Status CheckAllowWords(const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    const auto covers = [&](const char* key) { return AllowsChange(word, key); };
    if (!covers("data.seq_len") && !covers("train.batch_tokens") && !covers("data.train") &&
        !covers("data.validation") && !covers("data.reset_at_documents") && !covers("train.seed")) {
      return Error(ExitCode::kConfig,
                   "--allow-change " + word + ": takes seq_len, batch_tokens, data or seed");
    }
  }
  return absl::OkStatus();
}

// A checkpoint that does not fit, with what would: `status` of LoadBoxes, other errors unchanged.
absl::Status Misfit(const absl::Status& status, const std::string& cure) {
  if (ExitCodeOf(status) != ExitCode::kConfig) return status;
  return Error(ExitCode::kConfig, MessageOf(status) + "\n" + cure);
}

// Restores everything from `checkpoint`, after its config has been compared with the run's.
absl::Status Restore(const ResumeOptions& options, const std::string& fingerprint,
                     const Checkpoint& checkpoint, Trainer* trainer, const Notice& notice,
                     const Progress& progress) {
  RunConfig saved;
  KRAIT_ASSIGN_OR_RETURN(
      saved, ParseConfig(checkpoint.meta.config_yaml, checkpoint.path + "/manifest.json: config",
                         {}, ConfigUse::kStored, 1));
  KRAIT_RETURN_IF_ERROR(CheckChanges(saved, trainer->config(), options.allow_change, notice));
  if (trainer->config().model.Has(SublayerKind::kMoe) &&
      trainer->config().model.moe.aux_sequences == 0 &&
      saved.train.micro_batch != trainer->config().train.micro_batch) {
    notice(
        absl::StrFormat("train.micro_batch: %d in the checkpoint, %d now; the router's "
                        "statistics are those of a pass, so the weights come out otherwise than "
                        "without the change (not with model.moe.aux_sequences)",
                        saved.train.micro_batch, trainer->config().train.micro_batch));
  }
  const bool data_allowed =
      std::any_of(options.allow_change.begin(), options.allow_change.end(),
                  [](const auto& word) { return AllowsChange(word, "data.train"); });
  if (checkpoint.meta.data_fingerprint != fingerprint && !data_allowed) {
    return Error(ExitCode::kConfig,
                 "data.train: the token files are not those that " + checkpoint.path +
                     " was trained on; give back the old ones, or add --allow-change data");
  }
  const std::vector<CheckpointBox> boxes = trainer->Boxes();
  KRAIT_RETURN_IF_ERROR(
      Misfit(LoadBoxes(checkpoint, boxes, trainer->ctx(), progress),
             checkpoint.path + " does not hold the weights and moments that this run goes on with; "
                               "--init starts another run_dir from weights alone"));
  trainer->Loaded();
  const std::string here = HardwareName(trainer->ctx().device);
  if (!checkpoint.meta.hardware.empty() && checkpoint.meta.hardware != here) {
    notice("the last steps ran on " + checkpoint.meta.hardware + "; this is " + here +
           ": the results are as good, but not the bits of a run that goes on there");
  }
  trainer->state() = checkpoint.meta;
  return absl::OkStatus();
}

absl::Status RestoreWeights(const Checkpoint& checkpoint, Trainer* trainer, const Notice& notice,
                            const Progress& progress) {
  const auto saved =
      ParseConfig(checkpoint.meta.config_yaml, checkpoint.path, {}, ConfigUse::kStored, 1);
  if (!saved.ok()) {
    notice(checkpoint.path + ": its config cannot be read here: " + MessageOf(saved.status()));
  } else {
    for (const ConfigDifference& change : CompareForResume(*saved, trainer->config())) {
      if (change.kind != ConfigDifference::Kind::kRefused) continue;
      notice(absl::StrFormat("%s: %s there, %s here", change.key, change.before, change.after));
    }
  }
  std::vector<CheckpointBox> boxes = trainer->Boxes();
  std::erase_if(boxes, [](const CheckpointBox& box) { return box.slot != "weight"; });
  KRAIT_RETURN_IF_ERROR(Misfit(LoadBoxes(checkpoint, boxes, trainer->ctx(), progress),
                               "--init " + checkpoint.path +
                                   " does not fit this run's model; give the run the "
                                   "model of the checkpoint, or take another one"));
  trainer->Loaded();
  return absl::OkStatus();
}

// Sets checkpoints newer than `step` aside (never deletes them): the run continues on another path
// and `auto` must not jump to theirs.
absl::Status SetNewerAside(const std::string& dir, int64_t step, const Notice& notice) {
  std::vector<std::string> folders;
  KRAIT_ASSIGN_OR_RETURN(folders, ListCheckpoints(dir));
  for (const std::string& folder : folders) {
    const auto checkpoint = OpenCheckpoint(folder);
    if (!checkpoint.ok() || checkpoint->meta.step <= step) continue;
    const std::string aside =
        dir + "/discarded-" + folder.substr(folder.rfind('/') + 1) + "." + checkpoint->save_id;
    KRAIT_RETURN_IF_ERROR(Rename(folder, aside, ExitCode::kCannotSave));
    notice(folder + " is past the resumed step: moved to " + aside);
    KRAIT_RETURN_IF_ERROR(MendLatest(dir));
  }
  return absl::OkStatus();
}

// Damaged checkpoints newer than the one that was loaded go under another name (they are never
// deleted): retention does not count them, and no later start tries them again.
absl::Status SetDamagedAside(const std::vector<PassedOver>& passed_over, const Notice& notice) {
  for (const PassedOver& damaged : passed_over) {
    const std::string stem =
        ParentFolder(damaged.path) + "/damaged-" + damaged.path.substr(damaged.path.rfind('/') + 1);
    std::string aside = stem;
    for (int n = 2; Exists(aside); ++n) aside = absl::StrFormat("%s-%d", stem, n);
    KRAIT_RETURN_IF_ERROR(Rename(damaged.path, aside, ExitCode::kCannotSave));
    notice(damaged.path + " was moved to " + aside);
    KRAIT_RETURN_IF_ERROR(MendLatest(ParentFolder(damaged.path)));
  }
  return absl::OkStatus();
}

// --resume never beside checkpoints: the old ones are kept under another name, so that neither
// keep-k nor a later --resume auto mixes the two runs.
absl::Status SetAllAside(const std::string& dir, const Notice& notice) {
  std::vector<std::string> folders;
  KRAIT_ASSIGN_OR_RETURN(folders, ListCheckpoints(dir));
  if (folders.empty()) return absl::OkStatus();
  int n = 1;
  while (Exists(absl::StrFormat("%s.before-%d", dir, n))) ++n;
  const std::string aside = absl::StrFormat("%s.before-%d", dir, n);
  KRAIT_RETURN_IF_ERROR(Rename(dir, aside, ExitCode::kCannotSave));
  notice(absl::StrFormat(
      "--resume never: the %d checkpoints of this folder were moved to %s; another run_dir "
      "(run_dir=NAME) keeps runs apart",
      folders.size(), aside));
  return absl::OkStatus();
}

// How the record names the PATH of a --resume.
std::string FollowedPath(const std::string& resume) {
  std::error_code error;
  const auto path = std::filesystem::weakly_canonical(resume, error);
  return error ? resume : path.string();
}

}  // namespace

absl::Status CheckChanges(const RunConfig& saved, const RunConfig& now,
                          const std::vector<std::string>& allow_change, const Notice& notice) {
  ErrorList errors;
  for (const ConfigDifference& change : CompareForResume(saved, now)) {
    const std::string what = absl::StrFormat("%s: %s in the checkpoint, %s now", change.key,
                                             change.before, change.after);
    const bool allowed =
        std::any_of(allow_change.begin(), allow_change.end(),
                    [&](const auto& word) { return AllowsChange(word, change.key); });
    if (change.kind == ConfigDifference::Kind::kRefused) {
      errors.Add(ExitCode::kConfig, what +
                                        "; a resumed run keeps its model: set it back, or "
                                        "start another run_dir with --init");
    } else if (change.kind == ConfigDifference::Kind::kNeedsAllow && !allowed) {
      errors.Add(ExitCode::kConfig,
                 what + "; set it back, or add --allow-change " + AllowWord(change.key));
    } else {
      notice("changed: " + what);
    }
  }
  return errors.ToStatus();
}

absl::Status StartRun(const ResumeOptions& asked, const std::string& fingerprint, Trainer* trainer,
                      const Notice& notice, const StartProgress& progress) {
  KRAIT_RETURN_IF_ERROR(CheckAllowWords(asked.allow_change));
  const std::string& dir = trainer->config().checkpoint.dir;
  const std::string& run_dir = trainer->config().run_dir;
  std::optional<RunRecord> record;
  KRAIT_ASSIGN_OR_RETURN(record, ReadRunRecord(run_dir));
  ResumeOptions options = asked;
  if (options.resume != "auto" && options.resume != "never" && record.has_value() &&
      record->followed == FollowedPath(options.resume) && record->step > record->followed_step) {
    notice(absl::StrFormat(
        "--resume %s was followed before, to step %d: this run's own checkpoints since then go "
        "first (to go back once more, remove %s)",
        options.resume, record->followed_step, RunRecordPath(run_dir)));
    options.resume = "auto";
  }
  const auto restore = [&](const Checkpoint& checkpoint) {
    return Restore(options, fingerprint, checkpoint, trainer, notice, progress.loading);
  };

  std::vector<std::string> candidates;
  if (options.resume == "never") {
    KRAIT_RETURN_IF_ERROR(SetAllAside(dir, notice));
    KRAIT_RETURN_IF_ERROR(RemoveFile(RunRecordPath(run_dir), ExitCode::kCannotSave));
  } else if (options.resume != "auto") {
    KRAIT_ASSIGN_OR_RETURN(candidates, FindCheckpoints(options.resume));
  } else {
    KRAIT_ASSIGN_OR_RETURN(candidates, ListCheckpoints(dir));
    if (record.has_value()) KRAIT_RETURN_IF_ERROR(CheckRecorded(*record, dir, candidates));
  }
  if (!candidates.empty()) {
    Checkpoint checkpoint;
    std::vector<PassedOver> passed_over;
    auto loaded = LoadNewest(candidates, restore, notice, &passed_over);
    if (!loaded.ok() && ExitCodeOf(loaded.status()) == ExitCode::kNoCheckpoint) {
      return Error(ExitCode::kNoCheckpoint,
                   MessageOf(loaded.status()) +
                       "\nnothing was started; to train anew use another run_dir, or add "
                       "--resume never");
    }
    KRAIT_ASSIGN_OR_RETURN(checkpoint, std::move(loaded));
    if (checkpoint.meta.step < trainer->config().train.steps) {
      notice(absl::StrFormat("resuming at step %d from %s", checkpoint.meta.step, checkpoint.path));
    }
    if (!options.init.empty()) notice("--init is ignored: this run has a checkpoint of its own");
    RunRecord now = record.value_or(RunRecord());
    now.path = checkpoint.path;
    now.save_id = checkpoint.save_id;
    now.step = checkpoint.meta.step;
    if (options.resume != "auto") {
      // Before the record: a start that is cut off here is told that a checkpoint is missing, and
      // does not jump back to the newer ones.
      KRAIT_RETURN_IF_ERROR(SetNewerAside(dir, checkpoint.meta.step, notice));
      now.followed = FollowedPath(options.resume);
      now.followed_step = checkpoint.meta.step;
    }
    if (now != record) KRAIT_RETURN_IF_ERROR(WriteRunRecord(run_dir, now));
    return options.resume == "auto" ? SetDamagedAside(passed_over, notice) : absl::OkStatus();
  }

  if (!options.init.empty()) {
    KRAIT_ASSIGN_OR_RETURN(candidates, FindCheckpoints(options.init));
    Checkpoint checkpoint;
    KRAIT_ASSIGN_OR_RETURN(checkpoint, LoadNewest(
                                           candidates,
                                           [&](const Checkpoint& c) {
                                             return RestoreWeights(c, trainer, notice,
                                                                   progress.loading);
                                           },
                                           notice));
    notice("starting at step 0 with the weights of " + checkpoint.path);
    return absl::OkStatus();
  }
  return trainer->Init(progress.initialising);
}

}  // namespace krait
