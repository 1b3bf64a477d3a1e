// Causal grouped-query attention with document boundaries.
//
//   s = q k^T / sqrt(P), masked to doc_start[t] <= position of the key <= t; y = softmax(s) v
//
// q, y [B,T,H,P]; k, v [B,S,G,P], S >= T: the S-T first keys are a prefix from before this call (a
// cache, or earlier pieces of a cut sequence), the last of them at the position before
// documents.first_position. H is a multiple of G; query head h reads key head h / (H/G). All may be
// strided in T (q, k, v are slices of one glued product). lse [B,H,T] is Wide: log-sum-exp of each
// row. A query sees the keys from the start of its document (kernels/documents.h) up to itself.
// Memory is O(B*H*T): no T x S matrix is kept. All but lse have the compute dtype.
#ifndef KRAIT_KERNELS_ATTENTION_H_
#define KRAIT_KERNELS_ATTENTION_H_

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"

namespace krait {

void AttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                      const Documents& documents, const Context& ctx);
// dq, dk, dv are overwritten (dk, dv over all S keys). Deterministic.
void AttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse, Tensor q,
                       Tensor k, Tensor v, const Documents& documents, const Context& ctx);

// Rotary position embedding in place (Su et al., 2104.09864; the half-split pairing of Hugging
// Face Llama): pair (i, i+P/2) of x [B,T,H,P] is rotated by angle n * theta^(-2i/P), where n counts
// from the start of the token's document (undefined doc_start: from position 0). P is even.
// `inverse` rotates back, which is the backward.
void Rope(Tensor x, const Documents& documents, double theta, bool inverse, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_ATTENTION_H_
