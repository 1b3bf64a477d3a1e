#include "data/sampler.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/number.h"
#include "kernels/base/random.h"

namespace krait {

absl::Status CheckSameTokenizer(const TokenFile& file, const std::string& other,
                                const std::string& tokenizer) {
  if (file.tokenizer() == tokenizer || file.tokenizer().empty() || tokenizer.empty()) {
    return absl::OkStatus();
  }
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
    // With the place in the config, where there is one.
    const auto add = [&](const absl::Status& fault) {
      if (fault.ok()) return;
      const std::string place = source.named_at.empty() ? "" : source.named_at + ": ";
      errors.Add(ExitCodeOf(fault), place + MessageOf(fault));
    };
    auto opened = source.synthetic.has_value()
                      ? TokenFile::Synthetic(*source.synthetic, seq_len, model_vocab)
                      : TokenFile::Open(source.path);
    if (!opened.ok()) {
      add(opened.status());
      continue;
    }
    (*opened)->ExpectVocabulary(model_vocab);
    const TokenFile& file = **opened;
    if (file.tokens() < seq_len) {
      add(Error(ExitCode::kData,
                absl::StrFormat("%s: %d tokens are less than one sequence of seq_len %d",
                                source.path, file.tokens(), seq_len)));
    } else if (const auto targets = result->HasTargets(file); !targets.ok()) {
      add(targets.status());
    } else if (!*targets) {
      add(Error(ExitCode::kData,
                absl::StrFormat("%s: no token of its sequences has a target: each starts a "
                                "document (data.reset_at_documents)",
                                source.path)));
    }
    if (file.vocab_size() > model_vocab) {
      add(Error(ExitCode::kData,
                absl::StrFormat("%s: its vocab_size %d is above the model's vocab_size %d",
                                source.path, file.vocab_size(), model_vocab)));
    }
    for (const auto& known : result->files_) {
      if (known->tokenizer().empty()) continue;
      add(CheckSameTokenizer(file, known->path(), known->tokenizer()));
      break;
    }
    result->files_.push_back(*std::move(opened));
  }
  errors.Add(Mix::Create(result->weights_).status());
  if (!errors.empty()) return errors.ToStatus();
  KRAIT_ASSIGN_OR_RETURN(Continuation beginning, result->ContinueFrom(DataPosition()));
  result->Seek(std::move(beginning));
  return result;
}

absl::StatusOr<Continuation> Dataset::ContinueFrom(const DataPosition& saved) const {
  std::vector<SourceFile> files;
  for (size_t i = 0; i < files_.size(); ++i) {
    files.push_back(
        {files_[i]->path(), files_[i]->content_hash(), weights_[i], files_[i]->tokens()});
  }
  return krait::ContinueFrom(saved, files, seq_len_, seed_);
}

void Dataset::Seek(Continuation continuation) {
  start_ = std::move(continuation);
  uses_ = start_.mix.Uses(start_.position.sequences - start_.position.mix_start);
}

int64_t Dataset::SequencesOf(int source) const {
  return files_[static_cast<size_t>(source)]->tokens() / seq_len_;
}

absl::StatusOr<bool> Dataset::HasTargets(const TokenFile& file) const {
  const int64_t used = file.tokens() / seq_len_ * seq_len_;
  // Of positions before `end`, those that do not begin a sequence.
  const auto inner = [&](int64_t end) { return end - (end + seq_len_ - 1) / seq_len_; };
  if (!reset_at_documents_) return inner(used) > 0;
  int64_t starts = 0;  // of documents, within sequences
  bool found = false;
  KRAIT_RETURN_IF_ERROR(file.document_table().ForEachPiece([&](const std::vector<uint64_t>& piece) {
    for (const uint64_t entry : piece) {
      const int64_t start = std::min(static_cast<int64_t>(entry), used);
      found = inner(start) > starts;
      if (found || start == used) return false;
      starts += start % seq_len_ != 0;
    }
    return true;
  }));
  return found;
}

