#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "data/content_hash.h"
#include "data/line_reader.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "kernels/base/check.h"
#include "kernels/base/file.h"
#include "kernels/base/output.h"
#include "kernels/base/random.h"
#include "kernels/base/stop_signals.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

constexpr int64_t kTextPiece = int64_t{1} << 20;  // bytes of a text in memory at once
constexpr size_t kTokenBuffer = size_t{1} << 20;  // tokens between two writes
// Small enough to read single sequences. With its checksum of 4 bytes a chunk of u8 fills pages.
constexpr int64_t kTokenChunk = (int64_t{1} << 16) - 4;
constexpr int64_t kDocumentChunk = int64_t{1} << 12;
constexpr size_t kOpenFiles = 64;

absl::Status CheckStop(const BuildOptions& options) {
  if (!StopRequested()) return absl::OkStatus();
  return Error(ExitCode::kStopped, "stopped on request: " + options.out + " was not written");
}

bool IsCompressed(const std::string& path) {
  return absl::EndsWith(path, ".gz") || absl::EndsWith(path, ".zst");
}

bool IsJsonLines(const std::string& path) {
  return absl::EndsWith(path, ".jsonl") || absl::EndsWith(path, ".jsonl.gz") ||
         absl::EndsWith(path, ".jsonl.zst");
}

// Picks the string "text" out of a JSON object as it is parsed: no line, however deeply nested,
// takes more memory than its own length.
class TextField : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return Other(); }
  bool boolean(bool) override { return Other(); }
  bool number_integer(number_integer_t) override { return Other(); }
  bool number_unsigned(number_unsigned_t) override { return Other(); }
  bool number_float(number_float_t, const string_t&) override { return Other(); }
  bool binary(binary_t&) override { return Other(); }
  bool string(string_t& value) override {
    if (!at_text_) return Other();
    text = std::move(value);
    has_text = true;
    at_text_ = false;
    return true;
  }
  bool key(string_t& value) override {
    at_text_ = depth_ == 1 && value == "text";
    has_key = has_key || at_text_;
    return true;
  }
  bool start_object(size_t) override {
    is_object = is_object || depth_ == 0;
    return Open();
  }
  bool start_array(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    fault = absl::StrFormat("not JSON at byte %u of the line: %s", position, error.what());
    return false;
  }

  bool is_object = false;
  bool has_key = false, has_text = false;  // the key exists; its value is a string
  std::string text, fault;

 private:
  bool Other() {
    if (at_text_) has_text = false;
    at_text_ = false;
    return true;
  }
  bool Open() {
    Other();
    ++depth_;
    return true;
  }
  bool Close() {
    --depth_;
    return true;
  }

  int64_t depth_ = 0;
  bool at_text_ = false;  // the value that comes next is the one
};

// The string "text" of one line of a .jsonl file; `place` is "path:line".
absl::StatusOr<std::string> TextOfLine(const std::string& line, const std::string& place) {
  TextField field;
  std::string fault;
  if (!nlohmann::json::sax_parse(line, &field)) {
    fault = field.fault;
  } else if (!field.is_object) {
    fault = "an object with a string \"text\" is needed";
  } else if (!field.has_key) {
    fault = "the field \"text\" is missing";
  } else if (!field.has_text) {
    fault = "the field \"text\" is not a string";
  }
  if (!fault.empty()) return Error(ExitCode::kData, place + ": " + fault);
  return std::move(field.text);
}

bool IsBlank(const std::string& line) {
  return line.find_first_not_of(" \t\r") == std::string::npos;
}

// Where a document's bytes lie: a whole text file, a line of a .jsonl file, or a text in the spool.
struct Document {
  int32_t file;  // index of the input file, or kSpool
  int64_t begin;
  int64_t bytes;
};
constexpr int32_t kSpool = -1;

// Finds the documents of the inputs.
class DocumentList {
 public:
  explicit DocumentList(const BuildOptions& options, BuildReport* report)
      : options_(options), report_(*report) {}

  absl::Status Find() {
    ErrorList errors;
    for (const std::string& path : options_.paths) errors.Add(AddPath(path));
    if (errors.empty() && documents_.empty()) {
      errors.Add(ExitCode::kData, "no text was found in " + JoinedPaths());
    }
    return errors.ToStatus();
  }

