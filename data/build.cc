#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "data/build_parts.h"
#include "data/content_hash.h"
#include "data/encode_pool.h"
#include "data/inputs.h"
#include "data/records.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/base/output.h"
#include "kernels/base/random.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

// Small enough to read single sequences. With its checksum of 4 bytes a chunk of u8 fills pages.
constexpr int64_t kTokenChunk = (int64_t{1} << 16) - 4;
constexpr int64_t kDocumentChunk = int64_t{1} << 12;
constexpr size_t kBatchBytes = size_t{1} << 20;    // of text, given to a thread
constexpr size_t kBatchRecords = size_t{1} << 14;  // likewise
constexpr int64_t kMarkBytes = int64_t{64} << 20;  // of text between two marks
constexpr size_t kMergeBuffer = size_t{1} << 20;   // bytes between two writes
constexpr int64_t kTellBytes = int64_t{1} << 20;   // between two calls of the progress
constexpr int64_t kPartsVersion = 1;
constexpr size_t kNamedBad = 20;

// The progress of a build, in bytes of the inputs, each counted twice.
class Teller {
 public:
  Teller(const BuildOptions& options, int64_t total) : options_(options), total_(total) {}

  absl::Status Tell(int64_t done) {
    KRAIT_RETURN_IF_ERROR(CheckStop(options_));
    if (!options_.progress || done - told_ < kTellBytes) return absl::OkStatus();
    told_ = done;
    return options_.progress(std::min(done, total_), total_);
  }

 private:
  const BuildOptions& options_;
  int64_t total_, told_ = 0;
};

// First half of a build: reads the inputs, has them encoded, and keeps the documents in parts.
class Encoding {
 public:
  Encoding(const BuildOptions& options, const std::vector<Input>& inputs,
           const Tokenizer& tokenizer, BuildParts* parts, BuildMark* mark, Teller* teller)
      : options_(options),
        inputs_(inputs),
        tokenizer_(tokenizer),
        dtype_(TokenDType(tokenizer.vocab_size())),
        parts_(*parts),
        mark_(*mark),
        teller_(*teller),
        pool_(tokenizer, options.threads > 0 ? options.threads : UsableThreads()) {}

  absl::Status Run() {
    const absl::Status status = ReadAll();
    // What came before a fault is kept for the next try, where anything is.
    if (parts_.any_mark() && ExitCodeOf(status) != ExitCode::kCannotSave) {
      const absl::Status marked = Mark();
      if (status.ok()) return marked;
    }
    return status;
  }

 private:
  // What is known of a batch in the pool, beside its records.
  struct Sent {
    int64_t input;
    bool ends_input;
    InputKind kind;  // where ends_input
  };

  absl::Status ReadAll() {
    for (int64_t i = 0; i < mark_.input; ++i) read_bytes_ += inputs_[static_cast<size_t>(i)].bytes;
    const int64_t first = mark_.input;
    for (int64_t i = first; i < static_cast<int64_t>(inputs_.size()); ++i) {
      KRAIT_RETURN_IF_ERROR(ReadInput(i, i == first ? mark_.records : 0));
      read_bytes_ += inputs_[static_cast<size_t>(i)].bytes;
      KRAIT_RETURN_IF_ERROR(teller_.Tell(read_bytes_));
    }
    while (!pool_.empty()) KRAIT_RETURN_IF_ERROR(TakeOne());
    return absl::OkStatus();
  }

  absl::Status ReadInput(int64_t index, int64_t skip) {
    const Input& input = inputs_[static_cast<size_t>(index)];
    batch_ = RecordBatch{.place = input.path, .records = {}, .begins_document = true};
    batch_bytes_ = 0;
    const RecordReader::Take take = [&](Record record) -> absl::Status {
      batch_bytes_ += record.content.size();
      const bool ends = record.ends_document;
      batch_.records.push_back(std::move(record));
      if (batch_bytes_ < kBatchBytes && batch_.records.size() < kBatchRecords) {
        return absl::OkStatus();
      }
      return Send({.input = index, .ends_input = false, .kind = InputKind::kRecords}, ends);
    };
    const RecordReader::Tell tell = [&](int64_t bytes) {
      return teller_.Tell(read_bytes_ + std::min(bytes, input.bytes));
    };
    const auto kind = RecordReader(input, tokenizer_.splits_anywhere(), take, tell).Read(skip);
    if (!kind.ok()) {
      // Of several faults the first is told.
      while (!pool_.empty()) KRAIT_RETURN_IF_ERROR(TakeOne());
      return kind.status();
    }
    return Send({.input = index, .ends_input = true, .kind = *kind}, true);
  }

