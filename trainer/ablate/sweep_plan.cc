#include "trainer/ablate/sweep_plan.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "kernels/base/random.h"
#include "model/params.h"
#include "trainer/report/metrics.h"
#include "trainer/tools/plan.h"

namespace krait {
namespace {

constexpr double kMostOff = 0.01;      // of what is held equal
constexpr double kGoodEnough = 0.005;  // then d_ff stays a rounder number

void Set(const std::string& key, const std::string& value, const std::string& place,
         std::vector<SweepSetting>* settings) {
  std::erase_if(*settings, [&](const SweepSetting& s) { return s.key == key; });
  settings->push_back({key, value, place});
}

// The model with other feed-forwards, experts' as many times as wide as before.
ModelSpec WithFeedForward(const RunConfig& config, int64_t d_ff) {
  ModelSpec model = config.model;
  const double ratio = static_cast<double>(model.moe.d_ff) /
                       static_cast<double>(std::max<int64_t>(1, model.mlp_d_ff));
  model.mlp_d_ff = d_ff;
  if (model.Has(SublayerKind::kMoe)) {
    model.moe.d_ff = std::max<int64_t>(1, std::llround(ratio * static_cast<double>(d_ff)));
  }
  return model;
}

double SizeOfModel(const ModelSpec& model, EqualSize kind) {
  const ParamTable table(model);
  return static_cast<double>(kind == EqualSize::kActive ? table.active(model) : table.total());
}

// The feed-forward width that comes nearest to `target` parameters.
int64_t SolveFeedForward(const RunConfig& config, EqualSize kind, double target) {
  const auto size = [&](int64_t d_ff) { return SizeOfModel(WithFeedForward(config, d_ff), kind); };
  // Parameters grow linearly with the width, but for the rounding of the experts'.
  const double base = size(1), slope = (size(1025) - base) / 1024;
  const double exact = slope > 0 ? 1 + (target - base) / slope : 1;
  if (exact > static_cast<double>(int64_t{1} << 24)) return int64_t{1} << 24;
  int64_t best = 1;
  for (int64_t grain = 128; grain >= 1; grain /= 2) {
    const auto below = static_cast<int64_t>(std::floor(exact / static_cast<double>(grain))) * grain;
    double best_off = 0;
    best = 0;
    for (const int64_t width : {below, below + grain}) {
      if (width < 1) continue;
      const double off = std::abs(size(width) / target - 1);
      if (best == 0 || off < best_off) {
        best = width;
        best_off = off;
      }
    }
    if (best_off <= kGoodEnough) break;
  }
  return best;
}

// A run's folder: letters, digits and a few signs of the cell's name.
std::string FolderName(const std::string& name) {
  std::string folder;
  for (const char c : name) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       c == '.' || c == '_';
    if (plain) {
      folder += c;
    } else if (!folder.empty() && folder.back() != '-') {
      folder += '-';
    }
    if (folder.size() == 60) break;
  }
  while (!folder.empty() && (folder.back() == '-' || folder.back() == '.')) folder.pop_back();
  if (folder.empty() || folder.front() == '.') folder = "run" + folder;
  return folder;
}

std::string Percent(double share) { return absl::StrFormat("%+.2f %%", 100 * share); }

class Planner {
 public:
  Planner(const Sweep& sweep, int64_t ranks, const StepSeconds& speeds)
      : sweep_(sweep), ranks_(ranks), speeds_(speeds) {}

  absl::StatusOr<SweepPlan> Plan() {
    plan_.sweep = sweep_;
    // The baseline first: others may be held to it.
    std::vector<std::optional<PlannedCell>> cells(sweep_.cells.size());
    std::vector<size_t> order = {sweep_.baseline};
    for (size_t i = 0; i < cells.size(); ++i) {
      if (i != sweep_.baseline) order.push_back(i);
    }
    for (const size_t i : order) {
      auto cell = PlanCell(i);
      if (cell.ok()) {
        cells[i] = *std::move(cell);
        continue;
      }
      AddErrors(sweep_.cells[i].name, cell.status());
      if (i == sweep_.baseline && HeldToBaseline()) break;
    }
    KRAIT_RETURN_IF_ERROR(errors_.ToStatus());
    for (auto& cell : cells) plan_.cells.push_back(*std::move(cell));
    // What has no effect in some cells is there for the others.
    for (const std::string& note : plan_.cells.front().config.notes) {
      if (std::all_of(plan_.cells.begin(), plan_.cells.end(), [&](const PlannedCell& cell) {
            const std::vector<std::string>& notes = cell.config.notes;
            return std::find(notes.begin(), notes.end(), note) != notes.end();
          })) {
        plan_.notes.push_back(note);
      }
    }
    NoteWidths();
    ChooseMetric();
    MakeRuns();
    KRAIT_RETURN_IF_ERROR(errors_.ToStatus());
    return std::move(plan_);
  }

