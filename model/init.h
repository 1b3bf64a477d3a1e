// Initial values of weights, by the spec's scheme.
//
// Random values are functions of (seed, published name, element of the published tensor): they do
// not depend on the layout, nor on the number of threads.
#ifndef KRAIT_MODEL_INIT_H_
#define KRAIT_MODEL_INIT_H_

#include <cstdint>

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "model/layout.h"
#include "model/params.h"
#include "model/spec.h"

namespace krait {

// y [box.numel()] gets the values of a box of `param`. A bf16 y gets those of an f32 one, rounded
// to nearest even: the copy of a master.
void InitParam(Tensor y, const Param& param, const ParamBox& box, const ModelSpec& spec,
               uint64_t seed, const Context& ctx);

}  // namespace krait

#endif  // KRAIT_MODEL_INIT_H_
