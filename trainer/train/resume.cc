#include "trainer/train/resume.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <set>

#include "absl/strings/str_format.h"
#include "kernels/base/file.h"
#include "kernels/hardware.h"
#include "trainer/checkpoint/checkpoint_ranks.h"
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

// How the training data goes on from where it stood at `checkpoint`.
absl::StatusOr<Continuation> ContinueData(const Checkpoint& checkpoint, const RunConfig& saved,
                                          const Dataset& data) {
  const CheckpointMeta& meta = checkpoint.meta;
  if (!meta.sources.empty()) {
    return data.ContinueFrom({meta.sequences, meta.mix_start, meta.sources});
  }
  DataPosition position;
  KRAIT_ASSIGN_OR_RETURN(position, PositionOfFirstVersion(meta.data_fingerprint, meta.sequences,
                                                          saved.data.seq_len, saved.train.seed));
  return data.ContinueFrom(position);
}

std::vector<std::string> Sorted(std::vector<std::string> list) {
  std::sort(list.begin(), list.end());
  return list;
}

bool SamePaths(const std::vector<SourceSpec>& a, const std::vector<SourceSpec>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const SourceSpec& x, const SourceSpec& y) { return x.path == y.path; });
}

// Whether config and data may go on from `checkpoint`: all that differs, as notices or errors.
absl::Status CheckResume(const ResumeOptions& options, const RunData& data,
                         const Checkpoint& checkpoint, const RunConfig& saved,
                         const Continuation& continuation, const RunConfig& now,
                         const Notice& notice) {
  const CheckpointMeta& meta = checkpoint.meta;
  if (!meta.tokenizer.empty()) {
    KRAIT_RETURN_IF_ERROR(
        CheckSameTokenizer(*data.train->files().front(), checkpoint.path, meta.tokenizer));
  }
  const auto allowed = [&](const char* key) {
    return std::any_of(options.allow_change.begin(), options.allow_change.end(),
                       [&](const auto& word) { return AllowsChange(word, key); });
  };
  // Data is known by its content: moved, renamed or reordered files are no change. The first
  // version did not keep the contents of validation files.
  const bool knows_validation = !meta.validation.empty() || saved.data.validation.empty();
  const bool same_validation =
      knows_validation && Sorted(meta.validation) == Sorted(data.validation);
  std::vector<std::string> free, lines = continuation.lines;
  if (continuation.same_data) free.emplace_back("data.train");
  if (same_validation) free.emplace_back("data.validation");
  ErrorList errors;
  errors.Add(CheckChanges(saved, now, free, options.allow_change, notice));
  if (!continuation.same_data && !allowed("data.train")) {
    for (const std::string& line : lines) errors.Add(ExitCode::kConfig, line);
    errors.Add(ExitCode::kConfig, "data.train is not what " + checkpoint.path +
                                      " was trained on: give back the old files and weights, or "
                                      "add --allow-change data");
  }
  if (knows_validation && !same_validation &&
      SamePaths(saved.data.validation, now.data.validation)) {
    const std::string what =
        "data.validation: other tokens than in the checkpoint, so that losses do not compare with "
        "those before";
    if (!allowed("data.validation")) {
      errors.Add(ExitCode::kConfig, what + "; give back the old files, or add --allow-change data");
    }
    lines.push_back(what);
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());
  for (const std::string& line : lines) notice(line);
  return absl::OkStatus();
}

// What a checkpoint's config and data say about how the run goes on.
struct Resumed {
  RunConfig saved;
  Continuation continuation;
};

// Loads weights and moments, after the checkpoint's config and data have been compared with the
// run's. What does not fit one rank, or is damaged for it, fails on that rank alone: so nothing
// else changes before all ranks agree (GoOn).
absl::Status Restore(const ResumeOptions& options, const RunData& data,
                     const Checkpoint& checkpoint, Trainer* trainer, const Notice& notice,
                     const Progress& progress, Resumed* resumed) {
  const RunConfig& now = trainer->config();
  RunConfig& saved = resumed->saved;
  KRAIT_ASSIGN_OR_RETURN(
      saved, ParseConfig(checkpoint.meta.config_yaml, checkpoint.path + "/manifest.json: config",
                         {}, ConfigUse::kStored, 1));
  KRAIT_ASSIGN_OR_RETURN(resumed->continuation, ContinueData(checkpoint, saved, *data.train));
  KRAIT_RETURN_IF_ERROR(
      CheckResume(options, data, checkpoint, saved, resumed->continuation, now, notice));
  if (now.model.Has(SublayerKind::kMoe) && now.model.moe.aux_sequences == 0 &&
      saved.train.micro_batch != now.train.micro_batch) {
    notice(
        absl::StrFormat("train.micro_batch: %d in the checkpoint, %d now; the router's "
                        "statistics are those of a pass, so the weights come out otherwise than "
                        "without the change (not with model.moe.aux_sequences)",
                        saved.train.micro_batch, now.train.micro_batch));
  }
  return Misfit(LoadBoxes(checkpoint, trainer->Boxes(), trainer->ctx(), progress),
                checkpoint.path +
                    " does not hold the weights and moments that this run goes on "
                    "with; --init starts another run_dir from weights alone");
}

