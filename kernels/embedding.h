// Token embedding. tokens [M] i32 in [0, V); table [V,D]; y [M,D].
#ifndef KRAIT_KERNELS_EMBEDDING_H_
#define KRAIT_KERNELS_EMBEDDING_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

void EmbeddingForward(Tensor y, Tensor tokens, Tensor table, const Context& ctx);
// dtable[tokens[i]] += dy[i], the rows of one token in ascending i (deterministic, no atomics).
void EmbeddingBackward(Tensor dtable, Tensor dy, Tensor tokens, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_EMBEDDING_H_
