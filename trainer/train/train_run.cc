#include "trainer/train/train_run.h"

#include <csignal>
#include <cstring>
#include <memory>
#include <optional>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/run_record.h"
#include "trainer/report/environment.h"
#include "trainer/report/metrics.h"
#include "trainer/train/evaluate.h"
#include "trainer/train/signals.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

constexpr int64_t kMaxSkippedInRow = 10;
constexpr double kRedrawSeconds = 0.1;  // of the live line, at most this often

bool Due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

class Run {
 public:
  Run(const RunConfig& config, const TrainOptions& options) : config_(config), options_(options) {}

  absl::Status Open();
  absl::StatusOr<ExitCode> Loop();

 private:
  absl::Status LockCheckpoints();
  absl::Status WriteRunFolder();
  absl::Status Describe();
  absl::Status Report(StepReport report, double seconds);
  absl::Status Evaluate(int64_t step);
  absl::Status Save(bool wait);
  absl::Status Diverged(const std::string& what);
  absl::Status SaveEnded(const absl::Status& result, const std::vector<std::string>& warnings);
  absl::Status PrintSummary();
  absl::Status Say(const std::string& line) { return console_.Line(line); }
  CheckpointMeta& state() { return trainer_->state(); }

  const RunConfig& config_;
  const TrainOptions& options_;
  const Mesh mesh_;                 // a single rank
  RunLock lock_, checkpoint_lock_;  // rank 0's
  StopSignals signals_;
  Console console_;
  std::optional<MetricsLog> metrics_;
  std::unique_ptr<Dataset> train_data_, validation_;
  std::unique_ptr<Trainer> trainer_;
  std::optional<Arena> staging_;  // the copy that saver_ writes from
  AsyncSaver saver_;

  int64_t first_step_ = 0, first_tokens_ = 0;  // of this process
  int64_t saving_step_ = 0;                    // of the save under way
  double start_ = MonotonicSeconds();
  double drawn_ = 0;           // the live line
  double window_seconds_ = 0;  // since the last log line
  int64_t window_steps_ = 0;
};

absl::Status Run::Open() {
  KRAIT_RETURN_IF_ERROR(CheckDevice(config_));
  ErrorList errors;
  const auto open = [&](const std::vector<SourceSpec>& sources, std::unique_ptr<Dataset>* data) {
    auto opened = Dataset::Open(sources, config_.data.seq_len, config_.model.vocab_size,
                                config_.train.seed, config_.data.reset_at_documents);
    errors.Add(opened.status());
    if (opened.ok()) *data = std::move(*opened);
  };
  open(config_.data.train, &train_data_);
  if (!config_.data.validation.empty()) open(config_.data.validation, &validation_);
  if (train_data_ != nullptr && validation_ != nullptr) {
    const TokenFile &train = *train_data_->files().front(),
                    &held_out = *validation_->files().front();
    errors.Add(CheckSameTokenizer(held_out, train.path(), train.tokenizer()));
  }
  KRAIT_RETURN_IF_ERROR(errors.ToStatus());

  KRAIT_RETURN_IF_ERROR(MakeDirectories(config_.run_dir, ExitCode::kCannotSave));
  if (mesh_.rank == 0) {
    KRAIT_ASSIGN_OR_RETURN(lock_, RunLock::Acquire(config_.run_dir));
  }
  if (IsDirectory(config_.checkpoint.dir)) KRAIT_RETURN_IF_ERROR(LockCheckpoints());
  KRAIT_ASSIGN_OR_RETURN(console_, Console::Open(config_.run_dir + "/train.log"));
  trainer_ = std::make_unique<Trainer>(config_);
  absl::Status said;
  const Notice notice = [&](const std::string& line) { said.Update(Say(line)); };
  KRAIT_RETURN_IF_ERROR(
      StartRun(options_.resume, train_data_->Fingerprint(), trainer_.get(), notice));
  KRAIT_RETURN_IF_ERROR(said);

  int64_t bytes = 0;
  for (const CheckpointBox& box : trainer_->Boxes()) bytes += box.bytes();
  if (state().step < config_.train.steps) {
    KRAIT_RETURN_IF_ERROR(CheckCanSave(config_.checkpoint.dir, bytes));
    // Once more: the folder may be there only by now, or have been moved away with its lock.
    KRAIT_RETURN_IF_ERROR(LockCheckpoints());
  }
  state().data_fingerprint = train_data_->Fingerprint();
  state().config_yaml = config_.ToYaml();
  state().tokenizer = train_data_->files().front()->tokenizer();
  first_step_ = state().step;
  first_tokens_ = state().tokens;
  return absl::OkStatus();
}

