// kernels/cross_entropy.h on CUDA tensors (logits f32 or bf16), called by its dispatch functions
// alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_CROSS_ENTROPY_H_
#define KRAIT_KERNELS_CUDA_CROSS_ENTROPY_H_

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "kernels/vocabulary.h"

namespace krait::cuda {

void CrossEntropyMax(Tensor max, Tensor logits, VocabularySlice slice, const Context& ctx);
void CrossEntropySum(Tensor sum, Tensor picked, Tensor max, Tensor logits, Tensor targets,
                     VocabularySlice slice, const Context& ctx);
void CrossEntropyFinish(Tensor losses, Tensor d_logits, Tensor max, Tensor sum, Tensor picked,
                        Tensor logits, Tensor targets, VocabularySlice slice, Tensor scale,
                        const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_CROSS_ENTROPY_H_