  // Hands the batch to the pool; the next one begins a document or goes on in it.
  absl::Status Send(Sent sent, bool ends_document) {
    while (pool_.full()) KRAIT_RETURN_IF_ERROR(TakeOne());
    RecordBatch next{.place = batch_.place, .records = {}, .begins_document = ends_document};
    pool_.Add(std::exchange(batch_, std::move(next)));
    batch_bytes_ = 0;
    sent_.push_back(sent);
    return absl::OkStatus();
  }

  // Takes the oldest result over.
  absl::Status TakeOne() {
    const EncodedBatch result = pool_.Next();
    const Sent sent = sent_.front();
    sent_.pop_front();
    BuildReport report = mark_.report;
    for (const std::string& bad : result.bad) {
      ++report.bad_records;
      if (report.bad.size() < kNamedBad) report.bad.push_back(bad);
    }
    if (report.bad_records > options_.max_bad) return TooManyBad(report);
    KRAIT_RETURN_IF_ERROR(Append(result));
    mark_.input = sent.input;
    mark_.records += result.records;
    mark_.input_documents += static_cast<int64_t>(result.ends.size());
    report.skipped_documents += result.empty;
    report.text_bytes += result.text_bytes;
    mark_.report = std::move(report);
    if (sent.ends_input) KRAIT_RETURN_IF_ERROR(EndInput(sent.kind));
    unmarked_ += result.text_bytes;
    return unmarked_ >= kMarkBytes ? Mark() : absl::OkStatus();
  }

  absl::Status TooManyBad(const BuildReport& report) const {
    if (options_.max_bad == 0) return Error(ExitCode::kData, report.bad.front());
    return Error(
        ExitCode::kData,
        absl::StrFormat("%d bad records are more than --max-bad %d; the first are\n%s",
                        report.bad_records, options_.max_bad, absl::StrJoin(report.bad, "\n")));
  }

  absl::Status Append(const EncodedBatch& result) {
    switch (dtype_) {
      case DType::kU8:
        KRAIT_RETURN_IF_ERROR(AppendAs<uint8_t>(result.ids));
        break;
      case DType::kU16:
        KRAIT_RETURN_IF_ERROR(AppendAs<uint16_t>(result.ids));
        break;
      default:
        KRAIT_RETURN_IF_ERROR(AppendAs<uint32_t>(result.ids));
    }
    // Tokens are counted into the document that is open until it ends.
    int64_t begin = 0;
    for (const int64_t end : result.ends) {
      KRAIT_RETURN_IF_ERROR(
          parts_.AppendDocument(static_cast<uint64_t>(open_tokens_ + end - begin)));
      open_tokens_ = 0;
      begin = end;
      ++mark_.documents;
    }
    const auto size = static_cast<int64_t>(result.ids.size());
    open_tokens_ += size - begin;
    mark_.tokens += size;
    return absl::OkStatus();
  }

  template <typename T>
  absl::Status AppendAs(const std::vector<int32_t>& ids) {
    const std::vector<T> stored(ids.begin(), ids.end());
    return parts_.AppendTokens(stored.data(), stored.size() * sizeof(T));
  }

  absl::Status EndInput(InputKind kind) {
    const Input& input = inputs_[static_cast<size_t>(mark_.input)];
    BuildReport& report = mark_.report;
    if (mark_.input_documents > 0) {
      ++report.files;
      report.linked_files += input.linked ? 1 : 0;
      report.plain_json_files += kind == InputKind::kPlainJson ? 1 : 0;
    } else if (input.named && kind != InputKind::kNoText && report.bad_records == 0) {
      return Error(ExitCode::kData, input.path + " holds no text");
    } else {
      ++report.skipped_files;
    }
    ++mark_.input;
    mark_.records = mark_.input_documents = 0;
    return absl::OkStatus();
  }

  // Marks are set between documents.
  absl::Status Mark() {
    if (open_tokens_ > 0) return absl::OkStatus();
    unmarked_ = 0;
    return parts_.Commit(mark_);
  }

  const BuildOptions& options_;
  const std::vector<Input>& inputs_;
  const Tokenizer& tokenizer_;
  DType dtype_;
  BuildParts& parts_;
  BuildMark& mark_;
  Teller& teller_;
  EncodePool pool_;
  std::deque<Sent> sent_;
  RecordBatch batch_;
  size_t batch_bytes_ = 0;
  int64_t read_bytes_ = 0, open_tokens_ = 0, unmarked_ = 0;
};

