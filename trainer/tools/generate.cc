#include "trainer/tools/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/random.h"
#include "kernels/transfer.h"

namespace krait {
namespace {

constexpr int64_t kPromptChunk = InferenceModel::kPromptChunk;

}  // namespace

absl::Status CheckSampling(const SamplingOptions& options) {
  ErrorList errors;
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    errors.Add(ExitCode::kConfig, absl::StrFormat("--temperature %g: must be 0 (greedy) or more",
                                                  options.temperature));
  }
  if (options.top_k < 0) {
    errors.Add(ExitCode::kConfig,
               absl::StrFormat("--top-k %d: must be 0 (all) or more", options.top_k));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    errors.Add(ExitCode::kConfig,
               absl::StrFormat("--top-p %g: must be above 0 and at most 1", options.top_p));
  }
  return errors.ToStatus();
}

int32_t Sample(const float* logits, int64_t vocab, const SamplingOptions& options, uint64_t index) {
  std::vector<int32_t> ids(static_cast<size_t>(vocab));
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (options.temperature == 0) return ids.front();
  if (options.top_k > 0 && options.top_k < vocab) ids.resize(static_cast<size_t>(options.top_k));

  std::vector<double> shares;  // running sums of unnormalised probabilities
  double sum = 0;
  for (int32_t id : ids) {
    sum += std::exp((double{logits[id]} - double{logits[ids.front()]}) / options.temperature);
    shares.push_back(sum);
  }
  const auto kept = std::lower_bound(shares.begin(), shares.end(), options.top_p * sum);
  const double limit = kept == shares.end() ? sum : *kept;
  const RandomStream random(options.seed, RandomPurpose::kSampling, 0);
  const double draw = random.Uniform(index) * limit;
  const auto chosen = std::upper_bound(shares.begin(), shares.end(), draw);
  return ids[static_cast<size_t>(std::min(chosen, std::prev(shares.end())) - shares.begin())];
}

absl::StatusOr<GenerateStats> Generate(InferenceModel* model, const std::vector<int32_t>& prompt,
                                       int64_t tokens, int64_t vocab,
                                       const std::vector<int32_t>& ends,
                                       const SamplingOptions& options,
                                       const std::function<absl::Status(int32_t id)>& on_token) {
  KRAIT_RETURN_IF_ERROR(CheckSampling(options));
  KRAIT_CHECK(!prompt.empty() && vocab <= model->config().model.vocab_size);
  const auto prompt_size = static_cast<int64_t>(prompt.size());
  std::unique_ptr<SequenceState> state;
  const Context ctx = model->ForDecode({.batch = 1, .seq_len = std::min(kPromptChunk, prompt_size)},
                                       prompt_size + tokens, &state);
  // One pass's tokens and logits, where the model computes.
  Tensor pass_tokens, pass_logits;
  const auto take = [&](Arena* arena) {
    pass_tokens = arena->Alloc(DType::kI32, {1, kPromptChunk});
    pass_logits = arena->Alloc(DType::kF32, {1, model->config().model.vocab_size});
  };
  Arena measure("pass", ctx.device);
  take(&measure);
  Arena arena("pass", ctx.device, measure.high_water());
  take(&arena);
  std::vector<float> logits;
  const auto decode = [&](const int32_t* ids, int64_t count) {
    const Tensor tokens_view = pass_tokens.Slice(1, 0, count);
    Upload(tokens_view, ids, ctx);
    model->model().Decode(pass_logits, tokens_view, state.get(), ctx);
    logits = DownloadFloats(pass_logits, ctx);
  };

  GenerateStats stats;
  double start = MonotonicSeconds();
  for (int64_t done = 0; done < prompt_size; done += kPromptChunk) {
    decode(prompt.data() + done, std::min(kPromptChunk, prompt_size - done));
  }
  stats.prompt_seconds = MonotonicSeconds() - start;
  start = MonotonicSeconds();
  for (int64_t i = 0; i < tokens; ++i) {
    if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
      return Error(ExitCode::kNumerics,
                   absl::StrFormat("the logits of token %d are not finite: the checkpoint's "
                                   "weights are not usable",
                                   prompt_size + i));
    }
    const int32_t id = Sample(logits.data(), vocab, options, static_cast<uint64_t>(i));
    if (std::find(ends.begin(), ends.end(), id) != ends.end()) break;
    ++stats.tokens;
    KRAIT_RETURN_IF_ERROR(on_token(id));
    if (i + 1 < tokens) decode(&id, 1);
  }
  stats.decode_seconds = MonotonicSeconds() - start;
  return stats;
}

}  // namespace krait
