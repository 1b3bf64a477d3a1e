// Token embedding over a slice of the vocabulary. tokens [M] i32 in [0, slice.total); table
// [rows,D] of the compute dtype, row i for the id slice.first + i, rows >= slice.used; y [M,D] of
// the compute dtype.
#ifndef KRAIT_KERNELS_EMBEDDING_H_
#define KRAIT_KERNELS_EMBEDDING_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "kernels/vocabulary.h"

namespace krait {

// y[i] = the row of tokens[i], zero where the slice does not hold it: the sum over the slices of
// all ranks is the embedding.
void EmbeddingForward(Tensor y, Tensor tokens, Tensor table, VocabularySlice slice,
                      const Context& ctx);
// dtable (Wide) row of tokens[i] += dy[i], the rows of one token in ascending i (deterministic, no
// atomics). Tokens of other slices are ignored, and so is pad_token, whose row is not trained by
// the lookup (torch.nn.Embedding's padding_idx).
inline constexpr int64_t kNoPadToken = -1;
void EmbeddingBackward(Tensor dtable, Tensor dy, Tensor tokens, VocabularySlice slice,
                       int64_t pad_token, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_EMBEDDING_H_
