// Which GPU a rank has: the one at its place among the ranks of its machine.
#ifndef KRAIT_PARALLEL_GPU_H_
#define KRAIT_PARALLEL_GPU_H_

#include "kernels/base/status.h"
#include "parallel/world.h"

namespace krait {

// Chooses it, before anything else uses CUDA. Touches no GPU.
void ChooseGpu(const World& world);

// Whether several ranks can compute on their GPUs together; all ranks call it, each of which has a
// usable one. kConfig on all of them, with the first one's message, in a build without NCCL or
// where ranks would share a GPU against NCCL's will.
absl::Status CheckGpus(World* world);

}  // namespace krait

#endif  // KRAIT_PARALLEL_GPU_H_
