// Softmax cross-entropy rows on the CPU; see kernels/cross_entropy.h.
#ifndef KRAIT_KERNELS_CPU_CROSS_ENTROPY_H_
#define KRAIT_KERNELS_CPU_CROSS_ENTROPY_H_

#include <cstdint>

namespace krait::cpu {

// The loss of one row of n logits with target in [0, n). Unless d_logits is null (it may be logits)
// it receives (softmax - onehot) * scale.
float CrossEntropyRow(int64_t n, const float* logits, int64_t target, float scale, float* d_logits);
double CrossEntropyRow(int64_t n, const double* logits, int64_t target, double scale,
                       double* d_logits);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_CROSS_ENTROPY_H_
