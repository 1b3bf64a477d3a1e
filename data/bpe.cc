#include "data/bpe.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <queue>

#include "absl/hash/hash.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "kernels/base/check.h"
#include "kernels/base/utf8.h"

namespace krait {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
// Up to so many symbols the best pair is searched for; from there on it is kept in a heap.
constexpr size_t kShort = 48;

std::string_view FirstCharacter(std::string_view text) {
  return text.substr(0, std::max<size_t>(1, Utf8Length(text, 0)));
}

std::string_view LastCharacter(std::string_view text) {
  for (size_t size = 1; size <= 4 && size <= text.size(); ++size) {
    const size_t at = text.size() - size;
    if (Utf8Length(text, at) == size) return text.substr(at);
  }
  return text.substr(text.size() - 1);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const BpeVocabulary>> BpeVocabulary::Create(
    std::vector<std::string> tokens, const std::array<int32_t, 256>& byte_tokens,
    const std::vector<std::pair<std::string, std::string>>& merges, Options options,
    const std::string& place) {
  auto vocabulary = std::make_shared<BpeVocabulary>();
  vocabulary->tokens_ = std::move(tokens);
  vocabulary->byte_tokens_ = byte_tokens;
  vocabulary->options_ = options;
  for (size_t id = 0; id < vocabulary->tokens_.size(); ++id) {
    const std::string& token = vocabulary->tokens_[id];
    if (!token.empty()) vocabulary->ids_.emplace(token, static_cast<int32_t>(id));
  }
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto& [left, right] = merges[i];
    const int32_t ids[] = {vocabulary->Find(left), vocabulary->Find(right),
                           vocabulary->Find(left + right)};
    if (std::find(std::begin(ids), std::end(ids), -1) != std::end(ids)) {
      return Error(ExitCode::kData,
                   absl::StrFormat("%s[%d]: a part of the merge or what it makes is no token of "
                                   "the vocabulary",
                                   place, i));
    }
    vocabulary->merges_[Pair(ids[0], ids[1])] = {static_cast<uint32_t>(i), ids[2]};
  }
  if (!options.byte_level) vocabulary->FindSeams(merges);
  return vocabulary;
}

void BpeVocabulary::FindSeams(const std::vector<std::pair<std::string, std::string>>& merges) {
  cuts_ = !options_.ignore_merges;  // of which a whole word may be a token
  for (const auto& [left, right] : merges) {
    const int32_t a = Find(LastCharacter(left)), b = Find(FirstCharacter(right));
    for (const std::string& part : {left, right}) {
      const int32_t id = Find(part);
      // Merges of the tokens of bytes join symbols that are no characters.
      cuts_ =
          cuts_ && std::find(byte_tokens_.begin(), byte_tokens_.end(), id) == byte_tokens_.end();
    }
    if (a >= 0 && b >= 0) joined_.insert(Pair(a, b));
  }
}

int32_t BpeVocabulary::Find(std::string_view token) const {
  const auto found = ids_.find(absl::string_view(token.data(), token.size()));
  return found == ids_.end() ? -1 : found->second;
}

BpeEncoder::BpeEncoder(std::shared_ptr<const BpeVocabulary> vocabulary)
    : vocabulary_(std::move(vocabulary)), remembered_(kWords) {
  static_assert(sizeof(Remembered) == 64);
}

int BpeEncoder::Encode(std::string_view word, std::vector<int32_t>* ids) {
  const BpeVocabulary& vocabulary = *vocabulary_;
  if (!vocabulary.cuts_) return EncodeWord(word, ids);
  size_t begin = 0;
  int32_t before = -1;
  for (size_t i = 0; i < word.size();) {
    const size_t length = std::max<size_t>(1, Utf8Length(word, i));
    const int32_t id = vocabulary.Find(word.substr(i, length));
    if (i > begin &&
        (before < 0 || id < 0 || !vocabulary.joined_.contains(BpeVocabulary::Pair(before, id)))) {
      if (const int bad = EncodeWord(word.substr(begin, i - begin), ids); bad >= 0) return bad;
      begin = i;
    }
    before = id;
    i += length;
  }
  return EncodeWord(word.substr(begin), ids);
}

int BpeEncoder::EncodeWord(std::string_view word, std::vector<int32_t>* ids) {
  if (word.empty()) return -1;
  if (word.size() > kWordBytes) return EncodeNew(word, ids);
  Remembered& place =
      remembered_[absl::HashOf(absl::string_view(word.data(), word.size())) % kWords];
  if (place.bytes == word.size() && std::memcmp(place.word, word.data(), word.size()) == 0) {
    ids->insert(ids->end(), place.id, place.id + place.ids);
    return -1;
  }
  const size_t before = ids->size();
  const int bad = EncodeNew(word, ids);
  const size_t count = ids->size() - before;
  if (bad < 0 && count <= kWordIds) {
    place.bytes = static_cast<uint8_t>(word.size());
    place.ids = static_cast<uint8_t>(count);
    std::memcpy(place.word, word.data(), word.size());
    std::copy(ids->begin() + static_cast<int64_t>(before), ids->end(), place.id);
  }
  return bad;
}

int BpeEncoder::EncodeNew(std::string_view word, std::vector<int32_t>* ids) {
  if (vocabulary_->options_.ignore_merges) {
    if (const int32_t id = vocabulary_->Find(word); id >= 0) {
      ids->push_back(id);
      return -1;
    }
  }
  symbols_.clear();
  if (const int bad = AddSymbols(word); bad >= 0) return bad;
  symbols_.size() <= kShort ? MergeShort(ids) : MergeLong(ids);
  return -1;
}

int BpeEncoder::AddSymbols(std::string_view word) {
  const BpeVocabulary& vocabulary = *vocabulary_;
  size_t i = 0;
  while (i < word.size()) {
    size_t length = 1;
    if (!vocabulary.options_.byte_level) {
      length = std::max<size_t>(1, Utf8Length(word, i));
      if (const int32_t id = vocabulary.Find(word.substr(i, length)); id >= 0) {
        symbols_.push_back(id);
        i += length;
        continue;
      }
    }
    for (const size_t end = i + length; i < end; ++i) {
      const auto byte = static_cast<unsigned char>(word[i]);
      if (vocabulary.byte_tokens_[byte] < 0) return byte;
      symbols_.push_back(vocabulary.byte_tokens_[byte]);
    }
  }
  return -1;
}

uint32_t BpeEncoder::RankOf(int32_t left, int32_t right, int32_t* merged) const {
  const auto found = vocabulary_->merges_.find(BpeVocabulary::Pair(left, right));
  if (found == vocabulary_->merges_.end()) return kNone;
  *merged = found->second.id;
  return found->second.rank;
}

// The ranks of all neighbours, of which the lowest is searched for each time.
void BpeEncoder::MergeShort(std::vector<int32_t>* ids) {
  size_t count = symbols_.size();
  ranks_.assign(count, kNone);
  merged_.assign(count, -1);
  for (size_t i = 0; i + 1 < count; ++i) {
    ranks_[i] = RankOf(symbols_[i], symbols_[i + 1], &merged_[i]);
  }
  while (count > 1) {
    const auto lowest =
        std::min_element(ranks_.begin(), ranks_.begin() + static_cast<int64_t>(count) - 1);
    if (*lowest == kNone) break;
    const auto i = static_cast<size_t>(lowest - ranks_.begin());
    symbols_[i] = merged_[i];
    for (size_t k = i + 1; k + 1 < count; ++k) {
      symbols_[k] = symbols_[k + 1];
      ranks_[k] = ranks_[k + 1];
      merged_[k] = merged_[k + 1];
    }
    --count;
    ranks_[i] = i + 1 < count ? RankOf(symbols_[i], symbols_[i + 1], &merged_[i]) : kNone;
    if (i > 0) ranks_[i - 1] = RankOf(symbols_[i - 1], symbols_[i], &merged_[i - 1]);
  }
  ids->insert(ids->end(), symbols_.begin(), symbols_.begin() + static_cast<int64_t>(count));
}

// A linked list of symbols and a heap of pairs, in which pairs that are gone are left and passed
// over.
void BpeEncoder::MergeLong(std::vector<int32_t>* ids) {
  struct Candidate {
    uint32_t rank;
    int32_t at;
    int32_t left, right;  // ids at the time
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  KRAIT_CHECK(symbols_.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()));
  const auto count = static_cast<int32_t>(symbols_.size());
  list_.resize(symbols_.size());
  std::vector<Candidate> start;
  int32_t merged = -1;
  for (int32_t i = 0; i < count; ++i) {
    const auto k = static_cast<size_t>(i);
    list_[k] = {symbols_[k], i - 1, i + 1 < count ? i + 1 : -1};
    if (i + 1 == count) break;
    const uint32_t rank = RankOf(symbols_[k], symbols_[k + 1], &merged);
    if (rank != kNone) start.push_back({rank, i, symbols_[k], symbols_[k + 1]});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap(std::greater<>(),
                                                                              std::move(start));
  const auto offer = [&](int32_t at) {
    const Symbol& symbol = list_[static_cast<size_t>(at)];
    if (symbol.next < 0) return;
    const int32_t right = list_[static_cast<size_t>(symbol.next)].id;
    const uint32_t rank = RankOf(symbol.id, right, &merged);
    if (rank != kNone) heap.push({rank, at, symbol.id, right});
  };
  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Symbol& symbol = list_[static_cast<size_t>(best.at)];
    if (symbol.id != best.left || symbol.next < 0) continue;
    Symbol& right = list_[static_cast<size_t>(symbol.next)];
    if (right.id != best.right) continue;
    RankOf(best.left, best.right, &merged);
    symbol.id = merged;
    right.id = -1;
    symbol.next = right.next;
    if (symbol.next >= 0) list_[static_cast<size_t>(symbol.next)].previous = best.at;
    if (symbol.previous >= 0) offer(symbol.previous);
    offer(best.at);
  }
  for (int32_t i = 0; i >= 0; i = list_[static_cast<size_t>(i)].next) {
    ids->push_back(list_[static_cast<size_t>(i)].id);
  }
}

}  // namespace krait
