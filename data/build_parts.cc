#include "data/build_parts.h"

#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/base/crc32c.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

constexpr ExitCode kCode = ExitCode::kCannotSave;
constexpr size_t kBuffer = size_t{4} << 20;
constexpr int64_t kMaxJournal = int64_t{256} << 20;

// The counts of a mark by name, the same list for both directions.
template <typename Visit>
void VisitCounts(BuildMark* mark, const Visit& visit) {
  BuildReport& report = mark->report;
  const std::pair<const char*, int64_t*> counts[] = {
      {"input", &mark->input},
      {"records", &mark->records},
      {"input_documents", &mark->input_documents},
      {"tokens", &mark->tokens},
      {"documents", &mark->documents},
      {"files", &report.files},
      {"linked_files", &report.linked_files},
      {"plain_json_files", &report.plain_json_files},
      {"skipped_files", &report.skipped_files},
      {"skipped_documents", &report.skipped_documents},
      {"bad_records", &report.bad_records},
      {"text_bytes", &report.text_bytes}};
  for (const auto& [name, count] : counts) visit(name, count);
}

std::string Print(const BuildMark& mark) {
  BuildMark copy = mark;
  nlohmann::ordered_json json;
  VisitCounts(&copy, [&](const char* name, const int64_t* count) { json[name] = *count; });
  json["bad"] = mark.report.bad;
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// False for what no mark of this version is.
bool Parse(const std::string& line, BuildMark* mark) {
  const nlohmann::json json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("bad")) return false;
  bool whole = json["bad"].is_array();
  VisitCounts(mark, [&](const char* name, int64_t* count) {
    whole = whole && json.contains(name) && json[name].is_number_integer();
    if (whole) *count = json[name].get<int64_t>();
    whole = whole && *count >= 0;
  });
  if (!whole) return false;
  for (const auto& place : json["bad"]) {
    if (place.is_string()) mark->report.bad.push_back(place.get<std::string>());
  }
  return true;
}

absl::Status Cut(const File& file, int64_t bytes) {
  if (ftruncate(file.fd(), bytes) == 0) return absl::OkStatus();
  return Error(kCode, "cannot cut " + file.path() + ": " + std::strerror(errno));
}

}  // namespace

