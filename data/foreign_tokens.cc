#include "data/foreign_tokens.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "data/content_hash.h"

namespace krait {
namespace {

constexpr int64_t kPiece = int64_t{1} << 18;  // elements read at once
constexpr int64_t kSample = int64_t{1} << 20;
constexpr int64_t kIndexHead = 9 + 8 + 1 + 8 + 8;
constexpr int64_t kLlmcHead = 1024;

absl::Status Fault(const File& file, const std::string& what) {
  return Error(ExitCode::kData, file.path() + ": " + what);
}

template <typename T>
T ValueAt(const std::vector<char>& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

absl::Status HashRange(const File& file, int64_t begin, int64_t end, ContentHash* hash) {
  std::vector<char> piece;
  for (int64_t at = begin; at < end; at += kSample) {
    piece.resize(static_cast<size_t>(std::min(kSample, end - at)));
    KRAIT_RETURN_IF_ERROR(file.ReadAt(piece.data(), piece.size(), at));
    hash->AddTokens(piece.data(), piece.size());
  }
  return absl::OkStatus();
}

// An array of the index, read in pieces from its first element to its last.
template <typename T>
class Column {
 public:
  Column(const File& file, int64_t begin, int64_t count, int64_t piece = kPiece)
      : file_(file), begin_(begin), count_(count), most_(piece) {}

  // Element `i`; each not before the one asked for last.
  absl::StatusOr<T> At(int64_t i) {
    if (i >= first_ + static_cast<int64_t>(piece_.size())) {
      first_ = i;
      piece_.resize(static_cast<size_t>(std::min(most_, count_ - i)));
      KRAIT_RETURN_IF_ERROR(file_.ReadAt(piece_.data(), piece_.size() * sizeof(T),
                                         begin_ + i * static_cast<int64_t>(sizeof(T))));
    }
    return piece_[static_cast<size_t>(i - first_)];
  }

 private:
  const File& file_;
  int64_t begin_, count_, most_, first_ = 0;
  std::vector<T> piece_;
};

absl::StatusOr<DType> TypeOfCode(const File& index, int code) {
  switch (code) {
    case 1:
      return DType::kU8;
    case 4:  // i32, of which no id is negative
      return DType::kU32;
    case 8:
      return DType::kU16;
    default:
      return Fault(index, absl::StrFormat("ids of type code %d; 1 (u8), 4 (i32) and 8 (u16) are "
                                          "read",
                                          code));
  }
}

// The starts of documents as an index has them, where each bound of a document is one.
class MegatronStarts {
 public:
  MegatronStarts(File index, int64_t sequences, int64_t tokens, int64_t width)
      : index_(std::move(index)), sequences_(sequences), tokens_(tokens), width_(width) {}

  absl::Status Read(int64_t first, int64_t count, uint64_t* entries) const {
    std::vector<int64_t> bounds(static_cast<size_t>(count));
    KRAIT_RETURN_IF_ERROR(index_.ReadAt(bounds.data(), bounds.size() * sizeof(int64_t),
                                        kIndexHead + 12 * sequences_ + 8 * first));
    Column<int64_t> places(index_, kIndexHead + 4 * sequences_, sequences_, count);
    int64_t before = 0;
    for (size_t i = 0; i < bounds.size(); ++i) {
      if (bounds[i] < before || bounds[i] > sequences_) {
        return Fault(index_, "it changed while in use");
      }
      before = bounds[i];
      int64_t place = tokens_ * width_;
      if (before < sequences_) {
        KRAIT_ASSIGN_OR_RETURN(place, places.At(before));
      }
      entries[i] = static_cast<uint64_t>(place / width_);
    }
    return absl::OkStatus();
  }

 private:
  File index_;
  int64_t sequences_, tokens_, width_;
};

// With the starts of its documents in `starts`; null: they are left out, and `plain` says whether
// each bound is one.
absl::StatusOr<ForeignTokens> ScanMegatron(const std::string& stem, std::vector<uint64_t>* starts,
                                           bool* plain) {
  KRAIT_ASSIGN_OR_RETURN(const File index, File::OpenRead(stem + ".idx", ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, index.Size());
  std::vector<char> head(static_cast<size_t>(kIndexHead));
  if (size < kIndexHead) return Fault(index, "it ends within its head of 34 bytes");
  KRAIT_RETURN_IF_ERROR(index.ReadAt(head.data(), head.size(), 0));
  if (std::memcmp(head.data(), "MMIDIDX\0\0", 9) != 0) {
    return Fault(index, "no index of Megatron-LM: it does not begin with MMIDIDX");
  }
  if (const auto version = ValueAt<uint64_t>(head, 9); version != 1) {
    return Fault(index, absl::StrFormat("version %u; 1 is read", version));
  }
  ForeignTokens result;
  result.format = "Megatron";
  KRAIT_ASSIGN_OR_RETURN(result.dtype, TypeOfCode(index, head[17]));
  const auto sequences = ValueAt<uint64_t>(head, 18), bounds = ValueAt<uint64_t>(head, 26);
  // Each sequence has 12 bytes, each bound 8; what follows are modes of one byte per sequence.
  const auto rest = static_cast<uint64_t>(size - kIndexHead);
  const bool fits = sequences <= rest / 12 && bounds <= (rest - sequences * 12) / 8;
  const uint64_t needed = fits ? sequences * 12 + bounds * 8 : 0;
  if (!fits || (rest != needed && rest != needed + sequences)) {
    return Fault(index, absl::StrFormat("%d bytes do not hold the %u sequences and %u bounds of "
                                        "documents that it announces",
                                        size, sequences, bounds));
  }
  KRAIT_ASSIGN_OR_RETURN(result.ids, File::OpenRead(stem + ".bin", ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const int64_t id_bytes, result.ids.Size());
  const int64_t width = SizeOf(result.dtype);
  const auto count = static_cast<int64_t>(sequences);
  Column<int32_t> lengths(index, kIndexHead, count);
  Column<int64_t> places(index, kIndexHead + 4 * count, count);
  Column<int64_t> documents(index, kIndexHead + 12 * count, static_cast<int64_t>(bounds));
  int64_t next = 0;  // bound of a document
  int64_t last_start = -1;
  *plain = true;
  const auto bound = [&](int64_t sequence, int64_t tokens) -> absl::Status {
    while (next < static_cast<int64_t>(bounds)) {
      KRAIT_ASSIGN_OR_RETURN(const int64_t first, documents.At(next));
      if (first > sequence) return absl::OkStatus();
      if (first < sequence) {
        return Fault(index, absl::StrFormat("document %d begins at sequence %d, after one that "
                                            "begins later",
                                            next, first));
      }
      const bool is_new = tokens != last_start;
      *plain = *plain && is_new && (next > 0 || tokens == 0);
      if (starts != nullptr && is_new) starts->push_back(static_cast<uint64_t>(tokens));
      last_start = tokens;
      ++next;
    }
    return absl::OkStatus();
  };
  for (int64_t s = 0; s < count; ++s) {
    KRAIT_RETURN_IF_ERROR(bound(s, result.tokens));
    KRAIT_ASSIGN_OR_RETURN(const int32_t length, lengths.At(s));
    KRAIT_ASSIGN_OR_RETURN(const int64_t place, places.At(s));
    if (length < 0 || place != result.tokens * width) {
      return Fault(index, absl::StrFormat("sequence %d: %d ids at byte %d; those before it end at "
                                          "byte %d (other orders are not read)",
                                          s, length, place, result.tokens * width));
    }
    result.tokens += length;
    if (result.tokens > id_bytes / width) {
      return Fault(result.ids, absl::StrFormat("%d bytes are less than sequence %d of the index "
                                               "needs",
                                               id_bytes, s));
    }
  }
  KRAIT_RETURN_IF_ERROR(bound(count, result.tokens));
  if (next != static_cast<int64_t>(bounds)) {
    return Fault(index, absl::StrFormat("document %d begins after the last sequence", next));
  }
  if (result.tokens * width != id_bytes) {
    return Fault(result.ids, absl::StrFormat("%d bytes where the index has %d ids of %d bytes",
                                             id_bytes, result.tokens, width));
  }
  ContentHash hash;
  KRAIT_RETURN_IF_ERROR(HashRange(index, 0, size, &hash));
  KRAIT_RETURN_IF_ERROR(HashRange(result.ids, 0, std::min(kSample, id_bytes), &hash));
  KRAIT_RETURN_IF_ERROR(
      HashRange(result.ids, std::max<int64_t>(0, id_bytes - kSample), id_bytes, &hash));
  result.content_hash = hash.Finish("Megatron", static_cast<uint64_t>(id_bytes));
  *plain = *plain && last_start == result.tokens;
  if (*plain && starts == nullptr && bounds >= 2) {
    KRAIT_ASSIGN_OR_RETURN(File again, File::OpenRead(stem + ".idx", ExitCode::kData));
    const auto stored =
        std::make_shared<MegatronStarts>(std::move(again), count, result.tokens, width);
    KRAIT_ASSIGN_OR_RETURN(
        result.documents,
        DocumentTable::Open([stored](int64_t first, int64_t n,
                                     uint64_t* entries) { return stored->Read(first, n, entries); },
                            static_cast<int64_t>(bounds), result.tokens, stem + ".idx: documents"));
  }
  return result;
}

// From its starts: ids before the first document are one too, and so are all where there is none.
void KeepInMemory(std::vector<uint64_t> starts, ForeignTokens* file) {
  const auto tokens = static_cast<uint64_t>(file->tokens);
  if (starts.empty() || starts.front() != 0) starts.insert(starts.begin(), 0);
  if (starts.back() != tokens) starts.push_back(tokens);
  file->documents = DocumentTable::InMemory(std::move(starts));
}

absl::StatusOr<ForeignTokens> OpenMegatron(const std::string& stem) {
  bool plain = false;
  auto result = ScanMegatron(stem, nullptr, &plain);
  if (!result.ok() || result->tokens == 0 || result->documents.entries() > 0) return result;
  std::vector<uint64_t> starts;
  result = ScanMegatron(stem, &starts, &plain);
  if (result.ok() && result->tokens > 0) KeepInMemory(std::move(starts), &*result);
  return result;
}

template <typename T>
absl::Status ScanLlmc(T begins_document, ForeignTokens* file, std::vector<uint64_t>* starts,
                      ContentHash* hash) {
  std::vector<T> piece;
  T largest = 0;
  for (int64_t at = 0; at < file->tokens; at += kPiece) {
    piece.resize(static_cast<size_t>(std::min(kPiece, file->tokens - at)));
    const size_t bytes = piece.size() * sizeof(T);
    KRAIT_RETURN_IF_ERROR(
        file->ids.ReadAt(piece.data(), bytes, file->begin + at * static_cast<int64_t>(sizeof(T))));
    hash->AddTokens(piece.data(), bytes);
    for (size_t i = 0; i < piece.size(); ++i) {
      largest = std::max(largest, piece[i]);
      const uint64_t place = static_cast<uint64_t>(at) + i;
      if (piece[i] == begins_document || place == 0) starts->push_back(place);
    }
  }
  file->vocab_size = static_cast<int64_t>(largest) + 1;
  return absl::OkStatus();
}

absl::StatusOr<ForeignTokens> OpenLlmc(const std::string& path) {
  ForeignTokens result;
  result.format = "llm.c";
  KRAIT_ASSIGN_OR_RETURN(result.ids, File::OpenRead(path, ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, result.ids.Size());
  std::vector<char> head(12);
  const char* needed =
      "neither a file of llm.c (its first number would be 20240520 or 20240801) nor one of "
      "Megatron-LM (an .idx would lie beside it)";
  if (size < kLlmcHead) return Fault(result.ids, needed);
  KRAIT_RETURN_IF_ERROR(result.ids.ReadAt(head.data(), head.size(), 0));
  const auto magic = ValueAt<int32_t>(head, 0), version = ValueAt<int32_t>(head, 4);
  const bool small = magic == 20240520;
  if (!small && magic != 20240801) return Fault(result.ids, needed);
  if (version != (small ? 1 : 7)) {
    return Fault(result.ids, absl::StrFormat("version %d of llm.c's format; %d is read", version,
                                             small ? 1 : 7));
  }
  result.begin = kLlmcHead;
  result.dtype = small ? DType::kU16 : DType::kU32;
  result.tokens = ValueAt<int32_t>(head, 8);
  if (result.tokens < 0 || result.tokens * SizeOf(result.dtype) != size - kLlmcHead) {
    return Fault(result.ids, absl::StrFormat("%d bytes do not hold the %d ids that it announces",
                                             size, result.tokens));
  }
  ContentHash hash;
  std::vector<uint64_t> starts;
  KRAIT_RETURN_IF_ERROR(small ? ScanLlmc<uint16_t>(50256, &result, &starts, &hash)
                              : ScanLlmc<uint32_t>(128000, &result, &starts, &hash));
  if (result.tokens > 0) KeepInMemory(std::move(starts), &result);
  result.content_hash = hash.Finish("llm.c", static_cast<uint64_t>(magic));
  return result;
}

}  // namespace

bool IsForeignTokenFile(const std::string& path) {
  return absl::EndsWithIgnoreCase(path, ".idx") || absl::EndsWithIgnoreCase(path, ".bin");
}

absl::StatusOr<ForeignTokens> OpenForeignTokens(const std::string& path) {
  const std::string stem = path.substr(0, path.size() - 4);
  const bool index = absl::EndsWithIgnoreCase(path, ".idx") || Exists(stem + ".idx");
  auto opened = index ? OpenMegatron(stem) : OpenLlmc(path);
  if (opened.ok() && opened->tokens == 0) return Fault(opened->ids, "it holds no ids");
  return opened;
}

}  // namespace krait
