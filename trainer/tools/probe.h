// `krait probe`: forward values, gradients and a few optimizer steps of a published model over
// given batches, for comparison with another implementation.
#ifndef KRAIT_TRAINER_TOOLS_PROBE_H_
#define KRAIT_TRAINER_TOOLS_PROBE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "parallel/world.h"
#include "trainer/checkpoint/checkpoint.h"

namespace krait {

struct ProbeOptions {
  World* world = nullptr;  // the ranks that run it; null: this process alone
  std::string hf;          // folder with config.json and safetensors weights
  std::string batches;     // safetensors with int32 `batches` [S,B,T] or `input_ids` [B,T]
  std::string out;         // safetensors to write
  bool force = false;      // replace an older `out`
  int64_t steps = 0;
  std::vector<std::string> overrides;  // key.path=value
};

// Each [B,T] batch is one optimizer step and one pass. Writes, before any update and for
// `input_ids` or batches[0]: logits [B,T,V], hidden_states.i [B,T,D], router_logits.j [B*T,E],
// cross_entropy, aux_loss, loss ([1] each), grad.NAME; with steps also losses [S], grad_norms [S]
// and weight.NAME after them. All fp32. Settings are the defaults except a constant schedule
// without warm-up, and model.pad_token, the folder's pad_token_id; `overrides` go last. `notice`
// gets what the folder has to be said about (HfFolder::notes). kData for what is wrong with
// `batches`.
absl::Status RunProbe(const ProbeOptions& options, const Notice& notice = nullptr);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_PROBE_H_
