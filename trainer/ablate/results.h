// What the runs of a sweep came to, read from their folders, and how cells compare.
#ifndef KRAIT_TRAINER_ABLATE_RESULTS_H_
#define KRAIT_TRAINER_ABLATE_RESULTS_H_

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "trainer/ablate/sweep_plan.h"
#include "trainer/report/run_summary.h"

namespace krait {

struct CurvePoint {
  double tokens = 0, value = 0;
};

struct RunResult {
  enum class State : uint8_t { kAbsent, kUnfinished, kFailed, kFinished } state = State::kAbsent;
  RunSummary summary;
  std::vector<CurvePoint> loss;    // train/loss
  std::vector<CurvePoint> metric;  // the sweep's
  std::optional<double> value;     // the metric's last; only a finite one
  double tokens_per_s = 0;         // median over the records
  double peak_gib = 0;
  std::map<int, double> imbalance;  // by layer: most rows of an expert over the mean; mean of the
                                    // last half of the records
};
const char* Name(RunResult::State state);

// Of the finished runs of a cell.
struct CellResult {
  std::vector<size_t> runs;     // indices of those that have a value
  double mean = 0, spread = 0;  // spread: standard deviation over seeds, 0 for one
  double tokens_per_s = 0, seconds = 0, peak_gib = 0;  // means
  std::map<int, double> imbalance;                     // means

  // The metric less the baseline's of the same seeds, of those that both have.
  int64_t pairs = 0;
  double difference = 0;
  double half_width = 0;  // of its 95 % interval, by Student's t; 0 for fewer than two pairs
  bool significant() const { return pairs > 1 && std::abs(difference) > half_width; }
};

struct SweepResults {
  std::vector<RunResult> runs;    // as SweepPlan::runs
  std::vector<CellResult> cells;  // as SweepPlan::cells
  size_t Count(RunResult::State state) const;
};

SweepResults ReadResults(const SweepPlan& plan);

// The 97.5 % quantile of Student's t, to three digits.
double StudentQuantile(int64_t degrees);

// Indices of the cells with results that no other one beats in both: a better metric and less of
// `cost`.
std::vector<size_t> ParetoFront(const SweepPlan& plan, const SweepResults& results,
                                const std::vector<double>& cost);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_RESULTS_H_
