// kernels/embedding.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain
// C++.
#ifndef KRAIT_KERNELS_CUDA_EMBEDDING_H_
#define KRAIT_KERNELS_CUDA_EMBEDDING_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/cuda/bucket_sort.h"
#include "kernels/tensor.h"
#include "kernels/vocabulary.h"

namespace krait::cuda {

void EmbeddingForward(Tensor y, Tensor tokens, Tensor table, VocabularySlice slice,
                      const Context& ctx);

// Tokens are sorted by digits of so many bits.
inline constexpr int kTokenBits = 8;
// i32 words of scratch memory for M tokens: two arrays of keys and positions, one of places, the
// blocks' counts, and the buckets' offsets (i64).
inline int64_t EmbeddingScratchWords(int64_t tokens) {
  constexpr int64_t kBuckets = int64_t{1} << kTokenBits;
  return 5 * tokens + BucketBlocks(tokens) * kBuckets + 2 * (kBuckets + 1) + 2;
}
// scratch [EmbeddingScratchWords(M)] i32.
void EmbeddingBackward(Tensor dtable, Tensor dy, Tensor tokens, VocabularySlice slice,
                       int64_t pad_token, Tensor scratch, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_EMBEDDING_H_
