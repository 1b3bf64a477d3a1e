// Matrix products and the linear layer. Row-major; y[M,O] = x[M,I] * w[O,I]^T + b[O].
//
// Inputs have one dtype: f32, f64 (CPU) or bf16. An output has the dtype of the inputs or, for
// bf16, f32; sums are f32 (f64) and rounded once. Gradients of weights and biases are always
// Wide(inputs). Unit inner stride; a row stride larger than the row is allowed, so that halves of
// glued tensors (x|z, gate|up) are used in place. CPU: CBLAS on all threads. The same number of
// threads gives the same bits; with another number the library may cut its sums at other points
// (this is the one op family whose bits can depend on it). Rows may be 0 (an expert without
// tokens): outputs are then zeroed or left as they are when accumulating.
#ifndef KRAIT_KERNELS_GEMM_H_
#define KRAIT_KERNELS_GEMM_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// c[M,N] = op(a) * op(b) (+ c when `accumulate`); op transposes where the flag says so.
void MatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, bool accumulate,
            const Context& ctx);

// y[M,O] = x[M,I] w[O,I]^T, plus bias[O] when defined.
void LinearForward(Tensor y, Tensor x, Tensor w, Tensor bias, const Context& ctx);
// dx[M,I] = dy[M,O] w[O,I] (+ dx when `accumulate`; a bf16 dx on CUDA is rounded twice then, the
// product and the sum: so do cuBLASLt's kernels).
void LinearBackwardInput(Tensor dx, Tensor dy, Tensor w, bool accumulate, const Context& ctx);
// dw[O,I] = dy[M,O]^T x[M,I] (+ dw when `accumulate`).
void LinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, bool accumulate, const Context& ctx);

// y[M,O] += bias[O]: the bias of a product whose parts are summed over ranks first.
void AddBias(Tensor y, Tensor bias, const Context& ctx);
// db[O] += sum over rows of dy[M,O], in a fixed order.
void LinearBackwardBias(Tensor db, Tensor dy, const Context& ctx);

// The linear layer of each expert over its own rows: rows [offsets[e], offsets[e+1]) of x and y
// with w[e], w [E,O,I]; offsets [E+1] i64 on the device, ascending, each a multiple of
// ExpertRowAlignment(). x and y may have more rows than are in use; those are neither read nor
// written. Same meaning of the three parts as above; dx is overwritten. An expert without rows gets
// a zero dw[e] unless `accumulate`.
void GroupedLinearForward(Tensor y, Tensor x, Tensor w, Tensor offsets, const Context& ctx);
void GroupedLinearBackwardInput(Tensor dx, Tensor dy, Tensor w, Tensor offsets, const Context& ctx);
void GroupedLinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, Tensor offsets, bool accumulate,
                                 const Context& ctx);

// Rows of one expert start at multiples of this in grouped products; 1 on the CPU.
constexpr int64_t ExpertRowAlignment(Device device) { return device == Device::kCuda ? 128 : 1; }

}  // namespace krait

#endif  // KRAIT_KERNELS_GEMM_H_
