// The part of a vocabulary whose rows of the embedding or the LM head one rank holds. Plain C++.
#ifndef KRAIT_KERNELS_VOCABULARY_H_
#define KRAIT_KERNELS_VOCABULARY_H_

#include <cstdint>

namespace krait {

// The table has rows for the ids [first, first + used); rows after those are padding in memory,
// never read nor written. `used` may be 0. All ranks together hold [0, total).
struct VocabularySlice {
  int64_t first = 0, used = 0, total = 0;
};

inline VocabularySlice WholeVocabulary(int64_t size) { return {0, size, size}; }

}  // namespace krait

#endif  // KRAIT_KERNELS_VOCABULARY_H_