 private:
  bool HeldToBaseline() const {
    return (sweep_.steps.kind != EqualSteps::kNone && !sweep_.steps.value.has_value()) ||
           (sweep_.size.kind != EqualSize::kNone && !sweep_.size.value.has_value());
  }

  // Each line once, with the first cell that has it.
  void AddErrors(const std::string& cell, const absl::Status& status) {
    std::istringstream lines(MessageOf(status));
    for (std::string line; std::getline(lines, line);) {
      if (!told_.insert(line).second) continue;
      errors_.Add(ExitCodeOf(status),
                  sweep_.cells.size() > 1 ? absl::StrCat(line, " (cell ", cell, ")") : line);
    }
  }

  absl::StatusOr<RunConfig> Load(const std::vector<SweepSetting>& settings) const {
    return LoadCell(sweep_, settings, ranks_);
  }

  absl::StatusOr<PlannedCell> PlanCell(size_t index) {
    PlannedCell cell;
    cell.name = sweep_.cells[index].name;
    std::vector<SweepSetting> settings = sweep_.cells[index].settings;
    if (sweep_.steps.kind != EqualSteps::kNone) {
      // What the base or the cell says of the length is replaced; its schedule's warm-up is checked
      // against the length that is solved for.
      for (const char* key : {"train.tokens", "train.steps"}) {
        for (const SweepSetting& setting : sweep_.cells[index].settings) {
          if (setting.key != key) continue;
          return Error(ExitCode::kConfig,
                       absl::StrCat(setting.place, ": ", key,
                                    " varies, but the sweep holds the length of runs equal (",
                                    sweep_.steps.place, "): keep one of them"));
        }
      }
      Set("train.steps", std::to_string(kAnySteps), sweep_.steps.place, &settings);
    }
    KRAIT_ASSIGN_OR_RETURN(cell.config, Load(settings));
    KRAIT_RETURN_IF_ERROR(SolveSize(&settings, &cell));
    const ParamTable table(cell.config.model);
    cell.params_total = table.total();
    cell.params_active = table.active(cell.config.model);
    cell.flops_per_token = FlopsPerToken(cell.config.model, cell.config.data.seq_len);
    cell.speed_key = SpeedKey(cell.config);
    const auto speed = speeds_.find(cell.speed_key);
    const double step_seconds = speed == speeds_.end() ? 0 : speed->second;
    KRAIT_RETURN_IF_ERROR(SolveSteps(step_seconds, &settings, &cell));
    const int64_t tokens = cell.config.train.batch_tokens.After(0, cell.config.train.steps);
    if (cell.solved) {
      cell.tokens = tokens;
      cell.flops = static_cast<double>(cell.tokens) * cell.flops_per_token;
      cell.seconds = static_cast<double>(cell.config.train.steps) * step_seconds;
    }
    if (index == sweep_.baseline) {
      baseline_size_ = SizeOfModel(cell.config.model, sweep_.size.kind);
      baseline_tokens_ = static_cast<double>(tokens);
      baseline_flops_ = cell.flops;
    }
    PlanReport report;
    KRAIT_ASSIGN_OR_RETURN(report, MakePlan(cell.config, {.ranks = std::max<int64_t>(1, ranks_),
                                                          .context = cell.config.data.seq_len}));
    const DecodeMemory& decode = report.decode.front();
    cell.cache_bytes = decode.kv_cache_bytes + decode.conv_state_bytes + decode.ssm_state_bytes;
    cell.memory_bytes = report.memory.total();
    return cell;
  }

