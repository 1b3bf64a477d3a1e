// A run as one typed struct, and the reader that makes it from YAML. This folder is the only user
// of yaml-cpp.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "data/sampler.h"
#include "kernels/base/status.h"
#include "kernels/placement.h"
#include "model/hybrid_model.h"
#include "model/spec.h"
#include "parallel/mesh.h"
#include "trainer/config/batch_ramp.h"

namespace krait {

class World;

enum class DevicePreference : uint8_t { kAuto, kCpu, kCuda };
enum class Precision : uint8_t { kAuto, kFp32, kBf16 };

enum class GradReduce : uint8_t { kFp32, kBf16 };  // in which gradients travel

struct ParallelConfig {
  int64_t tensor = 1, expert = 1;
  int64_t data = 0;  // 0: auto
  double expert_slack = 1.5;
  GradReduce reduce = GradReduce::kFp32;
};

struct DataConfig {
  std::vector<SourceSpec> train;
  std::vector<SourceSpec> validation;
  int64_t seq_len = 4096;
  bool reset_at_documents = true;
};

struct SpikeGuardConfig {
  int64_t window = 0;  // steps; 0: off
  double z = 6;        // standard deviations
};

struct TrainConfig {
  DevicePreference device = DevicePreference::kAuto;
  Precision precision = Precision::kAuto;
  bool deterministic = true;
  int64_t steps = 0;   // resolved from tokens where that was given
  int64_t tokens = 0;  // length of the run where it was given so; else 0
  BatchRamp batch_tokens = 4 << 20;
  int64_t micro_batch = 2;
  uint64_t seed = 1234;
  Recompute recompute = Recompute::kNone;
  double hang_timeout = 600;  // seconds
  SpikeGuardConfig spike_guard;
};

enum class MomentDType : uint8_t { kFp32, kBf16 };
struct OptimizerConfig {
  double lr = 3e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  double clip = 1.0;  // 0: off
  MomentDType moments = MomentDType::kFp32;
};

enum class ScheduleKind : uint8_t { kCosine, kWsd, kLinear, kConstant };
struct ScheduleConfig {
  ScheduleKind kind = ScheduleKind::kCosine;
  int64_t warmup_steps = 2000;
  double min_lr_ratio = 0.1;
  int64_t decay_steps = 0;  // of wsd, else 0; resolved: a share of the steps is multiplied out
};

struct CheckpointConfig {
  int64_t every = 1000;
  int64_t keep = 3;
  int64_t keep_every = 0;  // 0: none
  bool async = true;
  std::string dir;  // default run_dir/checkpoints
};
struct LogConfig {
  int64_t every = 10;
  bool tensorboard = true;
  bool layer_statistics = false;
};
struct EvaluationConfig {
  int64_t every = 1000;
  int64_t tokens = 2 << 20;
};

struct RunConfig {
  std::string path;  // of the YAML file, or the name given to ParseConfig
  std::string run_dir;
  ModelSpec model;
  ParallelConfig parallel;
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  CheckpointConfig checkpoint;
  LogConfig log;
  EvaluationConfig evaluation;
  // What the files and words say without effect, a line each with its place: to be shown to the
  // user. What depends on device and ranks is looked at for ConfigUse::kTrain alone.
  std::vector<std::string> notes;

  // The resolved configuration as YAML text that reads back to the same struct. Numbers are printed
  // in shortest round-trip form.
  std::string ToYaml() const;

  // Passes of a step of `batch` tokens, or of the largest that the run has.
  int64_t accumulation(int64_t data_ranks, int64_t batch) const {
    return batch / (data.seq_len * train.micro_batch * data_ranks);
  }
  int64_t accumulation(int64_t data_ranks) const {
    return accumulation(data_ranks, train.batch_tokens.largest());
  }
};

// What a config is read for. kPlan (plan, bench) does without data.train and train.steps (steps is
// 0 then). kStored is what a checkpoint says of its run: in addition nothing is asked of this
// machine and its ranks, so that it can be read anywhere.
enum class ConfigUse : uint8_t { kTrain, kPlan, kStored };

// Reads base files, the file, then "key.path=value" words. All errors at once, each with
// file:line:column (or the word), what was found and what would be right; exit code kConfig.
// `ranks` is the world size that the batch and the mesh are checked against (1 without mpirun; 0:
// it is not known). Touches no GPU and opens no data file.
absl::StatusOr<RunConfig> LoadConfig(const std::string& path,
                                     const std::vector<std::string>& overrides, ConfigUse use,
                                     int64_t ranks);
// The same from YAML text that stands alone (a checkpoint's manifest, probe's built-in settings);
// `name` stands for the path in messages.
absl::StatusOr<RunConfig> ParseConfig(const std::string& text, const std::string& name,
                                      const std::vector<std::string>& overrides, ConfigUse use,
                                      int64_t ranks);

// Where a loaded config's run computes, and in which dtype (train.device, train.precision; loading
// has resolved `auto`: CUDA in a build with it where a GPU can be used).
Placement PlacementOf(const RunConfig& config);
// Readies the device (kernels/hardware.h). kConfig when the run asks for CUDA and this build or
// machine has none. `plan` needs none.
absl::Status CheckDevice(const RunConfig& config);
// The same on all ranks, which all call it: an error of one is agreed on (parallel/world.h), and so
// are GPUs that cannot work together (parallel/gpu.h).
absl::Status CheckDevice(const RunConfig& config, World* world);

// The mesh of a run on `ranks` ranks, as `rank` sees it. The config was read for that many.
Mesh MeshOf(const ParallelConfig& parallel, int ranks, int rank);
// The fewest ranks that a mesh of these sizes has.
int64_t LeastRanks(const ParallelConfig& parallel);
// The dtype in which gradients travel.
DType ReduceDType(const RunConfig& config);

// The resolved config as YAML, each line with where its value came from as a comment:
// file:line:column, a word of the command line, a key that it is derived from, or the default. Its
// notes come first.
absl::StatusOr<std::string> ExplainConfig(const std::string& path,
                                          const std::vector<std::string>& overrides, int64_t ranks);

// Every key that a config may have, in the order of the resolved config. `default_value` is YAML,
// or in words where the default depends on other keys or the key is required.
struct ConfigKeyInfo {
  std::string key, type, default_value, unit, meaning;
};
std::vector<ConfigKeyInfo> ListConfigKeys();

// What a resume compares: keys whose change is refused (model.*), needs --allow-change KEY (data.*,
// train.batch_tokens, train.seed), or applies with a line (optimizer.*, schedule.*, steps, device,
// precision, deterministic). All others are free. Each difference once, with the dotted key of the
// resolved config and both values as YAML.
struct ConfigDifference {
  enum class Kind : uint8_t { kRefused, kNeedsAllow, kApplies } kind;
  std::string key, before, after;
};
std::vector<ConfigDifference> CompareForResume(const RunConfig& saved, const RunConfig& now);

// The words of model.pattern that yield the model's layers, one period.
std::string LayoutPattern(const ModelSpec& model);

// Whether `--allow-change WORD` covers a key: the whole key, its last part, or "data" for all keys
// of that section.
bool AllowsChange(const std::string& word, const std::string& key);

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_H_
