// The elementwise ops of kernels/swiglu.h on CUDA tensors (f32 and bf16), called by their dispatch
// functions alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_SWIGLU_H_
#define KRAIT_KERNELS_CUDA_SWIGLU_H_

#include "kernels/context.h"
#include "kernels/swiglu.h"
#include "kernels/tensor.h"

namespace krait::cuda {

void SwiGluForward(Tensor product, Tensor gate_up, const Context& ctx);
void SwiGluBackward(Tensor d_gate_up, Tensor product, Tensor d_product, Tensor gate_up,
                    const Context& ctx);
void WeightedSwiGluBackward(Tensor d_gate_up, Tensor product, const RowWeights& rows,
                            Tensor d_product, Tensor gate_up, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_SWIGLU_H_