  absl::Status SolveSize(std::vector<SweepSetting>* settings, PlannedCell* cell) {
    if (sweep_.size.kind == EqualSize::kNone) return absl::OkStatus();
    if (!sweep_.size.value.has_value() && baseline_size_ == 0) return absl::OkStatus();  // it is it
    const double target = sweep_.size.value.value_or(baseline_size_);
    const int64_t d_ff = SolveFeedForward(cell->config, sweep_.size.kind, target);
    const ModelSpec model = WithFeedForward(cell->config, d_ff);
    Set("model.mlp.d_ff", std::to_string(d_ff), sweep_.size.place, settings);
    if (model.Has(SublayerKind::kMoe)) {
      Set("model.moe.d_ff", std::to_string(model.moe.d_ff), sweep_.size.place, settings);
    }
    const double size = SizeOfModel(model, sweep_.size.kind);
    cell->size_off = size / target - 1;
    if (std::abs(cell->size_off) > kMostOff) {
      return Error(ExitCode::kConfig,
                   absl::StrFormat(
                       "%s: equal.%s asks for %s parameters, and the nearest that model.mlp.d_ff "
                       "reaches is %s (d_ff %d), %s: more than 1 %% off",
                       sweep_.size.place,
                       sweep_.size.kind == EqualSize::kActive ? "active_params" : "total_params",
                       PrintGrouped(std::llround(target)), PrintGrouped(std::llround(size)), d_ff,
                       Percent(cell->size_off)));
    }
    KRAIT_ASSIGN_OR_RETURN(cell->config, Load(*settings));
    return absl::OkStatus();
  }

  absl::Status SolveSteps(double step_seconds, std::vector<SweepSetting>* settings,
                          PlannedCell* cell) {
    if (sweep_.steps.kind == EqualSteps::kNone) return absl::OkStatus();
    if (!cell->config.train.batch_tokens.constant()) {
      return Error(ExitCode::kConfig,
                   absl::StrCat(sweep_.steps.place,
                                ": the length of runs is held equal by their "
                                "steps, which a ramp of train.batch_tokens makes of different "
                                "sizes; give one size, or train.tokens without equal"));
    }
    const auto batch = static_cast<double>(cell->config.train.batch_tokens.largest());
    const char* what = "tokens";
    double target = 0, per_step = batch;
    if (!sweep_.steps.value.has_value() && baseline_tokens_ == 0) {
      // The baseline itself: as long as its config says.
      std::erase_if(*settings, [](const SweepSetting& s) { return s.key == "train.steps"; });
      KRAIT_ASSIGN_OR_RETURN(cell->config, Load(*settings));
      return absl::OkStatus();
    }
    if (sweep_.steps.kind == EqualSteps::kTokens) {
      target = sweep_.steps.value.value_or(baseline_tokens_);
    } else if (sweep_.steps.kind == EqualSteps::kFlops) {
      what = "flops";
      target = sweep_.steps.value.value_or(baseline_flops_);
      per_step = batch * cell->flops_per_token;
    } else {
      what = "seconds";
      target = *sweep_.steps.value;
      per_step = step_seconds;
      if (per_step == 0) {
        cell->solved = false;
        return absl::OkStatus();
      }
    }
    const int64_t steps = std::max<int64_t>(1, std::llround(target / per_step));
    cell->steps_off = static_cast<double>(steps) * per_step / target - 1;
    if (std::abs(cell->steps_off) > kMostOff) {
      return Error(ExitCode::kConfig,
                   absl::StrFormat(
                       "%s: equal.%s asks for %s, and %d step%s of %s come to %s, %s: more "
                       "than 1 %% off; a smaller train.batch_tokens comes nearer",
                       sweep_.steps.place, what, PrintShort(target), steps, steps == 1 ? "" : "s",
                       PrintShort(per_step), PrintShort(static_cast<double>(steps) * per_step),
                       Percent(cell->steps_off)));
    }
    Set("train.steps", std::to_string(steps), sweep_.steps.place, settings);
    KRAIT_ASSIGN_OR_RETURN(cell->config, Load(*settings));
    return absl::OkStatus();
  }

  static std::string SpeedKey(RunConfig config) {
    config.run_dir = "x";
    config.checkpoint = {};
    config.schedule = {};
    config.train.steps = 1;
    config.train.tokens = 0;
    config.train.seed = 0;
    config.data.train.clear();
    config.data.validation.clear();
    return absl::StrFormat("%016x", HashName(config.ToYaml()));
  }

