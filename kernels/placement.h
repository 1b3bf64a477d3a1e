// Where a run's tensors live and in which dtype it computes. Plain C++.
#ifndef KRAIT_KERNELS_PLACEMENT_H_
#define KRAIT_KERNELS_PLACEMENT_H_

#include "kernels/base/dtype.h"
#include "kernels/tensor.h"

namespace krait {

struct Placement {
  Device device = Device::kCpu;
  DType compute = DType::kF32;  // f32, bf16, or f64 (gradient checks)
};

}  // namespace krait

#endif  // KRAIT_KERNELS_PLACEMENT_H_
