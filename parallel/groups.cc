#include "parallel/groups.h"

#include <utility>

#include "kernels/base/check.h"

namespace krait {

Groups::Groups(World* world, const Mesh& mesh, double expert_slack)
    : world_(world),
      mesh_(mesh),
      expert_slack_(expert_slack),
      tensor_(world, mesh.TensorGroup(), mesh.rank, world == nullptr ? &planned_.tensor : nullptr),
      expert_(world, mesh.ExpertGroup(), mesh.rank, world == nullptr ? &planned_.expert : nullptr),
      stage_(Of(mesh.TensorReplicas(mesh.tensor))) {
  KRAIT_CHECK(world == nullptr || (world->size() == mesh.world() && world->rank() == mesh.rank));
}

}  // namespace krait