absl::Status WriteAttributes(const Tokenizer& tokenizer, const TokenizerFiles& files,
                             const BuildReport& report, const std::string& hash, H5File* file) {
  KRAIT_RETURN_IF_ERROR(file->WriteAttribute("format_version", kTokenFileVersion));
  KRAIT_RETURN_IF_ERROR(file->WriteAttribute("tokenizer", tokenizer.name()));
  KRAIT_RETURN_IF_ERROR(
      file->WriteAttribute("vocab_size", static_cast<uint64_t>(tokenizer.vocab_size())));
  KRAIT_RETURN_IF_ERROR(file->WriteAttribute("content_hash", hash));
  KRAIT_RETURN_IF_ERROR(
      file->WriteAttribute("text_bytes", static_cast<uint64_t>(report.text_bytes)));
  if (tokenizer.end_token().has_value()) {
    KRAIT_RETURN_IF_ERROR(
        file->WriteAttribute("end_token", static_cast<uint64_t>(*tokenizer.end_token())));
  }
  if (files.empty()) return absl::OkStatus();
  std::string names;
  for (const auto& [name, content] : files) {
    if (content.empty()) continue;
    names += (names.empty() ? "" : "\n") + name;
    const std::string dataset = "tokenizer_file:" + name;
    KRAIT_RETURN_IF_ERROR(file->CreateChunked(dataset, DType::kU8, kTokenChunk));
    KRAIT_RETURN_IF_ERROR(
        file->Append(dataset, content.data(), static_cast<int64_t>(content.size())));
  }
  return file->WriteAttribute("tokenizer_files", names);
}

// Second half: writes the whole token file at `path`, which must not exist, from the parts, with
// the documents in the order of the seed.
absl::Status WriteTokens(const std::string& path, const Tokenizer& tokenizer,
                         const TokenizerFiles& files, const BuildOptions& options,
                         int64_t input_bytes, BuildParts* parts, BuildReport* report,
                         Teller* teller) {
  KRAIT_ASSIGN_OR_RETURN(H5File file, H5File::Create(path, ExitCode::kCannotSave));
  // Held to the end: RemoveLeftovers of another build leaves the file alone.
  KRAIT_ASSIGN_OR_RETURN(File raw, File::OpenWrite(path, ExitCode::kCannotSave));
  (void)flock(raw.fd(), LOCK_EX | LOCK_NB);  // where there are no locks, the process id must do
  const DType dtype = TokenDType(tokenizer.vocab_size());
  const auto size = static_cast<int64_t>(SizeOf(dtype));
  KRAIT_RETURN_IF_ERROR(file.CreateChunked("tokens", dtype, kTokenChunk));
  // The tokens before each document, in the parts.
  std::vector<uint64_t> before;
  KRAIT_ASSIGN_OR_RETURN(before, parts->Documents());
  uint64_t tokens = 0;
  for (uint64_t& count : before) tokens += std::exchange(count, tokens);
  before.push_back(tokens);
  const size_t documents = before.size() - 1;
  const KeyedPermutation order(documents, options.seed, RandomPurpose::kDocumentShuffle, 0);
  ContentHash hash;
  std::string buffer;
  const auto flush = [&]() -> absl::Status {
    hash.AddTokens(buffer.data(), buffer.size());
    KRAIT_RETURN_IF_ERROR(
        file.Append("tokens", buffer.data(), static_cast<int64_t>(buffer.size()) / size));
    buffer.clear();
    return absl::OkStatus();
  };
  std::vector<uint64_t> starts;
  uint64_t written = 0;
  for (size_t i = 0; i < documents; ++i) {
    const auto from = static_cast<size_t>(order(i));
    uint64_t at = before[from];
    if (at < before[from + 1]) starts.push_back(written);
    while (at < before[from + 1]) {
      const size_t room = (kMergeBuffer - buffer.size()) / static_cast<size_t>(size);
      const uint64_t count = std::min<uint64_t>(room, before[from + 1] - at);
      const size_t old = buffer.size();
      buffer.resize(old + count * static_cast<size_t>(size));
      KRAIT_RETURN_IF_ERROR(parts->ReadTokens(static_cast<int64_t>(at) * size, buffer.data() + old,
                                              buffer.size() - old));
      at += count;
      written += count;
      if (kMergeBuffer - buffer.size() >= static_cast<size_t>(size)) continue;
      KRAIT_RETURN_IF_ERROR(flush());
      const auto share = static_cast<double>(written) / static_cast<double>(tokens);
      KRAIT_RETURN_IF_ERROR(teller->Tell(
          input_bytes + static_cast<int64_t>(share * static_cast<double>(input_bytes))));
    }
  }
  KRAIT_RETURN_IF_ERROR(flush());
  starts.push_back(written);
  report->documents = static_cast<int64_t>(starts.size()) - 1;
  report->tokens = static_cast<int64_t>(written);
  KRAIT_RETURN_IF_ERROR(file.CreateChunked("documents", DType::kU64, kDocumentChunk));
  KRAIT_RETURN_IF_ERROR(
      file.Append("documents", starts.data(), static_cast<int64_t>(starts.size())));
  hash.AddDocuments(starts);
  KRAIT_RETURN_IF_ERROR(WriteAttributes(
      tokenizer, files, *report,
      hash.Finish(tokenizer.name(), static_cast<uint64_t>(tokenizer.vocab_size())), &file));
  KRAIT_RETURN_IF_ERROR(teller->Tell(2 * input_bytes));
  KRAIT_RETURN_IF_ERROR(file.Close());
  KRAIT_RETURN_IF_ERROR(raw.Sync());
  return raw.Close();
}

