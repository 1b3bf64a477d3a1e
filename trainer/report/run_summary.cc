#include "trainer/report/run_summary.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "kernels/base/file.h"

namespace krait {
namespace {

constexpr int64_t kMaxSummaryBytes = 1 << 20;
constexpr int64_t kMaxMetricsBytes = int64_t{4} << 30;
constexpr char kFile[] = "/summary.json";

// dump() makes null of what is not finite.
nlohmann::ordered_json Json(std::optional<double> value) {
  return value.has_value() ? nlohmann::ordered_json(*value) : nlohmann::ordered_json("none");
}

std::optional<double> FromJson(const nlohmann::json& json, const char* name) {
  const nlohmann::json value = json.value(name, nlohmann::json("none"));
  if (value.is_null()) return std::nan("");
  if (!value.is_number()) return std::nullopt;
  return value.get<double>();
}

}  // namespace

absl::Status WriteRunSummary(const std::string& run_dir, const RunSummary& s) {
  const nlohmann::ordered_json json = {{"finished", s.finished},
                                       {"exit_code", s.exit_code},
                                       {"error", s.error},
                                       {"step", s.step},
                                       {"steps", s.steps},
                                       {"tokens", s.tokens},
                                       {"params_total", s.params_total},
                                       {"params_active", s.params_active},
                                       {"flops_per_token", s.flops_per_token},
                                       {"seconds", s.seconds},
                                       {"train_loss", Json(s.train_loss)},
                                       {"val_loss", Json(s.val_loss)},
                                       {"val_accuracy", Json(s.val_accuracy)}};
  // A message may name a path, which need not be UTF-8.
  const std::string text =
      json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  return WriteFileAtomic(run_dir + kFile, text, ExitCode::kCannotSave);
}

std::optional<RunSummary> ReadRunSummary(const std::string& run_dir) {
  if (!Exists(run_dir + kFile)) return std::nullopt;
  const auto text = ReadFile(run_dir + kFile, kMaxSummaryBytes, ExitCode::kCannotSave);
  if (!text.ok()) return std::nullopt;
  const auto json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return std::nullopt;
  RunSummary s;
  try {
    s.finished = json.value("finished", false);
    s.exit_code = json.value("exit_code", 0);
    s.error = json.value("error", "");
    s.step = json.value("step", int64_t{0});
    s.steps = json.value("steps", int64_t{0});
    s.tokens = json.value("tokens", int64_t{0});
    s.params_total = json.value("params_total", int64_t{0});
    s.params_active = json.value("params_active", int64_t{0});
    s.flops_per_token = json.value("flops_per_token", 0.0);
    s.seconds = json.value("seconds", 0.0);
    s.train_loss = FromJson(json, "train_loss");
    s.val_loss = FromJson(json, "val_loss");
    s.val_accuracy = FromJson(json, "val_accuracy");
  } catch (const nlohmann::json::exception&) {  // a member of another type
    return std::nullopt;
  }
  return s;
}

double TrainingSeconds(const std::string& run_dir) {
  const auto content =
      ReadFile(run_dir + "/metrics.jsonl", kMaxMetricsBytes, ExitCode::kCannotSave);
  if (!content.ok()) return 0;
  double seconds = 0, before = 0;
  std::istringstream lines(*content);
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object() || !record.contains("perf/step_ms") || !record.contains("step")) {
      continue;
    }
    const auto &ms = record["perf/step_ms"], &step = record["step"];
    if (!ms.is_number() || !step.is_number()) continue;
    seconds += ms.get<double>() / 1000 * std::max(0.0, step.get<double>() - before);
    before = step.get<double>();
  }
  return seconds;
}

}  // namespace krait
