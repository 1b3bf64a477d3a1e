// RMSNorm on the CPU; see kernels/rms_norm.h. T is the dtype of the rows, S of statistics and
// weight: float/float, double/double, BF16/float.
#ifndef KRAIT_KERNELS_CPU_RMS_NORM_H_
#define KRAIT_KERNELS_CPU_RMS_NORM_H_

#include <cstdint>

#include "kernels/cpu/dispatch.h"

namespace krait::cpu {

// h = residual + delta (no delta when its data is null: then residual is normalised and h is not
// written), y = norm(h).
template <typename T, typename S>
struct NormForwardArgs {
  Rows<T> residual, delta, h, y;
  S* rstd;
  const S* w;
  S eps;
};

template <typename T, typename S>
void NormForward(const NormForwardArgs<T, S>& args);

template <typename T, typename S>
struct NormBackwardArgs {
  Rows<T> dx, dx_in, dy,
      x;  // dx = dx_in (zero when its data is null) + the norm's; may be one memory
  const S* rstd;
  const S* w;
  S* dw;
  S* partial;  // [NormPieces(rows), columns]
};

// Pieces of rows over which the weight gradient is summed before the pieces are added in order.
int64_t NormPieces(int64_t rows);

template <typename T, typename S>
void NormBackward(const NormBackwardArgs<T, S>& args);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_RMS_NORM_H_
