// Elementwise ops. Operands have one shape; rows may be strided.
#ifndef KRAIT_KERNELS_ACTIVATION_H_
#define KRAIT_KERNELS_ACTIVATION_H_

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// y += x; same shapes; f32, f64, bf16, or y f32 and x bf16.
void AddInPlace(Tensor y, Tensor x, const Context& ctx);
// y += scale * x, likewise, rounded once.
void AddScaled(Tensor y, Tensor x, double scale, const Context& ctx);
// y = value, in any dtype.
void Fill(Tensor y, double value, const Context& ctx);
// y = x; same shape, rows may be strided. Floating dtypes may differ: rounded to nearest even.
void Copy(Tensor y, Tensor x, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_KERNELS_ACTIVATION_H_