// The run stands where `checkpoint` stood, from which Restore has loaded.
void GoOn(const RunData& data, const Checkpoint& checkpoint, Resumed resumed, Trainer* trainer,
          const Notice& notice) {
  const RunConfig& now = trainer->config();
  trainer->Loaded();
  const std::string here = HardwareName(trainer->ctx().device);
  if (!checkpoint.meta.hardware.empty() && checkpoint.meta.hardware != here) {
    notice("the last steps ran on " + checkpoint.meta.hardware + "; this is " + here +
           ": the results are as good, but not the bits of a run that goes on there");
  }
  trainer->state() = checkpoint.meta;
  data.train->Seek(std::move(resumed.continuation));
  const BatchRamp& before = resumed.saved.train.batch_tokens;
  if (now.train.tokens > 0 && before != now.train.batch_tokens) {
    const int64_t left = trainer->last_step() - checkpoint.meta.step;
    notice(absl::StrFormat(
        "train.tokens: %d of %d were seen, %d steps of %s are left; the next learning rate is %.3g",
        checkpoint.meta.tokens, now.train.tokens, left, now.train.batch_tokens.Text(),
        trainer->learning_rate()));
  }
}

// Loads weights alone; as Restore, it changes nothing else.
absl::Status RestoreWeights(const RunData& data, const Checkpoint& checkpoint, Trainer* trainer,
                            const Notice& notice, const Progress& progress) {
  const std::string& tokenizer = checkpoint.meta.tokenizer;
  if (data.train != nullptr && !tokenizer.empty()) {
    const absl::Status same =
        CheckSameTokenizer(*data.train->files().front(), checkpoint.path, tokenizer);
    if (!same.ok()) notice("warning: its embeddings are of other tokens: " + MessageOf(same));
  }
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
  return Misfit(LoadBoxes(checkpoint, boxes, trainer->ctx(), progress),
                "--init " + checkpoint.path +
                    " does not fit this run's model; give the run the model of the checkpoint, or "
                    "take another one");
}

