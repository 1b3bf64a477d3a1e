// AdamW (Loshchilov & Hutter, 1711.05101, as torch.optim.AdamW) over flat storage, and the sums it
// needs. Everything that depends on gradients stays on the device: a step needs no host read
// between the backward pass and the next forward.
#ifndef KRAIT_KERNELS_OPTIMIZER_H_
#define KRAIT_KERNELS_OPTIMIZER_H_

#include <cmath>
#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// sum [1] f64 += the sum of squares of x [n], in double, in a fixed order independent of the number
// of threads. NaN or infinity in x gives a non-finite sum. x is f32, f64 or bf16.
void AddSumOfSquares(Tensor sum, Tensor x, const Context& ctx);
// sum [1] f64 += the sum of x [n], likewise, without bf16.
void AddSum(Tensor sum, Tensor x, const Context& ctx);

struct AdamWSettings {
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0;
  double clip = 0;  // largest norm of the gradient; 0: any
  // A step whose norm, or whose losses[0], is above is skipped.
  double max_norm = HUGE_VAL, max_loss = HUGE_VAL;
};

// What the updates of one step share, [kAdamWControl] f64 on the device.
enum AdamWControl : int64_t {
  kAdamWSteps,        // updates applied so far; AdamWPrepare advances it
  kAdamWNorm,         // of the gradient, before clipping
  kAdamWApplied,      // 1: this step updates; 0: it is skipped
  kAdamWGradScale,    // the clip factor min(1, clip / (norm + 1e-6))
  kAdamWStepSize,     // lr / (1 - beta1^steps)
  kAdamWRootScale,    // 1 / sqrt(1 - beta2^steps)
  kAdamWControlSize,  // number of entries
};
// Fills `control` from the squared norm of the whole gradient, sum_of_squares [1] f64. A norm that
// is not finite or above its limit, or a value of `losses` [n] f64 that is not finite, or the first
// above its limit, skips the step: nothing is updated and kAdamWSteps stays.
void AdamWPrepare(Tensor control, Tensor sum_of_squares, Tensor losses,
                  const AdamWSettings& settings, const Context& ctx);

// Steps of parts of a vector: those of the ascending ranges [begin, end) of `ranges` [S,2] i64 are
// multiplied by `scales` [S] f64. Undefined: none is.
struct StepScales {
  Tensor ranges, scales;
};

// w *= 1 - lr*wd; m = b1*m + (1-b1)*g; v = b2*v + (1-b2)*g^2;
// w -= scale * lr/(1-b1^s) * m / (sqrt(v)/sqrt(1-b2^s) + eps).
//
// master [n] is w, Wide; m and v [n] are Wide or bf16 (rounded to nearest even; the update uses
// them before rounding); grad [n] Wide. weight [n] receives master: rounded to nearest even for
// bf16; or it is the same memory as master. decay_ranges [R,2] i64: ascending ranges [begin, end)
// of elements with weight decay, or undefined for none; decay is not scaled. Nothing changes in a
// skipped step.
void AdamW(Tensor weight, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor decay_ranges,
           const StepScales& step_scales, Tensor control, const AdamWSettings& settings,
           const Context& ctx);
inline void AdamW(Tensor weight, Tensor master, Tensor m, Tensor v, Tensor grad,
                  Tensor decay_ranges, Tensor control, const AdamWSettings& settings,
                  const Context& ctx) {
  AdamW(weight, master, m, v, grad, decay_ranges, StepScales(), control, settings, ctx);
}

}  // namespace krait

#endif  // KRAIT_KERNELS_OPTIMIZER_H_
