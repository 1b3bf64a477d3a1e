// kernels/parts.h on CUDA tensors, called by its dispatch functions alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_PARTS_H_
#define KRAIT_KERNELS_CUDA_PARTS_H_

#include <vector>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// f32, bf16, bf16 into f32, f64 and i64.
void SumParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx);
// f32.
void MaxParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_PARTS_H_
