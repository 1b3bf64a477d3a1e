#include "data/records.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "data/json_texts.h"
#include "kernels/base/file.h"

namespace krait {
namespace {

constexpr int64_t kPiece = int64_t{1} << 20;  // bytes of a text in memory at once

}  // namespace

absl::StatusOr<InputKind> RecordReader::Read(int64_t skip) {
  skip_ = skip;
  if (HasEnding(input_.path, ".jsonl") || HasEnding(input_.path, ".ndjson")) {
    KRAIT_RETURN_IF_ERROR(ReadLines());
    return InputKind::kRecords;
  }
  if (HasEnding(input_.path, ".json")) return ReadJson();
  return ReadText();
}

absl::Status RecordReader::Hand(Record record) {
  if (++number_ <= skip_) return absl::OkStatus();
  record.number = number_;
  return take_(std::move(record));
}

absl::StatusOr<InputKind> RecordReader::NotText(const std::string& why) const {
  if (input_.named) return Error(ExitCode::kData, input_.path + why);
  return InputKind::kNoText;
}

absl::StatusOr<InputKind> RecordReader::ReadText() {
  if (input_.named && IsCompressed(input_.path)) {
    return Error(
        ExitCode::kData,
        input_.path +
            ": of compressed files only .jsonl.gz, .jsonl.zst, .json.gz and .json.zst are read");
  }
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(input_.path, ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
  if (size == 0) return NotText(" is empty");
  if (!pieces_ && size > LineReader::kMaxLine) {
    return Error(ExitCode::kData, input_.path +
                                      " is a text of more than 1 GiB, which only the byte "
                                      "tokenizer takes: cut it into documents");
  }
  // The whole file is known to be text before any of it is handed on.
  std::string text;
  for (int64_t begin = 0; begin < size; begin += kPiece) {
    text.resize(static_cast<size_t>(std::min(kPiece, size - begin)));
    KRAIT_RETURN_IF_ERROR(file.ReadAt(text.data(), text.size(), begin));
    if (const size_t nul = text.find('\0'); nul != std::string::npos) {
      return NotText(
          absl::StrFormat(" is not text: byte %u is NUL", static_cast<uint64_t>(begin) + nul));
    }
    KRAIT_RETURN_IF_ERROR(tell_(0));
  }
  const int64_t most = pieces_ ? kPiece : size;
  for (int64_t begin = 0; begin < size; begin += most) {
    Record record;
    record.content.resize(static_cast<size_t>(std::min(most, size - begin)));
    record.ends_document = begin + most >= size;
    KRAIT_RETURN_IF_ERROR(file.ReadAt(record.content.data(), record.content.size(), begin));
    KRAIT_RETURN_IF_ERROR(Hand(std::move(record)));
    KRAIT_RETURN_IF_ERROR(tell_(std::min(begin + most, size)));
  }
  return InputKind::kText;
}

absl::Status RecordReader::ReadLines() {
  KRAIT_ASSIGN_OR_RETURN(LineReader reader, LineReader::Open(input_.path));
  while (true) {
    Record record;
    record.kind = RecordKind::kLine;
    KRAIT_ASSIGN_OR_RETURN(const bool more, reader.Next(&record.content));
    if (!more) return absl::OkStatus();
    KRAIT_RETURN_IF_ERROR(Hand(std::move(record)));
    KRAIT_RETURN_IF_ERROR(tell_(reader.bytes_read()));
  }
}

absl::StatusOr<InputKind> RecordReader::ReadJson() {
  KRAIT_ASSIGN_OR_RETURN(const auto source, OpenByteSource(input_.path));
  bool any = false;
  const absl::Status status = ReadJsonTexts(
      source.get(), input_.path,
      [&](const std::string& text) {
        any = true;
        Record record;
        record.kind = RecordKind::kJsonText;
        record.content = text;
        return Hand(std::move(record));
      },
      [&](int64_t /*bytes*/) { return tell_(source->bytes_read()); });
  // In a folder such a file may be anything: without a record at its start it is a text.
  if (!status.ok() && !input_.named && !any && ExitCodeOf(status) == ExitCode::kData) {
    if (IsCompressed(input_.path)) return InputKind::kNoText;
    KRAIT_ASSIGN_OR_RETURN(const InputKind kind, ReadText());
    return kind == InputKind::kText ? InputKind::kPlainJson : kind;
  }
  KRAIT_RETURN_IF_ERROR(status);
  return InputKind::kRecords;
}

}  // namespace krait
