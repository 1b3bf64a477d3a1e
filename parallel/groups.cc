#include "parallel/groups.h"

#include <utility>

#include "kernels/base/check.h"

namespace krait {

Groups::Groups(World* world, const Mesh& mesh, double expert_slack)
    : world_(world),
      mesh_(mesh),
      expert_slack_(expert_slack),
      tensor_(world, mesh.TensorGroup(), mesh.rank),
      expert_(world, mesh.ExpertGroup(), mesh.rank),
      stage_(world, mesh.TensorReplicas(mesh.tensor), mesh.rank) {
  KRAIT_CHECK(world == nullptr || (world->size() == mesh.world() && world->rank() == mesh.rank));
}

}  // namespace krait
