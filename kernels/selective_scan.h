// The selective scan of Mamba-1 (Gu & Dao, 2312.00752), with the gate.
//
//   dt = softplus(dt_raw + dt_bias)           softplus(x) = max(x,0) + log1p(exp(-|x|))
//   A  = -exp(A_log)                          [I,N]
//   h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * x_t          (per channel i and state n)
//   s_t = sum_n C_t[n] * h_t[n] + D * x_t
//   y_t = s_t * silu(z_t)
//
// x, z, dt_raw, y [B,T,I]; b, c [B,T,N] (token-major, rows may be strided); a_log [I,N]; d, dt_bias
// [I]. The state is f32 (f64 for f64) whatever the dtype of x. a_log, d, dt_bias: f32 (f64).
// initial_state [B,I,N] (undefined = zeros) and final_state (undefined = not wanted), f32/f64.
// doc_start [B,T] i32 (undefined = all 0): the state is set to zero before token t where
// doc_start[b,t] == t and t > 0; token 0 always continues initial_state.
#ifndef KRAIT_KERNELS_SELECTIVE_SCAN_H_
#define KRAIT_KERNELS_SELECTIVE_SCAN_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// Time steps between the states that the forward keeps for the backward.
inline constexpr int64_t kScanChunk = 64;
// Number of kept states per row: ceil(T / kScanChunk).
inline int64_t ScanChunks(int64_t t) { return (t + kScanChunk - 1) / kScanChunk; }

struct SelectiveScanInputs {
  Tensor x, dt_raw, b, c, z;        // data
  Tensor a_log, d, dt_bias;         // parameters
  Tensor initial_state, doc_start;  // optional
};

// chunk_states [B, ScanChunks(T), I, N]: the state before the first token of each chunk; undefined
// when no backward follows.
void SelectiveScanForward(Tensor y, Tensor final_state, Tensor chunk_states,
                          const SelectiveScanInputs& in, const Context& ctx);

struct SelectiveScanGradients {
  Tensor dx, d_dt_raw, db, dc, dz;  // overwritten; shapes and dtypes of the inputs
  Tensor d_a_log, dd, d_dt_bias;    // accumulated
  Tensor d_initial_state;           // overwritten; optional
};

// States are recomputed chunk by chunk from chunk_states. All sums are in a fixed order.
// dx, d_dt_raw, dz, y and d_initial_state may be the same memory as x, dt_raw, z, dy and
// d_final_state. d_final_state is optional. `y`, when defined, receives the recomputed output
// (out_proj's wgrad needs it).
void SelectiveScanBackward(const SelectiveScanGradients& grad, Tensor y, Tensor dy,
                           Tensor d_final_state, Tensor chunk_states, const SelectiveScanInputs& in,
                           const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_SELECTIVE_SCAN_H_
