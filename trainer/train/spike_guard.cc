#include "trainer/train/spike_guard.h"

#include <cmath>
#include <limits>
#include <vector>

namespace krait {
namespace {

double Limit(const std::vector<double>& values, int64_t window, double z) {
  constexpr double kAny = std::numeric_limits<double>::infinity();
  const auto size = static_cast<int64_t>(values.size());
  if (size < window) return kAny;
  const auto n = static_cast<double>(window);
  double sum = 0, squares = 0;
  for (int64_t i = size - window; i < size; ++i) sum += values[static_cast<size_t>(i)];
  const double mean = sum / n;
  for (int64_t i = size - window; i < size; ++i) {
    const double off = values[static_cast<size_t>(i)] - mean;
    squares += off * off;
  }
  return squares > 0 ? mean + z * std::sqrt(squares / (n - 1)) : kAny;
}

void Push(double value, int64_t window, std::vector<double>* values) {
  if (!std::isfinite(value)) return;  // a step without targets has no loss
  values->push_back(value);
  const auto most = static_cast<size_t>(window);
  if (values->size() > most) values->erase(values->begin(), values->end() - window);
}

}  // namespace

SpikeLimits LimitsOf(const SpikeGuardConfig& config, const CheckpointMeta& state) {
  constexpr double kAny = std::numeric_limits<double>::infinity();
  if (config.window == 0) return {kAny, kAny};
  return {Limit(state.recent_losses, config.window, config.z),
          Limit(state.recent_norms, config.window, config.z)};
}

void Remember(const SpikeGuardConfig& config, double loss, double norm, CheckpointMeta* state) {
  if (config.window == 0) {
    state->recent_losses.clear();
    state->recent_norms.clear();
    return;
  }
  Push(loss, config.window, &state->recent_losses);
  Push(norm, config.window, &state->recent_norms);
}

}  // namespace krait