absl::Status Run::LockCheckpoints() {
  if (mesh_.rank != 0) return absl::OkStatus();
  checkpoint_lock_ = RunLock();
  // Not the name of a run folder's lock: the two may be one folder.
  KRAIT_ASSIGN_OR_RETURN(checkpoint_lock_,
                         RunLock::Acquire(config_.checkpoint.dir, "checkpoints.lock"));
  return absl::OkStatus();
}

absl::Status Run::WriteRunFolder() {
  const std::string& dir = config_.run_dir;
  KRAIT_RETURN_IF_ERROR(
      WriteFileAtomic(dir + "/config.yaml", config_.ToYaml(), ExitCode::kCannotSave));
  KRAIT_RETURN_IF_ERROR(
      WriteFileAtomic(dir + "/command.txt", options_.command_line + "\n", ExitCode::kCannotSave));
  KRAIT_RETURN_IF_ERROR(
      WriteFileAtomic(dir + "/environment.json", EnvironmentJson(), ExitCode::kCannotSave));
  KRAIT_ASSIGN_OR_RETURN(metrics_, MetricsLog::Open(dir, state().step, config_.log.tensorboard));
  return absl::OkStatus();
}

absl::Status Run::Describe() {
  const ParamTable& table = trainer_->weights().table();
  KRAIT_RETURN_IF_ERROR(Say(absl::StrFormat(
      "%s: %s parameters (%s active), %d layers, batch %s tokens, memory %s planned",
      config_.run_dir, PrintShort(static_cast<double>(table.total())),
      PrintShort(static_cast<double>(table.active(config_.model))), config_.model.n_layers,
      PrintShort(static_cast<double>(config_.train.batch_tokens)),
      PrintBytes(trainer_->memory().total()))));
  const int64_t there = MemoryOf(trainer_->ctx().device).total;
  if (trainer_->memory().total() <= there) return absl::OkStatus();
  return Say(
      absl::StrFormat("warning: that is more than the %s of this machine", PrintBytes(there)));
}

absl::StatusOr<ExitCode> Run::Loop() {
  const int64_t steps = config_.train.steps;
  if (state().step >= steps) {
    KRAIT_RETURN_IF_ERROR(
        Say(absl::StrFormat("this run is finished: step %d of %d; to train on, raise train.steps",
                            state().step, steps)));
    KRAIT_RETURN_IF_ERROR(PrintSummary());
    return ExitCode::kOk;
  }
  KRAIT_RETURN_IF_ERROR(WriteRunFolder());
  KRAIT_RETURN_IF_ERROR(Describe());
  start_ = MonotonicSeconds();
  // This rank's rows of each pass.
  const int64_t rows = config_.train.micro_batch, pass_rows = rows * mesh_.data;
  TokenBatch batch;
  bool stop = false, save = false;
  while (state().step < steps && !(stop && !save)) {
    const double begin = MonotonicSeconds();
    KRAIT_RETURN_IF_ERROR(train_data_->ReadTraining(state().sequences + mesh_.data_index() * rows,
                                                    config_.accumulation(mesh_.data), pass_rows,
                                                    rows, &batch));
    const StepReport report = trainer_->Step(batch);
    KRAIT_RETURN_IF_ERROR(Report(report, MonotonicSeconds() - begin));
    if (report.skipped_in_row >= kMaxSkippedInRow) {
      return Diverged(
          absl::StrFormat("%d steps in a row without a finite loss and gradient (the "
                          "last is %d)",
                          report.skipped_in_row, report.step));
    }
    const bool last = state().step == steps;
    if (validation_ != nullptr && (Due(config_.evaluation.every, state().step) || last)) {
      KRAIT_RETURN_IF_ERROR(Evaluate(state().step));
    }
    if (!stop && signals_.received() != 0) {
      stop = true;
      if (report.was_skipped && !last) {
        KRAIT_RETURN_IF_ERROR(Say("the last step was skipped: stopping after one that is not"));
      }
    }
    if (const auto ended = saver_.Poll(); ended.has_value()) {
      KRAIT_RETURN_IF_ERROR(SaveEnded(*ended, saver_.warnings()));
    }
    // Skipped steps may be the end of good weights: until one is not skipped, no checkpoint of them
    // takes the place of an older one.
    save = save || Due(config_.checkpoint.every, state().step) || last || stop;
    if (save && (!report.was_skipped || last)) {
      KRAIT_RETURN_IF_ERROR(Save(/*wait=*/last || stop));
      save = false;
    }
  }
  KRAIT_RETURN_IF_ERROR(PrintSummary());
  return state().step < steps ? ExitCode::kStopped : ExitCode::kOk;
}

