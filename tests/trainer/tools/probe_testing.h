// Support for tests of krait probe in bf16: where the experts of two runs over the golden
// jamba-micro agree, and how far their logits lie apart there.
#ifndef KRAIT_TESTS_TRAINER_TOOLS_PROBE_TESTING_H_
#define KRAIT_TESTS_TRAINER_TOOLS_PROBE_TESTING_H_

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/golden.h"
#include "support/gradcheck.h"
#include "trainer/tools/probe.h"

namespace krait::testing {

inline constexpr int64_t kProbeTokens = 8 * 32, kProbeVocab = 256;

// The experts that each token of MoE sublayer j chooses.
inline std::vector<std::set<int64_t>> Choices(const SafetensorsReader& run, int j) {
  constexpr int64_t kExperts = 4, kTopK = 2;
  const auto logits = ReadTensor(run, "router_logits." + std::to_string(j));
  KRAIT_CHECK(static_cast<int64_t>(logits.size()) == kProbeTokens * kExperts);
  std::vector<std::set<int64_t>> choices;
  for (int64_t t = 0; t < kProbeTokens; ++t) {
    const auto at = [&](int64_t e) { return logits[static_cast<size_t>(t * kExperts + e)]; };
    std::vector<int64_t> order = {0, 1, 2, 3};
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return at(a) > at(b); });
    choices.emplace_back(order.begin(), order.begin() + kTopK);
  }
  return choices;
}

// Which tokens choose the same experts in all MoE sublayers. A token whose experts differ is
// computed by other weights: it says nothing about rounding.
inline std::vector<bool> AgreeingTokens(const SafetensorsReader& a, const SafetensorsReader& b) {
  constexpr int kMoeSublayers = 4;
  std::vector<bool> agree(kProbeTokens, true);
  for (int j = 0; j < kMoeSublayers; ++j) {
    const auto of_a = Choices(a, j), of_b = Choices(b, j);
    for (size_t t = 0; t < agree.size(); ++t) agree[t] = agree[t] && of_a[t] == of_b[t];
  }
  return agree;
}

inline double Share(const std::vector<bool>& agree) {
  return static_cast<double>(std::count(agree.begin(), agree.end(), true)) /
         static_cast<double>(agree.size());
}

// The relative error of the logits of `narrow` over the tokens of `agree`.
inline double LogitsError(const SafetensorsReader& narrow, const SafetensorsReader& wide,
                          const std::vector<bool>& agree) {
  const auto logits = ReadTensor(wide, "logits"), narrow_logits = ReadTensor(narrow, "logits");
  std::vector<double> kept, narrow_kept;
  for (size_t t = 0; t < agree.size(); ++t) {
    if (!agree[t]) continue;
    const auto begin = static_cast<int64_t>(t) * kProbeVocab;
    kept.insert(kept.end(), logits.begin() + begin, logits.begin() + begin + kProbeVocab);
    narrow_kept.insert(narrow_kept.end(), narrow_logits.begin() + begin,
                       narrow_logits.begin() + begin + kProbeVocab);
  }
  return RelativeError(narrow_kept, kept);
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_TRAINER_TOOLS_PROBE_TESTING_H_
