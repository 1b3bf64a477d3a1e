#include "trainer/report/metrics.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/clock.h"
#include "kernels/base/number.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

constexpr int64_t kMaxMetricsBytes = int64_t{1} << 34;

double ToGiB(int64_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

// Opens for appending, creating the file when it is missing.
absl::StatusOr<File> OpenAppend(const std::string& path, int64_t* offset) {
  File file;
  if (Exists(path)) {
    KRAIT_ASSIGN_OR_RETURN(file, File::OpenWrite(path, ExitCode::kCannotSave));
  } else {
    KRAIT_ASSIGN_OR_RETURN(file, File::Create(path, /*exclusive=*/true, ExitCode::kCannotSave));
  }
  KRAIT_ASSIGN_OR_RETURN(*offset, file.Size());
  return file;
}

absl::Status Append(File* file, int64_t* offset, const std::string& text) {
  KRAIT_RETURN_IF_ERROR(file->WriteAt(text.data(), text.size(), *offset));
  *offset += static_cast<int64_t>(text.size());
  return absl::OkStatus();
}

}  // namespace

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-";
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return absl::StrFormat("%ds", s);
  if (s < 3600) return absl::StrFormat("%dm%02ds", s / 60, s % 60);
  if (s < 86400) return absl::StrFormat("%dh%02dm", s / 3600, s / 60 % 60);
  return absl::StrFormat("%dd%02dh", s / 86400, s / 3600 % 24);
}

std::string FormatLogLine(const StepReport& r) {
  std::vector<std::string> fields = {
      absl::StrFormat("step %5d/%d", r.step, r.steps),
      // Without a target there is no loss, which is no fault.
      std::isnan(r.loss) && !r.was_skipped ? "loss -" : absl::StrFormat("loss %.4f", r.loss),
      absl::StrFormat("lr %.2e", r.lr), absl::StrFormat("gnorm %.3f", r.grad_norm),
      r.has_moe ? absl::StrFormat("aux %.2f", r.aux_loss) : "aux -",
      PrintShort(r.tokens_per_s) + " tok/s",
      r.mfu.has_value() ? absl::StrFormat("MFU %.1f%%", *r.mfu * 100) : "MFU -",
      absl::StrFormat("mem %.1f/%.1f GiB", ToGiB(r.peak_memory), ToGiB(r.total_memory)),
      absl::StrFormat("%.0f ms", r.step_ms), "ETA " + FormatDuration(r.eta_seconds)};
  if (r.was_skipped) {
    fields.push_back(absl::StrFormat("skipped: %s (%d in a row, %d in all)",
                                     r.was_spike ? "a spike" : "not finite", r.skipped_in_row,
                                     r.skipped));
  }
  return absl::StrJoin(fields, " | ");
}

std::string FormatLiveLine(const StepReport& r) {
  constexpr int kWidth = 20;
  const int64_t done = r.steps > 0 ? r.step * kWidth / r.steps : 0;
  std::string bar(static_cast<size_t>(std::clamp<int64_t>(done, 0, kWidth)), '=');
  bar.resize(kWidth, ' ');
  return absl::StrFormat("[%s] %d/%d | loss %.4f | %s tok/s | ETA %s", bar, r.step, r.steps, r.loss,
                         PrintShort(r.tokens_per_s), FormatDuration(r.eta_seconds));
}

absl::StatusOr<Console> Console::Open(const std::string& log_path, bool live) {
  Console console;
  console.terminal_ = live && isatty(STDOUT_FILENO) == 1;
  if (!log_path.empty()) {
    KRAIT_ASSIGN_OR_RETURN(console.log_, OpenAppend(log_path, &console.offset_));
  }
  return console;
}

absl::Status Console::Line(const std::string& text) {
  ClearStatus();
  // A closed terminal or pipe does not end a run: train.log has every line.
  std::printf("%s\n", text.c_str());
  std::fflush(stdout);
  return log_.has_value() ? Append(&*log_, &offset_, text + "\n") : absl::OkStatus();
}

void Console::Status(const std::string& text) {
  if (!terminal_) return;
  winsize size = {};
  const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
  // One column is left free: a full line would wrap and not be overwritten.
  const size_t columns = known ? size.ws_col - 1u : 79u;
  std::printf("\r\033[K%s", text.substr(0, columns).c_str());
  std::fflush(stdout);
  status_shown_ = true;
}

void Console::ClearStatus() {
  if (!status_shown_) return;
  std::printf("\r\033[K");
  std::fflush(stdout);
  status_shown_ = false;
}

std::string FormatRecord(int64_t step, double time, const std::vector<Metric>& metrics) {
  nlohmann::ordered_json record;
  record["step"] = step;
  record["time"] = time;
  for (const Metric& metric : metrics) {
    // The JSON library writes non-finite numbers as null and doubles in shortest round-trip form.
    std::visit([&](auto value) { record[metric.name] = value; }, metric.value);
  }
  return record.dump() + "\n";
}

absl::StatusOr<MetricsLog> MetricsLog::Open(const std::string& run_dir, int64_t step,
                                            bool tensorboard) {
  KRAIT_RETURN_IF_ERROR(DiscardMetricsAfter(run_dir, step));
  MetricsLog log;
  KRAIT_ASSIGN_OR_RETURN(log.file_, OpenAppend(run_dir + "/metrics.jsonl", &log.offset_));
  if (tensorboard) {
    KRAIT_ASSIGN_OR_RETURN(log.events_, EventWriter::Create(run_dir + "/tensorboard", step + 1));
  }
  return log;
}

