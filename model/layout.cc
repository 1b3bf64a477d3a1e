#include "model/layout.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>

#include "kernels/base/check.h"

namespace krait {
namespace {

int64_t Product(const std::vector<int64_t>& extents) {
  int64_t n = 1;
  for (const int64_t extent : extents) n *= extent;
  return n;
}

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of a vocabulary that each tensor rank has memory for.
int64_t VocabularyRows(int64_t vocab_size, int tensor) {
  return RoundUp(vocab_size, kVocabularyRows * tensor) / tensor;
}

// Tensor ranks that share a unit of the parameter: 1 unless it has fewer units than ranks.
int Sharers(const ShardRule& shard, const std::vector<int64_t>& shape, int tensor) {
  const int64_t extent = shard.segments.empty() ? shape[shard.dim] : shard.segments.front();
  const int64_t units = extent / shard.unit;
  KRAIT_CHECK(units * shard.unit == extent && (units % tensor == 0 || tensor % units == 0));
  return units >= tensor ? 1 : static_cast<int>(tensor / units);
}

std::vector<int> Replicas(const Param& param, const Mesh& mesh) {
  switch (param.shard.axis) {
    case MeshAxis::kNone:
      return mesh.TensorReplicas(mesh.tensor);
    case MeshAxis::kTensor:
      return mesh.TensorReplicas(Sharers(param.shard, param.shape, mesh.tensor));
    case MeshAxis::kVocabulary:
      return mesh.TensorReplicas(1);
    case MeshAxis::kExpert:
      return mesh.ExpertReplicas();
  }
  KRAIT_FATAL("unknown mesh axis");
}

// Appends a range at or behind the last one's end; one that touches it makes it longer.
void Append(std::vector<ElementRange>* ranges, int64_t begin, int64_t end) {
  if (begin == end) return;
  if (!ranges->empty() && ranges->back().end == begin) {
    ranges->back().end = end;
  } else {
    ranges->push_back({begin, end});
  }
}

// What the mesh's rank holds along the dimension that is cut: ranges of the published tensor.
std::vector<ElementRange> Parts(const Param& param, const Storage& storage, const Mesh& mesh) {
  const ShardRule& shard = param.shard;
  const int64_t extent = param.shape[shard.dim];
  const int64_t index = mesh.tensor_index();
  switch (shard.axis) {
    case MeshAxis::kNone:
      return {{0, extent}};
    case MeshAxis::kTensor: {
      std::vector<ElementRange> parts;
      int64_t begin = 0;
      for (const int64_t segment :
           shard.segments.empty() ? std::vector<int64_t>{extent} : shard.segments) {
        const int64_t sharers = Sharers(shard, param.shape, mesh.tensor);
        const int64_t count = segment * sharers / mesh.tensor;
        const int64_t first = begin + index / sharers * count;
        Append(&parts, first, first + count);  // on one tensor rank the segments touch
        begin += segment;
      }
      KRAIT_CHECK(begin == extent);
      return parts;
    }
    case MeshAxis::kVocabulary: {
      const int64_t rows = VocabularyRows(extent, mesh.tensor);
      return {{std::min(extent, index * rows), std::min(extent, (index + 1) * rows)}};
    }
    case MeshAxis::kExpert: {
      const int64_t held = storage.shape[0] / mesh.expert;
      const int64_t expert = param.offset / (storage.numel() / storage.shape[0]);
      KRAIT_CHECK(held * mesh.expert == storage.shape[0]);
      return expert / held == mesh.expert_index() ? std::vector<ElementRange>{{0, extent}}
                                                  : std::vector<ElementRange>{};
    }
  }
  KRAIT_FATAL("unknown mesh axis");
}

}  // namespace

int64_t ParamBox::numel() const { return Product(extent); }
int64_t LocalStorage::numel() const { return Product(shape); }

Layout::Layout(const ParamTable* table, const Mesh& mesh, int64_t bucket_elements)
    : table_(table), mesh_(mesh), storages_(table->storages().size()) {
  if (mesh.pipeline != 1) KRAIT_FATAL("a layout has one pipeline stage");
  for (size_t s = 0; s < storages_.size(); ++s) Place(static_cast<int>(s));
  for (size_t f = 0; f < flats_.size(); ++f) Arrange(static_cast<int>(f), bucket_elements);
  SortBuckets();
}

// Any piece: they agree.
const Param& Layout::Attributes(int storage) const {
  return table_->params()[table_->storages()[storage].params.front()];
}

// Shape, boxes (relative to the storage) and flat of one storage.
void Layout::Place(int storage) {
  const Storage& global = table_->storages()[storage];
  LocalStorage& local = storages_[storage];
  const Param& first = Attributes(storage);
  const std::vector<int> replicas = Replicas(first, mesh_);
  int64_t begin = 0;
  for (const int p : global.params) {
    const Param& param = table_->params()[p];
    KRAIT_CHECK(param.dtype_class == first.dtype_class && param.trainable == first.trainable &&
                param.decay == first.decay && param.group == first.group &&
                param.init_scale == first.init_scale && param.lr_scale == first.lr_scale &&
                param.grad_write == first.grad_write && param.shard.axis == first.shard.axis &&
                Replicas(param, mesh_) == replicas);
    for (const ElementRange& part : Parts(param, global, mesh_)) {
      if (part.begin == part.end) continue;
      ParamBox box{p, std::vector<int64_t>(param.shape.size(), 0), param.shape, begin};
      box.offset[param.shard.dim] = part.begin;
      box.extent[param.shard.dim] = part.end - part.begin;
      begin += box.numel();
      local.boxes.push_back(std::move(box));
    }
  }

  // Columns are cut in storages of one parameter; everything else changes the number of rows.
  local.shape = global.shape;
  if (first.shard.axis == MeshAxis::kTensor && first.shard.dim > 0) {
    KRAIT_CHECK(global.params.size() == 1);
    local.shape[first.shard.dim] = local.boxes.front().extent[first.shard.dim];
  }
  local.shape[0] = begin / Product({local.shape.begin() + 1, local.shape.end()});
  local.rows = local.shape[0];
  KRAIT_CHECK(local.numel() == begin);
  if (first.shard.axis == MeshAxis::kVocabulary) {
    KRAIT_CHECK(global.params.size() == 1);
    local.shape[0] = VocabularyRows(global.shape[0], mesh_.tensor);
  }

  const int set = SetId(replicas);
  const auto same = [&](const Flat& flat) {
    return flat.replicas == set && flat.sum == set && flat.dtype_class == first.dtype_class &&
           flat.trainable == first.trainable;
  };
  auto flat = std::find_if(flats_.begin(), flats_.end(), same);
  if (flat == flats_.end()) {
    Flat added;
    added.replicas = added.sum = set;
    added.dtype_class = first.dtype_class;
    added.trainable = first.trainable;
    flats_.push_back(std::move(added));
    flat = flats_.end() - 1;
  }
  flat->storages.push_back(storage);
  local.flat = static_cast<int>(flat - flats_.begin());
}

int Layout::SetId(const std::vector<int>& ranks) {
  const auto at = std::find(sets_.begin(), sets_.end(), ranks);
  const auto id = static_cast<int>(at - sets_.begin());
  if (at == sets_.end()) sets_.push_back(ranks);
  return id;
}

// Order and offsets of a flat's storages, and its buckets.
void Layout::Arrange(int f, int64_t bucket_elements) {
  Flat& flat = flats_[f];
  std::vector<int>& order = flat.storages;
  // The table lists storages in the order of the forward pass.
  std::reverse(order.begin(), order.end());
  std::vector<ElementRange> runs;
  for (auto begin = order.begin(); begin != order.end();) {
    // A run: sublayers up to the first that makes it long enough.
    const auto sublayer = [&](int storage) { return table_->storages()[storage].sublayer; };
    int64_t elements = 0;
    auto end = begin;
    while (end != order.end() &&
           (elements < bucket_elements || sublayer(*end) == sublayer(*(end - 1)))) {
      elements += RoundUp(storages_[*end].numel(), kAlignment);
      ++end;
    }
    const auto key = [&](int storage) {
      const Param& param = Attributes(storage);
      return std::tuple(param.grad_write == GradWrite::kZeroed, !param.decay);
    };
    std::stable_sort(begin, end, [&](int a, int b) { return key(a) < key(b); });
    runs.push_back({flat.numel, flat.numel + elements});
    for (; begin != end; ++begin) {
      LocalStorage& storage = storages_[*begin];
      storage.offset = flat.numel;
      for (ParamBox& box : storage.boxes) box.begin += flat.numel;
      flat.numel += RoundUp(storage.numel(), kAlignment);
    }
    KRAIT_CHECK(flat.numel == runs.back().end);
  }
  for (const int s : order) {
    const LocalStorage& storage = storages_[s];
    if (Attributes(s).grad_write == GradWrite::kOverwrite) continue;
    Append(&flat.zero, storage.offset, storage.offset + RoundUp(storage.numel(), kAlignment));
  }
  for (const ElementRange& run : runs) CutRun(f, run, bucket_elements);
}

// The buckets of a run of a flat, all of whose storages have their places.
void Layout::CutRun(int f, ElementRange run, int64_t bucket_elements) {
  const Flat& flat = flats_[f];
  const auto ranks = static_cast<int64_t>(sets_[flat.replicas].size());
  const int64_t n = run.end - run.begin;
  const int64_t count = (n + 2 * bucket_elements - 1) / (2 * bucket_elements);
  for (int64_t i = 0; i < count; ++i) {
    Bucket bucket;
    bucket.flat = f;
    bucket.begin = CutAt(flat, run.begin + n * i / count);
    bucket.end = CutAt(flat, run.begin + n * (i + 1) / count);
    const int64_t size = bucket.end - bucket.begin;
    if (size == 0) continue;  // a row longer than a bucket
    for (int64_t rank = 0; rank <= ranks; ++rank) {
      bucket.cuts.push_back(CutAt(flat, bucket.begin + size * rank / ranks));
    }
    for (auto at = StorageAt(flat, bucket.begin); at != flat.storages.end(); ++at) {
      const int s = *at;
      LocalStorage& storage = storages_[s];
      if (storage.offset >= bucket.end) break;
      const int64_t begin = std::max(storage.offset, bucket.begin);
      const int64_t end =
          std::min(storage.offset + RoundUp(storage.numel(), kAlignment), bucket.end);
      if (begin < storage.offset + storage.numel()) {
        storage.buckets.push_back(static_cast<int>(buckets_.size()));
      }
      if (Attributes(s).decay) Append(&bucket.decay, begin, end);
      const double lr_scale = Attributes(s).lr_scale;
      if (lr_scale == 1) continue;
      if (bucket.scaled.empty() || bucket.scaled.back().end != begin ||
          bucket.lr_scales.back() != lr_scale) {
        bucket.scaled.push_back({begin, end});
        bucket.lr_scales.push_back(lr_scale);
      } else {
        bucket.scaled.back().end = end;
      }
    }
    buckets_.push_back(std::move(bucket));
  }
}

// The last storage of a flat that begins at or before `element`.
std::vector<int>::const_iterator Layout::StorageAt(const Flat& flat, int64_t element) const {
  const auto after = std::upper_bound(
      flat.storages.begin(), flat.storages.end(), element,
      [&](int64_t value, int storage) { return value < storages_[storage].offset; });
  return after - 1;
}

// The last place at or before `element` where a row of a published tensor begins; padding behind a
// storage is not parted from it.
int64_t Layout::CutAt(const Flat& flat, int64_t element) const {
  const auto at = StorageAt(flat, element);
  const LocalStorage& storage = storages_[*at];
  const int64_t end = storage.offset + storage.numel();
  if (element >= end) {
    return at + 1 == flat.storages.end() ? flat.numel : storages_[*(at + 1)].offset;
  }
  for (const ParamBox& box : storage.boxes) {
    if (element < box.begin + box.numel()) {
      return box.begin + (element - box.begin) / box.row() * box.row();
    }
  }
  // Padding rows of a vocabulary.
  const int64_t row = storage.numel() / storage.shape[0];
  return storage.offset + (element - storage.offset) / row * row;
}

void Layout::SortBuckets() {
  // The backward pass reaches the storages from last to first.
  std::vector<size_t> last(buckets_.size(), storages_.size());
  for (size_t s = storages_.size(); s-- > 0;) {
    for (const int b : storages_[s].buckets) last[b] = s;
  }
  std::vector<size_t> order(buckets_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return last[a] > last[b]; });
  std::vector<Bucket> sorted;
  std::vector<int> place(order.size());
  for (const size_t b : order) {
    place[b] = static_cast<int>(sorted.size());
    sorted.push_back(std::move(buckets_[b]));
  }
  buckets_ = std::move(sorted);
  for (LocalStorage& storage : storages_) {
    for (int& b : storage.buckets) b = place[b];
    std::sort(storage.buckets.begin(), storage.buckets.end());
  }
}