int64_t Dataset::sequences() const {
  int64_t sum = 0;
  for (size_t i = 0; i < files_.size(); ++i) sum += SequencesOf(static_cast<int>(i));
  return sum;
}

SequenceRef Dataset::At(int64_t q) const {
  KRAIT_CHECK(q >= start_.position.sequences);
  const Mix::Use use = start_.mix.At(q - start_.position.mix_start);
  const auto i = static_cast<size_t>(use.source);
  const SourcePosition& source = start_.position.sources[i];
  const int file = start_.files[i];
  const int64_t count = SequencesOf(file);
  const int64_t n = source.place + use.n - uses_[i];
  const int64_t epoch = source.epoch + n / count;
  // Sources and epochs share no permutation: epochs stay far below 2^40.
  const uint64_t step = static_cast<uint64_t>(source.key) << 40 | static_cast<uint64_t>(epoch);
  // Each shuffle permutes what is left from its place on, the last one first.
  int64_t sequence = n % count;
  const auto permute = [&](const Shuffle& shuffle, int64_t from) {
    if (sequence < from) return;
    const KeyedPermutation order(static_cast<uint64_t>(count - from), shuffle.seed,
                                 RandomPurpose::kDataShuffle, step);
    sequence = from + static_cast<int64_t>(order(static_cast<uint64_t>(sequence - from)));
  };
  if (epoch > source.epoch) {
    permute(source.shuffles.back(), 0);
  } else {
    for (auto shuffle = source.shuffles.rbegin(); shuffle != source.shuffles.rend(); ++shuffle) {
      permute(*shuffle, shuffle->from);
    }
  }
  return {file, epoch, sequence};
}

DataPosition Dataset::PositionAt(int64_t q) const {
  KRAIT_CHECK(q >= start_.position.sequences);
  DataPosition position = start_.position;
  position.sequences = q;
  const std::vector<int64_t> uses = start_.mix.Uses(q - position.mix_start);
  for (size_t i = 0; i < uses.size(); ++i) {
    SourcePosition& source = position.sources[i];
    const int64_t count = SequencesOf(start_.files[i]);
    const int64_t n = source.place + uses[i] - uses_[i];
    if (n >= count) source.shuffles = {{0, source.shuffles.back().seed}};
    source.epoch += n / count;
    source.place = n % count;
  }
  return position;
}

std::vector<std::string> Dataset::StandingAt(int64_t q) const {
  const DataPosition position = PositionAt(q);
  std::vector<std::string> lines;
  for (size_t i = 0; i < start_.files.size(); ++i) {
    const SourcePosition& source = position.sources[i];
    const int64_t count = SequencesOf(start_.files[i]);
    lines.push_back(absl::StrFormat("%s: epoch %s (%s of %s sequences), %.4g %% of the mix",
                                    source.path, PrintEpoch(source.epoch, source.place, count),
                                    PrintGrouped(source.place), PrintGrouped(count),
                                    100 * static_cast<double>(start_.mix.shares()[i]) /
                                        static_cast<double>(start_.mix.period())));
  }
  return lines;
}

void TokenBatch::Resize(int64_t rows, int64_t row_tokens) {
  KRAIT_CHECK(rows >= 0);
  const auto size = static_cast<size_t>(rows * row_tokens);
  sequences = rows;
  seq_len = row_tokens;
  tokens.resize(size);
  targets.resize(size);
  doc_start.resize(size);
  target_count = 0;
}

void TokenBatch::FillUp(int64_t rows) {
  const auto size = static_cast<size_t>(std::max(rows, sequences) * seq_len);
  sequences = std::max(rows, sequences);
  tokens.resize(size, 0);
  targets.resize(size, -1);
  doc_start.resize(size, 0);
}

