#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>

#include "absl/strings/str_format.h"
#include "data/content_hash.h"
#include "data/documents.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/base/output.h"
#include "kernels/base/random.h"

namespace krait {
namespace {

constexpr size_t kTokenBuffer = size_t{1} << 20;  // tokens between two writes
// Small enough to read single sequences. With its checksum of 4 bytes a chunk of u8 fills pages.
constexpr int64_t kTokenChunk = (int64_t{1} << 16) - 4;
constexpr int64_t kDocumentChunk = int64_t{1} << 12;

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
absl::Status WriteTokens(const std::string& path, Tokenizer& tokenizer, uint64_t seed,
                         DocumentList* documents, BuildReport* report) {
  KRAIT_ASSIGN_OR_RETURN(H5File file, H5File::Create(path, ExitCode::kCannotSave));
  // Held to the end: RemoveLeftovers of another build leaves the file alone.
  KRAIT_ASSIGN_OR_RETURN(File raw, File::OpenWrite(path, ExitCode::kCannotSave));
  (void)flock(raw.fd(), LOCK_EX | LOCK_NB);  // where there are no locks, the process id must do
  TokenWriter writer(&file, tokenizer.vocab_size());
  KRAIT_RETURN_IF_ERROR(writer.Start());
  const KeyedPermutation order(static_cast<uint64_t>(documents->size()), seed,
                               RandomPurpose::kDocumentShuffle, 0);
  std::vector<uint64_t> starts;
  std::vector<int32_t> ids;
  uint64_t tokens = 0;  // before `ids`
  for (int64_t i = 0; i < documents->size(); ++i) {
    const uint64_t start = tokens + ids.size();
    absl::Status write_status;
    KRAIT_RETURN_IF_ERROR(documents->Read(static_cast<int64_t>(order(static_cast<uint64_t>(i))),
                                          tokenizer.splits_anywhere(),
                                          [&](const std::string& text) {
                                            if (write_status.ok())
                                              write_status = tokenizer.Encode(text, &ids);
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
  KRAIT_RETURN_IF_ERROR(raw.Sync());
  return raw.Close();
}

// OUT.PID.tmp: the process id keeps two builds of one file apart.
std::string TemporaryName(const std::string& out) {
  return absl::StrFormat("%s.%d.tmp", out, getpid());
}

// Removes what killed builds of `out` left behind: temporary files that no process holds. What
// cannot be removed is no reason not to build.
void RemoveLeftovers(const std::string& out) {
  const std::string folder = ParentFolder(out);
  const std::string begin = std::filesystem::path(out).filename().string() + ".";
  const auto names = ListDirectory(folder, ExitCode::kCannotSave);
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    if (!name.starts_with(begin) || !name.ends_with(".tmp")) continue;
    const std::string process =
        name.substr(begin.size(), name.size() - std::min(name.size(), begin.size() + 4));
    const std::optional<int64_t> id = ParseInteger(process);
    if (process.find_first_not_of("0123456789") != std::string::npos || !id.has_value()) continue;
    const auto file = File::OpenWrite(folder + "/" + name, ExitCode::kCannotSave);
    if (!file.ok()) continue;
    const bool locked = flock(file->fd(), LOCK_EX | LOCK_NB) != 0;
    const bool no_locks = locked && errno != EWOULDBLOCK;
    if (locked && !(no_locks && kill(static_cast<pid_t>(*id), 0) != 0 && errno == ESRCH)) continue;
    (void)RemoveFile(folder + "/" + name, ExitCode::kCannotSave);
  }
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
  KRAIT_RETURN_IF_ERROR(CheckOutput(options.out, FileKind::kHdf5, options.paths, options.force));
  RemoveLeftovers(options.out);
  BuildReport report;
  DocumentList documents(options, &report);
  KRAIT_RETURN_IF_ERROR(documents.Find());
  const std::string temporary = TemporaryName(options.out);
  KRAIT_RETURN_IF_ERROR(RemoveAll(temporary, ExitCode::kCannotSave));
  absl::Status status = WriteTokens(temporary, *tokenizer, options.seed, &documents, &report);
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
