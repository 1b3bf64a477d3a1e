// Checks of an op's operands by shape. A failure is fatal and names the op and the operand:
//   CheckShape(op.name(), {"probs", probs}, {tokens, experts});
// Plain C++; asks nothing of the data, so that it holds for either device and while planning.
#ifndef KRAIT_KERNELS_CHECK_SHAPE_H_
#define KRAIT_KERNELS_CHECK_SHAPE_H_

#include <cstdint>
#include <initializer_list>

#include "kernels/context.h"

namespace krait {

// The operand has these extents; -1 stands for any. Undefined tensors fail: check optional operands
// where they are defined.
void CheckShape(const char* op, const Operand& operand, std::initializer_list<int64_t> shape);

// The same, and the elements lie without gaps.
void CheckDense(const char* op, const Operand& operand, std::initializer_list<int64_t> shape);

}  // namespace krait

#endif  // KRAIT_KERNELS_CHECK_SHAPE_H_
