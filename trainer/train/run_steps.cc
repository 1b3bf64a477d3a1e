// The steps of a run, and what is said of them.
#include <algorithm>
#include <cmath>

#include "data/read_ahead.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/base/shell.h"
#include "parallel/watchdog.h"
#include "trainer/report/environment.h"
#include "trainer/report/run_summary.h"
#include "trainer/train/evaluate.h"
#include "trainer/train/layer_statistics.h"
#include "trainer/train/run.h"

namespace krait {
namespace {

constexpr int64_t kMaxSkippedInRow = 10;
constexpr double kRedrawSeconds = 0.1;  // of the live line, at most this often

bool Due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

}  // namespace

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
  const BatchRamp& ramp = config_.train.batch_tokens;
  std::optional<ReadAhead> reader;
  int64_t stage_end = -1;  // tokens at which the batch that `reader` reads ends
  const auto read_stage = [&] {
    const int64_t seen = state().tokens, batch = ramp.At(seen);
    stage_end = ramp.EndOf(seen);
    const int64_t left = steps - state().step;
    const bool last = seen >= ramp.stages().back().from;
    reader.reset();  // its memory first
    reader.emplace(train_data_.get(),
                   StepRows{config_.accumulation(mesh_.data, batch), pass_rows, rows},
                   state().sequences + mesh_.data_index() * rows,
                   last ? left : std::min(left, ramp.Steps(seen, stage_end)));
  };
  Boundary boundary;
  KRAIT_ASSIGN_OR_RETURN(boundary, Exchange(absl::OkStatus(), 0));
  bool stop = boundary.stop, save = false;
  while (state().step < steps && !(stop && !save)) {
    const double begin = MonotonicSeconds();
    const int64_t seen = state().tokens;
    if (seen >= stage_end) {
      const bool changes = stage_end >= 0;
      read_stage();
      if (changes) {
        KRAIT_RETURN_IF_ERROR(OnFirst([&] {
          return Say(absl::StrFormat("batch: %s tokens from step %d on",
                                     PrintShort(static_cast<double>(ramp.At(seen))),
                                     state().step + 1));
        }));
      }
    }
    const absl::StatusOr<const TokenBatch*> batch = reader->Next();
    KRAIT_ASSIGN_OR_RETURN(boundary,
                           Exchange(batch.status(), batch.ok() ? (*batch)->target_count : 0));
    const StepReport report = trainer_->Step(**batch, boundary.targets);
    const double seconds = MonotonicSeconds() - begin;
    sound_ = !report.was_skipped;
    std::vector<Metric> layers;
    if (config_.log.layer_statistics && LogDue(report)) {
      layers = LayerStatistics(trainer_.get(), **batch);
    }
    if (report.was_skipped && !report.was_spike && report.skipped_in_row == 1) {
      const std::string where = FirstNonFinite(trainer_.get(), **batch);
      KRAIT_RETURN_IF_ERROR(OnFirst([&] {
        return Say(absl::StrFormat("step %d: not finite first: %s", report.step, where));
      }));
    }
    const absl::Status reported =
        first() ? Report(report, state().tokens - seen, seconds, layers) : absl::OkStatus();
    if (report.skipped_in_row >= kMaxSkippedInRow) {
      return Diverged(absl::StrFormat(
          "%d steps in a row %s (the last is %d)", report.skipped_in_row,
          report.was_spike ? "without a loss and gradient that train.spike_guard lets pass"
                           : "without a finite loss and gradient",
          report.step));
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

bool Run::LogDue(const StepReport& report) const {
  return report.step == 1 || report.step == report.steps || report.was_skipped ||
         Due(config_.log.every, report.step);
}

absl::Status Run::Report(StepReport report, int64_t tokens, double seconds,
                         const std::vector<Metric>& layers) {
  window_seconds_ += seconds;
  window_tokens_ += tokens;
  ++window_steps_;
  report.tokens_per_s = static_cast<double>(window_tokens_) / window_seconds_;
  report.step_ms = window_seconds_ / static_cast<double>(window_steps_) * 1000;
  const int64_t end = config_.train.batch_tokens.After(report.tokens, report.steps - report.step);
  report.eta_seconds = static_cast<double>(end - report.tokens) / report.tokens_per_s;
  const bool log = LogDue(report);
  const bool draw = MonotonicSeconds() - drawn_ >= kRedrawSeconds;
  if (!log && !draw) return absl::OkStatus();
  // Asked for lines only: it reads files, or asks the driver.
  const MemoryUse memory = MemoryOf(trainer_->ctx().device);
  report.peak_memory = memory.used;
  report.total_memory = memory.total;
  if (trainer_->peak_flops() > 0) {
    report.mfu = FlopsPerToken(config_.model, config_.data.seq_len) * report.tokens_per_s /
                 (trainer_->peak_flops() * world_->size());
  }
  if (draw) {
    drawn_ = MonotonicSeconds();
    Show(FormatLiveLine(report));
  }
  if (!log) return absl::OkStatus();
  KRAIT_RETURN_IF_ERROR(CheckFolder());
  window_seconds_ = 0;
  window_steps_ = window_tokens_ = 0;
  KRAIT_RETURN_IF_ERROR(Say(FormatLogLine(report)));
  std::vector<Metric> metrics = StepMetrics(report);
  metrics.insert(metrics.end(), layers.begin(), layers.end());
  return metrics_->Write(report.step, metrics);
}

bool Run::EvaluationDue() const {
  return validation_ != nullptr &&
         (Due(config_.evaluation.every, state().step) || state().step == trainer_->last_step());
}

// Every validation source, and all of them by tokens. Ends without a result on a stop request.
absl::Status Run::Evaluate() {
  const LongPhase phase;
  KRAIT_RETURN_IF_ERROR(OnFirst([&] { return CheckFolder(); }));
  const std::vector<EvalShare> shares =
      EvalShares(*validation_, config_.data.validation, config_.evaluation.tokens);
  int64_t before = 0, total = 0;
  for (const EvalShare& share : shares) total += share.count;
  const Progress show = ShowProgress("evaluating");
  std::vector<Metric> metrics;
  std::vector<std::string> lines;
  // NaN, and nothing in the line, where a file says nothing about bytes.
  // The accuracy is said of tasks, where it is the point.
  const std::vector<SourceSpec>& sources = config_.data.validation;
  const bool task = std::any_of(sources.begin(), sources.end(),
                                [](const SourceSpec& s) { return s.synthetic.has_value(); });
  const auto add = [&](const std::string& name, const std::string& said, double loss,
                       double accuracy, std::optional<double> tokens_per_byte) {
    const std::optional<double> bpb = BitsPerByte(loss, tokens_per_byte);
    metrics.push_back({name + "/loss", loss});
    metrics.push_back({name + "/accuracy", accuracy});
    metrics.push_back({name + "/bpb", bpb.value_or(std::nan(""))});
    lines.push_back(absl::StrFormat("step %5d/%d | %s loss %.4f", state().step,
                                    trainer_->last_step(), said, loss));
    if (task) lines.back() += absl::StrFormat(" | %s acc %.4f", said, accuracy);
    if (bpb.has_value()) lines.back() += absl::StrFormat(" | %s bpb %.4f", said, *bpb);
  };
  double sum = 0, bytes = 0;
  int64_t targets = 0, correct = 0;
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
      add("val/" + share.name, "val " + share.name, result->loss, result->accuracy(),
          share.tokens_per_byte);
    }
    if (result->targets == 0) continue;
    sum += result->loss * static_cast<double>(result->targets);
    targets += result->targets;
    correct += result->correct;
    bytes += static_cast<double>(result->targets) / share.tokens_per_byte.value_or(std::nan(""));
  }
  std::optional<double> tokens_per_byte;
  if (std::isfinite(bytes)) tokens_per_byte = static_cast<double>(targets) / bytes;
  const double loss = sum / static_cast<double>(targets);
  add("val", "val", loss, AccuracyOf(loss, correct, targets), tokens_per_byte);
  metrics.push_back({"tokens", state().tokens});
  return OnFirst([&]() -> absl::Status {
    for (const std::string& line : lines) KRAIT_RETURN_IF_ERROR(Say(line));
    return metrics_->Write(state().step, metrics);
  });
}

void Run::WriteSummary(const absl::StatusOr<ExitCode>& end) {
  if (!first() || !lock_.Holds()) return;
  const std::string& dir = config_.run_dir;
  RunSummary summary;
  summary.exit_code = static_cast<int>(end.ok() ? *end : ExitCodeOf(end.status()));
  summary.error = MessageOf(end.status());
  const ParamTable table(config_.model);
  summary.params_total = table.total();
  summary.params_active = table.active(config_.model);
  summary.flops_per_token = FlopsPerToken(config_.model, config_.data.seq_len);
  summary.steps = config_.train.steps;
  if (trainer_ != nullptr) {
    summary.step = state().step;
    summary.steps = trainer_->last_step();
    summary.tokens = state().tokens;
    summary.finished = end.ok() && *end == ExitCode::kOk;
  }
  summary.seconds = TrainingSeconds(dir);
  summary.train_loss = LastRecorded(dir, "train/loss");
  summary.val_loss = LastRecorded(dir, "val/loss");
  summary.val_accuracy = LastRecorded(dir, "val/accuracy");
  WriteRunSummary(dir, summary).IgnoreError();
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
      const SourceSpec& held_out = config_.data.validation.front();
      summary.next_commands.push_back(
          options_.program + " eval " + quoted +
          (held_out.synthetic.has_value() ? " --tokens " + std::to_string(config_.evaluation.tokens)
                                          : " --data " + ShellQuoted(held_out.path)));
    }
  }
  for (const std::string& line : FormatSummary(summary)) KRAIT_RETURN_IF_ERROR(Say(line));
  return absl::OkStatus();
}

}  // namespace krait