// What half-done work belongs to: the inputs as they are, and how they are encoded.
std::string KeyOf(const std::vector<Input>& inputs, const Tokenizer& tokenizer) {
  nlohmann::ordered_json json = {{"version", kPartsVersion},
                                 {"tokenizer", tokenizer.name()},
                                 {"end_token", tokenizer.end_token().value_or(-1)},
                                 {"prefix", tokenizer.prefix()},
                                 {"suffix", tokenizer.suffix()},
                                 {"token_bytes", SizeOf(TokenDType(tokenizer.vocab_size()))}};
  ContentHash hash;  // of what may be long
  for (const Input& input : inputs) {
    const std::string line = absl::StrFormat("%s\n%d %d %d %d\n", input.path, input.named,
                                             input.linked, input.bytes, input.changed_ns);
    hash.AddTokens(line.data(), line.size());
  }
  json["inputs"] = inputs.size();
  json["inputs_hash"] = hash.Finish("", 0);
  return json.dump();
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

// Builds in an open folder of parts.
absl::Status BuildWith(const BuildOptions& options, const std::vector<Input>& inputs,
                       const Tokenizer& tokenizer, const TokenizerFiles& files, BuildParts* parts,
                       BuildMark* mark, BuildReport* report) {
  int64_t input_bytes = 0;
  for (const Input& input : inputs) input_bytes += input.bytes;
  Teller teller(options, 2 * input_bytes);
  KRAIT_RETURN_IF_ERROR(Encoding(options, inputs, tokenizer, parts, mark, &teller).Run());
  BuildReport read = mark->report;
  read.hidden = report->hidden;
  read.repeated_files = report->repeated_files;
  read.repeated_folders = report->repeated_folders;
  read.resumed_documents = report->resumed_documents;
  read.skipped_files += report->skipped_files;
  *report = std::move(read);
  if (mark->documents == 0) {
    return Error(ExitCode::kData,
                 options.paths.empty()
                     ? "no text was found in an empty list of paths"
                     : "no text was found in " + absl::StrJoin(options.paths, ", "));
  }
  const std::string temporary = TemporaryName(options.out);
  KRAIT_RETURN_IF_ERROR(RemoveAll(temporary, ExitCode::kCannotSave));
  absl::Status status =
      WriteTokens(temporary, tokenizer, files, options, input_bytes, parts, report, &teller);
  if (status.ok()) status = Rename(temporary, options.out, ExitCode::kCannotSave);
  // The first error is the one to report; what cannot be removed has a name that says what it is.
  if (!status.ok()) (void)RemoveAll(temporary, ExitCode::kCannotSave);
  return status;
}

}  // namespace

absl::StatusOr<BuildReport> BuildTokenFile(const BuildOptions& options) {
  TokenizerFiles files;
  KRAIT_ASSIGN_OR_RETURN(files, ReadTokenizerFiles(options.tokenizer));
  std::unique_ptr<Tokenizer> tokenizer;
  KRAIT_ASSIGN_OR_RETURN(tokenizer, MakeTokenizer(files, options.tokenizer));
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
  std::vector<Input> inputs;
  KRAIT_ASSIGN_OR_RETURN(inputs, FindInputs(options, &report));
  BuildMark mark;
  auto parts = BuildParts::Open(options.out + ".parts", KeyOf(inputs, *tokenizer), &mark);
  if (!parts.ok()) {
    // Of a folder that could not be filled nothing is left; another build's stays.
    if (ExitCodeOf(parts.status()) == ExitCode::kCannotSave) {
      (void)RemoveAll(options.out + ".parts", ExitCode::kCannotSave);
    }
    return parts.status();
  }
  report.resumed_documents = mark.documents;
  absl::Status status = BuildWith(options, inputs, *tokenizer, files, &*parts, &mark, &report);
  if (status.ok()) {
    KRAIT_RETURN_IF_ERROR(parts->Remove());
    KRAIT_RETURN_IF_ERROR(SyncDirectory(folder, ExitCode::kCannotSave));
    return report;
  }
  if (!parts->any_mark()) {
    (void)parts->Remove();
    return status;
  }
  return Error(ExitCodeOf(status),
               MessageOf(status) + absl::StrFormat("; %s.parts keeps what was done, and the same "
                                                   "command goes on from there",
                                                   options.out));
}

}  // namespace krait
