// Matrix products and the linear layer. Row-major; y[M,O] = x[M,I] * w[O,I]^T + b[O].
//
// Operands have one dtype (f32, f64; bf16 on CUDA) and unit inner stride; a row stride larger than
// the row is allowed, so that halves of glued tensors (x|z, gate|up) are used in place.
// CPU: CBLAS on all threads. The same number of threads gives the same bits; with another number
// the library may cut its sums at other points (this is the one op family whose bits can depend on
// it). Rows may be 0 (an expert without tokens): outputs are then zeroed or left as they are when
// accumulating.
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
// dx[M,I] = dy[M,O] w[O,I] (+ dx when `accumulate`).
void LinearBackwardInput(Tensor dx, Tensor dy, Tensor w, bool accumulate, const Context& ctx);
// dw[O,I] += dy[M,O]^T x[M,I].
void LinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, const Context& ctx);
// db[O] += sum over rows of dy[M,O], in a fixed order.
void LinearBackwardBias(Tensor db, Tensor dy, const Context& ctx);

// The linear layer of each expert over its own rows: rows [offsets[e], offsets[e+1]) of x and y
// with w[e], w [E,O,I]; `offsets` is host memory, E+1 entries ascending. Same meaning of the three
// parts as above; dx is overwritten, dw[E,O,I] accumulates.
void GroupedLinearForward(Tensor y, Tensor x, Tensor w, const int64_t* offsets, const Context& ctx);
void GroupedLinearBackwardInput(Tensor dx, Tensor dy, Tensor w, const int64_t* offsets,
                                const Context& ctx);
void GroupedLinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, const int64_t* offsets,
                                 const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_GEMM_H_
