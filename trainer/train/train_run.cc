#include "trainer/train/train_run.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/base/shell.h"
#include "kernels/base/stop_signals.h"
#include "kernels/hardware.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/checkpoint/checkpoint_ranks.h"
#include "trainer/checkpoint/run_record.h"
#include "trainer/report/environment.h"
#include "trainer/report/metrics.h"
#include "trainer/report/progress_line.h"
#include "trainer/train/evaluate.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

constexpr int64_t kMaxSkippedInRow = 10;
constexpr double kRedrawSeconds = 0.1;  // of the live line, at most this often
// From so many on, a line of the log says that they are being initialised.
constexpr int64_t kManyParameters = 1'000'000'000;
constexpr int64_t kMaxRecordBytes = int64_t{64} << 20;  // of command.txt and environment.json

bool Due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

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
        signals_("stopping after this step; once more to end at once", world_->size() > 1),
        saver_(world_) {}

  absl::Status Open();
  // After an Open that failed: a run folder that it made goes again.
  void RemoveEmptyFolder();
  absl::StatusOr<ExitCode> Loop();

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
  absl::Status Report(StepReport report, double seconds);
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
  AsyncSaver saver_;

  int64_t first_step_ = 0, first_tokens_ = 0;  // of this process
  int64_t saving_step_ = 0;                    // of the save under way, or the last one
  int64_t saved_step_ = -1;                    // the last one that is in place
  bool sound_ = true;                          // the last step was not skipped
  bool evaluation_missed_ = false;             // of the last step: a stop request came first
  double start_ = MonotonicSeconds();
  double drawn_ = 0;           // the live line
  double window_seconds_ = 0;  // since the last log line
  int64_t window_steps_ = 0;
};

// Before anything is allocated: a plan that does not fit is refused.
absl::Status Run::CheckMemory() {
  const MemoryPlan plan = PlanTraining(config_, mesh_);
  const bool on_cpu = plan.device == Device::kCpu;
  // Ranks of one machine share its memory.
  const int sharers = world_->local_size();
  const int64_t there = MemoryOf(plan.device).total / (on_cpu ? sharers : 1);
  const bool staging_fits = on_cpu || plan.staging <= MachineMemory() / sharers;
  if (options_.force || (plan.total() <= there && staging_fits)) return absl::OkStatus();
  const std::string owner = !on_cpu        ? "the GPU"
                            : sharers == 1 ? "this process"
                                           : absl::StrFormat("each of %d ranks", sharers);
  const std::string what =
      staging_fits ? absl::StrFormat("this run takes %s, and %s has %s", PrintBytes(plan.total()),
                                     owner, PrintBytes(there))
                   : absl::StrFormat("saving this run takes %s of the host's memory, which has %s",
                                     PrintBytes(plan.staging), PrintBytes(MachineMemory()));
  return Error(ExitCode::kOutOfMemory,
               what +
                   ": nothing was started. `krait plan` shows what takes it; a smaller "
                   "train.micro_batch or train.recompute: layer take less, and --force tries");
}

// The copy that saves in the background write from, taken now and not at the first save: a machine
// that lacks it shows before the first step.
absl::Status Run::TakeStaging() {
  if (!config_.checkpoint.async && trainer_->ctx().device == Device::kCpu) return absl::OkStatus();
  staging_.emplace("checkpoint staging", Device::kCpu, AsyncSaver::StagingBytes(trainer_->Boxes()));
  const Tensor copy = staging_->Alloc(DType::kU8, {staging_->capacity()});
  std::memset(copy.raw(), 0, static_cast<size_t>(copy.bytes()));
  staging_->Release(0);
  return absl::OkStatus();
}

// Draws on the terminal, and ends the work when a stop is requested.
Progress Run::ShowProgress(const std::string& what) {
  auto line = std::make_shared<ProgressLine>(what, [this](const std::string& text) { Show(text); });
  return [this, line, what](int64_t done, int64_t total) -> absl::Status {
    if (StopRequested()) {
      if (first()) console_.ClearStatus();
      return Error(ExitCode::kStopped, "stopped on request while " + what);
    }
    if (done == 0) line->Begin();
    line->Update(done, total);
    return absl::OkStatus();
  };
}

