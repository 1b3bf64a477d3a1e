// The half-done work of a `data build`: OUT.parts, a folder from which a build that was killed goes
// on.
//
//   tokens      the ids of all documents so far, in the order of the inputs, in the file's dtype
//   documents   how many tokens each has, u64
//   journal     lines "CRC JSON": first what the work belongs to, then where it stood at each mark
//
// Only what a mark counts is taken over, and a mark is written after what it counts is on disk: the
// folder can be left at any time.
#ifndef KRAIT_DATA_BUILD_PARTS_H_
#define KRAIT_DATA_BUILD_PARTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "data/token_file.h"
#include "kernels/base/file.h"
#include "kernels/base/status.h"

namespace krait {

// How far the inputs were taken.
struct BuildMark {
  int64_t input = 0;            // index of the input that comes next
  int64_t records = 0;          // of it that were taken
  int64_t input_documents = 0;  // of it that were written
  int64_t tokens = 0, documents = 0;
  BuildReport report;  // counts of what was read
};

class BuildParts {
 public:
  // Makes the folder, or goes on in one that belongs to the same `key`: then `mark` is where.
  // Another build in it is kConfig, the rest kCannotSave.
  static absl::StatusOr<BuildParts> Open(const std::string& folder, const std::string& key,
                                         BuildMark* mark);

  absl::Status AppendTokens(const void* data, size_t bytes);
  absl::Status AppendDocument(uint64_t tokens);
  // Makes all that was appended durable and notes the mark.
  absl::Status Commit(const BuildMark& mark);
  bool any_mark() const { return any_mark_; }

  // The number of tokens of each document.
  absl::StatusOr<std::vector<uint64_t>> Documents();
  absl::Status ReadTokens(int64_t offset, void* out, size_t bytes) const;

  absl::Status Remove();

 private:
  absl::Status FlushTokens();
  absl::Status FlushDocuments();
  absl::Status WriteLine(const std::string& json);
  absl::Status Restart(const std::string& key);
  absl::Status Resume(const std::string& key, BuildMark* mark);

  std::string folder_;
  File lock_, tokens_, documents_, journal_;
  int64_t token_bytes_ = 0, document_count_ = 0, journal_bytes_ = 0;  // written
  std::string token_buffer_;
  std::vector<uint64_t> document_buffer_;
  bool any_mark_ = false;
};

}  // namespace krait

#endif  // KRAIT_DATA_BUILD_PARTS_H_
