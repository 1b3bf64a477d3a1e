// Byte pair encoding: the words of a text to ids.
//
// A word begins as one symbol per byte or character; the pair of neighbours whose merge stands
// first in the list, leftmost first, is merged until none is left (Sennrich et al. 2016; the same
// order as Hugging Face tokenizers').
#ifndef KRAIT_DATA_BPE_H_
#define KRAIT_DATA_BPE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "kernels/base/status.h"

namespace krait {

// Immutable, so that threads share it.
class BpeVocabulary {
 public:
  struct Options {
    bool byte_level = true;      // symbols are bytes; else characters, and bytes where those lack
    bool ignore_merges = false;  // a word that is a token stays whole
  };
  // `tokens`: id to bytes, where ids without a token are "". `byte_tokens`: of each byte, the token
  // that stands for it; -1 where there is none, for byte_level only. `merges`: pairs of tokens; the
  // last one counts where a pair comes twice. kData, with `place` and the index, for a merge whose
  // parts or result are no tokens.
  static absl::StatusOr<std::shared_ptr<const BpeVocabulary>> Create(
      std::vector<std::string> tokens, const std::array<int32_t, 256>& byte_tokens,
      const std::vector<std::pair<std::string, std::string>>& merges, Options options,
      const std::string& place);

  const std::vector<std::string>& tokens() const { return tokens_; }
  // The id of a token's bytes, or -1.
  int32_t Find(std::string_view token) const;

 private:
  friend class BpeEncoder;
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  static uint64_t Pair(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  void FindSeams(const std::vector<std::pair<std::string, std::string>>& merges);

  std::vector<std::string> tokens_;
  absl::flat_hash_map<std::string, int32_t> ids_;
  absl::flat_hash_map<uint64_t, Merge> merges_;
  std::array<int32_t, 256> byte_tokens_{};
  Options options_;
  // Pairs of first symbols that some merge joins. Between any other two a word may be cut, as no
  // token reaches over them. Used for characters, where a word is a whole text.
  absl::flat_hash_set<uint64_t> joined_;
  bool cuts_ = false;
};

// Encodes for one thread, and remembers short words.
class BpeEncoder {
 public:
  explicit BpeEncoder(std::shared_ptr<const BpeVocabulary> vocabulary);

  // Appends the ids of a word; of bytes that are no UTF-8 too. -1, or the byte that has no token.
  int Encode(std::string_view word, std::vector<int32_t>* ids);

 private:
  static constexpr size_t kWordBytes = 27, kWordIds = 8, kWords = size_t{1} << 16;
  // 64 bytes, a line of the processor's cache.
  struct Remembered {
    uint8_t bytes = 0, ids = 0;  // bytes 0: empty
    char word[kWordBytes + 3] = {};
    int32_t id[kWordIds] = {};
  };
  struct Symbol {
    int32_t id;
    int32_t previous, next;  // -1: none
  };

  int EncodeWord(std::string_view word, std::vector<int32_t>* ids);
  int EncodeNew(std::string_view word, std::vector<int32_t>* ids);
  int AddSymbols(std::string_view word);
  void MergeShort(std::vector<int32_t>* ids);
  void MergeLong(std::vector<int32_t>* ids);
  uint32_t RankOf(int32_t left, int32_t right, int32_t* merged) const;

  std::shared_ptr<const BpeVocabulary> vocabulary_;
  std::vector<Remembered> remembered_;
  std::vector<int32_t> symbols_;
  std::vector<uint32_t> ranks_;
  std::vector<int32_t> merged_;
  std::vector<Symbol> list_;
};

}  // namespace krait

#endif  // KRAIT_DATA_BPE_H_
