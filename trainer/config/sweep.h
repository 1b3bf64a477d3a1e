// A sweep: many runs that differ in a few keys of one config, as `krait ablate` takes them.
//
//   config: recall-cpu.yaml           # the base of every run, relative to this file
//   title: Attention to Mamba         # of the report; default: the file's name
//   out: runs/ratio                   # default runs/NAME of the sweep's file
//   grid:                             # every combination of these values ...
//     model.mixer.ratio: ["0:1", "1:7"]
//     model.moe: [none, {every: 2, experts: 8}]
//   cases:                            # ... with each of these sets of values that go together
//     norms: {model.mamba.inner_norms: true}
//     no norms: {model.mamba.inner_norms: false}
//   exclude: [{model.mixer.ratio: "1:0", case: no norms}]      # combinations to leave out
//   baseline: {model.mixer.ratio: "0:1", case: norms}          # default: the first cell
//   seeds: [1, 2, 3]                  # train.seed; default: the config's
//   equal: {flops: 1e15, active_params: baseline}
//   metric: val/accuracy              # of metrics.jsonl; default: val/accuracy of tasks, else
//   val/loss
//
// Like a config it may have `base: other-sweep.yaml`, and words of the command line go over it.
#ifndef KRAIT_TRAINER_CONFIG_SWEEP_H_
#define KRAIT_TRAINER_CONFIG_SWEEP_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/config/config.h"

namespace krait {

// One config key of a cell.
struct SweepSetting {
  std::string key, value;  // value: YAML
  std::string place;       // for messages: file:line:column
  std::string Word() const { return key + "=" + value; }
};

struct SweepCell {
  std::string name;                    // the values that vary: "ratio 1:7, every 2"
  std::vector<SweepSetting> settings;  // each key once
};

// What all runs have in common, to be reached by train.steps or model.mlp.d_ff.
enum class EqualSteps : uint8_t { kNone, kTokens, kFlops, kSeconds };
enum class EqualSize : uint8_t { kNone, kActive, kTotal };
template <typename Kind>
struct Equal {
  Kind kind = Kind::kNone;
  std::optional<double> value;  // none: the baseline's
  std::string place;
};

struct Sweep {
  std::string path, title, out;
  std::string config;            // path
  std::vector<SweepCell> cells;  // at least one; names differ
  size_t baseline = 0;           // index into cells
  std::vector<int64_t> seeds;    // empty: the config's
  Equal<EqualSteps> steps;
  Equal<EqualSize> size;
  std::string metric;  // "": by the data
};

// Reads and checks a sweep, not yet its configs. All errors at once, with their places; kConfig.
absl::StatusOr<Sweep> LoadSweep(const std::string& path, const std::vector<std::string>& words);

// The base config with the settings over it. Errors name the settings by their places.
absl::StatusOr<RunConfig> LoadCell(const Sweep& sweep, const std::vector<SweepSetting>& settings,
                                   int64_t ranks);

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_SWEEP_H_
