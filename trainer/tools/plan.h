// `krait plan`: what a config means in numbers, before anything is trained.
#ifndef KRAIT_TRAINER_TOOLS_PLAN_H_
#define KRAIT_TRAINER_TOOLS_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/config/config.h"
#include "trainer/train/memory_plan.h"

namespace krait {

struct PlanOptions {
  int64_t ranks = 1;    // the config must have been loaded for as many
  int64_t context = 0;  // tokens; 0: report at data.seq_len and at 262,144
  int64_t memory = 0;   // bytes that one rank may take; 0: the memory of this machine
};

// What one sequence carries while decoding, at a context of so many tokens: keys, values and conv
// inputs in 16 bit, scan state in fp32.
struct DecodeMemory {
  int64_t context = 0;
  int64_t kv_cache_bytes = 0;
  int64_t conv_state_bytes = 0;
  int64_t ssm_state_bytes = 0;
};

// Parameters and FLOPs per token of one kind of sublayer with the norms before them, or of
// embedding, final norm and head.
struct PlanPart {
  std::string name;
  int64_t sublayers = 0;
  int64_t parameters = 0;
  double flops_per_token = 0;
};

struct PlanReport {
  std::string config;   // path
  std::string pattern;  // words of one period, as model.pattern takes them
  int64_t n_layers = 0;
  std::vector<PlanPart> parts;
  int64_t params_total = 0;
  int64_t params_active = 0;
  double flops_per_token = 0;  // at seq_len, forward x 3
  std::vector<DecodeMemory> decode;

  // Batch arithmetic; steps 0 = the config names none.
  int64_t seq_len = 0, micro_batch = 0, data_ranks = 1, accumulation = 0;
  BatchRamp batch_tokens = 1;
  int64_t steps = 0;

  Placement placement;
  MemoryPlan memory;         // of the rank that takes most
  int64_t memory_limit = 0;  // bytes
  bool fits = true;          // memory.total() <= memory_limit
  int64_t checkpoint_bytes = 0;
  int64_t checkpoints_kept = 0;
  Mesh mesh;
  // Sent by a rank per step over all axes (MemoryPlan::sent). 0 for one rank.
  int64_t wire_bytes_per_step() const {
    return memory.sent.tensor + memory.sent.expert + memory.sent.data;
  }
};

// Touches no data file and no memory to speak of, whatever the model's size.
absl::StatusOr<PlanReport> MakePlan(const RunConfig& config, const PlanOptions& options);

std::string PlanText(const PlanReport& report);  // for people; ends with a newline
std::string PlanJson(const PlanReport& report);  // one JSON object

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_PLAN_H_
