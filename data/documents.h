// The documents in texts, .jsonl and .json files and folders, for `data build` (token_file.h).
#ifndef KRAIT_DATA_DOCUMENTS_H_
#define KRAIT_DATA_DOCUMENTS_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "data/token_file.h"
#include "kernels/base/file.h"

namespace krait {

// kStopped after a request to stop (kernels/base/stop_signals.h).
absl::Status CheckStop(const BuildOptions& options);

class DocumentList {
 public:
  // Both outlive it. The report gets the counts of files.
  DocumentList(const BuildOptions& options, BuildReport* report)
      : options_(options), report_(*report) {}

  // Reads all inputs once; all their errors.
  absl::Status Find();

  int64_t size() const { return static_cast<int64_t>(documents_.size()); }

  // Calls fn(piece) with the text of document `index`, in order, in one piece unless `split`.
  template <typename Fn>
  absl::Status Read(int64_t index, bool split, const Fn& fn);

 private:
  // Where a document's bytes lie: a whole text file, a line of a .jsonl file, or a text in the
  // spool.
  struct Document {
    int32_t file;  // index of the input file, or kSpool
    int64_t begin;
    int64_t bytes;
  };
  static constexpr int32_t kSpool = -1;
  static constexpr int64_t kTextPiece = int64_t{1} << 20;  // bytes of a text in memory at once

  using FileId = std::pair<uint64_t, uint64_t>;  // device and inode
  // A file to read.
  struct Input {
    std::string path;
    bool named = false;   // by the user, not found in a folder
    bool linked = false;  // by a symbolic link in a folder
    FileId id = {};
    int64_t bytes = 0;
  };

  static bool IsJsonLines(const std::string& path);
  std::string JoinedPaths() const;
  // The files that a path of the user's stands for.
  absl::Status List(const std::string& path);
  // Adds the files in a folder and below. `seen`: the folders gone through.
  absl::Status ListFolder(const std::string& folder, std::set<FileId>* seen,
                          std::vector<Input>* found);
  absl::Status AddInput(const Input& input);
  absl::Status AddText(const Input& input);
  absl::Status AddJsonLines(const Input& input);
  absl::Status AddJson(const Input& input);
  absl::Status NotText(const Input& input, const std::string& why);
  absl::Status AddToSpool(const std::string& text);
  absl::Status OpenSpool();
  int32_t NextFile(const std::string& path);
  absl::StatusOr<const File*> Opened(int32_t index);
  // Puts the text of the line in text_, of a .jsonl file, in its place.
  absl::Status TakeLine(const File& file, int64_t begin);
  absl::Status Tell(int64_t done);

  const BuildOptions& options_;
  BuildReport& report_;
  std::vector<Input> inputs_;
  std::vector<std::string> files_;
  std::vector<Document> documents_;
  std::map<int32_t, File> opened_;
  File spool_;
  int64_t spool_size_ = 0;
  // Of the progress, which counts bytes: each input is read twice.
  int64_t input_bytes_ = 0, document_bytes_ = 0, done_ = 0, told_ = 0;
  std::string line_, text_;
};

template <typename Fn>
absl::Status DocumentList::Read(int64_t index, bool split, const Fn& fn) {
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
    done_ += static_cast<int64_t>(text_.size());
    if (is_line) KRAIT_RETURN_IF_ERROR(TakeLine(*file, document.begin));
    fn(text_);
    KRAIT_RETURN_IF_ERROR(Tell(done_));
  }
  return absl::OkStatus();
}

}  // namespace krait

#endif  // KRAIT_DATA_DOCUMENTS_H_
