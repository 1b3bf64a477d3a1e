// Elementwise ops. silu(x) = x / (1 + exp(-x)).
#ifndef KRAIT_KERNELS_ACTIVATION_H_
#define KRAIT_KERNELS_ACTIVATION_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// SwiGLU (Shazeer, 2002.05202): y[M,F] = silu(gate) * up with gate = gate_up[:, :F],
// up = gate_up[:, F:]; gate_up [M,2F].
void SwiGluForward(Tensor y, Tensor gate_up, const Context& ctx);
// d_gate_up [M,2F] is overwritten; may be the same memory as gate_up. When `y` is defined it is
// recomputed into y as well (the wgrad of down_proj needs it).
void SwiGluBackward(Tensor d_gate_up, Tensor y, Tensor dy, Tensor gate_up, const Context& ctx);

// y += x; same shapes.
void AddInPlace(Tensor y, Tensor x, const Context& ctx);
void Fill(Tensor y, double value, const Context& ctx);
void Copy(Tensor y, Tensor x, const Context& ctx);  // same shape and dtype, rows may be strided

}  // namespace krait

#endif  // KRAIT_KERNELS_ACTIVATION_H_
