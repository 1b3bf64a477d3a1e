#include "data/document_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"

namespace krait {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kPieceBlocks = 16;  // of a pass over the whole table

}  // namespace

absl::StatusOr<DocumentTable> DocumentTable::Open(Source source, int64_t entries, int64_t tokens,
                                                  const std::string& name) {
  KRAIT_CHECK(entries >= 2);
  DocumentTable table;
  table.source_ = std::move(source);
  table.name_ = name;
  table.entries_ = entries;
  table.firsts_.reserve(static_cast<size_t>((entries + kBlock - 1) / kBlock));
  int64_t i = 0;
  uint64_t before = 0;
  absl::Status fault;
  const auto check = [&](const std::vector<uint64_t>& piece) {
    for (const uint64_t start : piece) {
      if (i == 0 && start != 0) {
        fault = Error(ExitCode::kData,
                      absl::StrFormat("%s[0] is %u; it must be 0", table.name_, start));
      } else if (i > 0 && start <= before) {
        fault = Error(ExitCode::kData, absl::StrFormat("%s[%d] is %u after %u; they must ascend",
                                                       table.name_, i, start, before));
      }
      if (!fault.ok()) return false;
      if (i % kBlock == 0) table.firsts_.push_back(start);
      before = start;
      ++i;
    }
    return true;
  };
  KRAIT_RETURN_IF_ERROR(table.ForEachPiece(check));
  KRAIT_RETURN_IF_ERROR(fault);
  if (before != static_cast<uint64_t>(tokens)) {
    return Error(ExitCode::kData,
                 absl::StrFormat("%s[%d], the last, is %u; it must be the number of tokens, %d",
                                 table.name_, entries - 1, before, tokens));
  }
  return table;
}

DocumentTable DocumentTable::InMemory(std::vector<uint64_t> starts) {
  DocumentTable table;
  table.entries_ = static_cast<int64_t>(starts.size());
  for (size_t i = 0; i < starts.size(); i += kBlock) table.firsts_.push_back(starts[i]);
  table.source_ = [starts = std::move(starts)](int64_t first, int64_t count, uint64_t* entries) {
    std::copy_n(starts.begin() + first, count, entries);
    return absl::OkStatus();
  };
  return table;
}

absl::Status DocumentTable::ForEachPiece(const Piece& see) const {
  std::vector<uint64_t> piece;
  for (int64_t first = 0; first < entries_; first += kBlock * kPieceBlocks) {
    piece.resize(static_cast<size_t>(std::min(kBlock * kPieceBlocks, entries_ - first)));
    KRAIT_RETURN_IF_ERROR(source_(first, static_cast<int64_t>(piece.size()), piece.data()));
    if (!see(piece)) break;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint64_t>> DocumentTable::All() const {
  std::vector<uint64_t> all;
  KRAIT_RETURN_IF_ERROR(ForEachPiece([&](const std::vector<uint64_t>& piece) {
    all.insert(all.end(), piece.begin(), piece.end());
    return true;
  }));
  return all;
}

absl::Status DocumentTable::ReadBlock(int64_t b) const {
  if (b == in_block_) return absl::OkStatus();
  in_block_ = -1;
  const int64_t first = b * kBlock;
  block_.resize(static_cast<size_t>(std::min(kBlock, entries_ - first)));
  KRAIT_RETURN_IF_ERROR(source_(first, static_cast<int64_t>(block_.size()), block_.data()));
  // What was checked when the table was opened may have been replaced since.
  const auto next = static_cast<size_t>(b) + 1;
  if (block_.front() != firsts_[static_cast<size_t>(b)] ||
      std::adjacent_find(block_.begin(), block_.end(), std::greater_equal<>()) != block_.end() ||
      (next < firsts_.size() && block_.back() >= firsts_[next])) {
    return Error(ExitCode::kData, absl::StrFormat("%s changed at entries %d to %d while in use",
                                                  name_, first, first + kBlock - 1));
  }
  in_block_ = b;
  return absl::OkStatus();
}

absl::Status DocumentTable::Within(int64_t begin, int64_t end,
                                   std::vector<uint64_t>* starts) const {
  starts->clear();
  const auto from = static_cast<uint64_t>(begin), to = static_cast<uint64_t>(end);
  // The last block that begins at or before `begin`; the first begins at 0.
  auto b = std::upper_bound(firsts_.begin(), firsts_.end(), from) - firsts_.begin() - 1;
  for (; b < static_cast<int64_t>(firsts_.size()) && firsts_[static_cast<size_t>(b)] < to; ++b) {
    KRAIT_RETURN_IF_ERROR(ReadBlock(b));
    const auto first = std::upper_bound(block_.begin(), block_.end(), from);
    const auto last = std::lower_bound(first, block_.end(), to);
    starts->insert(starts->end(), first, last);
  }
  return absl::OkStatus();
}

}  // namespace krait