// Sets checkpoints newer than `step` aside (never deletes them): the run continues on another path
// and `auto` must not jump to theirs.
absl::Status SetNewerAside(const std::string& dir, int64_t step, const Notice& notice) {
  std::vector<std::string> folders;
  KRAIT_ASSIGN_OR_RETURN(folders, ListCheckpoints(dir));
  for (const std::string& folder : folders) {
    const auto checkpoint = ReadManifest(folder);
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
                          const std::vector<std::string>& free,
                          const std::vector<std::string>& allow_change, const Notice& notice) {
  ErrorList errors;
  for (const ConfigDifference& change : CompareForResume(saved, now)) {
    const std::string what = absl::StrFormat("%s: %s in the checkpoint, %s now", change.key,
                                             change.before, change.after);
    const bool allowed =
        std::find(free.begin(), free.end(), change.key) != free.end() ||
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

namespace {

// The checkpoints that the run may go on from, newest first; none where it starts anew. Moves those
// aside that --resume never leaves behind. `options` become those that the record asks for.
absl::StatusOr<std::vector<std::string>> Candidates(const RunConfig& config, ResumeOptions* options,
                                                    std::optional<RunRecord>* record,
                                                    const Notice& notice) {
  const std::string& dir = config.checkpoint.dir;
  KRAIT_ASSIGN_OR_RETURN(*record, ReadRunRecord(config.run_dir));
  if (options->resume != "auto" && options->resume != "never" && record->has_value() &&
      (*record)->followed == FollowedPath(options->resume) &&
      (*record)->step > (*record)->followed_step) {
    notice(absl::StrFormat(
        "--resume %s was followed before, to step %d: this run's own checkpoints since then go "
        "first (to go back once more, remove %s)",
        options->resume, (*record)->followed_step, RunRecordPath(config.run_dir)));
    options->resume = "auto";
  }
  std::vector<std::string> candidates;
  if (options->resume == "never") {
    KRAIT_RETURN_IF_ERROR(SetAllAside(dir, notice));
    KRAIT_RETURN_IF_ERROR(RemoveFile(RunRecordPath(config.run_dir), ExitCode::kCannotSave));
  } else if (options->resume != "auto") {
    KRAIT_ASSIGN_OR_RETURN(candidates, FindCheckpoints(options->resume));
  } else {
    KRAIT_ASSIGN_OR_RETURN(candidates, ListCheckpoints(dir));
    if (record->has_value()) KRAIT_RETURN_IF_ERROR(CheckRecorded(**record, dir, candidates));
  }
  return candidates;
}

// The record and the folders after `checkpoint` was loaded.
absl::Status Settle(const RunConfig& config, const ResumeOptions& options,
                    const Checkpoint& checkpoint, const std::optional<RunRecord>& record,
                    const std::vector<PassedOver>& passed_over, const Notice& notice) {
  RunRecord now = record.value_or(RunRecord());
  now.path = checkpoint.path;
  now.save_id = checkpoint.save_id;
  now.step = checkpoint.meta.step;
  if (options.resume != "auto") {
    // Before the record: a start that is cut off here is told that a checkpoint is missing, and
    // does not jump back to the newer ones.
    KRAIT_RETURN_IF_ERROR(SetNewerAside(config.checkpoint.dir, checkpoint.meta.step, notice));
    now.followed = FollowedPath(options.resume);
    now.followed_step = checkpoint.meta.step;
  }
  if (now != record) KRAIT_RETURN_IF_ERROR(WriteRunRecord(config.run_dir, now));
  return options.resume == "auto" ? SetDamagedAside(passed_over, notice) : absl::OkStatus();
}

}  // namespace

absl::Status StartRun(const ResumeOptions& asked, const RunData& data, Trainer* trainer,
                      const Notice& tell, const StartProgress& progress, World* given) {
  World* const world = OrAlone(given);
  const RunConfig& config = trainer->config();
  // The same lines come from each rank, and for each checkpoint that is tried.
  std::set<std::string> said;
  const Notice notice = [&](const std::string& line) {
    if (world->first()) tell(line);
  };
  const Notice once = [&](const std::string& line) {
    if (said.insert(line).second) notice(line);
  };
  KRAIT_RETURN_IF_ERROR(Agree(world, CheckAllowWords(asked.allow_change)));
  ResumeOptions options = asked;
  std::optional<RunRecord> record;
  absl::StatusOr<std::vector<std::string>> found;
  if (world->first()) found = Candidates(config, &options, &record, notice);
  std::vector<std::string> candidates;
  KRAIT_ASSIGN_OR_RETURN(candidates, PathsOfFirst(world, found));
  if (!candidates.empty()) {
    Checkpoint checkpoint;
    Resumed resumed;
    const auto restore = [&](const Checkpoint& c) {
      return Restore(options, data, c, trainer, once, progress.loading, &resumed);
    };
    std::vector<PassedOver> passed_over;
    auto loaded = LoadNewest(candidates, restore, notice, &passed_over, world);
    if (!loaded.ok() && ExitCodeOf(loaded.status()) == ExitCode::kNoCheckpoint) {
      return StatusOfFirst(
          world, Error(ExitCode::kNoCheckpoint,
                       MessageOf(loaded.status()) +
                           "\nnothing was started; to train anew use another run_dir, or add "
                           "--resume never"));
    }
    KRAIT_ASSIGN_OR_RETURN(checkpoint, std::move(loaded));
    GoOn(data, checkpoint, std::move(resumed), trainer, once);
    if (checkpoint.meta.step < trainer->last_step()) {
      notice(absl::StrFormat("resuming at step %d from %s", checkpoint.meta.step, checkpoint.path));
      for (const std::string& line : data.train->StandingAt(checkpoint.meta.sequences)) {
        notice(line);
      }
    }
    if (!options.init.empty()) notice("--init is ignored: this run has a checkpoint of its own");
    absl::Status settled;
    if (world->first()) {
      settled = Settle(config, options, checkpoint, record, passed_over, notice);
    }
    return StatusOfFirst(world, settled);
  }

  if (!options.init.empty()) {
    if (world->first()) found = FindCheckpoints(options.init);
    KRAIT_ASSIGN_OR_RETURN(candidates, PathsOfFirst(world, found));
    const auto restore = [&](const Checkpoint& c) {
      return RestoreWeights(data, c, trainer, notice, progress.loading);
    };
    Checkpoint checkpoint;
    KRAIT_ASSIGN_OR_RETURN(checkpoint, LoadNewest(candidates, restore, notice, nullptr, world));
    trainer->Loaded();
    // What an imported folder said beyond its weights goes with them.
    trainer->state().hf_config = checkpoint.meta.hf_config;
    trainer->state().hf_generation_config = checkpoint.meta.hf_generation_config;
    notice("starting at step 0 with the weights of " + checkpoint.path);
    return absl::OkStatus();
  }
  return Agree(world, trainer->Init(progress.initialising));
}

}  // namespace krait
