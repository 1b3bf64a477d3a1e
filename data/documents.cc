#include "data/documents.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "data/json_texts.h"
#include "data/line_reader.h"
#include "kernels/base/check.h"
#include "kernels/base/stop_signals.h"

namespace krait {
namespace {

constexpr size_t kOpenFiles = 64;
constexpr int64_t kTellBytes = int64_t{1} << 20;  // between two calls of the progress

bool IsCompressed(const std::string& path) {
  return absl::EndsWithIgnoreCase(path, ".gz") || absl::EndsWithIgnoreCase(path, ".zst");
}

// Ends with `ending`, also before .gz and .zst.
bool HasEnding(const std::string& path, const std::string& ending) {
  return absl::EndsWithIgnoreCase(path, ending) || absl::EndsWithIgnoreCase(path, ending + ".gz") ||
         absl::EndsWithIgnoreCase(path, ending + ".zst");
}

bool IsBlank(const std::string& line) {
  return line.find_first_not_of(" \t\r") == std::string::npos;
}

}  // namespace

absl::Status CheckStop(const BuildOptions& options) {
  if (!StopRequested()) return absl::OkStatus();
  return Error(ExitCode::kStopped, "stopped on request: " + options.out + " was not written");
}

bool DocumentList::IsJsonLines(const std::string& path) { return HasEnding(path, ".jsonl"); }

absl::Status DocumentList::Find() {
  ErrorList errors;
  for (const std::string& path : options_.paths) {
    errors.Add(List(path));
    KRAIT_RETURN_IF_ERROR(CheckStop(options_));  // alone, not beside what it cut short
  }
  for (const Input& input : inputs_) input_bytes_ += input.bytes;
  document_bytes_ = input_bytes_;  // until it is known
  int64_t before = 0;
  for (const Input& input : inputs_) {
    const absl::Status added = AddInput(input);
    // A request to stop is no fault of an input.
    if (ExitCodeOf(added) == ExitCode::kStopped) return added;
    errors.Add(added);
    done_ = before += input.bytes;
    KRAIT_RETURN_IF_ERROR(Tell(done_));
  }
  if (errors.empty() && documents_.empty()) {
    errors.Add(ExitCode::kData, "no text was found in " + JoinedPaths());
  }
  document_bytes_ = 0;
  for (const Document& document : documents_) document_bytes_ += document.bytes;
  return errors.ToStatus();
}

std::string DocumentList::JoinedPaths() const {
  std::string joined;
  for (const std::string& path : options_.paths) joined += (joined.empty() ? "" : ", ") + path;
  return joined.empty() ? "an empty list of paths" : joined;
}

absl::Status DocumentList::Tell(int64_t done) {
  KRAIT_RETURN_IF_ERROR(CheckStop(options_));
  if (!options_.progress || done - told_ < kTellBytes) return absl::OkStatus();
  told_ = done;
  return options_.progress(done, input_bytes_ + document_bytes_);
}

absl::Status DocumentList::List(const std::string& path) {
  struct stat info = {};
  // What is not there is said when it is opened.
  if (stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    inputs_.push_back({.path = path, .named = true, .bytes = info.st_size});
    return absl::OkStatus();
  }
  std::vector<Input> found;
  std::set<FileId> seen = {{info.st_dev, info.st_ino}};
  KRAIT_RETURN_IF_ERROR(ListFolder(path, &seen, &found));
  // A link to a file that is read under its own name, or by a link before it, adds nothing.
  std::set<FileId> files;
  for (const Input& input : found) {
    if (!input.linked) files.insert(input.id);
  }
  std::erase_if(found, [&](const Input& input) {
    const bool again = input.linked && !files.insert(input.id).second;
    report_.repeated_files += again ? 1 : 0;
    return again;
  });
  std::sort(found.begin(), found.end(),
            [](const Input& a, const Input& b) { return a.path < b.path; });
  inputs_.insert(inputs_.end(), found.begin(), found.end());
  return absl::OkStatus();
}

absl::Status DocumentList::ListFolder(const std::string& folder, std::set<FileId>* seen,
                                      std::vector<Input>* found) {
  KRAIT_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                         ListDirectory(folder, ExitCode::kData));
  for (const std::string& name : names) {
    if (name.starts_with('.')) {
      ++report_.hidden;
      continue;
    }
    KRAIT_RETURN_IF_ERROR(CheckStop(options_));
    const std::string path = folder + "/" + name;
    struct stat entry = {}, target = {};
    if (lstat(path.c_str(), &entry) != 0 || stat(path.c_str(), &target) != 0) {
      // A link to nowhere, or to itself.
      if (S_ISLNK(entry.st_mode) && (errno == ENOENT || errno == ELOOP)) {
        ++report_.skipped_files;
        continue;
      }
      return Error(ExitCode::kData, "cannot look up " + path + ": " + std::strerror(errno));
    }
    const FileId id = {target.st_dev, target.st_ino};
    if (S_ISDIR(target.st_mode)) {
      if (seen->insert(id).second) {
        KRAIT_RETURN_IF_ERROR(ListFolder(path, seen, found));
      } else {
        ++report_.repeated_folders;
      }
    } else if (S_ISREG(target.st_mode)) {
      found->push_back(
          {.path = path, .linked = S_ISLNK(entry.st_mode), .id = id, .bytes = target.st_size});
    } else {
      ++report_.skipped_files;
    }
  }
  return absl::OkStatus();
}

