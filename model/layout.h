// What one rank of a mesh holds of the parameter table, and who owns it. Pure arithmetic: every
// rank can compute the layout of every other.
//
// Storages of one kind lie one after the other in a *flat*. A flat is cut into *buckets*, the unit
// of reduction, update and gathering; a bucket is cut into one range per rank of its replica set,
// the *owner* of these elements (ZeRO-1, Rajbhandari et al., 1910.02054): it holds their optimizer
// state, counts them in the norm, updates them, writes them to checkpoints and sends them on.
//
// Ranks of one replica set have equal flats and buckets. All ranks of a stage have flats, buckets
// and local shapes of the same sizes in the same order, so collectives over them can be issued in
// that order.
#ifndef KRAIT_MODEL_LAYOUT_H_
#define KRAIT_MODEL_LAYOUT_H_

#include <cstdint>
#include <vector>

#include "kernels/base/status.h"
#include "model/params.h"
#include "model/spec.h"
#include "parallel/mesh.h"

namespace krait {

struct ElementRange {
  int64_t begin = 0, end = 0;
  bool operator==(const ElementRange&) const = default;
};

// A box of a published tensor, row-major and without gaps in a flat.
struct ParamBox {
  int param = 0;                        // index into ParamTable::params
  std::vector<int64_t> offset, extent;  // in the published tensor
  int64_t begin = 0;                    // its first element in the flat

  int64_t numel() const;
  // Elements of one row, all dimensions but the first.
  int64_t row() const { return numel() / extent[0]; }
};

// This rank's part of ParamTable::storages()[i]. It lies at `offset` of its flat.
struct LocalStorage {
  std::vector<int64_t> shape;  // of the memory
  // Rows (dimension 0) in use. Below shape[0] only for a vocabulary, 0 where it is all padding:
  // the rows behind are zero and no part of the model.
  int64_t rows = 0;
  std::vector<ParamBox> boxes;  // ascending, tiling the rows in use; none where there are none
  int flat = 0;
  int64_t offset = 0;
  // Buckets with elements of it, ascending, as indices into Layout::buckets().
  std::vector<int> buckets;

  int64_t numel() const;
};

// The storages of one replica set, sum set, dtype class and trainability.
struct Flat {
  int replicas = 0;  // ranks that hold the same elements: index into Layout::sets()
  // Ranks whose gradients are added. With sequence parallelism these are the replicas for every
  // tensor: ranks own different tokens, or different query heads of a shared K/V head, so the
  // gradient of each is a part of the sum and none is counted twice.
  int sum = 0;
  DTypeClass dtype_class = DTypeClass::kCompute;
  bool trainable = true;  // false: weights only, no gradients
  // In the order of the flat: as the backward pass finishes them (head, final norm, last sublayer
  // ... first, embedding), except that within a run of sublayers that makes a bucket, or several,
  // those alike in gradient write and decay lie together.
  std::vector<int> storages;
  int64_t numel = 0;  // with the padding that aligns the storages
  // What is zeroed before the first backward pass of a step, sorted and apart.
  std::vector<ElementRange> zero;
};

// Elements [begin, end) of a flat. It begins with a row of a published tensor or at a storage.
struct Bucket {
  int flat = 0;
  int64_t begin = 0, end = 0;
  // Rank i of the replica set owns [cuts[i], cuts[i+1]), whole rows of published tensors (maybe
  // none) and the padding behind them.
  std::vector<int64_t> cuts;
  std::vector<ElementRange> decay;  // elements of the flat with weight decay, sorted and apart
  // Elements whose Param::lr_scale is not 1, likewise, and that scale of each range.
  std::vector<ElementRange> scaled;
  std::vector<double> lr_scales;
};

// A box of a published tensor that this rank owns.
struct OwnedBox {
  int bucket = 0;  // index into Layout::buckets()
  ParamBox box;
};

class Layout {
 public:
  // Storages start at multiples of this in their flat: 256 bytes of a two-byte dtype.
  static constexpr int64_t kAlignment = 128;
  // 64 MiB of f32 gradients.
  static constexpr int64_t kBucketElements = int64_t{16} << 20;

  // The layout of mesh.rank. `table` outlives it and was built for mesh.tensor; CheckMesh has
  // passed. One pipeline stage. A bucket closes with the first sublayer that brings it to
  // `bucket_elements`; what is then beyond twice that is cut at rows into equal buckets, so that
  // all but the last of a flat have between one and two times `bucket_elements`.
  Layout(const ParamTable* table, const Mesh& mesh, int64_t bucket_elements = kBucketElements);

  const ParamTable& table() const { return *table_; }
  const Mesh& mesh() const { return mesh_; }
  const std::vector<LocalStorage>& storages() const { return storages_; }  // as the table's
  // Different sets of ranks, each ascending; the same index on all ranks for the same purpose.
  const std::vector<std::vector<int>>& sets() const { return sets_; }
  const std::vector<Flat>& flats() const { return flats_; }
  // Of all flats, in the order in which the backward pass completes them.
  const std::vector<Bucket>& buckets() const { return buckets_; }

  // The box of a parameter that this rank holds whole and in one piece; fatal where it does not.
  const ParamBox& WholeBox(int param) const;
  // This rank's range of a bucket.
  ElementRange Own(int bucket) const;
  // What this rank owns, in table order of the parameters, ascending within one. Over all ranks of
  // a replica set the boxes of a tensor tile what the set holds.
  std::vector<OwnedBox> Owned() const;

 private:
  const Param& Attributes(int storage) const;
  void Place(int storage);
  void Arrange(int flat, int64_t bucket_elements);
  void CutRun(int flat, ElementRange run, int64_t bucket_elements);
  std::vector<int>::const_iterator StorageAt(const Flat& flat, int64_t element) const;
  int64_t CutAt(const Flat& flat, int64_t element) const;
  int SetId(const std::vector<int>& ranks);
  void SortBuckets();

  const ParamTable* table_;
  Mesh mesh_;
  std::vector<LocalStorage> storages_;
  std::vector<std::vector<int>> sets_;
  std::vector<Flat> flats_;
  std::vector<Bucket> buckets_;
};

// Rules of a mesh over the model's sizes: one sentence for each that is broken, with what would be
// right. kConfig.
absl::Status CheckMesh(const ModelSpec& spec, const Mesh& mesh);

// The sizes that a rank's sublayers compute with.
struct LocalSizes {
  int64_t heads = 0, kv_heads = 0;
  int64_t d_inner = 0, mlp_d_ff = 0;
  int64_t experts = 0, first_expert = 0;        // the experts held, of moe.experts
  int64_t vocab_rows = 0, first_vocab_row = 0;  // ids held; vocab_rows 0 where all is padding
  int64_t padded_vocab_rows = 0;                // rows in memory, alike on all ranks
};
LocalSizes LocalSizesOf(const ModelSpec& spec, const Mesh& mesh);

}  // namespace krait

#endif  // KRAIT_MODEL_LAYOUT_H_