absl::Status Run::Report(StepReport report, double seconds) {
  window_seconds_ += seconds;
  ++window_steps_;
  const double step_seconds = window_seconds_ / static_cast<double>(window_steps_);
  report.tokens_per_s = static_cast<double>(config_.train.batch_tokens) / step_seconds;
  report.step_ms = step_seconds * 1000;
  report.eta_seconds = step_seconds * static_cast<double>(report.steps - report.step);
  const bool log = report.step == 1 || report.step == report.steps || report.was_skipped ||
                   Due(config_.log.every, report.step);
  const bool draw = MonotonicSeconds() - drawn_ >= kRedrawSeconds;
  if (!log && !draw) return absl::OkStatus();
  // Asked for lines only: it reads files, or asks the driver.
  const MemoryUse memory = MemoryOf(trainer_->ctx().device);
  report.peak_memory = memory.used;
  report.total_memory = memory.total;
  if (trainer_->peak_flops() > 0) {
    report.mfu = FlopsPerToken(config_.model, config_.data.seq_len) * report.tokens_per_s /
                 trainer_->peak_flops();
  }
  if (draw) {
    drawn_ = MonotonicSeconds();
    console_.Status(FormatLiveLine(report));
  }
  if (!log) return absl::OkStatus();
  window_seconds_ = 0;
  window_steps_ = 0;
  KRAIT_RETURN_IF_ERROR(Say(FormatLogLine(report)));
  return metrics_->Write(report.step, StepMetrics(report));
}

absl::Status Run::Evaluate(int64_t step) {
  console_.Status("evaluating ...");
  const int64_t wanted = std::max<int64_t>(1, config_.evaluation.tokens / config_.data.seq_len);
  EvalResult result;
  KRAIT_ASSIGN_OR_RETURN(result, EvaluateStored(trainer_->evaluator(), *validation_, wanted,
                                                config_.train.micro_batch));
  const std::optional<double> bpb = BitsPerByte(result.loss, state().tokenizer);
  std::string line =
      absl::StrFormat("step %5d/%d | val loss %.4f", step, config_.train.steps, result.loss);
  if (bpb.has_value()) line += absl::StrFormat(" | val bpb %.4f", *bpb);
  KRAIT_RETURN_IF_ERROR(Say(line));
  return metrics_->Write(step, {{"val/loss", result.loss},
                                {"val/bpb", bpb.value_or(std::nan(""))},
                                {"tokens", state().tokens}});
}

// The end of a run whose numbers are of no use any more.
absl::Status Run::Diverged(const std::string& what) {
  if (saver_.busy()) KRAIT_RETURN_IF_ERROR(SaveEnded(saver_.Wait(), saver_.warnings()));
  std::optional<RunRecord> record;
  KRAIT_ASSIGN_OR_RETURN(record, ReadRunRecord(config_.run_dir));
  std::string message = what + ": lower optimizer.lr, or look at the data. ";
  message += record.has_value()
                 ? absl::StrFormat("The last good step is %d, in %s; to resume there: %s",
                                   record->step, record->path, options_.continue_line)
                 : "No step was saved before";
  return Error(ExitCode::kNumerics, message);
}

