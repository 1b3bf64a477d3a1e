// kernels/attention.h on CUDA tensors (f32 and bf16), called by its dispatch functions alone. Plain
// C++.
#ifndef KRAIT_KERNELS_CUDA_ATTENTION_H_
#define KRAIT_KERNELS_CUDA_ATTENTION_H_

#include <algorithm>
#include <cstdint>

#include "kernels/context.h"
#include "kernels/documents.h"
#include "kernels/tensor.h"

namespace krait::cuda {

// --- The plain kernels: any sizes, strides and addresses, head_dim up to 256 ---

inline constexpr int64_t kMaxHeadDim = 256;

// Rows of a block of the forward: queries times the heads that share a key head; few where there
// are few (decoding).
inline int64_t AttentionRows(int64_t rows) { return rows <= 16 ? 16 : 64; }

// In how many ranges of keys the forward cuts each row's, so that few queries with a long prefix
// fill the device. Each range has results of its own, which a second kernel merges.
inline int64_t AttentionSplits(Tensor q, Tensor k) {
  const int64_t rows = q.dim(1) * (q.dim(2) / k.dim(2)), keys = k.dim(1);
  const int64_t tile = AttentionRows(rows), wanted = tile == 16 ? 1056 : 264;
  const int64_t blocks = std::max<int64_t>(1, q.dim(0) * k.dim(2) * ((rows + tile - 1) / tile));
  return std::clamp<int64_t>(wanted / blocks, 1, (keys + 255) / 256);
}

// partial_y [splits, B*H*T, P] and partial_lse [splits, B*H*T] f32 are scratch, undefined when
// there is one range.
void PlainAttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                           const Documents& documents, Tensor partial_y, Tensor partial_lse,
                           const Context& ctx);
// delta [B,H,T] f32 is scratch.
void PlainAttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse,
                            Tensor q, Tensor k, Tensor v, const Documents& documents, Tensor delta,
                            const Context& ctx);

void Rope(Tensor x, const Documents& documents, double theta, bool inverse, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_ATTENTION_H_
