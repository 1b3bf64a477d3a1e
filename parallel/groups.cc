#include "parallel/groups.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace krait {

Groups::Groups(World* world, const Mesh& mesh, double expert_slack, Device device)
    : world_(world),
      mesh_(mesh),
      expert_slack_(expert_slack),
      device_(device),
      communicators_(world == nullptr && device == Device::kCuda ? 1 : 0),
      all_(world != nullptr && device == Device::kCuda ? NcclRanks::OfWorld(world) : nullptr),
      tensor_({world, Nccl(mesh.TensorGroup()), world == nullptr ? &planned_.tensor : nullptr,
               &alone_, &peers_},
              mesh.TensorGroup(), mesh.rank),
      expert_({world, Nccl(mesh.ExpertGroup()), world == nullptr ? &planned_.expert : nullptr,
               &alone_, &peers_},
              mesh.ExpertGroup(), mesh.rank),
      stage_(Of(mesh.TensorReplicas(mesh.tensor))) {
  machines_.assign(static_cast<size_t>(mesh.world()), 0);
  if (world == nullptr) return;
  KRAIT_CHECK(world->size() == mesh.world() && world->rank() == mesh.rank);
  const std::vector<int64_t> machines = world->AllGather(int64_t{world->machine()});
  std::copy(machines.begin(), machines.end(), machines_.begin());
}

std::shared_ptr<NcclRanks> Groups::Nccl(const std::vector<int>& ranks) const {
  if (device_ == Device::kCuda && world_ == nullptr && ranks.size() > 1) ++communicators_;
  if (all_ == nullptr) return nullptr;
  return all_->Split(ranks.size() > 1 ? ranks.front() : -1);
}

Communicator Groups::Of(std::vector<int> ranks) const {
  const Communicator::Links links = {world_, nullptr, world_ == nullptr ? &planned_.data : nullptr,
                                     &alone_, &peers_};
  auto known = std::find_if(made_.begin(), made_.end(),
                            [&](const auto& made) { return made.first == ranks; });
  // A set of which a rank has none yet is new on all: NCCL makes the sets of all ranks at once.
  const auto place = static_cast<int64_t>(known - made_.begin());
  const auto count = static_cast<int64_t>(made_.size());
  bool same = place < count;
  if (all_ != nullptr) {
    for (const int64_t other : world_->AllGather(place)) same = same && other == place;
  }
  if (!same) {
    made_.emplace_back(ranks, Nccl(ranks));
    known = made_.end() - 1;
  }
  return {{links.world, known->second, links.planned, links.alone, links.peers},
          std::move(ranks),
          mesh_.rank};
}

}  // namespace krait
