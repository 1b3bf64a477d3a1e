// Mixture-of-experts routing: dropless top-k (Jamba, 2403.19887; Mixtral's load-balancing loss).
//
//   p = softmax(logits) over all E experts;  (w_j, e_j) = top-k of p, ties to the lower expert;
//   with `renormalize` w_j /= sum_j w_j.
//
// M tokens, E experts, k = top_k choices, R = ExpertRows(M, k, E, device) rows of memory. Rows of
// expert e are the pairs (token, j) with choice[token,j] == e in ascending (token, j), from row
// offsets[e] on; offsets are multiples of ExpertRowAlignment(), the rows between an expert's last
// one and the next offset are padding and zero. Activations have the compute dtype; logits, probs,
// routing weights, statistics and their gradients are Wide.
#ifndef KRAIT_KERNELS_MOE_H_
#define KRAIT_KERNELS_MOE_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// logits[M,E] = x[M,D] w[E,D]^T: w is Wide whatever x is.
void RouterForward(Tensor logits, Tensor x, Tensor w, const Context& ctx);
// dx[M,D] = d_logits w (+ dx when `accumulate`).
void RouterBackwardInput(Tensor dx, Tensor d_logits, Tensor w, bool accumulate, const Context& ctx);
// dw[E,D] = d_logits^T x (+ dw when `accumulate`).
void RouterBackwardWeight(Tensor dw, Tensor d_logits, Tensor x, bool accumulate,
                          const Context& ctx);

// logits, probs [M,E]; choice [M,k] i32; weight [M,k].
void MoeRouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                     const Context& ctx);
// The gradient of the logits from three sources; overwrites d_logits [M,E]:
//   d_weight [M,k]: through the combine weights (and the renormalisation);
//   d_prob [G,E] or undefined: the aux loss, whose gradient with respect to the p_e of each token
//   of
//     group g is d_prob[g,e] (MoeLossesBackward); a group is M / G consecutive tokens;
//   z_scale: the z-loss z = mean_t logsumexp(logits_t)^2 (ST-MoE, 2202.08906): adds
//     z_scale * 2 * logsumexp(logits_t) * p; 0 = off.
void MoeRouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob, double z_scale, Tensor probs,
                      Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                      const Context& ctx);

// Sums over the tokens at hand, added to. For each of G groups of M / G consecutive tokens:
// prob_sum [G,E] += sum_t p_te; choice_count [G,E] i64 += number of (t,j) that chose e. Over all:
// z_sum [1] += sum_t logsumexp(logits_t)^2. Ranks add theirs up before the losses are taken.
void MoeStatistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                   Tensor logits, const Context& ctx);

// The losses of one pass from the statistics of its J MoE sublayers over `tokens` tokens (of all
// ranks) in G groups: prob_sum [J*G,E], choice_count [J*G,E] i64 (sublayer by sublayer), z_sum [J].
// Mixtral's load-balancing loss as Hugging Face computes it: with means over n tokens,
//   aux = E * sum over e of P_e * sum over j of f_je,   P_e = mean p_e, f_je = share of tokens
//   whose j-th choice is e.
// pools 1: n are the tokens of a group in all J sublayers together; pools J: those of one sublayer.
// aux is the mean over pools and groups.
struct MoeLossShape {
  int64_t tokens = 0, top_k = 0, pools = 1, groups = 1;
};
// Added to: aux [1], z [1] (the mean of logsumexp^2) and imbalance [J] (max_e count_e / mean count,
// counted over all groups), all f64.
void MoeLossesForward(Tensor aux, Tensor z, Tensor imbalance, Tensor prob_sum, Tensor choice_count,
                      Tensor z_sum, const MoeLossShape& shape, const Context& ctx);
// d_prob [J*G,E] = scale * the derivative of aux with respect to one token's p_e; the shares f are
// piecewise constant.
void MoeLossesBackward(Tensor d_prob, Tensor choice_count, double scale, const MoeLossShape& shape,
                       const Context& ctx);

// Rows of memory that M tokens may need, with the padding between experts.
int64_t ExpertRows(int64_t tokens, int64_t top_k, int64_t experts, Device device);
// Sorts the choices by expert: row_of [M,k] i32 (the row of each choice), source [R] i32
// (token*k + j of each row, -1 for padding and unused rows), offsets [E+1] i64.
void MoeSort(Tensor row_of, Tensor source, Tensor offsets, Tensor choice, const Context& ctx);

// rows[r] = x[source[r] / k], zero where source[r] < 0.  x [M,D], rows [R,D].
void MoePermute(Tensor rows, Tensor x, Tensor source, int64_t top_k, const Context& ctx);
// dx[t] (= or += when `accumulate`) sum_j d_rows[row_of[t,j]], j ascending.
void MoePermuteBackward(Tensor dx, Tensor d_rows, Tensor row_of, bool accumulate,
                        const Context& ctx);
// y[t] = sum_j weight[t,j] * rows[row_of[t,j]], j ascending. Its backward is MoePermute of dy: the
// routing weights and their gradients are applied to narrower rows (kernels/swiglu.h).
void MoeCombine(Tensor y, Tensor rows, Tensor weight, Tensor row_of, const Context& ctx);

// numbers [R] i32: 0, 1, ... for the first `used` rows, -1 for those behind; the `source` of rows
// that each belong to a choice of their own.
void MoeRowNumbers(Tensor numbers, int64_t used, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_MOE_H_
