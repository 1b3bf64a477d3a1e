#include "trainer/ablate/report_plots.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace krait {
namespace {

using Points = std::vector<std::pair<double, double>>;

constexpr size_t kPoints = 80;  // of a curve

// Means of equal numbers of consecutive points.
Points Thinned(const std::vector<CurvePoint>& curve) {
  const size_t per = (curve.size() + kPoints - 1) / kPoints;
  Points points;
  for (size_t begin = 0; begin < curve.size(); begin += per) {
    const size_t end = std::min(curve.size(), begin + per);
    double x = 0, y = 0;
    for (size_t i = begin; i < end; ++i) {
      x += curve[i].tokens;
      y += curve[i].value;
    }
    const auto count = static_cast<double>(end - begin);
    points.push_back({x / count, y / count});
  }
  return points;
}

// Of curves of one cell, as far as they have the same x.
Points MeanOf(const std::vector<Points>& curves) {
  Points mean;
  size_t length = curves.front().size();
  for (const Points& curve : curves) length = std::min(length, curve.size());
  for (size_t i = 0; i < length; ++i) {
    double sum = 0;
    for (const Points& curve : curves) {
      if (curve[i].first != curves.front()[i].first) return mean;
      sum += curve[i].second;
    }
    mean.push_back({curves.front()[i].first, sum / static_cast<double>(curves.size())});
  }
  return mean;
}

class Plotter {
 public:
  Plotter(const SweepPlan& plan, const SweepResults& results) : plan_(plan), results_(results) {}

  std::vector<std::pair<std::string, Plot>> All() {
    Quality();
    const std::string seeds =
        plan_.sweep.seeds.size() > 1 ? "thick: mean over seeds; thin: each seed" : "";
    Plot tokens{.title = "Training loss against tokens",
                .x = "tokens",
                .y = "cross-entropy (nats/token)",
                .note = seeds};
    Curves(&RunResult::loss, /*flops=*/false, &tokens);
    Add("loss-tokens", std::move(tokens));
    Plot flops{.title = "Training loss against compute",
               .x = "FLOP, forward and backward",
               .y = "cross-entropy (nats/token)",
               .note = seeds};
    Curves(&RunResult::loss, /*flops=*/true, &flops);
    Add("loss-flops", std::move(flops));
    if (plan_.metric != "train/loss") {
      Plot metric{.title = plan_.metric + " against tokens",
                  .x = "tokens",
                  .y = MetricAxis(),
                  .note = seeds};
      Curves(&RunResult::metric, /*flops=*/false, &metric);
      Add("metric-tokens", std::move(metric));
    }
    Pareto("pareto-speed", "Quality against speed", "training speed (tokens/s)", -1,
           [](const PlannedCell&, const CellResult& cell) { return cell.tokens_per_s; });
    Pareto("pareto-cache", "Quality against cache", "cache of one sequence (bytes)", 1,
           [](const PlannedCell& planned, const CellResult&) {
             return static_cast<double>(planned.cache_bytes);
           });
    Balance();
    return std::move(plots_);
  }

 private:
  std::string MetricAxis() const {
    if (plan_.higher_better) return plan_.metric + " (share of targets)";
    return plan_.metric.ends_with("loss") ? plan_.metric + " (nats/token)" : plan_.metric;
  }
  static int ColorOf(size_t cell) { return static_cast<int>(cell); }

  void Add(const std::string& name, Plot plot) {
    if (!plot.lines.empty() || !plot.points.empty()) plots_.push_back({name, std::move(plot)});
  }

  void Quality() {
    Plot plot{.title = plan_.metric + " by cell",
              .x = MetricAxis(),
              .note = plan_.sweep.seeds.size() > 1 ? "bars: standard deviation over seeds" : "",
              .rows = true};
    for (size_t i = 0; i < plan_.cells.size(); ++i) {
      const CellResult& cell = results_.cells[i];
      if (cell.runs.empty()) continue;
      plot.points.push_back({.name = plan_.cells[i].name,
                             .color = ColorOf(i),
                             .x = cell.mean,
                             .spread = cell.spread});
    }
    Add("quality", std::move(plot));
  }

  void Curves(std::vector<CurvePoint> RunResult::*curve, bool flops, Plot* plot) const {
    for (size_t i = 0; i < plan_.cells.size(); ++i) {
      const PlannedCell& cell = plan_.cells[i];
      std::vector<Points> curves;
      for (size_t r = 0; r < plan_.runs.size(); ++r) {
        if (plan_.runs[r].cell != i || (results_.runs[r].*curve).empty()) continue;
        curves.push_back(Thinned(results_.runs[r].*curve));
        for (auto& point : curves.back()) point.first *= flops ? cell.flops_per_token : 1;
      }
      if (curves.empty()) continue;
      const Points mean = curves.size() > 1 ? MeanOf(curves) : curves.front();
      const bool several = curves.size() > 1;
      for (const Points& one : curves) {
        if (!several) break;
        plot->lines.push_back({.name = mean.empty() ? "" : cell.name,
                               .color = ColorOf(i),
                               .thin = true,
                               .points = one});
      }
      plot->lines.push_back(
          {.name = cell.name, .color = ColorOf(i), .points = mean.empty() ? curves.front() : mean});
    }
  }

  // `sign` 1: less of the x is better.
  template <typename X>
  void Pareto(const std::string& file, const std::string& title, const std::string& axis,
              double sign, const X& x) {
    Plot plot{.title = title,
              .x = axis,
              .y = MetricAxis(),
              .note = "dashed: cells that no other one beats in both",
              .x_from_zero = true};
    std::vector<double> cost;
    for (size_t i = 0; i < plan_.cells.size(); ++i) {
      cost.push_back(sign * x(plan_.cells[i], results_.cells[i]));
    }
    const std::vector<size_t> front = ParetoFront(plan_, results_, cost);
    for (size_t i = 0; i < plan_.cells.size(); ++i) {
      const CellResult& cell = results_.cells[i];
      if (cell.runs.empty()) continue;
      plot.points.push_back({.name = plan_.cells[i].name,
                             .color = ColorOf(i),
                             .x = sign * cost[i],
                             .y = cell.mean,
                             .spread = cell.spread,
                             .joined = std::find(front.begin(), front.end(), i) != front.end()});
    }
    Add(file, std::move(plot));
  }

  void Balance() {
    Plot plot{.title = "Expert balance",
              .x = "layer",
              .y = "busiest expert / mean (rows)",
              .note = "1: balanced; means over the second half of each run",
              .whole_x = true};
    for (size_t i = 0; i < plan_.cells.size(); ++i) {
      PlotLine line{.name = plan_.cells[i].name, .color = ColorOf(i), .marked = true};
      for (const auto& [layer, value] : results_.cells[i].imbalance) {
        line.points.push_back({layer, value});
      }
      if (!line.points.empty()) plot.lines.push_back(std::move(line));
    }
    Add("expert-balance", std::move(plot));
  }

  const SweepPlan& plan_;
  const SweepResults& results_;
  std::vector<std::pair<std::string, Plot>> plots_;
};

}  // namespace

std::vector<std::pair<std::string, Plot>> SweepPlots(const SweepPlan& plan,
                                                     const SweepResults& results) {
  return Plotter(plan, results).All();
}

}  // namespace krait