  int64_t size() const { return static_cast<int64_t>(documents_.size()); }

  // Calls fn(piece) with the text of document `index`, in order, in one piece unless `split`.
  template <typename Fn>
  absl::Status Read(int64_t index, bool split, const Fn& fn) {
    const Document& document = documents_[static_cast<size_t>(index)];
    const File* file = &spool_;
    if (document.file != kSpool) {
      KRAIT_ASSIGN_OR_RETURN(file, Opened(document.file));
    }
    const bool is_line = document.file != kSpool && IsJsonLines(file->path());
    const int64_t most = split && !is_line ? kTextPiece : document.bytes;
    for (int64_t done = 0; done < document.bytes; done += most) {
      text_.resize(static_cast<size_t>(std::min(most, document.bytes - done)));
      KRAIT_RETURN_IF_ERROR(file->ReadAt(text_.data(), text_.size(), document.begin + done));
      if (is_line) {
        KRAIT_ASSIGN_OR_RETURN(
            text_,
            TextOfLine(text_, absl::StrFormat("%s at byte %d", file->path(), document.begin)));
      }
      fn(text_);
    }
    return absl::OkStatus();
  }

 private:
  std::string JoinedPaths() const {
    std::string joined;
    for (const std::string& path : options_.paths) joined += (joined.empty() ? "" : ", ") + path;
    return joined.empty() ? "an empty list of paths" : joined;
  }

  absl::Status AddPath(const std::string& path) {
    if (IsDirectory(path)) return AddFolder(path);
    if (IsJsonLines(path)) return AddJsonLines(path, /*named=*/true);
    return AddText(path, /*named=*/true);
  }

  absl::Status AddFolder(const std::string& folder) {
    std::vector<std::string> paths;
    std::error_code error;
    std::filesystem::recursive_directory_iterator entry(folder, error), end;
    while (!error && entry != end) {
      // symlink_status looks at the entry itself; the iterator enters no linked folder.
      const auto type = entry->symlink_status(error).type();
      if (error) break;
      if (type == std::filesystem::file_type::regular) paths.push_back(entry->path().string());
      entry.increment(error);
    }
    if (error) {
      return Error(ExitCode::kData, "cannot list " + folder + ": " + error.message());
    }
    std::sort(paths.begin(), paths.end());
    ErrorList errors;
    for (const std::string& path : paths) {
      KRAIT_RETURN_IF_ERROR(CheckStop(options_));
      errors.Add(IsJsonLines(path) ? AddJsonLines(path, /*named=*/false)
                                   : AddText(path, /*named=*/false));
    }
    return errors.ToStatus();
  }

  // A text file is one document. `named`: given by name, not found in a folder.
  absl::Status AddText(const std::string& path, bool named) {
    if (named && IsCompressed(path)) {
      return Error(ExitCode::kData,
                   path + ": of compressed files only .jsonl.gz and .jsonl.zst are read");
    }
    KRAIT_ASSIGN_OR_RETURN(const File file, File::OpenRead(path, ExitCode::kData));
    KRAIT_ASSIGN_OR_RETURN(const int64_t size, file.Size());
    if (size == 0) return NotText(path, named, " is empty");
    for (int64_t begin = 0; begin < size; begin += kTextPiece) {
      text_.resize(static_cast<size_t>(std::min(kTextPiece, size - begin)));
      KRAIT_RETURN_IF_ERROR(file.ReadAt(text_.data(), text_.size(), begin));
      if (const size_t nul = text_.find('\0'); nul != std::string::npos) {
        return NotText(
            path, named,
            absl::StrFormat(" is not text: byte %u is NUL", static_cast<uint64_t>(begin) + nul));
      }
    }
    documents_.push_back({NextFile(path), 0, size});
    return absl::OkStatus();
  }

  absl::Status NotText(const std::string& path, bool named, const std::string& why) {
    if (named) return Error(ExitCode::kData, path + why);
    ++report_.skipped_files;
    return absl::OkStatus();
  }

