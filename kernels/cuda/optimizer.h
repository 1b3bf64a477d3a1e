// kernels/optimizer.h on CUDA tensors, called by its dispatch functions alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_OPTIMIZER_H_
#define KRAIT_KERNELS_CUDA_OPTIMIZER_H_

#include "kernels/context.h"
#include "kernels/optimizer.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// Elements of the scratch `partial` f64 of both sums: one for each block, eight of them for each of
// the 132 multiprocessors of an H100 or H200. Fixed, so that sums do not depend on the device.
inline constexpr int64_t kSumBlocks = 1056;

// x is f32, for squares also bf16.
void AddSum(Tensor sum, Tensor x, Tensor partial, const Context& ctx);
void AddSumOfSquares(Tensor sum, Tensor x, Tensor partial, const Context& ctx);

void AdamWPrepare(Tensor control, Tensor sum_of_squares, Tensor losses,
                  const AdamWSettings& settings, const Context& ctx);
void AdamW(Tensor weight, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor decay_ranges,
           const StepScales& step_scales, Tensor control, const AdamWSettings& settings,
           const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_OPTIMIZER_H_
