#include "trainer/tools/gathered.h"

#include <algorithm>
#include <string>

#include "kernels/transfer.h"

namespace krait {

absl::Status ForRuns(
    const Param& param, const ParamBox& box,
    const std::function<absl::Status(int64_t from, int64_t count, int64_t to)>& run) {
  // Dimensions from `whole` on are not cut: they and the one before them make a run.
  size_t whole = param.shape.size();
  int64_t count = 1;
  while (whole > 1 && box.extent[whole - 1] == param.shape[whole - 1])
    count *= param.shape[--whole];
  count *= box.extent[whole - 1];
  const int64_t n = box.numel();
  for (int64_t to = 0; to < n; to += count) {
    int64_t from = 0, stride = 1, at = to;
    for (size_t d = param.shape.size(); d-- > 0;) {
      from += (box.offset[d] + at % box.extent[d]) * stride;
      at /= box.extent[d];
      stride *= param.shape[d];
    }
    KRAIT_RETURN_IF_ERROR(run(from, count, to));
  }
  return absl::OkStatus();
}

Gathered::Gathered(const Trainer* trainer, World* world) : trainer_(trainer), world_(world) {
  Mesh mesh = trainer->mesh();
  for (mesh.rank = 0; mesh.rank < world->size(); ++mesh.rank) {
    owned_.push_back(Layout(&trainer->weights().table(), mesh).Owned());
  }
}

Tensor Gathered::Master(const OwnedBox& owned) const {
  const int64_t first = trainer_->weights().layout().Own(owned.bucket).begin;
  const Tensor master = trainer_->optimizer().buckets()[static_cast<size_t>(owned.bucket)].master;
  return master.Slice(0, owned.box.begin - first, owned.box.numel());
}

std::vector<float> Gathered::WholeMaster(int param) const {
  return Whole(param, [&](const OwnedBox& owned) { return Master(owned); });
}

std::vector<float> Gathered::WholeGradient(int param) const {
  const Weights& weights = trainer_->weights();
  return Whole(param, [&](const OwnedBox& owned) {
    const int flat = weights.layout().buckets()[static_cast<size_t>(owned.bucket)].flat;
    return weights.FlatGrad(flat).Slice(0, owned.box.begin, owned.box.numel());
  });
}

std::vector<std::vector<float>> Gathered::OfRanks(const std::vector<float>& mine) const {
  const auto bytes = [](const std::vector<float>& values) {
    return static_cast<int64_t>(values.size() * sizeof(float));
  };
  const std::vector<int64_t> sizes = world_->AllGather(static_cast<int64_t>(mine.size()));
  if (!world_->first()) {
    std::vector<float> values = mine;
    if (!mine.empty()) world_->Exchange({{0, values.data(), bytes(values)}}, {});
    return {};
  }
  std::vector<std::vector<float>> all(sizes.size());
  std::vector<Message> receives;
  for (size_t r = 1; r < all.size(); ++r) {
    all[r].resize(static_cast<size_t>(sizes[r]));
    if (sizes[r] > 0) receives.push_back({static_cast<int>(r), all[r].data(), bytes(all[r])});
  }
  all[0] = mine;
  world_->Exchange({}, receives);
  return all;
}

std::vector<float> Gathered::Whole(int param,
                                   const std::function<Tensor(const OwnedBox&)>& values) const {
  std::vector<float> mine;
  for (const OwnedBox& owned : owned_[static_cast<size_t>(world_->rank())]) {
    if (owned.box.param != param) continue;
    const std::vector<float> part = DownloadFloats(values(owned), trainer_->ctx());
    mine.insert(mine.end(), part.begin(), part.end());
  }
  const std::vector<std::vector<float>> all = OfRanks(mine);
  if (!world_->first()) return {};
  const Param& published = trainer_->weights().table().params()[static_cast<size_t>(param)];
  std::vector<float> whole(static_cast<size_t>(published.numel()));
  for (size_t r = 0; r < all.size(); ++r) {
    const float* from = all[r].data();
    for (const OwnedBox& owned : owned_[r]) {
      if (owned.box.param != param) continue;
      const absl::Status copied =
          ForRuns(published, owned.box, [&](int64_t at, int64_t count, int64_t) {
            std::copy_n(from, count, whole.data() + at);
            from += count;
            return absl::OkStatus();
          });
      KRAIT_CHECK(copied.ok());
    }
  }
  return whole;
}

}  // namespace krait
