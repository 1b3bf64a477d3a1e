// kernels/random_fill.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone.
// Plain C++.
#ifndef KRAIT_KERNELS_CUDA_RANDOM_FILL_H_
#define KRAIT_KERNELS_CUDA_RANDOM_FILL_H_

#include "kernels/base/random.h"
#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

void FillNormal(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step, double scale,
                const Context& ctx);
void FillUniform(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step,
                 double bound, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_RANDOM_FILL_H_
