// The communicators of one rank: where model and trainer get them.
#ifndef KRAIT_PARALLEL_GROUPS_H_
#define KRAIT_PARALLEL_GROUPS_H_

#include <memory>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/mesh.h"
#include "parallel/world.h"

namespace krait {

class Groups {
 public:
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
  Communicator Of(std::vector<int> ranks) const { return {world_, std::move(ranks), mesh_.rank}; }

 private:
  World* world_;
  Mesh mesh_;
  double expert_slack_;
  Communicator tensor_, expert_, stage_;
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_GROUPS_H_