// Saves the state at this step boundary; in the background unless `wait`.
absl::Status Run::Save(bool wait) {
  if (saver_.busy()) KRAIT_RETURN_IF_ERROR(SaveEnded(saver_.Wait(), saver_.warnings()));
  KRAIT_RETURN_IF_ERROR(metrics_->Sync());
  if (!trainer_->WeightsFinite()) {
    return Diverged(
        absl::StrFormat("after step %d there are weights that are not finite", state().step));
  }
  SaveOptions options;
  options.dir = config_.checkpoint.dir;
  options.keep = config_.checkpoint.keep;
  saving_step_ = state().step;
  const std::vector<CheckpointBox> boxes = trainer_->Boxes();
  const bool now = wait || !config_.checkpoint.async;
  if (now) console_.Status("saving ...");
  if (now && trainer_->ctx().device == Device::kCpu) {
    std::vector<std::string> warnings;
    const absl::Status saved = SaveCheckpoint(options, state(), boxes, &warnings);
    return SaveEnded(saved, warnings);
  }
  if (!staging_.has_value()) {
    staging_.emplace("checkpoint staging", Device::kCpu, AsyncSaver::StagingBytes(boxes));
  }
  const Tensor copy = staging_->Alloc(DType::kU8, {staging_->capacity()});
  staging_->Release(0);
  KRAIT_RETURN_IF_ERROR(
      saver_.Start(options, state(), boxes, copy.raw(), copy.bytes(), trainer_->ctx()));
  return now ? SaveEnded(saver_.Wait(), saver_.warnings()) : absl::OkStatus();
}

absl::Status Run::SaveEnded(const absl::Status& result, const std::vector<std::string>& warnings) {
  KRAIT_RETURN_IF_ERROR(result);
  for (const std::string& warning : warnings) KRAIT_RETURN_IF_ERROR(Say(warning));
  const std::string path = absl::StrFormat("%s/step-%08d", config_.checkpoint.dir, saving_step_);
  const auto saved = OpenCheckpoint(path);
  if (!saved.ok()) return Error(ExitCode::kCannotSave, MessageOf(saved.status()));
  std::optional<RunRecord> record;
  KRAIT_ASSIGN_OR_RETURN(record, ReadRunRecord(config_.run_dir));
  if (!record.has_value()) record.emplace();
  record->path = path;
  record->save_id = saved->save_id;
  record->step = saving_step_;
  KRAIT_RETURN_IF_ERROR(WriteRunRecord(config_.run_dir, *record));
  return Say("saved " + path);
}

absl::Status Run::PrintSummary() {
  console_.ClearStatus();
  const std::string checkpoint =
      absl::StrFormat("%s/step-%08d", config_.checkpoint.dir, state().step);
  Summary summary;
  summary.finished = state().step >= config_.train.steps;
  summary.step = state().step;
  summary.steps = config_.train.steps;
  summary.tokens = state().tokens;
  summary.skipped = state().skipped;
  summary.session_tokens = state().tokens - first_tokens_;
  summary.session_seconds = state().step > first_step_ ? MonotonicSeconds() - start_ : 0;
  summary.val_loss = LastRecorded(config_.run_dir, "val/loss");
  summary.val_bpb = LastRecorded(config_.run_dir, "val/bpb");
  if (Exists(checkpoint)) summary.checkpoint = checkpoint;
  if (!summary.finished) {
    summary.next_commands = {options_.continue_line};
  } else if (!summary.checkpoint.empty()) {
    summary.next_commands = {options_.program + " generate " + checkpoint + " --prompt \"...\""};
    if (validation_ != nullptr) {
      summary.next_commands.push_back(options_.program + " eval " + checkpoint + " --data " +
                                      config_.data.validation.front().path);
    }
  }
  for (const std::string& line : FormatSummary(summary)) KRAIT_RETURN_IF_ERROR(Say(line));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ExitCode> RunTraining(const RunConfig& config, const TrainOptions& options) {
  Run run(config, options);
  KRAIT_RETURN_IF_ERROR(run.Open());
  return run.Loop();
}

}  // namespace krait
