#include "data/sampler.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/number.h"
#include "kernels/base/random.h"

namespace krait {

absl::Status CheckSameTokenizer(const TokenFile& file, const std::string& other,
                                const std::string& tokenizer) {
  if (file.tokenizer() == tokenizer) return absl::OkStatus();
  return Error(ExitCode::kData,
               absl::StrFormat("%s: its tokenizer is %s, that of %s is %s; all must be the same",
                               file.path(), file.tokenizer(), other, tokenizer));
}

absl::StatusOr<std::unique_ptr<Dataset>> Dataset::Open(const std::vector<SourceSpec>& sources,
                                                       int64_t seq_len, int64_t model_vocab,
                                                       uint64_t seed, bool reset_at_documents) {
  KRAIT_CHECK(!sources.empty() && seq_len > 0);
  std::unique_ptr<Dataset> result(new Dataset);
  result->seq_len_ = seq_len;
  result->seed_ = seed;
  result->reset_at_documents_ = reset_at_documents;
  ErrorList errors;
  for (const SourceSpec& source : sources) {
    result->weights_.push_back(source.weight);
    auto opened = TokenFile::Open(source.path);
    if (!opened.ok()) {
      errors.Add(opened.status());
      continue;
    }
    const TokenFile& file = **opened;
    if (file.tokens() < seq_len) {
      errors.Add(ExitCode::kData,
                 absl::StrFormat("%s: %d tokens are less than one sequence of seq_len %d",
                                 source.path, file.tokens(), seq_len));
    }
    if (file.vocab_size() > model_vocab) {
      errors.Add(ExitCode::kData,
                 absl::StrFormat("%s: its vocab_size %d is above the model's vocab_size %d",
                                 source.path, file.vocab_size(), model_vocab));
    }
    if (!result->files_.empty()) {
      const TokenFile& first = *result->files_.front();
      errors.Add(CheckSameTokenizer(file, first.path(), first.tokenizer()));
    }
    result->files_.push_back(*std::move(opened));
  }
  auto mix = Mix::Create(result->weights_);
  errors.Add(mix.status());
  if (!errors.empty()) return errors.ToStatus();
  result->mix_ = *std::move(mix);
  return result;
}

int64_t Dataset::SequencesOf(int source) const {
  return files_[static_cast<size_t>(source)]->tokens() / seq_len_;
}

int64_t Dataset::sequences() const {
  int64_t sum = 0;
  for (size_t i = 0; i < files_.size(); ++i) sum += SequencesOf(static_cast<int>(i));
  return sum;
}

SequenceRef Dataset::At(int64_t q) const {
  KRAIT_CHECK(q >= 0);
  const Mix::Use use = mix_.At(q);
  const int64_t count = SequencesOf(use.source);
  const int64_t epoch = use.n / count;
  // Sources and epochs share no permutation: epochs stay far below 2^40.
  const uint64_t step = static_cast<uint64_t>(use.source) << 40 | static_cast<uint64_t>(epoch);
  const KeyedPermutation order(static_cast<uint64_t>(count), seed_, RandomPurpose::kDataShuffle,
                               step);
  return {use.source, epoch, static_cast<int64_t>(order(static_cast<uint64_t>(use.n % count)))};
}

void Dataset::Prepare(int64_t count, TokenBatch* batch) const {
  KRAIT_CHECK(count >= 0);
  const auto size = static_cast<size_t>(count * seq_len_);
  batch->sequences = count;
  batch->seq_len = seq_len_;
  batch->tokens.resize(size);
  batch->targets.resize(size);
  batch->doc_start.resize(size);
  batch->target_count = 0;
}

absl::Status Dataset::ReadRow(int source, int64_t sequence, int64_t row, TokenBatch* batch) const {
  const TokenFile& file = *files_[static_cast<size_t>(source)];
  const int64_t begin = sequence * seq_len_;
  int32_t* tokens = batch->tokens.data() + row * seq_len_;
  int32_t* targets = batch->targets.data() + row * seq_len_;
  int32_t* doc_start = batch->doc_start.data() + row * seq_len_;
  KRAIT_RETURN_IF_ERROR(file.Read(begin, seq_len_, tokens));
  if (reset_at_documents_) {
    file.DocumentStarts(begin, seq_len_, doc_start);
  } else {
    std::fill(doc_start, doc_start + seq_len_, 0);
  }
  for (int64_t t = 0; t < seq_len_; ++t) {
    const bool has_target = t + 1 < seq_len_ && doc_start[t + 1] != t + 1;
    targets[t] = has_target ? tokens[t + 1] : -1;
    batch->target_count += has_target;
  }
  return absl::OkStatus();
}

absl::Status Dataset::ReadTraining(int64_t first, int64_t count, TokenBatch* batch) const {
  return ReadTraining(first, /*passes=*/1, /*stride=*/count, /*rows=*/count, batch);
}

absl::Status Dataset::ReadTraining(int64_t first, int64_t passes, int64_t stride, int64_t rows,
                                   TokenBatch* batch) const {
  Prepare(passes * rows, batch);
  for (int64_t i = 0; i < passes * rows; ++i) {
    const SequenceRef ref = At(first + i / rows * stride + i % rows);
    KRAIT_RETURN_IF_ERROR(ReadRow(ref.source, ref.sequence, i, batch));
  }
  return absl::OkStatus();
}

absl::Status Dataset::ReadStored(int64_t first, int64_t count, TokenBatch* batch) const {
  KRAIT_CHECK(first >= 0 && count >= 0 && first + count <= sequences());
  Prepare(count, batch);
  for (int64_t row = 0; row < count; ++row) {
    int64_t sequence = first + row;
    int source = 0;
    while (sequence >= SequencesOf(source)) sequence -= SequencesOf(source++);
    KRAIT_RETURN_IF_ERROR(ReadRow(source, sequence, row, batch));
  }
  return absl::OkStatus();
}

std::string Dataset::Fingerprint() const {
  std::string text;
  for (size_t i = 0; i < files_.size(); ++i) {
    absl::StrAppendFormat(&text, "%s weight %s content %s\n", files_[i]->path(),
                          PrintNumber(weights_[i]), files_[i]->content_hash());
  }
  return text;
}

}  // namespace krait
