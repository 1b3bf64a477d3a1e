#include "data/token_file.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "data/content_hash.h"
#include "data/foreign_tokens.h"
#include "kernels/base/check.h"

namespace krait {
namespace {

constexpr int64_t kMaxTokenizerFile = 100'000'000;  // bytes
constexpr int64_t kVerifyPiece = int64_t{1} << 20;

// Index of the first of `count` values at `raw` that is not below `limit`; `count` when all are.
template <typename T>
int64_t FirstAtOrAbove(const void* raw, int64_t count, int64_t limit) {
  if (limit > static_cast<int64_t>(std::numeric_limits<T>::max())) return count;
  const auto* bytes = static_cast<const unsigned char*>(raw);
  for (int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    if (value >= static_cast<T>(limit)) return i;
  }
  return count;
}

// Widens `count` values at the end of the same memory: value i is read before anything is written
// at or beyond it.
template <typename T>
void WidenInPlace(int32_t* out, int64_t count) {
  const auto* raw = reinterpret_cast<const unsigned char*>(out) +
                    count * static_cast<int64_t>(sizeof(int32_t) - sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, raw + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    out[i] = static_cast<int32_t>(value);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenFile>> TokenFile::Open(const std::string& path) {
  if (IsForeignTokenFile(path)) return OpenForeign(path);
  if (!Exists(path) && Exists(path + ".idx")) {
    return Error(ExitCode::kData, "there is no " + path +
                                      "; a Megatron file is named with its "
                                      "ending: " +
                                      path + ".bin");
  }
  std::unique_ptr<TokenFile> result(new TokenFile);
  result->path_ = path;
  KRAIT_ASSIGN_OR_RETURN(result->file_, H5File::OpenRead(path, ExitCode::kData));
  KRAIT_RETURN_IF_ERROR(result->CheckAttributes());
  KRAIT_RETURN_IF_ERROR(result->ReadDocuments());
  return result;
}

absl::StatusOr<std::unique_ptr<TokenFile>> TokenFile::OpenForeign(const std::string& path) {
  KRAIT_ASSIGN_OR_RETURN(ForeignTokens foreign, OpenForeignTokens(path));
  std::unique_ptr<TokenFile> result(new TokenFile);
  result->path_ = path;
  result->format_ = std::move(foreign.format);
  result->foreign_ = std::move(foreign.ids);
  result->foreign_begin_ = foreign.begin;
  result->dtype_ = foreign.dtype;
  result->tokens_ = foreign.tokens;
  result->vocab_size_ = foreign.vocab_size;
  result->documents_ = std::move(foreign.documents);
  result->content_hash_ = std::move(foreign.content_hash);
  return result;
}

absl::StatusOr<std::unique_ptr<TokenFile>> TokenFile::Synthetic(const SyntheticSpec& spec,
                                                                int64_t seq_len,
                                                                int64_t vocab_size) {
  KRAIT_RETURN_IF_ERROR(CheckSynthetic(spec, seq_len, vocab_size));
  std::unique_ptr<TokenFile> result(new TokenFile);
  result->path_ = spec.Name();
  result->format_ = "task";
  result->synthetic_.emplace(spec, seq_len, vocab_size);
  result->dtype_ = DType::kU32;
  result->tokens_ = result->synthetic_->tokens();
  result->vocab_size_ = vocab_size;
  result->content_hash_ = result->synthetic_->Hash();
  std::vector<uint64_t> starts;
  for (int64_t k = 0; k <= spec.sequences; ++k) {
    starts.push_back(static_cast<uint64_t>(k * seq_len));
  }
  result->documents_ = DocumentTable::InMemory(std::move(starts));
  return result;
}

absl::Status TokenFile::CheckAttributes() {
  KRAIT_ASSIGN_OR_RETURN(const uint64_t version, file_.ReadIntAttribute("format_version"));
  if (version != kTokenFileVersion) {
    return Error(ExitCode::kData, absl::StrFormat("%s: format_version is %u; this krait reads %u",
                                                  path_, version, kTokenFileVersion));
  }
  KRAIT_ASSIGN_OR_RETURN(tokenizer_, file_.ReadStringAttribute("tokenizer"));
  if (tokenizer_.empty()) {
    return Error(ExitCode::kData, path_ + ": attribute tokenizer is empty");
  }
  KRAIT_ASSIGN_OR_RETURN(const uint64_t vocab, file_.ReadIntAttribute("vocab_size"));
  if (vocab == 0 || vocab > std::numeric_limits<int32_t>::max()) {
    return Error(ExitCode::kData,
                 absl::StrFormat("%s: vocab_size is %u; 1 to %d is possible", path_, vocab,
                                 std::numeric_limits<int32_t>::max()));
  }
  vocab_size_ = static_cast<int64_t>(vocab);
  KRAIT_ASSIGN_OR_RETURN(content_hash_, file_.ReadStringAttribute("content_hash"));
  if (content_hash_.size() != 16 ||
      content_hash_.find_first_not_of("0123456789abcdef") != std::string::npos) {
    return Error(ExitCode::kData, path_ + ": content_hash is not 16 hexadecimal digits");
  }
  const auto optional = [&](const char* name, std::optional<int64_t>* value) -> absl::Status {
    if (!file_.HasAttribute(name)) return absl::OkStatus();
    KRAIT_ASSIGN_OR_RETURN(const uint64_t found, file_.ReadIntAttribute(name));
    if (found > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Error(ExitCode::kData, absl::StrFormat("%s: %s is %u", path_, name, found));
    }
    *value = static_cast<int64_t>(found);
    return absl::OkStatus();
  };
  KRAIT_RETURN_IF_ERROR(optional("end_token", &end_token_));
  KRAIT_RETURN_IF_ERROR(optional("text_bytes", &text_bytes_));
  if (file_.HasAttribute("tokenizer_files")) {
    KRAIT_ASSIGN_OR_RETURN(tokenizer_files_, file_.ReadStringAttribute("tokenizer_files"));
  }
  H5File::Info info;
  KRAIT_ASSIGN_OR_RETURN(info, file_.Stat("tokens"));
  if (info.dtype != DType::kU8 && info.dtype != DType::kU16 && info.dtype != DType::kU32) {
    return Error(ExitCode::kData, absl::StrFormat("%s: /tokens is %s; u8, u16 or u32 is needed",
                                                  path_, Name(info.dtype)));
  }
  dtype_ = info.dtype;
  tokens_ = info.elements;
  if (tokens_ == 0) return Error(ExitCode::kData, path_ + ": /tokens is empty");
  if (vocab_size_ > int64_t{1} << (8 * SizeOf(dtype_))) {
    return Error(ExitCode::kData, absl::StrFormat("%s: vocab_size %d does not fit /tokens of %s",
                                                  path_, vocab_size_, Name(dtype_)));
  }
  return absl::OkStatus();
}

std::optional<double> TokenFile::tokens_per_byte() const {
  if (tokenizer_ == "bytes") return 1.0;
  if (!text_bytes_.has_value() || *text_bytes_ == 0) return std::nullopt;
  return static_cast<double>(tokens_) / static_cast<double>(*text_bytes_);
}

absl::StatusOr<TokenizerFiles> TokenFile::ReadTokenizerFiles() const {
  TokenizerFiles files;
  for (const std::string& name :
       std::vector<std::string>(absl::StrSplit(tokenizer_files_, '\n', absl::SkipEmpty()))) {
    if (!IsTokenizerFile(name)) {
      return Error(ExitCode::kData,
                   path_ + ": tokenizer_files names " + name + ", which is no file of a tokenizer");
    }
    const std::string dataset = "tokenizer_file:" + name;
    H5File::Info info;
    KRAIT_ASSIGN_OR_RETURN(info, file_.Stat(dataset));
    if (info.dtype != DType::kU8 || info.elements > kMaxTokenizerFile) {
      return Error(
          ExitCode::kData,
          absl::StrFormat("%s: /%s is %d elements of %s; at most %d of u8 are possible", path_,
                          dataset, info.elements, Name(info.dtype), kMaxTokenizerFile));
    }
    std::string& content = files[name];
    content.resize(static_cast<size_t>(info.elements));
    KRAIT_RETURN_IF_ERROR(file_.Read(dataset, 0, info.elements, content.data()));
  }
  return files;
}

absl::Status KeepTokenizer(const TokenFile& file, const std::string& folder) {
  KRAIT_ASSIGN_OR_RETURN(const TokenizerFiles files, file.ReadTokenizerFiles());
  if (files.empty()) return absl::OkStatus();
  return WriteTokenizerFiles(files, folder, ExitCode::kCannotSave);
}

absl::Status TokenFile::ReadDocuments() {
  H5File::Info info;
  KRAIT_ASSIGN_OR_RETURN(info, file_.Stat("documents"));
  if (info.dtype != DType::kU64 || info.elements < 2) {
    return Error(ExitCode::kData,
                 absl::StrFormat("%s: /documents has %d elements of %s; at least 2 of u64 are "
                                 "needed",
                                 path_, info.elements, Name(info.dtype)));
  }
  KRAIT_ASSIGN_OR_RETURN(documents_, DocumentTable::Open(
                                         [this](int64_t first, int64_t count, uint64_t* entries) {
                                           return file_.Read("documents", first, count, entries);
                                         },
                                         info.elements, tokens_, path_ + ": /documents"));
  return absl::OkStatus();
}

absl::Status TokenFile::CheckIds(const void* raw, int64_t begin, int64_t count) const {
  // Ids are i32 later on.
  const int64_t limit = vocab_size_ > 0 ? vocab_size_ : std::numeric_limits<int32_t>::max();
  int64_t bad = count;
  uint32_t id = 0;
  switch (dtype_) {
    case DType::kU8:
      bad = FirstAtOrAbove<uint8_t>(raw, count, limit);
      break;
    case DType::kU16:
      bad = FirstAtOrAbove<uint16_t>(raw, count, limit);
      break;
    default:
      bad = FirstAtOrAbove<uint32_t>(raw, count, limit);
  }
  if (bad == count) return absl::OkStatus();
  const int64_t size = SizeOf(dtype_);
  std::memcpy(&id, static_cast<const unsigned char*>(raw) + bad * size, static_cast<size_t>(size));
  return Error(ExitCode::kData,
               absl::StrFormat("%s: /tokens[%d] is %u; ids are below vocab_size %d", path_,
                               begin + bad, id, limit));
}

absl::Status TokenFile::ReadStored(int64_t begin, int64_t count, void* raw) const {
  if (foreign_.fd() < 0) return file_.Read("tokens", begin, count, raw);
  const int64_t size = SizeOf(dtype_);
  return foreign_.ReadAt(raw, static_cast<size_t>(count * size), foreign_begin_ + begin * size);
}

absl::Status TokenFile::Read(int64_t begin, int64_t count, int32_t* out) const {
  KRAIT_CHECK(begin >= 0 && count >= 0 && count <= tokens_ && begin <= tokens_ - count);
  if (synthetic_.has_value()) {
    synthetic_->Read(begin, count, out, nullptr);
    return absl::OkStatus();
  }
  auto* raw = reinterpret_cast<unsigned char*>(out) + count * (4 - SizeOf(dtype_));
  KRAIT_RETURN_IF_ERROR(ReadStored(begin, count, raw));
  KRAIT_RETURN_IF_ERROR(CheckIds(raw, begin, count));
  if (dtype_ == DType::kU8) WidenInPlace<uint8_t>(out, count);
  if (dtype_ == DType::kU16) WidenInPlace<uint16_t>(out, count);
  return absl::OkStatus();
}

void TokenFile::Counts(int64_t begin, int64_t count, uint8_t* counts) const {
  if (synthetic_.has_value()) synthetic_->Read(begin, count, nullptr, counts);
}

absl::Status TokenFile::DocumentStarts(int64_t begin, int64_t count, int32_t* doc_start) const {
  KRAIT_CHECK(begin >= 0 && count >= 0 && count <= tokens_ && begin <= tokens_ - count);
  KRAIT_RETURN_IF_ERROR(documents_.Within(begin, begin + count, &starts_));
  auto next = starts_.begin();
  int32_t start = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (next != starts_.end() && static_cast<uint64_t>(begin + i) == *next) {
      start = static_cast<int32_t>(i);
      ++next;
    }
    doc_start[i] = start;
  }
  return absl::OkStatus();
}

absl::Status TokenFile::Verify() const {
  if (synthetic_.has_value()) return absl::OkStatus();  // nothing is stored
  ContentHash hash;
  std::vector<unsigned char> raw(
      static_cast<size_t>(std::min(tokens_, kVerifyPiece) * SizeOf(dtype_)));
  for (int64_t begin = 0; begin < tokens_; begin += kVerifyPiece) {
    const int64_t count = std::min(kVerifyPiece, tokens_ - begin);
    KRAIT_RETURN_IF_ERROR(ReadStored(begin, count, raw.data()));
    KRAIT_RETURN_IF_ERROR(CheckIds(raw.data(), begin, count));
    hash.AddTokens(raw.data(), static_cast<size_t>(count * SizeOf(dtype_)));
  }
  if (foreign_.fd() >= 0) return absl::OkStatus();
  KRAIT_RETURN_IF_ERROR(documents_.ForEachPiece([&](const std::vector<uint64_t>& piece) {
    hash.AddDocuments(piece);
    return true;
  }));
  const std::string found = hash.Finish(tokenizer_, static_cast<uint64_t>(vocab_size_));
  if (found != content_hash_) {
    return Error(ExitCode::kData, path_ + ": the content has hash " + found +
                                      ", but content_hash is " + content_hash_ +
                                      ": the file was changed after it was written");
  }
  return absl::OkStatus();
}

}  // namespace krait
