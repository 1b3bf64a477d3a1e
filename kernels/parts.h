// Joining what several ranks have of the same elements, in the order of the ranks, so that the same
// layout gives the same bits.
#ifndef KRAIT_KERNELS_PARTS_H_
#define KRAIT_KERNELS_PARTS_H_

#include <cstdint>
#include <vector>

#include "kernels/context.h"
#include "kernels/tensor.h"

namespace krait {

// out [n] = parts[0] + parts[1] + ..., one after the other in Wide(out.dtype()), rounded once. Each
// part is contiguous, as `out` is, and has n elements; all have one dtype: that of `out` (any but
// i32), or bf16 where `out` is Wide. A part may be `out` itself.
void SumParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx);
// The greatest of each element, f32 or f64; a NaN stays, whoever has it.
void MaxParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx);

// `t`, contiguous, as `count` parts of as many elements.
std::vector<Tensor> EqualParts(Tensor t, int count);

}  // namespace krait

#endif  // KRAIT_KERNELS_PARTS_H_