absl::Status Run::OpenData() {
  KRAIT_RETURN_IF_ERROR(CheckDevice(config_));
  KRAIT_RETURN_IF_ERROR(CheckMemory());
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
    errors.Add(CheckSameTokenizer(held_out, train.path(), train_data_->tokenizer()));
  }
  return errors.ToStatus();
}

absl::Status Run::OpenFolder() {
  made_run_folder_ = !Exists(config_.run_dir);
  KRAIT_RETURN_IF_ERROR(MakeDirectories(config_.run_dir, ExitCode::kCannotSave));
  KRAIT_ASSIGN_OR_RETURN(lock_, RunLock::Acquire(config_.run_dir));
  if (IsDirectory(config_.checkpoint.dir)) KRAIT_RETURN_IF_ERROR(LockCheckpoints());
  KRAIT_ASSIGN_OR_RETURN(
      console_, Console::Open(config_.run_dir + "/train.log", /*live=*/world_->size() == 1));
  return lock_.warning().empty() ? absl::OkStatus() : Say("warning: " + lock_.warning());
}

absl::Status Run::Open() {
  KRAIT_RETURN_IF_ERROR(Agree(world_, OpenData()));
  KRAIT_RETURN_IF_ERROR(OnFirst([&] { return OpenFolder(); }));
  trainer_ = std::make_unique<Trainer>(config_, world_);
  absl::Status said;
  const Notice notice = [&](const std::string& line) { said.Update(Say(line)); };
  const Progress initialising = ShowProgress("initialising");
  const StartProgress progress = {
      .loading = ShowProgress("loading"),
      .initialising = [&](int64_t done, int64_t total) -> absl::Status {
        if (done == 0 && total >= kManyParameters) {
          notice(absl::StrFormat("initialising %s parameters",
                                 PrintShort(static_cast<double>(total))));
        }
        return initialising(done, total);
      }};
  RunData data{train_data_.get(), {}};
  if (validation_ != nullptr) data.validation = validation_->Contents();
  KRAIT_RETURN_IF_ERROR(StartRun(options_.resume, data, trainer_.get(), notice, progress, world_));
  if (first()) console_.ClearStatus();
  for (const Dataset* sources : {train_data_.get(), validation_.get()}) {
    if (sources == nullptr) continue;
    for (const std::string& line : sources->Repeated()) notice("warning: " + line);
  }
  KRAIT_RETURN_IF_ERROR(StatusOfFirst(world_, said));

  int64_t own_bytes = 0, bytes = 0;
  for (const CheckpointBox& box : trainer_->Boxes()) own_bytes += box.bytes();
  for (const int64_t of_rank : world_->AllGather(own_bytes)) bytes += of_rank;
  if (state().step < trainer_->last_step()) {
    const auto lock = [&]() -> absl::Status {
      KRAIT_RETURN_IF_ERROR(CheckCanSave(config_.checkpoint.dir, bytes));
      // Once more: the folder may be there only by now, or have been moved away with its lock.
      return LockCheckpoints();
    };
    KRAIT_RETURN_IF_ERROR(OnFirst(lock));
    KRAIT_RETURN_IF_ERROR(TakeStaging());
  }
  const auto keep_tokenizer = [&]() -> absl::Status {
    for (const auto& file : train_data_->files()) {
      KRAIT_RETURN_IF_ERROR(KeepTokenizer(*file, config_.checkpoint.dir + "/tokenizer"));
    }
    return absl::OkStatus();
  };
  KRAIT_RETURN_IF_ERROR(OnFirst(keep_tokenizer));
  state().hardware = HardwareName(trainer_->ctx().device);
  state().data_fingerprint = train_data_->Fingerprint();
  state().config_yaml = config_.ToYaml();
  state().tokenizer = train_data_->tokenizer();
  state().validation = data.validation;
  first_step_ = saving_step_ = state().step;
  first_tokens_ = state().tokens;
  return absl::OkStatus();
}

