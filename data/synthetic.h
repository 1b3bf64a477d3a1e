// In-context tasks as sources of tokens: sequences that are computed when they are read, in which a
// few targets count, those that can be known from what the sequence said before. They show at
// small size what an architecture can do with its context.
//
// Ids: 0 is filler, 1 a separator, the others are data. One sequence of T tokens:
//
//   recall          k1 v1 k2 v2 ..., `items` pairs, then to the end keys of these, drawn anew each
//                   time, followed by their values, which count. Keys are distinct, of the lower
//                   half of the data ids, values of the upper half. (After the multi-query
//                   associative recall of Arora et al. 2023, arXiv:2312.04927; there each key is
//                   asked for once, so that values which came up already can be left out)
//   copy            filler, `items` data ids, separator, the same ids again, which count
//                   (Jelassi et al. 2024, arXiv:2402.01032)
//   induction       data ids, among them once the separator; the last two tokens are the separator
//                   and the id that followed it, which counts (Gu and Dao 2023, arXiv:2312.00752)
//   selective_copy  `items` data ids at random places of a stretch of filler, separator, the same
//                   ids again, which count (the same)
#ifndef KRAIT_DATA_SYNTHETIC_H_
#define KRAIT_DATA_SYNTHETIC_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

enum class SyntheticTask : uint8_t { kRecall, kCopy, kInduction, kSelectiveCopy };
// By their enumerators.
inline constexpr const char* kSyntheticTaskNames[] = {"recall", "copy", "induction",
                                                      "selective_copy"};

struct SyntheticSpec {
  SyntheticTask task = SyntheticTask::kRecall;
  int64_t items = 0;              // pairs, or copied ids; 0 for induction
  int64_t sequences = 1'000'000;  // of an epoch
  uint64_t seed = 1;              // sequences of different seeds have nothing in common

  // "recall-16": names the source in messages and metrics.
  std::string Name() const;
};

// kConfig, without a place: what the task lacks in sequences of `seq_len` tokens of `vocab_size`
// ids.
absl::Status CheckSynthetic(const SyntheticSpec& spec, int64_t seq_len, int64_t vocab_size);

// The tokens of a source: sequence k is [k * seq_len, (k + 1) * seq_len). Pure functions of the
// spec, safe from any thread.
class SyntheticTokens {
 public:
  // The spec has passed CheckSynthetic.
  SyntheticTokens(const SyntheticSpec& spec, int64_t seq_len, int64_t vocab_size)
      : spec_(spec), seq_len_(seq_len), vocab_size_(vocab_size) {}

  int64_t tokens() const { return spec_.sequences * seq_len_; }
  // 16 hexadecimal digits of all that the tokens depend on.
  std::string Hash() const;
  // Tokens [begin, begin + count), and whether each counts as a target. Either may be null.
  void Read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* counts) const;

 private:
  void Sequence(int64_t k, std::vector<int32_t>* tokens, std::vector<uint8_t>* counts) const;

  SyntheticSpec spec_;
  int64_t seq_len_, vocab_size_;
};

}  // namespace krait

#endif  // KRAIT_DATA_SYNTHETIC_H_
