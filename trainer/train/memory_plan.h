// How much memory a run takes, by segment. The trainer reserves exactly these sizes; `krait plan`
// prints them. Found by running the model with measuring arenas (kernels/arena.h), so plan and run
// cannot differ.
#ifndef KRAIT_TRAINER_TRAIN_MEMORY_PLAN_H_
#define KRAIT_TRAINER_TRAIN_MEMORY_PLAN_H_

#include <cstdint>

#include "parallel/groups.h"
#include "parallel/mesh.h"
#include "trainer/config/config.h"

namespace krait {

// Bytes per rank.
struct MemoryPlan {
  Device device = Device::kCpu;
  int64_t weights = 0;
  int64_t gradients = 0;
  int64_t optimizer = 0;    // exp_avg and exp_avg_sq (and fp32 masters where precision is not fp32)
  int64_t activations = 0;  // kept from forward to backward by one pass
  int64_t scratch = 0;      // temporaries of ops and sublayers
  int64_t batches = 0;      // the rows of a pass (on the CPU those of evaluation's)
  int64_t rows = 0;         // those of the step at hand and of the ones read ahead, in host memory
  int64_t scalars = 0;      // losses, norm and other numbers of a step
  int64_t communication = 0;  // gradients of other ranks on their way to their sum
  int64_t nccl = 0;           // what NCCL takes for its communicators
  int64_t staging = 0;        // copy of the state in host memory for checkpoints
  Groups::Traffic sent;       // over each axis by an optimizer step
  // Of how passes use activations, scratch memory and scalars (Arena::signature).
  uint64_t signature = 0;
  // Of the device's memory; on CUDA what is on the host is not in it.
  int64_t on_host() const { return rows + staging; }
  int64_t total() const {
    return weights + gradients + optimizer + activations + scratch + batches + scalars +
           communication + nccl + (device == Device::kCpu ? on_host() : 0);
  }
};

// Of a training run, evaluation included, on the rank of `mesh`. Touches no memory to speak of
// whatever the model's size.
MemoryPlan PlanTraining(const RunConfig& config, const Mesh& mesh = {});

// Of this process on the CPU (at its highest, and what it may have); of the GPU on CUDA (what is
// taken there at the moment, by whomever, and what there is).
struct MemoryUse {
  int64_t used = 0, total = 0;
};
MemoryUse MemoryOf(Device device);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_MEMORY_PLAN_H_