void Run::RemoveEmptyFolder() {
  if (!made_run_folder_) return;
  const std::string& dir = config_.run_dir;
  // A folder with anything else in it stays, and so does what cannot be removed.
  for (const char* name : {"/train.log", "/lock"}) {
    RemoveFile(dir + name, ExitCode::kCannotSave).IgnoreError();
  }
  (void)rmdir(dir.c_str());
}

absl::Status Run::LockCheckpoints() {
  checkpoint_lock_ = RunLock();
  // Not the name of a run folder's lock: the two may be one folder.
  KRAIT_ASSIGN_OR_RETURN(checkpoint_lock_,
                         RunLock::Acquire(config_.checkpoint.dir, "checkpoints.lock"));
  return absl::OkStatus();
}

// A folder that was removed or moved while the run uses it: nothing can be written there any more,
// and a folder of that name may by now be another run's.
absl::Status Run::CheckFolder() const {
  if (!first() || lock_.Holds()) return absl::OkStatus();
  return Error(ExitCode::kCannotSave,
               config_.run_dir +
                   " was removed, moved or replaced while this run used it: the run "
                   "ends, since nothing can be written there any more");
}

absl::Status Run::WriteRunFolder() {
  const std::string& dir = config_.run_dir;
  const auto so_far = [&](const std::string& name) -> absl::StatusOr<std::string> {
    const std::string path = dir + "/" + name;
    if (!Exists(path)) return "";
    return ReadFile(path, kMaxRecordBytes, ExitCode::kCannotSave);
  };
  KRAIT_RETURN_IF_ERROR(
      WriteFileAtomic(dir + "/config.yaml", config_.ToYaml(), ExitCode::kCannotSave));
  std::string commands, environments;
  KRAIT_ASSIGN_OR_RETURN(commands, so_far("command.txt"));
  KRAIT_RETURN_IF_ERROR(WriteFileAtomic(
      dir + "/command.txt", commands + options_.command_line + "\n", ExitCode::kCannotSave));
  KRAIT_ASSIGN_OR_RETURN(environments, so_far("environment.json"));
  KRAIT_RETURN_IF_ERROR(WriteFileAtomic(dir + "/environment.json",
                                        EnvironmentJson(environments, state().step),
                                        ExitCode::kCannotSave));
  KRAIT_ASSIGN_OR_RETURN(metrics_, MetricsLog::Open(dir, state().step, config_.log.tensorboard));
  return absl::OkStatus();
}

// How much data there is, and how often the run goes through it.
std::string Run::DataLine() const {
  const auto& files = train_data_->files();
  const int64_t left = trainer_->last_step() - state().step;
  const double tokens = static_cast<double>(state().tokens) +
                        static_cast<double>(left) * static_cast<double>(config_.train.batch_tokens);
  double there_are = 0, weights = 0;
  for (const SourceSpec& source : config_.data.train) weights += source.weight;
  std::vector<double> epochs;  // of each file, by its share of the mix
  for (size_t i = 0; i < files.size(); ++i) {
    const auto size = static_cast<double>(files[i]->tokens());
    there_are += size;
    epochs.push_back(tokens * config_.data.train[i].weight / weights / size);
  }
  const auto [least, most] = std::minmax_element(epochs.begin(), epochs.end());
  const std::string times = files.size() == 1
                                ? absl::StrFormat("%.3g epochs", *least)
                                : absl::StrFormat("%.3g to %.3g epochs of a file", *least, *most);
  return absl::StrFormat("data: %s tokens in %d file%s; the run takes %s, %s",
                         PrintShort(there_are), files.size(), files.size() == 1 ? "" : "s",
                         PrintShort(tokens), times);
}

