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

// How a tensor-parallel or expert-parallel layout cuts a parameter (one rank: unused but declared).
enum class MeshAxis : uint8_t { kNone, kTensor, kExpert };
struct ShardRule {
  MeshAxis axis = MeshAxis::kNone;
  // The dimension of the published tensor that is cut. An expert (kExpert) stays whole: dimension 0
  // of its storage, the expert, is cut.
  int dim = 0;
  std::vector<int64_t>
      segments;  // extents along dim that are cut apart (x|z of in_proj); empty: one
};

// Which ranks hold copies of a parameter, and what their gradients are before reduction.
enum class ReplicaSet : uint8_t {
  kData,    // sharded over tensor, copies on the data ranks
  kAll,     // on every rank of the stage
  kExpert,  // an expert: copies on world / expert ranks
};
enum class GradKind : uint8_t {
  kPartial,   // sum over the whole replica set
  kComplete,  // alike on every tensor rank (inner norms): sum over data only
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
  ReplicaSet replicas = ReplicaSet::kData;
  GradKind grad = GradKind::kPartial;
  int storage = 0;     // index into ParamTable::storages
  int64_t offset = 0;  // elements from the start of the storage

  int64_t numel() const;
};

// Attributes that all pieces share (dtype class, decay, group, trainable) live in the pieces; the
// optimizer checks that they agree.
struct Storage {
  std::string name;            // e.g. "model.layers.3.feed_forward.gate_up"
  std::vector<int64_t> shape;  // e.g. [E, 2F, D]
  int sublayer = -1;           // index into ModelSpec::sublayers; -1: embedding, final norm, head
  std::vector<int> params;     // its pieces, ascending offset, tiling it
  int64_t numel() const;
};

class ParamTable {
 public:
  explicit ParamTable(const ModelSpec& spec);

  const std::vector<Param>& params() const { return params_; }
  const std::vector<Storage>& storages() const { return storages_; }
  // Index of a published name, or -1.
  int Find(std::string_view name) const;
  // Index of a storage by name; fatal when missing (the caller is model code).
  int FindStorage(std::string_view name) const;

  int64_t total() const;
  // Parameters that one token uses: top_k of the experts, everything else.
  int64_t active(const ModelSpec& spec) const;

 private:
  void AddAttention(const ModelSpec& spec, const std::string& prefix, int sublayer);
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
