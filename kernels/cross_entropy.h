// Softmax cross-entropy over a vocabulary that may be cut into slices (vocabulary-parallel ranks):
// partial results of a slice, which all-reduce to those of the vocabulary, and a finish.
//
//   max[m]    = max over v of logits[m,v]                     all-reduce by maximum
//   sum[m]    = sum over v of exp(logits[m,v] - max[m])       all-reduce by sum
//   picked[m] = logits[m, target[m]]                          all-reduce by sum
//   losses[m] = log(sum[m]) + max[m] - picked[m], or 0 where target[m] < 0 (no target)
//
// logits [M,columns] f32, f64 or bf16 of the ids [slice.first, slice.first + slice.used), in the
// first `used` columns; more columns are padding and count as -inf. A slice without a used column
// has max -inf, sum 0, picked 0. targets [M] i32. max, picked, losses [M]: Wide(logits); sum [M]
// f64.
#ifndef KRAIT_KERNELS_CROSS_ENTROPY_H_
#define KRAIT_KERNELS_CROSS_ENTROPY_H_

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "kernels/vocabulary.h"

namespace krait {

void CrossEntropyMax(Tensor max, Tensor logits, VocabularySlice slice, const Context& ctx);
// `max` is that of the whole vocabulary.
void CrossEntropySum(Tensor sum, Tensor picked, Tensor max, Tensor logits, Tensor targets,
                     VocabularySlice slice, const Context& ctx);
// max, sum and picked are those of the whole vocabulary. When `d_logits` is defined (may be the
// same memory as logits) it receives (softmax - onehot) * scale, zero rows without target and zero
// columns of padding; scale [1] f64 on the device.
void CrossEntropyFinish(Tensor losses, Tensor d_logits, Tensor max, Tensor sum, Tensor picked,
                        Tensor logits, Tensor targets, VocabularySlice slice, Tensor scale,
                        const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_CROSS_ENTROPY_H_