  // Widths that are compared at one learning rate without muP.
  void NoteWidths() {
    for (const PlannedCell& a : plan_.cells) {
      for (const PlannedCell& b : plan_.cells) {
        const ModelSpec &one = a.config.model, &other = b.config.model;
        if (one.d_model >= other.d_model || a.config.optimizer.lr != b.config.optimizer.lr ||
            (one.mup_base_d_model > 0 && other.mup_base_d_model > 0)) {
          continue;
        }
        plan_.notes.push_back(absl::StrFormat(
            "cells of model.d_model %d and %d share optimizer.lr %s without muP: the best rate "
            "falls with the width, so that the wider model may look worse than it is; give "
            "optimizer: {mup: {base_d_model: %d}}, or each width its own rate",
            one.d_model, other.d_model, PrintNumber(a.config.optimizer.lr), one.d_model));
        return;
      }
    }
  }

  void ChooseMetric() {
    plan_.metric = sweep_.metric;
    if (plan_.metric.empty()) {
      const std::vector<SourceSpec>& held_out = plan_.cells.front().config.data.validation;
      const bool task = std::any_of(held_out.begin(), held_out.end(), [](const SourceSpec& source) {
        return source.synthetic.has_value();
      });
      plan_.metric = held_out.empty() ? "train/loss" : task ? "val/accuracy" : "val/loss";
    }
    plan_.higher_better = plan_.metric.ends_with("accuracy");
  }

  void MakeRuns() {
    const auto base_seed = static_cast<int64_t>(plan_.cells.front().config.train.seed);
    if (plan_.sweep.seeds.empty()) plan_.sweep.seeds = {base_seed};
    for (const int64_t seed : plan_.sweep.seeds) {
      for (size_t i = 0; i < plan_.cells.size(); ++i) {
        RunConfig config = plan_.cells[i].config;
        config.train.seed = static_cast<uint64_t>(seed);
        config.run_dir = "x";
        config.checkpoint.dir = "x/checkpoints";
        const std::string hash = absl::StrFormat("%08x", HashName(config.ToYaml()) & 0xFFFFFFFF);
        PlannedRun run{.cell = i, .seed = seed};
        run.dir = absl::StrCat(sweep_.out, "/runs/", FolderName(plan_.cells[i].name), ".s", seed,
                               "-", hash);
        config.run_dir = run.dir;
        config.checkpoint.dir = run.dir + "/checkpoints";
        run.yaml = config.ToYaml();
        if (!told_.insert(run.dir).second) {
          errors_.Add(ExitCode::kConfig,
                      absl::StrCat(sweep_.path, ": two cells are the same run (",
                                   plan_.cells[i].name, "): leave one of them out by exclude"));
        }
        plan_.runs.push_back(std::move(run));
      }
    }
  }

  static constexpr int64_t kAnySteps = 1'000'000'000;

  const Sweep& sweep_;
  const int64_t ranks_;
  const StepSeconds& speeds_;
  SweepPlan plan_;
  ErrorList errors_;
  std::set<std::string> told_;
  double baseline_size_ = 0, baseline_tokens_ = 0, baseline_flops_ = 0;
};

}  // namespace

bool SweepPlan::solved() const {
  return std::all_of(cells.begin(), cells.end(), [](const PlannedCell& c) { return c.solved; });
}

absl::StatusOr<SweepPlan> PlanSweep(const Sweep& sweep, int64_t ranks, const StepSeconds& speeds) {
  return Planner(sweep, ranks, speeds).Plan();
}

