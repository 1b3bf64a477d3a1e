// kernels/gemm.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain C++.
#ifndef KRAIT_KERNELS_CUDA_GEMM_H_
#define KRAIT_KERNELS_CUDA_GEMM_H_

#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// Bytes of scratch of one MatMul: the most that cuBLASLt may use for a product whose sum over k is
// cut into parts. At most 10 MiB were asked for by any product of a training step, and 64 MiB
// changed no choice of algorithm.
inline constexpr int64_t kMatMulWorkspace = int64_t{32} << 20;

// The power of two, up to 256, that an address is a multiple of. Large allocations lie at multiples
// of 2^32 and more.
inline uint32_t AlignmentOf(const void* address) {
  return uint32_t{1} << std::min(8, std::countr_zero(reinterpret_cast<uintptr_t>(address)));
}

// c[M,N] = op(a) op(b) (+ c when `accumulate`) (+ bias[N] of c's dtype when defined) by cuBLASLt:
// f32 without TF32, or bf16 with sums in f32 (measured for sm_90: accumulating onto a bf16 c, its
// kernels round the product to bf16 before they add; those for odd widths also before a bias). What
// cuBLASLt refuses takes the plain kernel. workspace: kMatMulWorkspace bytes.
void MatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, Tensor bias,
            bool accumulate, Tensor workspace, const Context& ctx);

// The same product by the plain kernel: any sizes, strides and addresses, f32 arithmetic.
void PlainMatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, Tensor bias,
                 bool accumulate, const Context& ctx);

void AddBias(Tensor y, Tensor bias, const Context& ctx);
void LinearBackwardBias(Tensor db, Tensor dy, const Context& ctx);

// bf16 products whose rows begin and end at 16-byte boundaries take the kernel of
// grouped_gemm.cu, others the plain one.
void GroupedLinearForward(Tensor y, Tensor x, Tensor w, Tensor offsets, const Context& ctx);
void GroupedLinearBackwardInput(Tensor dx, Tensor dy, Tensor w, Tensor offsets, const Context& ctx);
void GroupedLinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, Tensor offsets, bool accumulate,
                                 const Context& ctx);

// The three grouped products: of rows of an expert with w[e] (or its transpose), and the sum over
// the rows of an expert.
enum class Grouped { kForward, kInput, kWeight };

// The grouped product by the plain kernel. kForward: out y, a x, b w; kInput: out dx, a dy, b w;
// kWeight: out dw, a dy, b x.
void PlainGrouped(Grouped kind, Tensor out, Tensor a, Tensor b, Tensor offsets, bool accumulate,
                  const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_GEMM_H_
