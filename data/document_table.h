// Where the documents of a token file start.
#ifndef KRAIT_DATA_DOCUMENT_TABLE_H_
#define KRAIT_DATA_DOCUMENT_TABLE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

// The table: positions that ascend from 0, then the number of tokens. One entry in 4096 is held in
// memory; the others are read when they are asked for, 4096 at once. Errors are kData. Not
// thread-safe.
class DocumentTable {
 public:
  // Reads entries [first, first + count) of what is stored. Outlives the table.
  using Source = std::function<absl::Status(int64_t first, int64_t count, uint64_t* entries)>;

  DocumentTable() = default;
  // Reads the whole table once, in pieces, and checks it: `entries` of them, from 0 to `tokens`.
  // `name` is what messages call it: "X.h5: /documents".
  static absl::StatusOr<DocumentTable> Open(Source source, int64_t entries, int64_t tokens,
                                            const std::string& name);
  // One that is held in memory whole, and is sound.
  static DocumentTable InMemory(std::vector<uint64_t> starts);

  int64_t entries() const { return entries_; }
  int64_t documents() const { return entries_ - 1; }

  // Calls `see` with entries in their order, from the first on, a piece at a time, until it returns
  // false.
  using Piece = std::function<bool(const std::vector<uint64_t>& entries)>;
  absl::Status ForEachPiece(const Piece& see) const;
  // All of them (tests, small files).
  absl::StatusOr<std::vector<uint64_t>> All() const;
  // The starts s with begin < s < end, ascending. 0 <= begin <= end <= the number of tokens.
  absl::Status Within(int64_t begin, int64_t end, std::vector<uint64_t>* starts) const;

 private:
  // Makes block_ the entries [4096 b, 4096 (b + 1)), as far as there are any.
  absl::Status ReadBlock(int64_t b) const;

  Source source_;
  std::string name_;
  int64_t entries_ = 0;
  std::vector<uint64_t> firsts_;  // entry 4096 b for each b
  mutable std::vector<uint64_t> block_;
  mutable int64_t in_block_ = -1;  // b of block_
};

}  // namespace krait

#endif  // KRAIT_DATA_DOCUMENT_TABLE_H_