absl::StatusOr<BuildParts> BuildParts::Open(const std::string& folder, const std::string& key,
                                            BuildMark* mark) {
  BuildParts parts;
  parts.folder_ = folder;
  KRAIT_RETURN_IF_ERROR(MakeDirectories(folder, kCode));
  KRAIT_ASSIGN_OR_RETURN(parts.lock_, File::Create(folder + "/lock", /*exclusive=*/false, kCode));
  if (flock(parts.lock_.fd(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    return Error(ExitCode::kConfig, folder + ": another process builds this token file");
  }
  const absl::Status resumed = parts.Resume(key, mark);
  if (!resumed.ok()) {
    *mark = BuildMark();
    KRAIT_RETURN_IF_ERROR(parts.Restart(key));
  }
  return parts;
}

absl::Status BuildParts::Restart(const std::string& key) {
  KRAIT_ASSIGN_OR_RETURN(journal_, File::Create(folder_ + "/journal", false, kCode));
  KRAIT_ASSIGN_OR_RETURN(tokens_, File::Create(folder_ + "/tokens", false, kCode));
  KRAIT_ASSIGN_OR_RETURN(documents_, File::Create(folder_ + "/documents", false, kCode));
  token_bytes_ = document_count_ = journal_bytes_ = 0;
  any_mark_ = false;
  return WriteLine(key);
}

// Not OK where there is nothing to go on from.
absl::Status BuildParts::Resume(const std::string& key, BuildMark* mark) {
  KRAIT_ASSIGN_OR_RETURN(const std::string text,
                         ReadFile(folder_ + "/journal", kMaxJournal, kCode));
  bool first = true;
  int64_t sound = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find('\n', at);
    if (end == std::string::npos || end - at < 9) break;
    const std::string line = text.substr(at + 9, end - at - 9);
    if (text.substr(at, 8) != absl::StrFormat("%08x", Crc32c(line.data(), line.size()))) break;
    BuildMark next;
    if (first ? line != key : !Parse(line, &next)) break;
    if (!first) {
      *mark = std::move(next);
      any_mark_ = true;
    }
    first = false;
    at = end + 1;
    sound = static_cast<int64_t>(at);
  }
  if (!any_mark_) return absl::NotFoundError("no mark");
  const nlohmann::json head = nlohmann::json::parse(key);
  token_bytes_ = mark->tokens * head["token_bytes"].get<int64_t>();
  document_count_ = mark->documents;
  journal_bytes_ = sound;
  const auto open = [&](const char* name, int64_t bytes, File* file) -> absl::Status {
    KRAIT_ASSIGN_OR_RETURN(*file, File::OpenWrite(folder_ + "/" + name, kCode));
    KRAIT_ASSIGN_OR_RETURN(const int64_t size, file->Size());
    if (size < bytes) return Error(kCode, file->path() + " is shorter than its journal says");
    return Cut(*file, bytes);
  };
  KRAIT_RETURN_IF_ERROR(open("journal", journal_bytes_, &journal_));
  KRAIT_RETURN_IF_ERROR(open("tokens", token_bytes_, &tokens_));
  return open("documents", document_count_ * int64_t{8}, &documents_);
}

absl::Status BuildParts::WriteLine(const std::string& json) {
  const std::string line = absl::StrFormat("%08x %s\n", Crc32c(json.data(), json.size()), json);
  KRAIT_RETURN_IF_ERROR(journal_.WriteAt(line.data(), line.size(), journal_bytes_));
  journal_bytes_ += static_cast<int64_t>(line.size());
  return journal_.Sync();
}

absl::Status BuildParts::FlushTokens() {
  KRAIT_RETURN_IF_ERROR(tokens_.WriteAt(token_buffer_.data(), token_buffer_.size(), token_bytes_));
  token_bytes_ += static_cast<int64_t>(token_buffer_.size());
  token_buffer_.clear();
  return absl::OkStatus();
}

absl::Status BuildParts::FlushDocuments() {
  KRAIT_RETURN_IF_ERROR(documents_.WriteAt(document_buffer_.data(), document_buffer_.size() * 8,
                                           document_count_ * int64_t{8}));
  document_count_ += static_cast<int64_t>(document_buffer_.size());
  document_buffer_.clear();
  return absl::OkStatus();
}

absl::Status BuildParts::AppendTokens(const void* data, size_t bytes) {
  token_buffer_.append(static_cast<const char*>(data), bytes);
  return token_buffer_.size() < kBuffer ? absl::OkStatus() : FlushTokens();
}

absl::Status BuildParts::AppendDocument(uint64_t tokens) {
  document_buffer_.push_back(tokens);
  return document_buffer_.size() * 8 < kBuffer ? absl::OkStatus() : FlushDocuments();
}

absl::Status BuildParts::Commit(const BuildMark& mark) {
  KRAIT_RETURN_IF_ERROR(FlushTokens());
  KRAIT_RETURN_IF_ERROR(FlushDocuments());
  KRAIT_RETURN_IF_ERROR(tokens_.Sync());
  KRAIT_RETURN_IF_ERROR(documents_.Sync());
  KRAIT_RETURN_IF_ERROR(WriteLine(Print(mark)));
  if (!any_mark_) KRAIT_RETURN_IF_ERROR(SyncDirectory(folder_, kCode));
  any_mark_ = true;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint64_t>> BuildParts::Documents() {
  KRAIT_RETURN_IF_ERROR(FlushTokens());
  KRAIT_RETURN_IF_ERROR(FlushDocuments());
  std::vector<uint64_t> tokens(static_cast<size_t>(document_count_));
  KRAIT_RETURN_IF_ERROR(documents_.ReadAt(tokens.data(), tokens.size() * 8, 0));
  return tokens;
}

absl::Status BuildParts::ReadTokens(int64_t offset, void* out, size_t bytes) const {
  return tokens_.ReadAt(out, bytes, offset);
}

absl::Status BuildParts::Remove() { return RemoveAll(folder_, kCode); }

}  // namespace krait
