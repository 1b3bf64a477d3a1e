// Published tensors that are spread over the ranks of a trainer: filled part by part, and whole on
// the first rank.
#ifndef KRAIT_TRAINER_TOOLS_GATHERED_H_
#define KRAIT_TRAINER_TOOLS_GATHERED_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/base/status.h"
#include "model/layout.h"
#include "parallel/world.h"
#include "trainer/train/trainer.h"

namespace krait {

// Calls run(element of the published tensor, elements, element of the box) for each piece of a box
// that is contiguous in both, in the box's order; ends with its first error.
absl::Status ForRuns(
    const Param& param, const ParamBox& box,
    const std::function<absl::Status(int64_t from, int64_t count, int64_t to)>& run);

class Gathered {
 public:
  // Both outlive it.
  Gathered(const Trainer* trainer, World* world);

  // What this rank owns of the masters, in the layout's order; [n] each.
  Tensor Master(const OwnedBox& owned) const;
  // Of the published tensor `param`: all of it on the first rank, nothing on the others. All ranks
  // call these alike.
  std::vector<float> WholeGradient(int param) const;
  std::vector<float> WholeMaster(int param) const;
  // What every rank passes, in rank order, on the first rank.
  std::vector<std::vector<float>> OfRanks(const std::vector<float>& mine) const;

 private:
  std::vector<float> Whole(int param, const std::function<Tensor(const OwnedBox&)>& values) const;

  const Trainer* trainer_;
  World* world_;
  std::vector<std::vector<OwnedBox>> owned_;  // of every rank
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_GATHERED_H_
