#include "trainer/train/evaluate.h"

#include <algorithm>
#include <numbers>
#include <string>

namespace krait {
namespace {

Tensor Rows(const std::vector<int32_t>& values, int64_t first, int64_t count, int64_t seq_len) {
  KRAIT_CHECK((first + count) * seq_len <= static_cast<int64_t>(values.size()));
  // A view is not const; ops do not write to tokens.
  int32_t* data = const_cast<int32_t*>(values.data()) + first * seq_len;
  return Tensor(data, DType::kI32, Device::kCpu, {count, seq_len});
}

}  // namespace

Batch PassOf(const TokenBatch& batch, int64_t first, int64_t count) {
  return {.shape = {.batch = count, .seq_len = batch.seq_len},
          .tokens = Rows(batch.tokens, first, count, batch.seq_len),
          .targets = Rows(batch.targets, first, count, batch.seq_len),
          .doc_start = Rows(batch.doc_start, first, count, batch.seq_len)};
}

absl::StatusOr<EvalResult> EvaluateStored(HybridModel* model, const Dataset& data,
                                          int64_t sequences, int64_t micro_batch,
                                          const Context& ctx) {
  EvalResult result;
  result.sequences = std::min(sequences, data.sequences());
  TokenBatch rows;
  double sum = 0;
  for (int64_t first = 0; first < result.sequences; first += micro_batch) {
    const int64_t count = std::min(micro_batch, result.sequences - first);
    KRAIT_RETURN_IF_ERROR(data.ReadStored(first, count, &rows));
    const PassSums sums = model->Evaluate(PassOf(rows, 0, count), ctx);
    sum += sums.cross_entropy;
    result.targets += sums.targets;
  }
  if (result.targets == 0) {
    return Error(ExitCode::kData, data.files().front()->path() +
                                      ": nothing to evaluate: every token starts a document");
  }
  result.loss = sum / static_cast<double>(result.targets);
  return result;
}

std::optional<double> BitsPerByte(double loss, const std::string& tokenizer) {
  if (tokenizer != "bytes") return std::nullopt;
  return loss / std::numbers::ln2;
}

}  // namespace krait