std::string SweepPlanText(const SweepPlan& plan) {
  const Sweep& sweep = plan.sweep;
  std::string out =
      absl::StrFormat("%s: %d cells x %d seed%s = %d runs of %s into %s\n", sweep.path,
                      plan.cells.size(), sweep.seeds.size(), sweep.seeds.size() == 1 ? "" : "s",
                      plan.runs.size(), sweep.config, sweep.out);
  size_t width = 4;
  for (const PlannedCell& cell : plan.cells) width = std::max(width, cell.name.size());
  const int w = static_cast<int>(width);
  absl::StrAppendFormat(&out, "\n  %-*s %9s %9s %9s %8s %9s %9s %10s %10s\n", w, "cell", "params",
                        "active", "FLOP/tok", "steps", "tokens", "FLOP", "cache", "memory");
  double flops = 0, seconds = 0;
  bool timed = true;
  for (size_t i = 0; i < plan.cells.size(); ++i) {
    const PlannedCell& cell = plan.cells[i];
    const std::string open = cell.solved ? "" : "?";
    const auto number = [&](double x) { return open.empty() ? PrintShort(x) : open; };
    absl::StrAppendFormat(
        &out, "%s %-*s %9s %9s %9s %8s %9s %9s %10s %10s\n", i == sweep.baseline ? "*" : " ", w,
        cell.name, PrintShort(static_cast<double>(cell.params_total)),
        PrintShort(static_cast<double>(cell.params_active)), PrintShort(cell.flops_per_token),
        open.empty() ? PrintGrouped(cell.config.train.steps) : open,
        number(static_cast<double>(cell.tokens)), number(cell.flops), PrintBytes(cell.cache_bytes),
        PrintBytes(cell.memory_bytes));
    flops += cell.flops * static_cast<double>(sweep.seeds.size());
    seconds += cell.seconds * static_cast<double>(sweep.seeds.size());
    timed &= cell.seconds > 0;
  }
  absl::StrAppend(&out,
                  "  (* the baseline; FLOP forward and backward; cache: keys, values and "
                  "states of one sequence, decoding)\n\n");
  double steps_off = 0, size_off = 0;
  for (const PlannedCell& cell : plan.cells) {
    if (std::abs(cell.steps_off) > std::abs(steps_off)) steps_off = cell.steps_off;
    if (std::abs(cell.size_off) > std::abs(size_off)) size_off = cell.size_off;
  }
  const auto target = [](const auto& equal) {
    return equal.value.has_value() ? PrintShort(*equal.value) : std::string("the baseline's");
  };
  if (sweep.steps.kind != EqualSteps::kNone) {
    const char* name = sweep.steps.kind == EqualSteps::kTokens  ? "tokens"
                       : sweep.steps.kind == EqualSteps::kFlops ? "FLOP"
                                                                : "seconds";
    absl::StrAppendFormat(
        &out, "equal         %s: %s, by train.steps; %s\n", name, target(sweep.steps),
        plan.solved() ? "furthest off " + Percent(steps_off)
                      : "`krait ablate run` measures the speed of each cell first");
  }
  if (sweep.size.kind != EqualSize::kNone) {
    absl::StrAppendFormat(&out,
                          "equal         %s parameters: %s, by model.mlp.d_ff; furthest off %s\n",
                          sweep.size.kind == EqualSize::kActive ? "active" : "total",
                          target(sweep.size), Percent(size_off));
  }
  absl::StrAppendFormat(&out, "metric        %s (%s is better)\n", plan.metric,
                        plan.higher_better ? "higher" : "lower");
  absl::StrAppendFormat(&out, "cost          %s FLOP in all%s\n",
                        plan.solved() ? PrintShort(flops) : "?",
                        timed ? ", about " + FormatDuration(seconds) + " one after another" : "");
  return out;
}

std::string SweepPlanJson(const SweepPlan& plan) {
  using nlohmann::ordered_json;
  ordered_json cells = ordered_json::array(), runs = ordered_json::array();
  for (const PlannedCell& cell : plan.cells) {
    cells.push_back(
        {{"name", cell.name},
         {"params_total", cell.params_total},
         {"params_active", cell.params_active},
         {"flops_per_token", cell.flops_per_token},
         {"d_ff", cell.config.model.mlp_d_ff},
         {"steps", cell.solved ? ordered_json(cell.config.train.steps) : ordered_json()},
         {"tokens", cell.tokens},
         {"flops", cell.flops},
         {"cache_bytes", cell.cache_bytes},
         {"memory_bytes", cell.memory_bytes},
         {"steps_off", cell.steps_off},
         {"size_off", cell.size_off}});
  }
  for (const PlannedRun& run : plan.runs) {
    runs.push_back({{"cell", plan.cells[run.cell].name}, {"seed", run.seed}, {"dir", run.dir}});
  }
  const ordered_json json = {{"sweep", plan.sweep.path},
                             {"config", plan.sweep.config},
                             {"out", plan.sweep.out},
                             {"metric", plan.metric},
                             {"baseline", plan.cells[plan.sweep.baseline].name},
                             {"cells", cells},
                             {"runs", runs}};
  return json.dump(2, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace krait