absl::Status Run::Describe() {
  const ParamTable& table = trainer_->weights().table();
  KRAIT_RETURN_IF_ERROR(Say(absl::StrFormat(
      "%s: %s parameters (%s active), %d layers, batch %s tokens, memory %s planned%s",
      config_.run_dir, PrintShort(static_cast<double>(table.total())),
      PrintShort(static_cast<double>(table.active(config_.model))), config_.model.n_layers,
      PrintShort(static_cast<double>(config_.train.batch_tokens)),
      PrintBytes(trainer_->memory().total()), world_->size() > 1 ? " per rank" : "")));
  if (world_->size() > 1) {
    KRAIT_RETURN_IF_ERROR(
        Say(absl::StrFormat("ranks: %d = data %d x tensor %d, experts over %d", world_->size(),
                            mesh_.data, mesh_.tensor, mesh_.expert)));
  }
  KRAIT_RETURN_IF_ERROR(Say(DataLine()));
  if (config_.log.tensorboard) {
    KRAIT_RETURN_IF_ERROR(Say("curves: tensorboard --logdir " + config_.run_dir + "/tensorboard"));
  }
  if (const std::string idle = WithoutEffect(config_); !idle.empty()) {
    KRAIT_RETURN_IF_ERROR(Say("note: " + idle));
  }
  if (config_.model.pad_token >= 0) {
    KRAIT_RETURN_IF_ERROR(Say(
        absl::StrFormat("model.pad_token %d: its embedding row gets no gradient from the lookup",
                        config_.model.pad_token)));
  }
  const int64_t there = MemoryOf(trainer_->ctx().device).total;
  if (trainer_->memory().total() <= there) return absl::OkStatus();
  return Say(
      absl::StrFormat("warning: that is more than the %s of this machine", PrintBytes(there)));
}

absl::StatusOr<ExitCode> Run::Loop() {
  const int64_t steps = trainer_->last_step();
  // An evaluation that a stop request cut short is made up, so that the metrics are those of a run
  // without it.
  const bool make_up =
      world_->AllGather(int64_t{first() && state().step > 0 && state().step <= steps &&
                                EvaluationDue() &&
                                !IsRecorded(config_.run_dir, state().step, "val/loss")})[0] != 0;
  if (state().step >= steps && !make_up) {
    const auto finish = [&]() -> absl::Status {
      KRAIT_RETURN_IF_ERROR(
          Say(absl::StrFormat("this run is finished: step %d of %d; to train on, raise train.%s",
                              state().step, steps, config_.train.tokens > 0 ? "tokens" : "steps")));
      return PrintSummary();
    };
    KRAIT_RETURN_IF_ERROR(OnFirst(finish));
    return ExitCode::kOk;
  }
  const auto write = [&]() -> absl::Status {
    KRAIT_RETURN_IF_ERROR(WriteRunFolder());
    return Describe();
  };
  KRAIT_RETURN_IF_ERROR(OnFirst(write));
  start_ = MonotonicSeconds();
  absl::Status status = make_up ? Evaluate() : absl::OkStatus();
  if (status.ok()) status = Steps();
  if (!status.ok()) return SaveBeforeEnding(status);
  KRAIT_RETURN_IF_ERROR(OnFirst([&] { return PrintSummary(); }));
  return state().step < steps || evaluation_missed_ ? ExitCode::kStopped : ExitCode::kOk;
}

absl::StatusOr<Run::Boundary> Run::Exchange(const absl::Status& mine, int64_t targets) {
  constexpr int64_t kFailed = 1, kStop = 2, kSaverReady = 4, kFlags = 8;
  const int64_t word = targets * kFlags + (mine.ok() ? 0 : kFailed) +
                       (StopRequested() ? kStop : 0) + (saver_.ready() ? kSaverReady : 0);
  const std::vector<int64_t> words = world_->AllGather(word);
  Boundary boundary;
  boundary.saver_ready = true;
  bool failed = false;
  for (size_t r = 0; r < words.size(); ++r) {
    failed |= (words[r] & kFailed) != 0;
    boundary.stop |= (words[r] & kStop) != 0;
    boundary.saver_ready &= (words[r] & kSaverReady) != 0;
    // Tensor ranks have the same rows.
    if (r % static_cast<size_t>(mesh_.tensor) == 0) boundary.targets += words[r] / kFlags;
  }
  if (failed) KRAIT_RETURN_IF_ERROR(Agree(world_, mine));
  return boundary;
}