absl::Status Dataset::ReadRow(int source, int64_t sequence, int64_t row, TokenBatch* batch) const {
  const TokenFile& file = *files_[static_cast<size_t>(source)];
  const int64_t begin = sequence * seq_len_;
  int32_t* tokens = batch->tokens.data() + row * seq_len_;
  int32_t* targets = batch->targets.data() + row * seq_len_;
  int32_t* doc_start = batch->doc_start.data() + row * seq_len_;
  KRAIT_RETURN_IF_ERROR(file.Read(begin, seq_len_, tokens));
  if (reset_at_documents_) {
    KRAIT_RETURN_IF_ERROR(file.DocumentStarts(begin, seq_len_, doc_start));
  } else {
    std::fill(doc_start, doc_start + seq_len_, 0);
  }
  std::vector<uint8_t> counts(static_cast<size_t>(seq_len_), 1);
  file.Counts(begin, seq_len_, counts.data());
  for (int64_t t = 0; t < seq_len_; ++t) {
    const int64_t context = t + 1 - doc_start[t], token = begin + t + 1;
    const bool has_target = t + 1 < seq_len_ && doc_start[t + 1] != t + 1 &&
                            counts[static_cast<size_t>(t + 1)] != 0 &&
                            context >= only_.context_begin && context < only_.context_end &&
                            token >= only_.token_begin && token < only_.token_end;
    targets[t] = has_target ? tokens[t + 1] : -1;
    batch->target_count += has_target;
  }
  return absl::OkStatus();
}

absl::Status Dataset::ReadTraining(int64_t first, int64_t count, TokenBatch* batch) const {
  return ReadTraining(first, /*passes=*/1, /*stride=*/count, /*rows=*/count, batch);
}

absl::Status Dataset::ReadTraining(int64_t first, int64_t passes, int64_t stride, int64_t rows,
                                   TokenBatch* batch, const std::atomic<bool>* cancelled) const {
  batch->Resize(passes * rows, seq_len_);
  for (int64_t i = 0; i < passes * rows; ++i) {
    if (cancelled != nullptr && *cancelled) return absl::OkStatus();
    const SequenceRef ref = At(first + i / rows * stride + i % rows);
    KRAIT_RETURN_IF_ERROR(ReadRow(ref.source, ref.sequence, i, batch));
  }
  return absl::OkStatus();
}

absl::Status Dataset::ReadStored(int64_t first, int64_t count, TokenBatch* batch) const {
  KRAIT_CHECK(first >= 0 && count >= 0 && first + count <= sequences());
  batch->Resize(count, seq_len_);
  for (int64_t row = 0; row < count; ++row) {
    int64_t sequence = first + row;
    int source = 0;
    while (sequence >= SequencesOf(source)) sequence -= SequencesOf(source++);
    KRAIT_RETURN_IF_ERROR(ReadRow(source, sequence, row, batch));
  }
  return absl::OkStatus();
}

std::string Dataset::tokenizer() const {
  for (const auto& file : files_) {
    if (!file->tokenizer().empty()) return file->tokenizer();
  }
  return "";
}

std::string Dataset::Fingerprint() const {
  std::string text;
  for (size_t i = 0; i < files_.size(); ++i) {
    absl::StrAppendFormat(&text, "%s weight %s content %s\n", files_[i]->path(),
                          PrintNumber(weights_[i]), files_[i]->content_hash());
  }
  return text;
}

std::vector<std::string> Dataset::Contents() const {
  std::vector<std::string> contents;
  for (const auto& file : files_) contents.push_back(file->content_hash());
  return contents;
}

std::vector<std::string> Dataset::Repeated() const {
  std::vector<std::string> lines;
  for (size_t i = 0; i < files_.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (files_[j]->content_hash() != files_[i]->content_hash()) continue;
      lines.push_back(files_[i]->path() == files_[j]->path()
                          ? files_[i]->path() + " is named twice"
                          : files_[i]->path() + " holds the same tokens as " + files_[j]->path());
      break;
    }
  }
  return lines;
}

}  // namespace krait