const ParamBox& Layout::WholeBox(int p) const {
  const Param& param = table_->params()[p];
  for (const ParamBox& box : storages_[param.storage].boxes) {
    if (box.param == p && box.extent == param.shape) return box;
  }
  KRAIT_FATAL("this rank does not hold all of " + param.name);
}

ElementRange Layout::Own(int b) const {
  const Bucket& bucket = buckets_[b];
  const std::vector<int>& ranks = sets_[flats_[bucket.flat].replicas];
  const auto i =
      static_cast<size_t>(std::lower_bound(ranks.begin(), ranks.end(), mesh_.rank) - ranks.begin());
  return {bucket.cuts[i], bucket.cuts[i + 1]};
}

std::vector<OwnedBox> Layout::Owned() const {
  std::vector<OwnedBox> owned;
  for (const LocalStorage& storage : storages_) {
    for (const ParamBox& box : storage.boxes) {
      for (const int b : storage.buckets) {
        const ElementRange own = Own(b);
        const int64_t begin = std::max(box.begin, own.begin);
        const int64_t end = std::min(box.begin + box.numel(), own.end);
        if (begin >= end) continue;
        OwnedBox part{b, box};
        part.box.offset[0] += (begin - box.begin) / box.row();
        part.box.extent[0] = (end - begin) / box.row();
        part.box.begin = begin;
        KRAIT_CHECK(part.box.numel() == end - begin);
        owned.push_back(std::move(part));
      }
    }
  }
  return owned;
}

