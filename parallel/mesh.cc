#include "parallel/mesh.h"

#include "kernels/base/check.h"

namespace krait {
namespace {

// The ranks of `mesh`'s stage that `same` takes.
template <typename Same>
std::vector<int> StageRanks(const Mesh& mesh, const Same& same) {
  std::vector<int> ranks;
  Mesh other = mesh;
  for (int i = 0; i < mesh.stage(); ++i) {
    other.rank = mesh.pipeline_index() * mesh.stage() + i;
    if (same(other)) ranks.push_back(other.rank);
  }
  return ranks;
}

}  // namespace

std::vector<int> Mesh::TensorReplicas(int sharers) const {
  KRAIT_CHECK(sharers > 0 && tensor % sharers == 0);
  return StageRanks(*this, [&](const Mesh& other) {
    return other.tensor_index() / sharers == tensor_index() / sharers;
  });
}

std::vector<int> Mesh::TensorGroup() const {
  return StageRanks(*this, [&](const Mesh& other) { return other.rank / tensor == rank / tensor; });
}

std::vector<int> Mesh::ExpertGroup() const {
  KRAIT_CHECK(stage() % expert == 0);
  return StageRanks(*this, [&](const Mesh& other) { return other.rank / expert == rank / expert; });
}

std::vector<int> Mesh::ExpertReplicas() const {
  KRAIT_CHECK(stage() % expert == 0);
  return StageRanks(*this,
                    [&](const Mesh& other) { return other.expert_index() == expert_index(); });
}

}  // namespace krait
