// The runs of a sweep: their configs, with what is held equal solved for, and what they cost.
#ifndef KRAIT_TRAINER_ABLATE_SWEEP_PLAN_H_
#define KRAIT_TRAINER_ABLATE_SWEEP_PLAN_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/config/config.h"
#include "trainer/config/sweep.h"

namespace krait {

struct PlannedRun {
  size_t cell = 0;
  int64_t seed = 0;
  std::string dir = {};   // OUT/runs/NAME.sSEED-HASH: other settings have another folder
  std::string yaml = {};  // the whole config
};

struct PlannedCell {
  std::string name;
  RunConfig config;  // without run_dir; the seed is the base config's
  // What its speed is known by: the config without what does not change the speed.
  std::string speed_key;
  bool solved = true;  // false: equal.seconds, and its speed is not known yet; steps are 0 then
  int64_t params_total = 0, params_active = 0;
  double flops_per_token = 0;
  int64_t tokens = 0;       // of a run
  double flops = 0;         // likewise
  double seconds = 0;       // likewise, where the speed is known
  int64_t cache_bytes = 0;  // keys, values and states of one sequence of data.seq_len, decoding
  int64_t memory_bytes = 0;
  // By how much it misses what is held equal, relative; 0 where nothing is.
  double steps_off = 0, size_off = 0;
};

struct SweepPlan {
  Sweep sweep;
  std::string metric;          // of metrics.jsonl
  bool higher_better = false;  // accuracy, not loss
  std::vector<PlannedCell> cells;
  std::vector<PlannedRun> runs;  // seeds together: all cells with the first seed, then the second
  std::vector<std::string> notes;
  bool solved() const;
};

// Seconds of a step, by PlannedCell::speed_key.
using StepSeconds = std::map<std::string, double>;

// kConfig, all cells' errors at once, each once. What is held equal is met by train.steps (tokens,
// FLOPs, seconds) and by model.mlp.d_ff and model.moe.d_ff, whose ratio stays (parameters): in the
// coarsest of steps of 128, 64, ... 1 that comes within 0.5 %. More than 1 % off is refused.
absl::StatusOr<SweepPlan> PlanSweep(const Sweep& sweep, int64_t ranks, const StepSeconds& speeds);

std::string SweepPlanText(const SweepPlan& plan);
std::string SweepPlanJson(const SweepPlan& plan);

}  // namespace krait

#endif  // KRAIT_TRAINER_ABLATE_SWEEP_PLAN_H_