LocalSizes LocalSizesOf(const ModelSpec& spec, const Mesh& mesh) {
  LocalSizes sizes;
  sizes.heads = spec.attention.heads / mesh.tensor;
  sizes.kv_heads = std::max<int64_t>(1, spec.attention.kv_heads / mesh.tensor);
  sizes.d_inner = spec.mamba.d_inner / mesh.tensor;
  sizes.mlp_d_ff = spec.mlp_d_ff / mesh.tensor;
  sizes.experts = spec.moe.experts / mesh.expert;
  sizes.first_expert = sizes.experts * mesh.expert_index();
  sizes.padded_vocab_rows = VocabularyRows(spec.vocab_size, mesh.tensor);
  sizes.first_vocab_row = std::min(spec.vocab_size, sizes.padded_vocab_rows * mesh.tensor_index());
  sizes.vocab_rows = std::min(spec.vocab_size - sizes.first_vocab_row, sizes.padded_vocab_rows);
  return sizes;
}

absl::Status CheckMesh(const ModelSpec& spec, const Mesh& mesh) {
  ErrorList errors;
  // `size` of the mesh divides `n`.
  const auto divides = [&](const char* size, int64_t value, const std::string& what, int64_t n) {
    if (n % value == 0) return;
    std::string right;
    for (int64_t i = 1; i <= std::min<int64_t>(n, 1024); ++i) {
      if (n % i == 0) right += (right.empty() ? "" : ", ") + std::to_string(i);
    }
    errors.Add(ExitCode::kConfig, std::string(size) + " " + std::to_string(value) +
                                      " does not divide " + what + " " + std::to_string(n) +
                                      ", as " + right + (right == "1" ? " does" : " do"));
  };
  const int64_t tensor = mesh.tensor;
  const char* const tensor_key = "parallel.tensor";
  if (spec.Has(SublayerKind::kAttention)) {
    const int64_t kv_heads = spec.attention.kv_heads;
    divides(tensor_key, tensor, "model.attention.heads", spec.attention.heads);
    if (kv_heads % tensor != 0 && tensor % kv_heads != 0) {
      errors.Add(ExitCode::kConfig, "parallel.tensor " + std::to_string(tensor) +
                                        " must divide model.attention.kv_heads " +
                                        std::to_string(kv_heads) + " or be a multiple of it");
    }
  }
  if (spec.Has(SublayerKind::kMamba)) {
    divides(tensor_key, tensor, "the inner width of Mamba", spec.mamba.d_inner);
  }
  if (spec.Has(SublayerKind::kMlp)) {
    divides(tensor_key, tensor, "model.mlp.d_ff", spec.mlp_d_ff);
  }
  divides("parallel.expert", mesh.expert, "the ranks of a stage", mesh.stage());
  if (spec.Has(SublayerKind::kMoe)) {
    divides("parallel.expert", mesh.expert, "model.moe.experts", spec.moe.experts);
  }
  return errors.ToStatus();
}

}  // namespace krait
