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

// muP (maximal update parametrization), on where ModelSpec::mup_base_d_model is set: with
// w = d_model / base, the initial values and AdamW's steps of a parameter are those of a model of
// the base width times
//
//   parameter                                         initial values   steps
//   embedding                                         1                1
//   matrices of attention, MLP, experts; in_proj,
//     x_proj, out_proj                                w^-1/2           1/w
//   dt_proj.weight                                    (by its scheme)  base R / R
//   router, head                                      1/w              1/w
//   conv1d, A_log, D, dt_proj.bias, norms, biases     1                1
//
// Source: Yang et al., Tensor Programs V (arXiv:2203.03466), table 3, for Adam: hidden matrices,
// whose fan-in and fan-out grow, have variance and rate 1 / fan-in; outputs variance 1 / fan-in^2,
// rate 1 / fan-in; what has no growing fan-in (the embedding, vectors, the taps of a channel) is as
// it was. That form has no multipliers in the forward pass, so weights, export and decoding are
// those of any model. Mamba's matrices as hidden ones, A_log, D and biases unchanged: mamba.py
// (github.com/alxndrTL/mamba.py, pull request 50), which checked its transfer for Mamba-1.
// Vankadara et al., On Feature Learning in Structured State Space Models (NeurIPS 2024), show that
// this fails where N grows with the width; here it is fixed (B and C are then as many rows of
// x_proj whatever the width, and with inner norms their scale is that of the norms). dt_proj's
// uniform values scale with R by themselves; R counts as growing where it is ceil(d_model / 16),
// else as fixed. The router as an output: Malasnicki et al., mu-Parametrization for Mixture of
// Experts (arXiv:2508.09752).
//
// What is expected of a family of models: d_ff, expand * d_model and the number of heads grow with
// d_model; head_dim stays, so that attention's scale head_dim^-1/2 is one constant (the rule 1/d is
// for a head_dim that grows). Tied embeddings, which would be input and output at once, are
// refused. Weight decay keeps the common rate, so that its pull per step does not vanish with the
// width (mamba.py; Kosson et al., arXiv:2510.19093).
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
  int group = 0;                        // optimizer group
  double init_scale = 1, lr_scale = 1;  // of muP, above
  ShardRule shard;
  GradWrite grad_write = GradWrite::kOverwrite;
  int storage = 0;     // index into ParamTable::storages
  int64_t offset = 0;  // elements from the start of the storage

  int64_t numel() const;
};

// Attributes that all pieces share (dtype class, decay, group, scales, trainable, gradient write,
// holders)
// live in the pieces; Layout checks that they agree.
struct Storage {
  std::string name;            // e.g. "model.layers.3.feed_forward.gate_up"
  std::vector<int64_t> shape;  // e.g. [E, 2F, D]
  int sublayer = -1;           // index into ModelSpec::sublayers; -1: embedding, final norm, head
  std::vector<int> params;     // its pieces, ascending offset, tiling it
  int64_t numel() const;
};

// w of muP's table; 1 without muP.
double MupWidth(const ModelSpec& spec);

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
