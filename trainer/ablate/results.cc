#include "trainer/ablate/results.h"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "kernels/base/file.h"

namespace krait {
namespace {

constexpr int64_t kMaxMetricsBytes = int64_t{1} << 30;

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

// With n - 1 in the denominator; 0 for fewer than two.
double Deviation(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = Mean(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::optional<double> Number(const nlohmann::json& record, const std::string& name) {
  const auto found = record.find(name);
  if (found == record.end() || !found->is_number()) return std::nullopt;
  return found->get<double>();
}

// The layer of "moe/layer_NN/imbalance".
std::optional<int> ImbalanceLayer(const std::string& name) {
  constexpr absl::string_view kBegin = "moe/layer_", kEnd = "/imbalance";
  if (!absl::StartsWith(name, kBegin) || !absl::EndsWith(name, kEnd)) return std::nullopt;
  const std::string digits = name.substr(kBegin.size(), name.size() - kBegin.size() - kEnd.size());
  if (digits.empty() || digits.size() > 6 ||
      digits.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  return std::stoi(digits);
}

void ReadMetrics(const std::string& dir, const std::string& metric, RunResult* run) {
  const std::string path = dir + "/metrics.jsonl";
  if (!Exists(path)) return;
  const auto text = ReadFile(path, kMaxMetricsBytes, ExitCode::kCannotSave);
  if (!text.ok()) return;
  std::vector<double> speeds;
  std::map<int, std::vector<double>> imbalance;
  bool value_finite = true;
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object()) continue;
    const auto tokens = Number(record, "tokens");
    if (!tokens.has_value()) continue;
    if (const auto loss = Number(record, "train/loss"); loss.has_value()) {
      run->loss.push_back({*tokens, *loss});
    }
    if (record.contains(metric)) {
      const auto value = Number(record, metric);
      value_finite = value.has_value();
      if (value.has_value()) {
        run->metric.push_back({*tokens, *value});
        run->value = value;
      }
    }
    if (const auto speed = Number(record, "perf/tokens_per_s"); speed.has_value()) {
      speeds.push_back(*speed);
    }
    run->peak_gib = std::max(run->peak_gib, Number(record, "mem/peak_gib").value_or(0));
    for (const auto& [name, value] : record.items()) {
      const auto layer = ImbalanceLayer(name);
      if (layer.has_value() && value.is_number()) imbalance[*layer].push_back(value.get<double>());
    }
  }
  if (!value_finite) run->value.reset();
  run->tokens_per_s = Median(speeds);
  for (auto& [layer, values] : imbalance) {
    values.erase(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2));
    run->imbalance[layer] = Mean(values);
  }
}

RunResult ReadRun(const PlannedRun& planned, const std::string& metric) {
  using State = RunResult::State;
  RunResult run;
  if (!IsDirectory(planned.dir)) return run;
  const auto summary = ReadRunSummary(planned.dir);
  if (summary.has_value()) run.summary = *summary;
  ReadMetrics(planned.dir, metric, &run);
  run.state = run.summary.finished         ? State::kFinished
              : !run.summary.error.empty() ? State::kFailed
              : run.loss.empty()           ? State::kAbsent
                                           : State::kUnfinished;
  return run;
}

void Compare(const SweepPlan& plan, const SweepResults& results, const CellResult& baseline,
             CellResult* cell) {
  std::vector<double> differences;
  for (const size_t a : cell->runs) {
    for (const size_t b : baseline.runs) {
      if (plan.runs[a].seed != plan.runs[b].seed) continue;
      differences.push_back(*results.runs[a].value - *results.runs[b].value);
    }
  }
  cell->pairs = static_cast<int64_t>(differences.size());
  cell->difference = Mean(differences);
  if (cell->pairs < 2) return;
  const auto pairs = static_cast<double>(cell->pairs);
  cell->half_width = StudentQuantile(cell->pairs - 1) * Deviation(differences) / std::sqrt(pairs);
}

}  // namespace

const char* Name(RunResult::State state) {
  switch (state) {
    case RunResult::State::kFinished:
      return "finished";
    case RunResult::State::kFailed:
      return "failed";
    case RunResult::State::kUnfinished:
      return "unfinished";
    default:
      return "not started";
  }
}

double StudentQuantile(int64_t degrees) {
  // Any table of the t distribution, two-sided 95 %.
  constexpr double kTable[] = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306,
                               2.262,  2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
                               2.110,  2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
                               2.060,  2.056, 2.052, 2.048, 2.045, 2.042};
  if (degrees < 1) return 0;
  if (degrees <= static_cast<int64_t>(std::size(kTable))) return kTable[degrees - 1];
  // Cornish-Fisher from the normal quantile, right to three digits from here on.
  constexpr double kZ = 1.959964;
  const auto n = static_cast<double>(degrees);
  const double z3 = kZ * kZ * kZ, z5 = z3 * kZ * kZ;
  return kZ + (z3 + kZ) / (4 * n) + (5 * z5 + 16 * z3 + 3 * kZ) / (96 * n * n);
}

size_t SweepResults::Count(RunResult::State state) const {
  return static_cast<size_t>(std::count_if(
      runs.begin(), runs.end(), [&](const RunResult& run) { return run.state == state; }));
}

SweepResults ReadResults(const SweepPlan& plan) {
  SweepResults results;
  results.cells.resize(plan.cells.size());
  for (const PlannedRun& run : plan.runs) {
    results.runs.push_back(ReadRun(run, plan.metric));
    const RunResult& result = results.runs.back();
    if (result.state == RunResult::State::kFinished && result.value.has_value()) {
      results.cells[run.cell].runs.push_back(results.runs.size() - 1);
    }
  }
  for (CellResult& cell : results.cells) {
    std::vector<double> values, speeds, seconds, peaks;
    std::map<int, std::vector<double>> imbalance;
    for (const size_t i : cell.runs) {
      const RunResult& run = results.runs[i];
      values.push_back(*run.value);
      speeds.push_back(run.tokens_per_s);
      seconds.push_back(run.summary.seconds);
      peaks.push_back(run.peak_gib);
      for (const auto& [layer, value] : run.imbalance) imbalance[layer].push_back(value);
    }
    cell.mean = Mean(values);
    cell.spread = Deviation(values);
    cell.tokens_per_s = Mean(speeds);
    cell.seconds = Mean(seconds);
    cell.peak_gib = Mean(peaks);
    for (const auto& [layer, all] : imbalance) cell.imbalance[layer] = Mean(all);
  }
  const CellResult baseline = results.cells[plan.sweep.baseline];
  for (CellResult& cell : results.cells) Compare(plan, results, baseline, &cell);
  return results;
}

std::vector<size_t> ParetoFront(const SweepPlan& plan, const SweepResults& results,
                                const std::vector<double>& cost) {
  const double sign = plan.higher_better ? 1 : -1;
  std::vector<size_t> front;
  for (size_t i = 0; i < cost.size(); ++i) {
    if (results.cells[i].runs.empty()) continue;
    bool beaten = false;
    for (size_t j = 0; j < cost.size(); ++j) {
      if (j == i || results.cells[j].runs.empty()) continue;
      const double better = sign * (results.cells[j].mean - results.cells[i].mean);
      const double cheaper = cost[i] - cost[j];
      beaten |= better >= 0 && cheaper >= 0 && (better > 0 || cheaper > 0);
    }
    if (!beaten) front.push_back(i);
  }
  return front;
}

}  // namespace krait