absl::Status MetricsLog::Write(int64_t step, const std::vector<Metric>& metrics) {
  KRAIT_RETURN_IF_ERROR(Append(&file_, &offset_, FormatRecord(step, UnixSeconds(), metrics)));
  if (!events_.has_value()) return absl::OkStatus();
  std::vector<std::pair<std::string, double>> scalars;
  for (const Metric& metric : metrics) {
    const double value =
        std::visit([](auto number) { return static_cast<double>(number); }, metric.value);
    if (std::isfinite(value)) scalars.emplace_back(metric.name, value);
  }
  return events_->Scalars(step, scalars);
}

std::vector<Metric> StepMetrics(const StepReport& r) {
  const double none = std::nan("");
  std::vector<Metric> metrics = {{"train/loss", r.loss},
                                 {"train/aux_loss", r.aux_loss},
                                 {"train/total_loss", r.total_loss},
                                 {"optim/lr", r.lr},
                                 {"optim/grad_norm", r.grad_norm},
                                 {"optim/skipped", r.skipped},
                                 {"perf/tokens_per_s", r.tokens_per_s},
                                 {"perf/mfu", r.mfu.value_or(none)},
                                 {"perf/step_ms", r.step_ms},
                                 {"mem/peak_gib", ToGiB(r.peak_memory)},
                                 {"tokens", r.tokens}};
  if (r.activation_loss.has_value()) {
    metrics.push_back({"train/activation_loss", *r.activation_loss});
  }
  for (const auto& [layer, imbalance] : r.imbalance) {
    metrics.push_back({absl::StrFormat("moe/layer_%02d/imbalance", layer), imbalance});
  }
  if (r.has_moe) metrics.push_back({"moe/overflow_rounds", r.overflow_rounds});
  return metrics;
}

absl::Status DiscardMetricsAfter(const std::string& run_dir, int64_t step) {
  const std::string path = run_dir + "/metrics.jsonl";
  if (!Exists(path)) return absl::OkStatus();
  std::string content;
  KRAIT_ASSIGN_OR_RETURN(content, ReadFile(path, kMaxMetricsBytes, ExitCode::kCannotSave));
  std::string kept, discarded;
  std::istringstream lines(content);
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool keep = record.is_object() && record.contains("step") &&
                      record["step"].is_number_integer() && record["step"].get<int64_t>() <= step;
    (keep ? kept : discarded) += line + "\n";
  }
  if (discarded.empty() && kept == content) return absl::OkStatus();
  if (!discarded.empty()) {
    int64_t offset = 0;
    File file;
    KRAIT_ASSIGN_OR_RETURN(file, OpenAppend(run_dir + "/metrics.discarded.jsonl", &offset));
    KRAIT_RETURN_IF_ERROR(Append(&file, &offset, discarded));
    KRAIT_RETURN_IF_ERROR(file.Sync());
    KRAIT_RETURN_IF_ERROR(file.Close());
  }
  return WriteFileAtomic(path, kept, ExitCode::kCannotSave);
}

std::optional<double> LastRecorded(const std::string& run_dir, const std::string& name) {
  const auto content =
      ReadFile(run_dir + "/metrics.jsonl", kMaxMetricsBytes, ExitCode::kCannotSave);
  if (!content.ok()) return std::nullopt;
  std::optional<double> last;
  std::istringstream lines(*content);
  for (std::string line; std::getline(lines, line);) {
    if (line.find(name) == std::string::npos) continue;
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object() || !record.contains(name)) continue;
    if (record[name].is_number()) last = record[name].get<double>();
    if (record[name].is_null()) last = std::nan("");
  }
  return last;
}

bool IsRecorded(const std::string& run_dir, int64_t step, const std::string& name) {
  const auto content =
      ReadFile(run_dir + "/metrics.jsonl", kMaxMetricsBytes, ExitCode::kCannotSave);
  if (!content.ok()) return false;
  std::istringstream lines(*content);
  for (std::string line; std::getline(lines, line);) {
    if (line.find(name) == std::string::npos) continue;
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (record.is_object() && record.contains(name) &&
        record.value("step", nlohmann::json()) == step) {
      return true;
    }
  }
  return false;
}

std::vector<std::string> FormatSummary(const Summary& s) {
  std::vector<std::string> lines;
  lines.push_back(s.finished ? absl::StrFormat("finished: %d steps", s.step)
                             : absl::StrFormat("stopped at step %d of %d", s.step, s.steps));
  lines.back() += absl::StrFormat(", %s tokens", PrintShort(static_cast<double>(s.tokens)));
  if (s.session_seconds > 0) {
    lines.back() += absl::StrFormat(
        " | this session: %s, %s tok/s on average", FormatDuration(s.session_seconds),
        PrintShort(static_cast<double>(s.session_tokens) / s.session_seconds));
  }
  if (s.skipped > 0) lines.push_back(absl::StrFormat("skipped steps: %d", s.skipped));
  if (s.val_loss.has_value()) {
    lines.push_back(std::isfinite(*s.val_loss)
                        ? absl::StrFormat("validation loss %.4f", *s.val_loss)
                        : "validation loss: not finite");
    if (s.val_bpb.has_value() && std::isfinite(*s.val_bpb)) {
      lines.back() += absl::StrFormat(" (%.3f bits per byte)", *s.val_bpb);
    }
  }
  if (!s.checkpoint.empty()) lines.push_back("checkpoint: " + s.checkpoint);
  for (const std::string& command : s.next_commands) lines.push_back("next: " + command);
  return lines;
}

}  // namespace krait
