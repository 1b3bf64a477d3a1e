// kernels/moe.h on CUDA tensors (activations f32 or bf16), called by its dispatch functions alone.
// Plain C++.
#ifndef KRAIT_KERNELS_CUDA_MOE_H_
#define KRAIT_KERNELS_CUDA_MOE_H_

#include <algorithm>
#include <cstdint>

#include "kernels/context.h"
#include "kernels/moe.h"
#include "kernels/tensor.h"

namespace krait::cuda {

void RouterForward(Tensor logits, Tensor x, Tensor w, const Context& ctx);
void RouterBackwardInput(Tensor dx, Tensor d_logits, Tensor w, bool accumulate, const Context& ctx);
// Pieces of tokens over which the router's weight gradient is summed before they are added in
// order; partial [pieces, E, D] f32.
inline int64_t RouterPieces(int64_t tokens) { return std::clamp<int64_t>(tokens / 128, 1, 64); }
void RouterBackwardWeight(Tensor dw, Tensor d_logits, Tensor x, bool accumulate, Tensor partial,
                          const Context& ctx);

void MoeRouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                     const Context& ctx);
void MoeRouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob, double z_scale, Tensor probs,
                      Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                      const Context& ctx);
// partial [groups * StatisticsPieces(tokens of a group), E + 1] f64.
inline int64_t StatisticsPieces(int64_t tokens) { return std::clamp<int64_t>(tokens / 64, 1, 256); }
void MoeStatistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                   Tensor logits, Tensor partial, const Context& ctx);
void MoeLossesForward(Tensor aux, Tensor z, Tensor imbalance, Tensor prob_sum, Tensor choice_count,
                      Tensor z_sum, const MoeLossShape& shape, const Context& ctx);
void MoeLossesBackward(Tensor d_prob, Tensor choice_count, double scale, const MoeLossShape& shape,
                       const Context& ctx);

// counts [BucketBlocks(choices), E] i32.
void MoeSort(Tensor row_of, Tensor source, Tensor offsets, Tensor choice, Tensor counts,
             const Context& ctx);
void MoePermute(Tensor rows, Tensor x, Tensor source, int64_t top_k, const Context& ctx);
void MoePermuteBackward(Tensor dx, Tensor d_rows, Tensor row_of, bool accumulate,
                        const Context& ctx);
void MoeCombine(Tensor y, Tensor rows, Tensor weight, Tensor row_of, const Context& ctx);
void MoeRowNumbers(Tensor numbers, int64_t used, const Context& ctx);

}  // namespace krait::cuda

#endif  // KRAIT_KERNELS_CUDA_MOE_H_
