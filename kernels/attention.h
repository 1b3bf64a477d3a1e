// Causal grouped-query attention with document boundaries.
//
//   s = q k^T / sqrt(P), masked to doc_start[t] <= key <= t; y = softmax(s) v
//
// q, y [B,T,H,P]; k, v [B,S,G,P], S >= T: the S-T first keys are a prefix from before this call (a
// cache, or the earlier part of a sequence cut in two). Query t of row b sits at key position
// S-T+t. H is a multiple of G; query head h reads key head h / (H/G). All may be strided in T (q,
// k, v are slices of one glued product). lse [B,H,T] is f32 (f64 for f64): log-sum-exp of each row.
// doc_start [B,T] i32: the key position of the first token of the query's document, or undefined
// for none (all keys up to t). Memory is O(B*H*T): no T x S matrix is kept.
#ifndef KRAIT_KERNELS_ATTENTION_H_
#define KRAIT_KERNELS_ATTENTION_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

void AttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor doc_start,
                      const Context& ctx);
// dq, dk, dv are overwritten (dk, dv over all S keys). Deterministic.
void AttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse, Tensor q,
                       Tensor k, Tensor v, Tensor doc_start, const Context& ctx);

// Rotary position embedding in place (Su et al., 2104.09864; the half-split pairing of Hugging
// Face Llama): pair (i, i+P/2) of x [B,T,H,P] is rotated by angle position * theta^(-2i/P), with
// position = first_position + t - doc_start[b,t] (doc_start undefined: 0). P is even.
// `inverse` rotates back, which is the backward.
void Rope(Tensor x, Tensor doc_start, int64_t first_position, double theta, bool inverse,
          const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_ATTENTION_H_