absl::Status DocumentList::AddInput(const Input& input) {
  const int64_t files = report_.files;
  absl::Status status;
  if (IsJsonLines(input.path)) {
    status = AddJsonLines(input);
  } else if (HasEnding(input.path, ".json")) {
    status = AddJson(input);
  } else {
    status = AddText(input);
  }
  if (input.linked && report_.files > files) ++report_.linked_files;
  return status;
}

// A text file is one document.
absl::Status DocumentList::AddText(const Input& input) {
  if (input.named && IsCompressed(input.path)) {
    return Error(
        ExitCode::kData,
        input.path +
            ": of compressed files only .jsonl.gz, .jsonl.zst, .json.gz and .json.zst are read");
  }
  KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(input.path, ExitCode::kData));
  KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
  if (size == 0) return NotText(input, " is empty");
  const int64_t before = done_;
  for (int64_t begin = 0; begin < size; begin += kTextPiece) {
    text_.resize(static_cast<size_t>(std::min(kTextPiece, size - begin)));
    KRAIT_RETURN_IF_ERROR(file.ReadAt(text_.data(), text_.size(), begin));
    if (const size_t nul = text_.find('\0'); nul != std::string::npos) {
      return NotText(input, absl::StrFormat(" is not text: byte %u is NUL",
                                            static_cast<uint64_t>(begin) + nul));
    }
    KRAIT_RETURN_IF_ERROR(Tell(before + begin));
  }
  documents_.push_back({NextFile(input.path), 0, size});
  return absl::OkStatus();
}

absl::Status DocumentList::NotText(const Input& input, const std::string& why) {
  if (input.named) return Error(ExitCode::kData, input.path + why);
  ++report_.skipped_files;
  return absl::OkStatus();
}

