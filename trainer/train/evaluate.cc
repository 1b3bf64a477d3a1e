#include "trainer/train/evaluate.h"

#include <algorithm>
#include <numbers>
#include <string>

#include "kernels/activation.h"
#include "kernels/transfer.h"

namespace krait {
absl::StatusOr<EvalResult> EvaluateStored(const Evaluator& evaluator, const Dataset& data,
                                          int64_t sequences, int64_t micro_batch) {
  const Context& ctx = evaluator.ctx;
  EvalResult result;
  result.sequences = std::min(sequences, data.sequences());
  TokenBatch rows;
  Fill(evaluator.sums, 0, ctx);
  for (int64_t first = 0; first < result.sequences; first += micro_batch) {
    const int64_t count = std::min(micro_batch, result.sequences - first);
    KRAIT_RETURN_IF_ERROR(data.ReadStored(first, count, &rows));
    evaluator.model->Evaluate(evaluator.batch.Of(rows, 0, count, ctx), evaluator.sums, ctx);
    result.targets += rows.target_count;
  }
  if (result.targets == 0) {
    return Error(ExitCode::kData, data.files().front()->path() +
                                      ": nothing to evaluate: every token starts a document");
  }
  result.loss = PassSumsOf(DownloadDoubles(evaluator.sums, ctx)).cross_entropy /
                static_cast<double>(result.targets);
  return result;
}

std::optional<double> BitsPerByte(double loss, const std::string& tokenizer) {
  if (tokenizer != "bytes") return std::nullopt;
  return loss / std::numbers::ln2;
}

}  // namespace krait
