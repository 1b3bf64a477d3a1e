// Softmax cross-entropy of the LM head.
#ifndef KRAIT_KERNELS_CROSS_ENTROPY_H_
#define KRAIT_KERNELS_CROSS_ENTROPY_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// losses[m] = logsumexp(logits[m]) - logits[m, target[m]], or 0 where target[m] < 0 (no target).
// logits [M,V] f32 or f64 (rows may be strided: padded vocabulary), losses [M] same dtype,
// targets [M] i32.
// When `d_logits` is defined (may be the same memory as logits) it receives
// (softmax - onehot) * scale, zero rows without target.
void CrossEntropy(Tensor losses, Tensor d_logits, Tensor logits, Tensor targets, double scale,
                  const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_CROSS_ENTROPY_H_
