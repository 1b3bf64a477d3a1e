// The selective scan of Mamba-1 (Gu & Dao, 2312.00752), with the gate.
//
//   dt = softplus(dt_raw + dt_bias)           softplus(x) = max(x,0) + log1p(exp(-|x|))
//   A  = -exp(A_log)                          [I,N]
//   h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * x_t          (per channel i and state n)
//   s_t = sum_n C_t[n] * h_t[n] + D * x_t
//   y_t = s_t * silu(z_t)
//
// x, z, dt_raw, y [B,T,I]; b, c [B,T,N] (token-major, rows may be strided), all of the compute
// dtype; a_log [I,N]; d, dt_bias [I] Wide. The state is Wide.
// initial_state [B,I,N] is the state before documents.first_position (undefined = zeros),
// final_state that after the last token (undefined = not wanted). Where a token begins a document
// (kernels/documents.h) the state before it counts as zero.
#ifndef KRAIT_KERNELS_SELECTIVE_SCAN_H_
#define KRAIT_KERNELS_SELECTIVE_SCAN_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"

namespace krait {

// States per row that the forward keeps for the backward: one every 64 steps on the CPU, every 16
// on CUDA.
int64_t ScanStates(Device device, int64_t t);

struct SelectiveScanInputs {
  Tensor x, dt_raw, b, c, z;  // data
  Tensor a_log, d, dt_bias;   // parameters
  Tensor initial_state;       // optional
  Documents documents;
};

// kept_states [B, ScanStates(T), I, N], Wide, in an order that is the device's own: what the
// backward starts from; undefined when none follows.
void SelectiveScanForward(Tensor y, Tensor final_state, Tensor kept_states,
                          const SelectiveScanInputs& in, const Context& ctx);

struct SelectiveScanGradients {
  Tensor dx, d_dt_raw, dz;        // overwritten; shapes and dtypes of the inputs
  Tensor db, dc;                  // overwritten; shapes of b and c, Wide
  Tensor d_a_log, dd, d_dt_bias;  // accumulated
  Tensor d_initial_state;         // overwritten; optional
};

// States are recomputed from the kept ones. All sums are in a fixed order.
// dx, d_dt_raw, dz, y and d_initial_state may be the same memory as x, dt_raw, z, dy and
// d_final_state. d_final_state is optional. `y`, when defined, receives the recomputed output
// (out_proj's wgrad needs it).
void SelectiveScanBackward(const SelectiveScanGradients& grad, Tensor y, Tensor dy,
                           Tensor d_final_state, Tensor kept_states, const SelectiveScanInputs& in,
                           const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_SELECTIVE_SCAN_H_
