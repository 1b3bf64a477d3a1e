// A stable counting sort of small keys, for experts' rows and for the embedding's tokens.
// Plain C++.
#ifndef KRAIT_KERNELS_CUDA_BUCKET_SORT_H_
#define KRAIT_KERNELS_CUDA_BUCKET_SORT_H_

#include <cstdint>

#include "kernels/context.h"

namespace krait::cuda {

// Keys of one block; the blocks' counts are scratch memory of BucketBlocks(n) x buckets i32.
inline constexpr int64_t kBucketKeys = 1024;
inline int64_t BucketBlocks(int64_t n) { return (n + kBucketKeys - 1) / kBucketKeys; }
inline constexpr int64_t kMaxBuckets = 1024;

// The key of element i: (keys[i] >> shift) & mask, in [0, buckets).
struct BucketKeys {
  const int32_t* keys;
  int shift = 0;
  int32_t mask = -1;
};

// place[i] = where element i stands when [0, n) is sorted by key, equal keys in their order; bucket
// e begins at offsets[e], a multiple of `alignment`, and offsets[buckets] is the end. At most
// kMaxBuckets buckets. offsets [buckets + 1] i64.
void SortIntoBuckets(int32_t* place, int64_t* offsets, int32_t* counts, BucketKeys keys, int64_t n,
                     int64_t buckets, int64_t alignment, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_BUCKET_SORT_H_
