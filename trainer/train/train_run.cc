#include "trainer/train/train_run.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/hardware.h"
#include "parallel/watchdog.h"
#include "trainer/report/environment.h"
#include "trainer/report/progress_line.h"
#include "trainer/train/run.h"

namespace krait {
namespace {

// From so many on, a line of the log says that they are being initialised.
constexpr int64_t kManyParameters = 1'000'000'000;
constexpr int64_t kMaxRecordBytes = int64_t{64} << 20;  // of command.txt and environment.json

}  // namespace

// Before anything is allocated: a plan that does not fit is refused.
absl::Status Run::CheckMemory() {
  const MemoryPlan plan = PlanTraining(config_, mesh_);
  const bool on_cpu = plan.device == Device::kCpu;
  // Ranks of one machine share its memory.
  const int sharers = world_->local_size();
  const int64_t there = MemoryOf(plan.device).total / (on_cpu ? sharers : 1);
  const bool host_fits = on_cpu || plan.on_host() <= MachineMemory() / sharers;
  if (options_.force || (plan.total() <= there && host_fits)) return absl::OkStatus();
  const std::string owner = !on_cpu        ? "the GPU"
                            : sharers == 1 ? "this process"
                                           : absl::StrFormat("each of %d ranks", sharers);
  const std::string what = host_fits
                               ? absl::StrFormat("this run takes %s, and %s has %s",
                                                 PrintBytes(plan.total()), owner, PrintBytes(there))
                               : absl::StrFormat(
                                     "this run takes %s of the host's memory, which has %s, for "
                                     "what it saves and the rows of its steps",
                                     PrintBytes(plan.on_host()), PrintBytes(MachineMemory()));
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
  if (trainer_->ctx().device == Device::kCuda) pinned_staging_.emplace(copy.raw(), copy.bytes());
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
  KRAIT_ASSIGN_OR_RETURN(console_,
                         Console::Open(config_.run_dir + "/train.log",
                                       /*live=*/world_->size() == 1 && !StartedByMpirun()));
  return lock_.warning().empty() ? absl::OkStatus() : Say("warning: " + lock_.warning());
}

absl::Status Run::Open() {
  const LongPhase phase;
  KRAIT_RETURN_IF_ERROR(CheckDevice(config_, world_));
  KRAIT_RETURN_IF_ERROR(Agree(world_, OpenData()));
  KRAIT_RETURN_IF_ERROR(OnFirst([&] { return OpenFolder(); }));
  world_->SetHangTimeout(config_.train.hang_timeout, config_.run_dir);
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
  const auto tokens = static_cast<double>(config_.train.batch_tokens.After(state().tokens, left));
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
      PrintShort(static_cast<double>(config_.train.batch_tokens.At(state().tokens))),
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

absl::StatusOr<ExitCode> RunTraining(const RunConfig& config, const TrainOptions& options) {
  Run run(config, options);
  const absl::Status opened = run.Open();
  if (!opened.ok()) run.RemoveEmptyFolder();
  if (ExitCodeOf(opened) == ExitCode::kStopped && !IsAgreed(opened)) {
    return Error(ExitCode::kStopped,
                 MessageOf(opened) + ": no step was made; to go on: " + options.continue_line);
  }
  if (!opened.ok()) {
    run.WriteSummary(opened);
    return opened;
  }
  absl::StatusOr<ExitCode> end = run.Loop();
  run.WriteSummary(end);
  return end;
}

}  // namespace krait
