// kernels/activation.h on CUDA tensors, called by its dispatch functions alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_ACTIVATION_H_
#define KRAIT_KERNELS_CUDA_ACTIVATION_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// f32 and bf16, x also in the other of the two.
void AddScaled(Tensor y, Tensor x, double scale, const Context& ctx);
// Every dtype of kernels/base/dtype.h.
void Fill(Tensor y, double value, const Context& ctx);
// Every dtype; between different ones f32 and bf16.
void Copy(Tensor y, Tensor x, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_ACTIVATION_H_
