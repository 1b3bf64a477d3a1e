// Tensors filled with random numbers that are a function of their arguments alone
// (kernels/base/random.h): not of the device's threads, nor of how a tensor is cut over ranks.
#ifndef KRAIT_KERNELS_RANDOM_FILL_H_
#define KRAIT_KERNELS_RANDOM_FILL_H_

#include <cstdint>

#include "kernels/base/random.h"
#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// Element (r, c) of y [rows, columns] (rows may be strided) gets value number
// first + r * row_step + c of the stream: where y is a box of a larger tensor, `first` is the index
// of its first element there and row_step the width of that tensor. y is f32, f64 or bf16 (rounded
// from double). On CUDA values may differ from the CPU's in the last bit of a double before that.
void FillNormal(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step, double scale,
                const Context& ctx);  // scale * standard normal
void FillUniform(Tensor y, const RandomStream& stream, int64_t first, int64_t row_step,
                 double bound, const Context& ctx);  // uniform in (-bound, bound)

}  // namespace krait

#endif  // KRAIT_KERNELS_RANDOM_FILL_H_
