#include "trainer/config/batch_ramp.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/number.h"
#include "trainer/config/config_keys.h"

namespace krait {
namespace {

// Steps of `batch` that cover `tokens`.
int64_t Covering(int64_t tokens, int64_t batch) { return tokens / batch + (tokens % batch != 0); }

}  // namespace

absl::StatusOr<BatchRamp> BatchRamp::Parse(std::string_view text) {
  const auto error = [](const auto&... what) {
    return Error(ExitCode::kConfig, absl::StrCat(what...));
  };
  std::vector<BatchStage> stages;
  const std::vector<std::string> words = absl::StrSplit(std::string(text), ' ', absl::SkipEmpty());
  for (const std::string& word : words) {
    const size_t colon = word.find(':');
    if (colon == std::string::npos) return error("\"", word, "\" has no colon");
    int64_t numbers[2];
    for (const int i : {0, 1}) {
      const std::string part = i == 0 ? word.substr(0, colon) : word.substr(colon + 1);
      std::string why = "is no whole number";
      const auto number = ParseInteger(part, &why);
      if (number.has_value() && (*number < 1 - i || *number > kMaxTokens)) why = "is out of range";
      if (!number.has_value() || *number < 1 - i || *number > kMaxTokens) {
        return error("\"", part, "\" of \"", word, "\" ", why);
      }
      numbers[i] = *number;
    }
    if (stages.empty() && numbers[1] != 0) {
      return error("the first size holds from 0 tokens on, not from ", numbers[1]);
    }
    if (!stages.empty() && numbers[1] <= stages.back().from) {
      return error("\"", word, "\" begins no later than the size before it");
    }
    if (stages.empty() || stages.back().tokens != numbers[0]) {
      stages.push_back({numbers[0], numbers[1]});
    }
  }
  if (stages.empty()) return error("no size is given");
  return BatchRamp(std::move(stages));
}

int64_t BatchRamp::largest() const {
  int64_t most = 0;
  for (const BatchStage& stage : stages_) most = std::max(most, stage.tokens);
  return most;
}

size_t BatchRamp::StageAt(int64_t seen) const {
  size_t stage = stages_.size() - 1;
  while (stage > 0 && stages_[stage].from > seen) --stage;
  return stage;
}

int64_t BatchRamp::End(size_t stage) const {
  return stage + 1 < stages_.size() ? stages_[stage + 1].from : std::numeric_limits<int64_t>::max();
}

int64_t BatchRamp::At(int64_t seen) const { return stages_[StageAt(seen)].tokens; }
int64_t BatchRamp::EndOf(int64_t seen) const { return End(StageAt(seen)); }

int64_t BatchRamp::Steps(int64_t seen, int64_t until) const {
  int64_t steps = 0;
  while (seen < until) {
    const size_t stage = StageAt(seen);
    const int64_t count = Covering(std::min(End(stage), until) - seen, stages_[stage].tokens);
    steps += count;
    seen += count * stages_[stage].tokens;
  }
  return steps;
}

int64_t BatchRamp::After(int64_t seen, int64_t steps) const {
  while (steps > 0) {
    const size_t stage = StageAt(seen);
    const bool last = stage + 1 == stages_.size();
    const int64_t count =
        last ? steps : std::min(steps, Covering(End(stage) - seen, stages_[stage].tokens));
    seen += count * stages_[stage].tokens;
    steps -= count;
  }
  return seen;
}

double BatchRamp::Progress(int64_t seen) const {
  double steps = 0;
  for (size_t stage = 0; stage < stages_.size() && stages_[stage].from < seen; ++stage) {
    steps += static_cast<double>(std::min(End(stage), seen) - stages_[stage].from) /
             static_cast<double>(stages_[stage].tokens);
  }
  return steps;
}

std::string BatchRamp::Text() const {
  if (constant()) return absl::StrCat(stages_[0].tokens);
  std::string text;
  for (const BatchStage& stage : stages_) {
    absl::StrAppend(&text, text.empty() ? "" : " ", stage.tokens, ":", stage.from);
  }
  return text;
}

}  // namespace krait
