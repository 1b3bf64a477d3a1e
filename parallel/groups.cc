#include "parallel/groups.h"

#include <utility>

#include "kernels/base/check.h"

namespace krait {

Groups::Groups(World* world, const Mesh& mesh)
    : world_(world),
      mesh_(mesh),
      tensor_(world, mesh.TensorGroup(), mesh.rank),
      expert_(world, mesh.ExpertGroup(), mesh.rank),
      stage_(world, mesh.TensorReplicas(mesh.tensor), mesh.rank) {
  KRAIT_CHECK(world == nullptr || (world->size() == mesh.world() && world->rank() == mesh.rank));
}

}  // namespace krait
