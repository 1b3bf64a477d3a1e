// Mixture-of-experts routing: dropless top-k (Jamba, 2403.19887; Mixtral's load-balancing loss).
//
//   p = softmax(logits) over all E experts (f32);  (w_j, e_j) = top-k of p, ties to the lower
//   expert; with `renormalize` w_j /= sum_j w_j.
//
// M tokens, E experts, k = top_k choices. Rows of expert e are the pairs (token, j) with
// choice[token,j] == e in ascending (token, j): row r of the permuted arrays.
#ifndef KRAIT_KERNELS_MOE_H_
#define KRAIT_KERNELS_MOE_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// logits [M,E], probs [M,E] f32 (f64 for f64); choice [M,k] i32; weight [M,k] of logits' dtype.
void MoeRouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                     const Context& ctx);

// The gradient of the logits from three sources; overwrites d_logits [M,E]:
//   d_weight [M,k]: through the combine weights (and the renormalisation);
//   d_prob_mean [E] or undefined: the aux loss, whose gradient with respect to each token's p_e is
//     d_prob_mean[e] (the caller folds in 1/tokens, E, f_e and the coefficient);
//   z_scale: the z-loss z = mean_t logsumexp(logits_t)^2 (ST-MoE, 2202.08906): adds
//     z_scale * 2 * logsumexp(logits_t) * p; 0 = off.
void MoeRouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob_mean, double z_scale,
                      Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                      const Context& ctx);

// Sums for the aux loss and statistics, added to: prob_sum [E] f32/f64 += sum_t p_te;
// choice_count [E] i64 += number of (t,j) that chose e; z_sum [1] += sum_t logsumexp(logits_t)^2.
void MoeStatistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                   Tensor logits, const Context& ctx);

// Sorts the choices by expert: row_of [M,k] i32 (the permuted row of each choice), source [M*k] i32
// (token*k + j of each row) and host memory offsets [E+1]. The one host read of an MoE sublayer.
void MoeSort(Tensor row_of, Tensor source, int64_t* offsets, Tensor choice, int64_t experts,
             const Context& ctx);

// rows[r] = x[source[r] / k].  x [M,D], rows [M*k,D].
void MoePermute(Tensor rows, Tensor x, Tensor source, int64_t top_k, const Context& ctx);
// dx[t] (= or += when `accumulate`) sum_j d_rows[row_of[t,j]], j ascending.
void MoePermuteBackward(Tensor dx, Tensor d_rows, Tensor row_of, bool accumulate,
                        const Context& ctx);
// y[t] = sum_j weight[t,j] * rows[row_of[t,j]], j ascending.
void MoeCombine(Tensor y, Tensor rows, Tensor weight, Tensor row_of, const Context& ctx);
// d_rows[row_of[t,j]] = weight[t,j] * dy[t] (overwritten; may be the same memory as rows);
// d_weight[t,j] = dy[t] . rows[row_of[t,j]].
void MoeCombineBackward(Tensor d_rows, Tensor d_weight, Tensor dy, Tensor rows, Tensor weight,
                        Tensor row_of, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_MOE_H_