  absl::Status AddJsonLines(const std::string& path, bool named) {
    KRAIT_ASSIGN_OR_RETURN(LineReader reader, LineReader::Open(path));
    const bool compressed = IsCompressed(path);
    const size_t before = documents_.size();
    const int32_t file = NextFile(path);
    while (true) {
      KRAIT_RETURN_IF_ERROR(CheckStop(options_));
      KRAIT_ASSIGN_OR_RETURN(const bool more, reader.Next(&line_));
      if (!more) break;
      if (IsBlank(line_)) continue;
      KRAIT_ASSIGN_OR_RETURN(
          const std::string text,
          TextOfLine(line_, absl::StrFormat("%s:%d", path, reader.line_number())));
      if (text.empty()) {
        ++report_.skipped_documents;
      } else if (compressed) {
        KRAIT_RETURN_IF_ERROR(OpenSpool());
        KRAIT_RETURN_IF_ERROR(spool_.WriteAt(text.data(), text.size(), spool_size_));
        documents_.push_back({kSpool, spool_size_, static_cast<int64_t>(text.size())});
        spool_size_ += static_cast<int64_t>(text.size());
      } else {
        documents_.push_back({file, reader.line_begin(), static_cast<int64_t>(line_.size())});
      }
    }
    if (documents_.size() > before) return absl::OkStatus();
    --report_.files;
    return NotText(path, named, " holds no text");
  }

  int32_t NextFile(const std::string& path) {
    KRAIT_CHECK(files_.size() < INT32_MAX);
    files_.push_back(path);
    ++report_.files;
    return static_cast<int32_t>(files_.size() - 1);
  }

  // The spool lies beside the output, where there is room, and has no name: whatever ends the
  // process, it is gone.
  absl::Status OpenSpool() {
    if (spool_.fd() >= 0) return absl::OkStatus();
    const std::string path = absl::StrFormat("%s.%d.spool", options_.out, getpid());
    KRAIT_RETURN_IF_ERROR(RemoveAll(path, ExitCode::kCannotSave));
    KRAIT_ASSIGN_OR_RETURN(spool_, File::Create(path, /*exclusive=*/true, ExitCode::kCannotSave));
    return RemoveAll(path, ExitCode::kCannotSave);
  }

  absl::StatusOr<const File*> Opened(int32_t index) {
    const auto found = opened_.find(index);
    if (found != opened_.end()) return &found->second;
    if (opened_.size() == kOpenFiles) opened_.clear();
    KRAIT_ASSIGN_OR_RETURN(File file,
                           File::OpenRead(files_[static_cast<size_t>(index)], ExitCode::kData));
    return &opened_.emplace(index, std::move(file)).first->second;
  }

  const BuildOptions& options_;
  BuildReport& report_;
  std::vector<std::string> files_;
  std::vector<Document> documents_;
  std::map<int32_t, File> opened_;
  File spool_;
  int64_t spool_size_ = 0;
  std::string line_, text_;
};

// Appends ids to /tokens in the dtype of the vocabulary, and hashes them.
class TokenWriter {
 public:
  TokenWriter(H5File* file, int64_t vocab_size) : file_(*file), dtype_(TokenDType(vocab_size)) {}

  absl::Status Start() { return file_.CreateChunked("tokens", dtype_, kTokenChunk); }

  absl::Status Write(const std::vector<int32_t>& ids) {
    switch (dtype_) {
      case DType::kU8:
        return WriteAs<uint8_t>(ids);
      case DType::kU16:
        return WriteAs<uint16_t>(ids);
      default:
        return WriteAs<uint32_t>(ids);
    }
  }
  ContentHash& hash() { return hash_; }

 private:
  template <typename T>
  absl::Status WriteAs(const std::vector<int32_t>& ids) {
    std::vector<T> stored(ids.begin(), ids.end());
    hash_.AddTokens(stored.data(), stored.size() * sizeof(T));
    return file_.Append("tokens", stored.data(), static_cast<int64_t>(stored.size()));
  }

  H5File& file_;
  DType dtype_;
  ContentHash hash_;
};

