// What the tests of the config reader share.
#ifndef KRAIT_TESTS_TRAINER_CONFIG_CONFIG_TESTING_H_
#define KRAIT_TESTS_TRAINER_CONFIG_CONFIG_TESTING_H_

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "trainer/config/config.h"

namespace krait {

// The smallest valid training config.
inline constexpr char kSmall[] = R"(
model: {vocab_size: 256, d_model: 64, n_layers: 8, attention: {heads: 4}, mlp: {d_ff: 128}}
data: {train: [{path: x.h5}], seq_len: 128}
train: {steps: 4000, batch_tokens: 1Ki}
)";

inline absl::StatusOr<RunConfig> Parse(const std::string& text,
                                       const std::vector<std::string>& words = {},
                                       ConfigUse use = ConfigUse::kTrain, int64_t ranks = 1) {
  return ParseConfig(text, "test.yaml", words, use, ranks);
}

inline RunConfig MustParse(const std::string& text, const std::vector<std::string>& words = {},
                           ConfigUse use = ConfigUse::kTrain, int64_t ranks = 1) {
  auto config = Parse(text, words, use, ranks);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : RunConfig();
}

template <typename T>
std::string ErrorOf(const absl::StatusOr<T>& config) {
  if (config.ok()) return "";
  EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kConfig);
  return MessageOf(config.status());
}

}  // namespace krait

#endif  // KRAIT_TESTS_TRAINER_CONFIG_CONFIG_TESTING_H_
