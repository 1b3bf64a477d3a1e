// The communicators of one rank: where model and trainer get them.
#ifndef KRAIT_PARALLEL_GROUPS_H_
#define KRAIT_PARALLEL_GROUPS_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/event.h"
#include "parallel/collectives.h"
#include "parallel/mesh.h"
#include "parallel/world.h"

namespace krait {

class Groups {
 public:
  Groups(const Groups&) = delete;
  Groups& operator=(const Groups&) = delete;
  // world null: for planning runs, as the rank of `mesh`. Otherwise mesh.world() is the world's
  // size and mesh.rank its rank, all ranks make their groups at once, and `world` outlives them.
  // `expert_slack`: the memory for rows that the experts of a rank receive, as a multiple of their
  // balanced number; at least 1.
  // `device`: where the tensors are that travel.
  Groups(World* world, const Mesh& mesh, double expert_slack = 1.5, Device device = Device::kCpu);

  const Mesh& mesh() const { return mesh_; }
  World* world() const { return world_; }
  double expert_slack() const { return expert_slack_; }
  // Of each rank of the world the first rank of its machine; one machine while planning.
  const std::vector<int>& machines() const { return machines_; }
  const Communicator& tensor() const { return tensor_; }  // the ranks that share a pass
  const Communicator& expert() const { return expert_; }  // the expert group
  const Communicator& stage() const { return stage_; }    // all ranks of the pipeline stage
  // One of any ranks of the stage, this rank among them (the sets of a Layout), for traffic beside
  // the passes. All ranks call this in the same order, each with its set of the same kind.
  Communicator Of(std::vector<int> ranks) const;

  // From here on ranks of one machine read what they exchange from each other's memory, where it is
  // in segments of `peers`, which outlives the groups' use.
  void ReadPeers(PeerMemory* peers) { peers_ = peers; }
  PeerMemory* peers() const { return peers_; }

  // For traffic of the tensor ranks beside their computation.
  SideStream& beside() const { return beside_; }

  // What a rank sends over each axis, in bytes. `data`: gradients, weights and numbers of a step,
  // over whatever ranks.
  struct Traffic {
    int64_t tensor = 0, expert = 0, data = 0;
  };
  // Of planning runs so far.
  const Traffic& planned() const { return planned_; }
  // Communicators of NCCL that the run would have; of planning runs.
  int nccl_communicators() const { return communicators_; }

  // While set, nothing travels: what would come from another rank is this rank's own, as many rows
  // of it. The values are wrong, the time without communication is right.
  void SetAlone(bool alone) { alone_ = alone; }
  bool alone() const { return alone_; }

 private:
  // NCCL's communicator; null where none is needed, and while planning, which counts it.
  std::shared_ptr<NcclRanks> Nccl(const std::vector<int>& ranks) const;

  World* world_;
  Mesh mesh_;
  double expert_slack_;
  std::vector<int> machines_;
  bool alone_ = false;
  PeerMemory* peers_ = nullptr;
  mutable Traffic planned_;
  mutable SideStream beside_{1};
  Device device_;
  mutable int communicators_ = 0;
  std::shared_ptr<NcclRanks> all_;  // null on the CPU
  // Those of Of(): sets of equal ranks share one.
  mutable std::vector<std::pair<std::vector<int>, std::shared_ptr<NcclRanks>>> made_;
  Communicator tensor_, expert_, stage_;
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_GROUPS_H_