// Writes the whole token file at `path`, which must not exist.
absl::Status WriteTokens(const std::string& path, const Tokenizer& tokenizer,
                         const BuildOptions& options, DocumentList* documents,
                         BuildReport* report) {
  KRAIT_ASSIGN_OR_RETURN(H5File file, H5File::Create(path, ExitCode::kCannotSave));
  TokenWriter writer(&file, tokenizer.vocab_size());
  KRAIT_RETURN_IF_ERROR(writer.Start());
  const KeyedPermutation order(static_cast<uint64_t>(documents->size()), options.seed,
                               RandomPurpose::kDocumentShuffle, 0);
  std::vector<uint64_t> starts;
  std::vector<int32_t> ids;
  uint64_t tokens = 0;  // before `ids`
  for (int64_t i = 0; i < documents->size(); ++i) {
    KRAIT_RETURN_IF_ERROR(CheckStop(options));
    const uint64_t start = tokens + ids.size();
    absl::Status write_status;
    KRAIT_RETURN_IF_ERROR(documents->Read(static_cast<int64_t>(order(static_cast<uint64_t>(i))),
                                          tokenizer.splits_anywhere(),
                                          [&](const std::string& text) {
                                            tokenizer.Encode(text, &ids);
                                            if (ids.size() < kTokenBuffer || !write_status.ok())
                                              return;
                                            write_status = writer.Write(ids);
                                            tokens += ids.size();
                                            ids.clear();
                                          }));
    KRAIT_RETURN_IF_ERROR(write_status);
    if (tokens + ids.size() > start) starts.push_back(start);
  }
  KRAIT_RETURN_IF_ERROR(writer.Write(ids));
  tokens += ids.size();
  starts.push_back(tokens);
  report->documents = static_cast<int64_t>(starts.size()) - 1;
  report->tokens = static_cast<int64_t>(tokens);
  KRAIT_RETURN_IF_ERROR(file.CreateChunked("documents", DType::kU64, kDocumentChunk));
  KRAIT_RETURN_IF_ERROR(
      file.Append("documents", starts.data(), static_cast<int64_t>(starts.size())));
  const auto vocab_size = static_cast<uint64_t>(tokenizer.vocab_size());
  KRAIT_RETURN_IF_ERROR(file.WriteAttribute("format_version", kTokenFileVersion));
  KRAIT_RETURN_IF_ERROR(file.WriteAttribute("tokenizer", tokenizer.name()));
  KRAIT_RETURN_IF_ERROR(file.WriteAttribute("vocab_size", vocab_size));
  KRAIT_RETURN_IF_ERROR(file.WriteAttribute(
      "content_hash", writer.hash().Finish(starts, tokenizer.name(), vocab_size)));
  KRAIT_RETURN_IF_ERROR(file.Close());
  KRAIT_ASSIGN_OR_RETURN(File raw, File::OpenWrite(path, ExitCode::kCannotSave));
  KRAIT_RETURN_IF_ERROR(raw.Sync());
  return raw.Close();
}

}  // namespace

absl::StatusOr<BuildReport> BuildTokenFile(const BuildOptions& options) {
  std::unique_ptr<Tokenizer> tokenizer;
  KRAIT_ASSIGN_OR_RETURN(tokenizer, MakeTokenizer(options.tokenizer));
  if (options.out.empty() || IsDirectory(options.out)) {
    return Error(ExitCode::kConfig,
                 "the token file to write must be a file name, not \"" + options.out + "\"");
  }
  const std::string parent = std::filesystem::path(options.out).parent_path().string();
  const std::string folder = parent.empty() ? "." : parent;
  if (!IsDirectory(folder)) {
    return Error(ExitCode::kConfig,
                 "cannot write " + options.out + ": the folder " + folder + " does not exist");
  }
  KRAIT_RETURN_IF_ERROR(CheckOutput(options.out, FileKind::kHdf5, options.paths));
  BuildReport report;
  DocumentList documents(options, &report);
  const absl::Status found = documents.Find();
  KRAIT_RETURN_IF_ERROR(CheckStop(options));  // alone, not beside what it cut short
  KRAIT_RETURN_IF_ERROR(found);
  // The process id keeps two builds of one file apart.
  const std::string temporary = absl::StrFormat("%s.%d.tmp", options.out, getpid());
  KRAIT_RETURN_IF_ERROR(RemoveAll(temporary, ExitCode::kCannotSave));
  absl::Status status = WriteTokens(temporary, *tokenizer, options, &documents, &report);
  if (status.ok()) status = Rename(temporary, options.out, ExitCode::kCannotSave);
  if (!status.ok()) {
    // The first error is the one to report; what cannot be removed has a name that says what it is.
    (void)RemoveAll(temporary, ExitCode::kCannotSave);
    return status;
  }
  KRAIT_RETURN_IF_ERROR(SyncDirectory(folder, ExitCode::kCannotSave));
  return report;
}

}  // namespace krait
