// The three RMSNorms of a Jamba Mamba mixer (2403.19887) over the columns of x_proj's output:
// projected [M, R+2N] = dt | B | C, each part with a norm of its own (kernels/rms_norm.h).
//
// projected and d_normed are Wide, normed and d_projected have the compute dtype; weights w_dt [R],
// w_b [N], w_c [N] and their gradients are Wide; rstd [3,M] Wide. With undefined weights there are
// no norms: values are rounded to the output's dtype, and rstd and dw are not used.
#ifndef KRAIT_KERNELS_INNER_NORMS_H_
#define KRAIT_KERNELS_INNER_NORMS_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

struct InnerNormWeights {
  Tensor dt, b, c;
};

void InnerNormsForward(Tensor normed, Tensor rstd, Tensor projected, const InnerNormWeights& w,
                       double eps, const Context& ctx);
// d_projected is overwritten, dw is added to.
void InnerNormsBackward(Tensor d_projected, const InnerNormWeights& dw, Tensor d_normed,
                        Tensor projected, Tensor rstd, const InnerNormWeights& w,
                        const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_INNER_NORMS_H_
