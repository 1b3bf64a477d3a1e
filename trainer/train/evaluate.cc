#include "trainer/train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numbers>
#include <numeric>
#include <set>

#include "kernels/activation.h"
#include "kernels/transfer.h"

namespace krait {

double AccuracyOf(double loss, int64_t correct, int64_t targets) {
  return std::isfinite(loss) ? static_cast<double>(correct) / static_cast<double>(targets)
                             : std::nan("");
}

absl::StatusOr<EvalResult> EvaluateStored(const Evaluator& evaluator, const Dataset& data,
                                          int64_t first, int64_t count, int64_t micro_batch,
                                          const Progress& progress) {
  const Context& ctx = evaluator.ctx;
  const Groups* const groups = evaluator.groups;
  const Mesh mesh = groups != nullptr ? groups->mesh() : Mesh();
  // An error of one rank is all ranks'.
  const auto agreed = [&](const absl::Status& status) {
    return groups != nullptr ? Agree(groups->world(), status) : status;
  };
  EvalResult result;
  result.sequences = count;
  TokenBatch rows;
  Fill(evaluator.sums, 0, ctx);
  for (int64_t done = 0; done < count; done += micro_batch * mesh.data) {
    absl::Status status = progress ? progress(done, count) : absl::OkStatus();
    const int64_t begin = std::min(count, done + mesh.data_index() * micro_batch);
    const int64_t now = std::min(micro_batch, count - begin);
    if (status.ok()) status = data.ReadStored(first + begin, now, &rows);
    KRAIT_RETURN_IF_ERROR(agreed(status));
    if (groups != nullptr) rows.FillUp(micro_batch);
    evaluator.model->Evaluate(evaluator.batch.Of(rows, 0, rows.sequences, ctx), evaluator.sums, ctx,
                              &result.correct);
    result.targets += rows.target_count;
  }
  if (groups != nullptr) {
    const Tensor losses = evaluator.sums.Slice(0, kSumCrossEntropy, 1);
    groups->stage().AllReduceSum("evaluation", losses, ctx);
    const std::vector<int64_t> all = groups->world()->AllGather(result.targets);
    result.targets = 0;
    // Tensor ranks have the same rows, and count the right ones of their own.
    for (size_t r = 0; r < all.size(); r += static_cast<size_t>(mesh.tensor)) {
      result.targets += all[r];
    }
    const std::vector<int64_t> right = groups->world()->AllGather(result.correct);
    result.correct = std::accumulate(right.begin(), right.end(), int64_t{0});
  }
  const double sum = PassSumsOf(DownloadDoubles(evaluator.sums, ctx)).cross_entropy;
  result.loss = result.targets > 0 ? sum / static_cast<double>(result.targets) : std::nan("");
  return result;
}

std::vector<EvalShare> EvalShares(const Dataset& data, const std::vector<SourceSpec>& sources,
                                  int64_t tokens) {
  double weights = 0;
  for (const SourceSpec& source : sources) weights += source.weight;
  const auto sequences = static_cast<double>(tokens / data.seq_len());
  std::vector<EvalShare> shares;
  std::set<std::string> names;
  int64_t first = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t there = data.SequencesOf(static_cast<int>(i));
    EvalShare share;
    share.first = first;
    share.count = static_cast<int64_t>(sequences * (sources[i].weight / weights));
    share.count = std::clamp<int64_t>(share.count, 1, there);
    const std::string stem = std::filesystem::path(sources[i].path).stem().string();
    share.name = stem;
    for (int n = 2; !names.insert(share.name).second; ++n) {
      share.name = stem + "-" + std::to_string(n);
    }
    share.tokens_per_byte = data.files()[i]->tokens_per_byte();
    shares.push_back(share);
    first += there;
  }
  return shares;
}

std::optional<double> BitsPerByte(double loss, std::optional<double> tokens_per_byte) {
  if (!tokens_per_byte.has_value()) return std::nullopt;
  return loss / std::numbers::ln2 * *tokens_per_byte;
}

}  // namespace krait