// To the last step, or to that of a stop request.
absl::Status Run::Steps() {
  const int64_t steps = trainer_->last_step();
  // This rank's rows of each pass.
  const int64_t rows = config_.train.micro_batch, pass_rows = rows * mesh_.data;
  TokenBatch batch;
  Boundary boundary;
  KRAIT_ASSIGN_OR_RETURN(boundary, Exchange(absl::OkStatus(), 0));
  bool stop = boundary.stop, save = false;
  while (state().step < steps && !(stop && !save)) {
    const double begin = MonotonicSeconds();
    const absl::Status read =
        train_data_->ReadTraining(state().sequences + mesh_.data_index() * rows,
                                  config_.accumulation(mesh_.data), pass_rows, rows, &batch);
    KRAIT_ASSIGN_OR_RETURN(boundary, Exchange(read, batch.target_count));
    const StepReport report = trainer_->Step(batch, boundary.targets);
    sound_ = !report.was_skipped;
    const absl::Status reported =
        first() ? Report(report, MonotonicSeconds() - begin) : absl::OkStatus();
    if (report.skipped_in_row >= kMaxSkippedInRow) {
      return Diverged(
          absl::StrFormat("%d steps in a row without a finite loss and gradient (the "
                          "last is %d)",
                          report.skipped_in_row, report.step));
    }
    const bool last = state().step == steps;
    if (reported.ok() && EvaluationDue()) KRAIT_RETURN_IF_ERROR(Evaluate());
    KRAIT_ASSIGN_OR_RETURN(boundary, Exchange(reported, 0));
    if (!stop && boundary.stop) {
      stop = true;
      if (report.was_skipped && !last) {
        KRAIT_RETURN_IF_ERROR(OnFirst(
            [&] { return Say("the last step was skipped: stopping after one that is not"); }));
      }
    }
    if (boundary.saver_ready) {
      const auto ended = saver_.Advance();
      if (ended.has_value()) KRAIT_RETURN_IF_ERROR(SaveEnded(*ended, saver_.warnings()));
    }
    // Skipped steps may be the end of good weights: until one is not skipped, no checkpoint of them
    // takes the place of an older one.
    save = save || Due(config_.checkpoint.every, state().step) || last || stop;
    if (save && (!report.was_skipped || last)) {
      KRAIT_RETURN_IF_ERROR(Save(/*wait=*/last || stop));
      save = false;
    }
  }
  return absl::OkStatus();
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
    Show(FormatLiveLine(report));
  }
  if (!log) return absl::OkStatus();
  KRAIT_RETURN_IF_ERROR(CheckFolder());
  window_seconds_ = 0;
  window_steps_ = 0;
  KRAIT_RETURN_IF_ERROR(Say(FormatLogLine(report)));
  return metrics_->Write(report.step, StepMetrics(report));
}

bool Run::EvaluationDue() const {
  return validation_ != nullptr &&
         (Due(config_.evaluation.every, state().step) || state().step == trainer_->last_step());
}