absl::Status DocumentList::AddJsonLines(const Input& input) {
  const std::string& path = input.path;
  KRAIT_ASSIGN_OR_RETURN(LineReader reader, LineReader::Open(path));
  const bool compressed = IsCompressed(path);
  const size_t before = documents_.size();
  const int32_t file = NextFile(path);
  const int64_t done = done_;
  while (true) {
    KRAIT_ASSIGN_OR_RETURN(const bool more, reader.Next(&line_));
    if (!more) break;
    // Of a compressed file the bytes read are not known here: at most its own count.
    KRAIT_RETURN_IF_ERROR(Tell(done + std::min(reader.line_begin(), input.bytes)));
    if (IsBlank(line_)) continue;
    KRAIT_ASSIGN_OR_RETURN(const std::string text,
                           TextOfLine(line_, absl::StrFormat("%s:%d", path, reader.line_number())));
    if (text.empty()) {
      ++report_.skipped_documents;
    } else if (compressed) {
      KRAIT_RETURN_IF_ERROR(AddToSpool(text));
    } else {
      documents_.push_back({file, reader.line_begin(), static_cast<int64_t>(line_.size())});
    }
  }
  if (documents_.size() > before) return absl::OkStatus();
  --report_.files;
  return NotText(input, " holds no text");
}

absl::Status DocumentList::AddJson(const Input& input) {
  KRAIT_ASSIGN_OR_RETURN(const auto source, OpenByteSource(input.path));
  const size_t before = documents_.size();
  const int64_t done = done_;
  bool any = false;
  const absl::Status status = ReadJsonTexts(
      source.get(), input.path,
      [&](const std::string& text) {
        any = true;
        if (!text.empty()) return AddToSpool(text);
        ++report_.skipped_documents;
        return absl::OkStatus();
      },
      [&](int64_t bytes) { return Tell(done + std::min(bytes, input.bytes)); });
  // In a folder such a file may be anything: without a record at its start it is a text.
  if (!status.ok() && !input.named && !any && ExitCodeOf(status) == ExitCode::kData) {
    if (IsCompressed(input.path)) return NotText(input, "");
    ++report_.plain_json_files;
    return AddText(input);
  }
  KRAIT_RETURN_IF_ERROR(status);
  if (documents_.size() == before) return NotText(input, " holds no text");
  ++report_.files;
  return absl::OkStatus();
}

int32_t DocumentList::NextFile(const std::string& path) {
  KRAIT_CHECK(files_.size() < INT32_MAX);
  files_.push_back(path);
  ++report_.files;
  return static_cast<int32_t>(files_.size() - 1);
}

absl::Status DocumentList::AddToSpool(const std::string& text) {
  KRAIT_RETURN_IF_ERROR(OpenSpool());
  KRAIT_RETURN_IF_ERROR(spool_.WriteAt(text.data(), text.size(), spool_size_));
  documents_.push_back({kSpool, spool_size_, static_cast<int64_t>(text.size())});
  spool_size_ += static_cast<int64_t>(text.size());
  return absl::OkStatus();
}

// The spool lies beside the output, where there is room, and has no name: whatever ends the
// process, it is gone.
absl::Status DocumentList::OpenSpool() {
  if (spool_.fd() >= 0) return absl::OkStatus();
  const std::string path = absl::StrFormat("%s.%d.spool", options_.out, getpid());
  KRAIT_RETURN_IF_ERROR(RemoveAll(path, ExitCode::kCannotSave));
  KRAIT_ASSIGN_OR_RETURN(spool_, File::Create(path, /*exclusive=*/true, ExitCode::kCannotSave));
  return RemoveAll(path, ExitCode::kCannotSave);
}

absl::StatusOr<const File*> DocumentList::Opened(int32_t index) {
  const auto found = opened_.find(index);
  if (found != opened_.end()) return &found->second;
  if (opened_.size() == kOpenFiles) opened_.clear();
  KRAIT_ASSIGN_OR_RETURN(File file,
                         File::OpenRead(files_[static_cast<size_t>(index)], ExitCode::kData));
  return &opened_.emplace(index, std::move(file)).first->second;
}

absl::Status DocumentList::TakeLine(const File& file, int64_t begin) {
  KRAIT_ASSIGN_OR_RETURN(text_,
                         TextOfLine(text_, absl::StrFormat("%s at byte %d", file.path(), begin)));
  return absl::OkStatus();
}

}  // namespace krait
