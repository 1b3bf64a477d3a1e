// What one optimizer step has to report: the training step fills it, logs and metrics show it.
#ifndef KRAIT_TRAINER_REPORT_STEP_REPORT_H_
#define KRAIT_TRAINER_REPORT_STEP_REPORT_H_

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace krait {

// One optimizer step as it is reported. Everything but the fields from `tokens_per_s` on is the
// same bits whenever the same step of the same run is computed.
struct StepReport {
  int64_t step = 0, steps = 0;
  double loss = 0;                        // cross-entropy per target; NaN without one
  double aux_loss = 0;                    // unscaled; meaningful with `has_moe`
  std::optional<double> activation_loss;  // unscaled; where the model has it
  double total_loss = 0;                  // with the auxiliary losses and their coefficients
  double lr = 0, grad_norm = 0;
  bool has_moe = false;
  bool was_skipped = false;
  bool was_spike = false;  // skipped by the spike guard
  int64_t skipped = 0, skipped_in_row = 0;
  int64_t tokens = 0;                             // input tokens of the run so far
  std::vector<std::pair<int, double>> imbalance;  // published layer, max / mean rows of an expert
  int64_t overflow_rounds = 0;  // of expert exchanges beyond the first, over all ranks and passes

  double tokens_per_s = 0, step_ms = 0, eta_seconds = 0;
  std::optional<double> mfu;  // share of the device's stated peak, where there is one
  int64_t peak_memory = 0, total_memory = 0;  // bytes
};

}  // namespace krait

#endif  // KRAIT_TRAINER_REPORT_STEP_REPORT_H_
