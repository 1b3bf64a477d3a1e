// Multiple choice: which of several continuations of a text the model finds likeliest.
//
// A task file is JSON lines: {"context": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX}, the
// index counted from 0; other members are passed over. A continuation's tokens are those of context
// and continuation together behind the number of tokens of the context alone, as usual
// (EleutherAI's lm-evaluation-harness, lm_eval/api/model.py: _encode_pair).
#ifndef KRAIT_TRAINER_TOOLS_CHOICE_TASK_H_
#define KRAIT_TRAINER_TOOLS_CHOICE_TASK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/progress.h"
#include "trainer/tools/inference.h"
#include "trainer/tools/model_tokenizer.h"

namespace krait {

struct ChoiceItem {
  std::string context;
  std::vector<std::string> choices;  // at least 2
  size_t answer = 0;
};

// kData with file and line, of all bad lines at once.
absl::StatusOr<std::vector<ChoiceItem>> ReadChoiceTask(const std::string& path);

struct ChoiceResult {
  int64_t items = 0;
  int64_t correct = 0;          // the answer has the highest log-probability
  int64_t correct_by_byte = 0;  // ... per byte of the choice
  double chance = 0;            // accuracy of a guess
  double loss = 0;              // nats per token of the right choices
};

// One pass per choice. kNumerics where a probability is not a number. Of choices that are equally
// likely the first one is taken. The ranks of `world`, each with the whole model, take items in
// turn; the result is all ranks' and does not depend on their number.
absl::StatusOr<ChoiceResult> ScoreChoices(const std::vector<ChoiceItem>& items,
                                          Tokenizer* tokenizer, InferenceModel* model,
                                          const Progress& progress = nullptr,
                                          World* world = nullptr);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_CHOICE_TASK_H_