// Every validation source, and all of them by tokens. Ends without a result on a stop request.
absl::Status Run::Evaluate() {
  KRAIT_RETURN_IF_ERROR(OnFirst([&] { return CheckFolder(); }));
  const std::vector<EvalShare> shares =
      EvalShares(*validation_, config_.data.validation, config_.evaluation.tokens);
  int64_t before = 0, total = 0;
  for (const EvalShare& share : shares) total += share.count;
  const Progress show = ShowProgress("evaluating");
  std::vector<Metric> metrics;
  std::vector<std::string> lines;
  // NaN, and nothing in the line, where a file says nothing about bytes.
  const auto add = [&](const std::string& name, const std::string& said, double loss,
                       std::optional<double> tokens_per_byte) {
    const std::optional<double> bpb = BitsPerByte(loss, tokens_per_byte);
    metrics.push_back({name + "/loss", loss});
    metrics.push_back({name + "/bpb", bpb.value_or(std::nan(""))});
    lines.push_back(absl::StrFormat("step %5d/%d | %s loss %.4f", state().step,
                                    trainer_->last_step(), said, loss));
    if (bpb.has_value()) lines.back() += absl::StrFormat(" | %s bpb %.4f", said, *bpb);
  };
  double sum = 0, bytes = 0;
  int64_t targets = 0;
  for (const EvalShare& share : shares) {
    const auto result = EvaluateStored(
        trainer_->evaluator(), *validation_, share.first, share.count, config_.train.micro_batch,
        [&](int64_t done, int64_t /*total*/) { return show(before + done, total); });
    if (ExitCodeOf(result.status()) == ExitCode::kStopped) {
      evaluation_missed_ = true;
      return absl::OkStatus();
    }
    KRAIT_RETURN_IF_ERROR(result.status());
    before += share.count;
    if (shares.size() > 1) {
      add("val/" + share.name, "val " + share.name, result->loss, share.tokens_per_byte);
    }
    if (result->targets == 0) continue;
    sum += result->loss * static_cast<double>(result->targets);
    targets += result->targets;
    bytes += static_cast<double>(result->targets) / share.tokens_per_byte.value_or(std::nan(""));
  }
  std::optional<double> tokens_per_byte;
  if (std::isfinite(bytes)) tokens_per_byte = static_cast<double>(targets) / bytes;
  add("val", "val", sum / static_cast<double>(targets), tokens_per_byte);
  metrics.push_back({"tokens", state().tokens});
  return OnFirst([&]() -> absl::Status {
    for (const std::string& line : lines) KRAIT_RETURN_IF_ERROR(Say(line));
    return metrics_->Write(state().step, metrics);
  });
}

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
  KRAIT_RETURN_IF_ERROR(OnFirst([&] { return RecordSave(warnings); }));
  saved_step_ = saving_step_;
  return absl::OkStatus();
}

absl::Status Run::RecordSave(const std::vector<std::string>& warnings) {
  for (const std::string& warning : warnings) KRAIT_RETURN_IF_ERROR(Say(warning));
  const std::string path = CheckpointPath(saving_step_);
  const auto saved = ReadManifest(path);
  if (!saved.ok()) return Error(ExitCode::kCannotSave, MessageOf(saved.status()));
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

absl::Status Run::PrintSummary() {
  console_.ClearStatus();
  const std::string checkpoint = CheckpointPath(state().step);
  Summary summary;
  summary.finished = state().step >= trainer_->last_step();
  summary.step = state().step;
  summary.steps = trainer_->last_step();
  summary.tokens = state().tokens;
  summary.skipped = state().skipped;
  summary.session_tokens = state().tokens - first_tokens_;
  summary.session_seconds = state().step > first_step_ ? MonotonicSeconds() - start_ : 0;
  summary.val_loss = LastRecorded(config_.run_dir, "val/loss");
  summary.val_bpb = LastRecorded(config_.run_dir, "val/bpb");
  if (Exists(checkpoint)) summary.checkpoint = checkpoint;
  if (!summary.finished || evaluation_missed_) {
    summary.next_commands = {options_.continue_line};
  } else if (!summary.checkpoint.empty()) {
    const std::string quoted = ShellQuoted(checkpoint);
    summary.next_commands = {options_.program + " generate " + quoted + " --prompt \"...\""};
    if (validation_ != nullptr) {
      summary.next_commands.push_back(options_.program + " eval " + quoted + " --data " +
                                      ShellQuoted(config_.data.validation.front().path));
    }
  }
  for (const std::string& line : FormatSummary(summary)) KRAIT_RETURN_IF_ERROR(Say(line));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ExitCode> RunTraining(const RunConfig& config, const TrainOptions& options) {
  Run run(config, options);
  const absl::Status opened = run.Open();
  if (!opened.ok()) run.RemoveEmptyFolder();
  if (ExitCodeOf(opened) == ExitCode::kStopped && !IsAgreed(opened)) {
    return Error(ExitCode::kStopped,
                 MessageOf(opened) + ": no step was made; to go on: " + options.continue_line);
  }
  KRAIT_RETURN_IF_ERROR(opened);
  return run.Loop();
}

}  // namespace krait
