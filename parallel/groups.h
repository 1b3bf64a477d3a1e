// The communicators of one rank: where model and trainer get them.
#ifndef KRAIT_PARALLEL_GROUPS_H_
#define KRAIT_PARALLEL_GROUPS_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/mesh.h"
#include "parallel/world.h"

namespace krait {

class Groups {
 public:
  Groups(const Groups&) = delete;
  Groups& operator=(const Groups&) = delete;
  // world null: for planning runs, as the rank of `mesh`. Otherwise mesh.world() is the world's
  // size and mesh.rank its rank. `world` outlives the groups.
  // `expert_slack`: the memory for rows that the experts of a rank receive, as a multiple of their
  // balanced number; at least 1.
  Groups(World* world, const Mesh& mesh, double expert_slack = 1.5);

  const Mesh& mesh() const { return mesh_; }
  World* world() const { return world_; }
  double expert_slack() const { return expert_slack_; }
  const Communicator& tensor() const { return tensor_; }  // the ranks that share a pass
  const Communicator& expert() const { return expert_; }  // the expert group
  const Communicator& stage() const { return stage_; }    // all ranks of the pipeline stage
  // One of any ranks of the stage, this rank among them (the sets of a Layout).
  Communicator Of(std::vector<int> ranks) const {
    return {world_, std::move(ranks), mesh_.rank, world_ == nullptr ? &planned_.data : nullptr};
  }

  // What a rank sends over each axis, in bytes. `data`: gradients, weights and numbers of a step,
  // over whatever ranks.
  struct Traffic {
    int64_t tensor = 0, expert = 0, data = 0;
  };
  // Of planning runs so far.
  const Traffic& planned() const { return planned_; }

 private:
  World* world_;
  Mesh mesh_;
  double expert_slack_;
  mutable Traffic planned_;
  Communicator tensor_, expert_, stage_;
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_GROUPS_H_
