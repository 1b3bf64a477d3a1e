// The one parameter table. Optimizer, checkpoint, import/export, memory plan and counts read it.
//
// Two levels: a *storage* is what a sublayer computes with (one contiguous array; q|k|v, gate|up
// and all experts glued), a *parameter* is a published tensor, a contiguous piece of one storage.
#ifndef KRAIT_MODEL_PARAMS_H_
#define KRAIT_MODEL_PARAMS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels/tensor.h"
#include "model/spec.h"

namespace krait {

enum class DTypeClass : uint8_t {
  kCompute,  // the run's precision, with an fp32 master where that is not fp32
  kFp32,     // always fp32: A_log, D, dt_proj.bias, router, norm weights
};

enum class ParamInit : uint8_t {
  kNormal,          // N(0, std)
  kNormalResidual,  // N(0, std / sqrt(2 * n_layers)) under scheme mamba, N(0, std) under hf
  kZero,
  kOne,
  kALog,      // log(1..N) along the last dimension
  kDtWeight,  // scheme mamba: uniform in +-R^-0.5; hf: N(0, std)
  kDtBias,    // scheme mamba: inverse softplus of dt log-uniform in [1e-3, 1e-1], floor 1e-4; hf: 0
};

// Which ranks of a stage hold which part of a parameter.
enum class MeshAxis : uint8_t {
  kNone,        // every rank holds all of it
  kTensor,      // cut over the tensor ranks
  kVocabulary,  // likewise, by rows padded to a multiple of kVocabularyRows * tensor
  kExpert,      // an expert: whole on the ranks at its place in an expert group
};
struct ShardRule {
  MeshAxis axis = MeshAxis::kNone;
  // The dimension of the published tensor that is cut. kExpert: dimension 0 of the storage, the
  // expert, is cut instead.
  int dim = 0;
  // Elements along dim that stay together: a head's rows, 1 where every channel, row or column may
  // be cut from its neighbour. A segment with fewer units than tensor ranks (k, v) is not cut
  // further: consecutive ranks share a unit.
  int64_t unit = 1;
  // Extents along dim that are cut apart, a part of each going to every rank (x|z of in_proj);
  // empty: one.
  std::vector<int64_t> segments;
};
inline constexpr int64_t kVocabularyRows = 64;

// How the first pass of a step meets the gradient's memory.
enum class GradWrite : uint8_t {
  kOverwrite,  // the op's first write overwrites it: matrix products
  kZeroed,     // it is zeroed before, and the op adds
};

struct Param {
  std::string name;            // published, e.g. "model.layers.3.mamba.A_log"
  std::vector<int64_t> shape;  // published, global
  DTypeClass dtype_class = DTypeClass::kCompute;
  bool trainable = true;
  ParamInit init = ParamInit::kNormal;
  bool decay = true;
  int group = 0;  // optimizer group
  ShardRule shard;
  GradWrite grad_write = GradWrite::kOverwrite;
  int storage = 0;     // index into ParamTable::storages
  int64_t offset = 0;  // elements from the start of the storage

  int64_t numel() const;
};

// Attributes that all pieces share (dtype class, decay, group, trainable, gradient write, holders)
// live in the pieces; Layout checks that they agree.
struct Storage {
  std::string name;            // e.g. "model.layers.3.feed_forward.gate_up"
  std::vector<int64_t> shape;  // e.g. [E, 2F, D]
  int sublayer = -1;           // index into ModelSpec::sublayers; -1: embedding, final norm, head
  std::vector<int> params;     // its pieces, ascending offset, tiling it
  int64_t numel() const;
};

class ParamTable {
 public:
  // With more tensor ranks than K/V heads, several ranks share a K/V head but no query head: k|v is
  // then a storage apart from q ("self_attn.kv" and "self_attn.q_proj.weight" in place of
  // "self_attn.qkv"). Nothing else depends on `tensor`; shapes are global.
  explicit ParamTable(const ModelSpec& spec, int64_t tensor = 1);

  const std::vector<Param>& params() const { return params_; }
  const std::vector<Storage>& storages() const { return storages_; }
  // Index of a published name, or -1.
  int Find(std::string_view name) const;
  bool HasStorage(std::string_view name) const;
  // Index of a storage by name; fatal when missing (the caller is model code).
  int FindStorage(std::string_view name) const;

  int64_t total() const;
  // Parameters that one token uses: top_k of the experts, everything else.
  int64_t active(const ModelSpec& spec) const;

 private:
  void AddAttention(const ModelSpec& spec, int64_t tensor, const std::string& prefix, int sublayer);
  void AddMamba(const ModelSpec& spec, const std::string& prefix, int sublayer);
  void AddMlp(const ModelSpec& spec, const std::string& prefix, int sublayer);
  void AddMoe(const ModelSpec& spec, const std::string& prefix, int sublayer);
  void AddStorage(std::string name, std::vector<int64_t> shape, int sublayer);
  void AddParam(Param param);              // the next piece of the last storage
  void AddOne(Param param, int sublayer);  // a storage of its own, with the same name

  std::vector<Param> params_;
  std::vector<Storage> storages_;
  std::unordered_map<std::string, int> by_name_;
  std::unordered_map<std::string, int> storage_by_name_;
};

}  // namespace krait

#endif  // KRAIT_MODEL_PARAMS_H_
