// The LM head joined with its loss, forward and backward together in chunks of rows, so that the
// logits of a pass never exist at once.
#ifndef KRAIT_KERNELS_LINEAR_CROSS_ENTROPY_H_
#define KRAIT_KERNELS_LINEAR_CROSS_ENTROPY_H_

#include <cstdint>
#include <functional>

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "kernels/vocabulary.h"

namespace krait {

// Receives the unrounded logits of consecutive chunks of rows, [rows, slice.used] Wide, valid
// during the call.
using LogitsSink = std::function<void(Tensor logits)>;
// Receives of consecutive chunks of rows the largest logit and that of the target (0 where there is
// none), of the whole vocabulary: [rows] Wide each, valid during the call. A prediction is right
// where both are equal.
using ChoiceSink = std::function<void(Tensor max, Tensor picked)>;

// What ranks that hold slices of the vocabulary do between the steps of a chunk: in place, the
// maximum and the sum over the ranks. x is then the same on all of them, and its gradient the part
// of this slice.
struct VocabularyReductions {
  std::function<void(Tensor)> max, sum;
};

// losses [M] Wide = cross-entropy of the logits x[M,D] w[V,D]^T (kernels/cross_entropy.h).
//
// With `dw` [V,D] (Wide) defined: dw (+)= the gradient of scale * sum of losses, overwritten first
// unless `accumulate`, and x is overwritten with its gradient. Rows of w and dw beyond slice.used
// are padding. x and w have the compute dtype, and so have the logits between the two products:
// they are rounded once from the sums, and their gradient takes their place. scale [1] f64, on the
// device.
//
// On CUDA the logits are computed over all rows of w, those of padding included, on the CPU over
// the rows in use. Scratch: LogitRows() rows of logits.
void LinearCrossEntropy(Tensor losses, Tensor x, Tensor dw, bool accumulate, Tensor w,
                        Tensor targets, VocabularySlice slice, Tensor scale, const LogitsSink* sink,
                        const Context& ctx, const VocabularyReductions* ranks = nullptr,
                        const ChoiceSink* choices = nullptr);

// Rows of one chunk. CPU: 32 MiB of logits, which the caches and the rounding of dw's partial sums
// like; CUDA: 4096 rows, enough for products at full speed and for few passes over dw.
int64_t LogitRows(Device device, DType compute, int64_t rows, int64_t vocabulary);

}  // namespace krait

#endif  // KRAIT_KERNELS_LINEAR_CROSS_ENTROPY_H_
