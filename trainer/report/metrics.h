// What a run reports: the log line and the live line, train.log, metrics.jsonl, TensorBoard, and
// the closing summary.
#ifndef KRAIT_TRAINER_REPORT_METRICS_H_
#define KRAIT_TRAINER_REPORT_METRICS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/report/step_report.h"
#include "trainer/report/tensorboard.h"

namespace krait {

// step   120/5000 | loss 3.2145 | lr 2.91e-04 | gnorm 0.874 | aux 2.01 | 1.24M tok/s | MFU 41.2% |
// mem 62.1/139.8 GiB | 422 ms | ETA 1h52m         (one line; "-" for what does not apply)
std::string FormatLogLine(const StepReport& report);
// The short form that is redrawn on a terminal after every step.
std::string FormatLiveLine(const StepReport& report);

std::string FormatDuration(double seconds);  // 35s, 4m10s, 1h52m, 3d04h

// Standard output and train.log. Lines go to both; the status line goes to a terminal only, is
// redrawn in place and cleared before a line.
class Console {
 public:
  // Appends to `log_path`; empty: no log file. Without `live` no status line is drawn, whatever
  // standard output is: a launcher like mpirun gives a rank a terminal that nobody sees.
  static absl::StatusOr<Console> Open(const std::string& log_path, bool live = true);

  absl::Status Line(const std::string& text);
  void Status(const std::string& text);
  void ClearStatus();

 private:
  std::optional<File> log_;
  int64_t offset_ = 0;
  bool terminal_ = false;
  bool status_shown_ = false;
};

struct Metric {
  std::string name;
  std::variant<int64_t, double> value;
};

// metrics.jsonl, one flat object per record with `step` and `time` first, non-finite values null;
// and the same values as TensorBoard scalars (without the non-finite ones).
class MetricsLog {
 public:
  // Continues a run at `step`: records of later steps, and a line that a crash cut short, move to
  // metrics.discarded.jsonl first.
  static absl::StatusOr<MetricsLog> Open(const std::string& run_dir, int64_t step,
                                         bool tensorboard);

  absl::Status Write(int64_t step, const std::vector<Metric>& metrics);
  // fsync of metrics.jsonl: records before a checkpoint are on disk before it is.
  absl::Status Sync() { return file_.Sync(); }

 private:
  File file_;
  int64_t offset_ = 0;
  std::optional<EventWriter> events_;
};

// The record of a training step.
std::vector<Metric> StepMetrics(const StepReport& report);

// One line of metrics.jsonl, newline included.
std::string FormatRecord(int64_t step, double time, const std::vector<Metric>& metrics);

// Moves the records past `step` of metrics.jsonl in `run_dir` to metrics.discarded.jsonl. Nothing
// is lost when the process dies on the way; a record may then be in both.
absl::Status DiscardMetricsAfter(const std::string& run_dir, int64_t step);

// The last value of that name in metrics.jsonl, if any; NaN for a null, which stands for a value
// that is not finite.
std::optional<double> LastRecorded(const std::string& run_dir, const std::string& name);

// Whether a record of that step has a member of that name.
bool IsRecorded(const std::string& run_dir, int64_t step, const std::string& name);

// What a finished or stopped run prints last.
struct Summary {
  bool finished = false;
  int64_t step = 0, steps = 0, tokens = 0, skipped = 0;
  int64_t session_tokens = 0;  // of this process
  double session_seconds = 0;
  std::optional<double> val_loss, val_bpb;
  std::string checkpoint;  // folder, "" when none
  std::vector<std::string> next_commands;
};
std::vector<std::string> FormatSummary(const Summary& summary);

}  // namespace krait

#endif  // KRAIT_TRAINER_REPORT_METRICS_H_
