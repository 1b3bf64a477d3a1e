#include "data/mix.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"

namespace krait {
namespace {

constexpr int64_t kMaxPeriod = 65536;
constexpr double kExact = 1e-9;

// The shares of a period of `period` positions when they come out whole; else empty.
std::vector<int64_t> WholeShares(const std::vector<double>& parts, int64_t period) {
  std::vector<int64_t> shares;
  for (const double part : parts) {
    const double share = part * static_cast<double>(period);
    if (std::abs(share - std::round(share)) > kExact) return {};
    shares.push_back(std::llround(share));
  }
  return shares;
}

std::vector<int64_t> RoundedShares(const std::vector<double>& parts) {
  std::vector<int64_t> shares;
  std::vector<double> rest;
  for (const double part : parts) {
    const double share = part * static_cast<double>(kMaxPeriod);
    shares.push_back(static_cast<int64_t>(share));
    rest.push_back(share - std::floor(share));
  }
  std::vector<size_t> order(parts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return rest[a] > rest[b]; });
  int64_t missing = kMaxPeriod - std::accumulate(shares.begin(), shares.end(), int64_t{0});
  for (size_t k = 0; missing > 0; ++k, --missing) ++shares[order[k % order.size()]];
  return shares;
}

}  // namespace

absl::StatusOr<Mix> Mix::Create(const std::vector<double>& weights) {
  KRAIT_CHECK(!weights.empty());
  double sum = 0;
  for (const double weight : weights) {
    if (!std::isfinite(weight) || weight <= 0) {
      return Error(ExitCode::kData,
                   absl::StrFormat("the weight of a source is %g; it must be above 0", weight));
    }
    sum += weight;
  }
  std::vector<double> parts;
  for (const double weight : weights) parts.push_back(weight / sum);
  Mix mix;
  for (int64_t period = 1; period <= kMaxPeriod && mix.shares_.empty(); ++period) {
    mix.shares_ = WholeShares(parts, period);
    // A part below kExact / period looks like a whole 0.
    if (!mix.shares_.empty() && *std::min_element(mix.shares_.begin(), mix.shares_.end()) == 0) {
      mix.shares_.clear();
    }
  }
  if (mix.shares_.empty()) mix.shares_ = RoundedShares(parts);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (mix.shares_[i] == 0) {
      return Error(ExitCode::kData,
                   absl::StrFormat("the weight %g is below 1/%d of the sum of all weights, %g: "
                                   "its source would never be read",
                                   weights[i], kMaxPeriod, sum));
    }
  }
  const int64_t period = std::accumulate(mix.shares_.begin(), mix.shares_.end(), int64_t{0});
  std::vector<int64_t> used(weights.size(), 0);
  for (int64_t t = 0; t < period; ++t) {
    size_t next = weights.size();
    int64_t next_end = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t share = mix.shares_[i];
      if (used[i] == share || used[i] * period / share > t) continue;
      const int64_t end = ((used[i] + 1) * period + share - 1) / share;
      if (next == weights.size() || end < next_end) {
        next = i;
        next_end = end;
      }
    }
    KRAIT_CHECK(next < weights.size() && t < next_end);
    mix.schedule_.push_back({static_cast<int32_t>(next), static_cast<int32_t>(used[next])});
    ++used[next];
  }
  return mix;
}

Mix::Use Mix::At(int64_t position) const {
  const Slot& slot = schedule_[static_cast<size_t>(position % period())];
  const int64_t periods = position / period();
  return {slot.source, periods * shares_[static_cast<size_t>(slot.source)] + slot.n};
}

std::vector<int64_t> Mix::Uses(int64_t position) const {
  std::vector<int64_t> uses = shares_;
  for (int64_t& n : uses) n *= position / period();
  for (int64_t t = 0; t < position % period(); ++t) {
    ++uses[static_cast<size_t>(schedule_[static_cast<size_t>(t)].source)];
  }
  return uses;
}

}  // namespace krait
