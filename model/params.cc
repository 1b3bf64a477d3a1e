#include "model/params.h"

#include <cmath>
#include <utility>

#include "kernels/base/check.h"
#include "model/names.h"

namespace krait {
namespace {

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  return n;
}

// Rows of the table. Each takes the published name and shape; what is not said is the default of
// Param: compute dtype, N(0, std), decayed, on every rank, the first gradient overwriting.

Param Weight(std::string name, std::vector<int64_t> shape, ParamInit init = ParamInit::kNormal) {
  Param param;
  param.name = std::move(name);
  param.shape = std::move(shape);
  param.init = init;
  return param;
}

// Cut by output rows over tensor ranks, in units of `unit` rows; `segments` are cut apart.
Param ByOutput(Param param, int64_t unit = 1, std::vector<int64_t> segments = {}) {
  param.shard = {MeshAxis::kTensor, 0, unit, std::move(segments)};
  return param;
}

// Cut by input columns, in units of `unit` columns.
Param ByInput(Param param, int64_t unit = 1) {
  param.shard = {MeshAxis::kTensor, 1, unit, {}};
  return param;
}

Param ByVocabulary(Param param) {
  param.shard.axis = MeshAxis::kVocabulary;
  return param;
}

Param Expert(Param param) {
  param.shard.axis = MeshAxis::kExpert;
  return param;
}

Param Fp32(Param param) {
  param.dtype_class = DTypeClass::kFp32;
  return param;
}

Param NoDecay(Param param) {
  param.decay = false;
  return param;
}

Param Zeroed(Param param) {
  param.grad_write = GradWrite::kZeroed;
  return param;
}

// The rows of muP's table (model/params.h); width: d_model over that of the base.
Param Hidden(double width, Param param) {
  param.init_scale = 1 / std::sqrt(width);
  param.lr_scale = 1 / width;
  return param;
}
Param Output(double width, Param param) {
  param.init_scale = param.lr_scale = 1 / width;
  return param;
}

Param Norm(std::string name, int64_t width) {
  return Fp32(Zeroed(NoDecay(Weight(std::move(name), {width}, ParamInit::kOne))));
}

Param Bias(std::string name, int64_t width) {
  return Zeroed(NoDecay(Weight(std::move(name), {width}, ParamInit::kZero)));
}

}  // namespace

double MupWidth(const ModelSpec& spec) {
  if (spec.mup_base_d_model == 0) return 1;
  return static_cast<double>(spec.d_model) / static_cast<double>(spec.mup_base_d_model);
}

int64_t Param::numel() const { return Product(shape); }
int64_t Storage::numel() const { return Product(shape); }

ParamTable::ParamTable(const ModelSpec& spec, int64_t tensor) {
  Param embedding = ByVocabulary(Weight(kEmbeddingName, {spec.vocab_size, spec.d_model}));
  // A tied one gets its first gradient from the head.
  AddOne(spec.tie_embeddings ? embedding : Zeroed(embedding), -1);
  for (size_t s = 0; s < spec.sublayers.size(); ++s) {
    const Sublayer& sublayer = spec.sublayers[s];
    const int index = static_cast<int>(s);
    const std::string prefix = SublayerPrefix(sublayer.kind, sublayer.layer);
    AddOne(Norm(NormName(sublayer.kind, sublayer.layer), spec.d_model), index);
    switch (sublayer.kind) {
      case SublayerKind::kAttention:
        AddAttention(spec, tensor, prefix, index);
        break;
      case SublayerKind::kMamba:
        AddMamba(spec, prefix, index);
        break;
      case SublayerKind::kMlp:
        AddMlp(spec, prefix, index);
        break;
      case SublayerKind::kMoe:
        AddMoe(spec, prefix, index);
        break;
    }
  }
  AddOne(Norm(kFinalNormName, spec.d_model), -1);
  if (!spec.tie_embeddings) {
    AddOne(Output(MupWidth(spec), ByVocabulary(Weight(kHeadName, {spec.vocab_size, spec.d_model}))),
           -1);
  }
  for (const Storage& storage : storages_) {
    int64_t end = 0;
    for (const int p : storage.params) end += params_[static_cast<size_t>(p)].numel();
    KRAIT_CHECK(end == storage.numel());
  }
}

void ParamTable::AddAttention(const ModelSpec& spec, int64_t tensor, const std::string& prefix,
                              int sublayer) {
  const int64_t head = spec.attention.head_dim;
  const int64_t q = spec.attention.heads * head;
  const int64_t kv = spec.attention.kv_heads * head;
  const int64_t d = spec.d_model;
  const double width = MupWidth(spec);
  Param q_proj = Hidden(width, ByOutput(Weight(prefix + "q_proj.weight", {q, d}), head));
  if (tensor <= spec.attention.kv_heads) {
    AddStorage(prefix + "qkv", {q + 2 * kv, d}, sublayer);
    AddParam(std::move(q_proj));
  } else {
    AddOne(std::move(q_proj), sublayer);
    AddStorage(prefix + "kv", {2 * kv, d}, sublayer);
  }
  AddParam(Hidden(width, ByOutput(Weight(prefix + "k_proj.weight", {kv, d}), head)));
  AddParam(Hidden(width, ByOutput(Weight(prefix + "v_proj.weight", {kv, d}), head)));
  AddOne(Hidden(width, ByInput(Weight(prefix + "o_proj.weight", {d, q}, ParamInit::kNormalResidual),
                               head)),
         sublayer);
}

void ParamTable::AddMamba(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const MambaSpec& m = spec.mamba;
  const int64_t d = spec.d_model;
  const int64_t i = m.d_inner;
  const double width = MupWidth(spec);
  AddOne(Hidden(width, ByOutput(Weight(prefix + "in_proj.weight", {2 * i, d}), 1, {i, i})),
         sublayer);
  if (m.proj_bias) AddOne(ByOutput(Bias(prefix + "in_proj.bias", 2 * i), 1, {i, i}), sublayer);
  AddStorage(prefix + "conv1d.weight", {i, m.d_conv}, sublayer);
  AddParam(Zeroed(ByOutput(Weight(prefix + "conv1d.weight", {i, 1, m.d_conv}))));
  if (m.conv_bias) AddOne(ByOutput(Bias(prefix + "conv1d.bias", i)), sublayer);
  AddOne(Hidden(width, ByInput(Weight(prefix + "x_proj.weight", {m.dt_rank + 2 * m.d_state, i}))),
         sublayer);
  if (m.inner_norms) {
    AddOne(Norm(prefix + "dt_layernorm.weight", m.dt_rank), sublayer);
    AddOne(Norm(prefix + "b_layernorm.weight", m.d_state), sublayer);
    AddOne(Norm(prefix + "c_layernorm.weight", m.d_state), sublayer);
  }
  const auto auto_rank = [](int64_t d_model) { return (d_model + 15) / 16; };
  double rank_width = 1;
  if (spec.mup_base_d_model > 0 && m.dt_rank == auto_rank(d)) {
    rank_width =
        static_cast<double>(m.dt_rank) / static_cast<double>(auto_rank(spec.mup_base_d_model));
  }
  Param dt_proj =
      Hidden(rank_width,
             ByOutput(Weight(prefix + "dt_proj.weight", {i, m.dt_rank}, ParamInit::kDtWeight)));
  if (spec.init_scheme == InitScheme::kMamba) dt_proj.init_scale = 1;
  AddOne(std::move(dt_proj), sublayer);
  AddOne(Fp32(Zeroed(NoDecay(ByOutput(Weight(prefix + "dt_proj.bias", {i}, ParamInit::kDtBias))))),
         sublayer);
  AddOne(
      Fp32(Zeroed(NoDecay(ByOutput(Weight(prefix + "A_log", {i, m.d_state}, ParamInit::kALog))))),
      sublayer);
  AddOne(Fp32(Zeroed(NoDecay(ByOutput(Weight(prefix + "D", {i}, ParamInit::kOne))))), sublayer);
  AddOne(Hidden(width,
                ByInput(Weight(prefix + "out_proj.weight", {d, i}, ParamInit::kNormalResidual))),
         sublayer);
  if (m.proj_bias) AddOne(Bias(prefix + "out_proj.bias", d), sublayer);
}

void ParamTable::AddMlp(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const int64_t d = spec.d_model;
  const int64_t f = spec.mlp_d_ff;
  const double width = MupWidth(spec);
  AddStorage(prefix + "gate_up", {2 * f, d}, sublayer);
  AddParam(Hidden(width, ByOutput(Weight(prefix + "gate_proj.weight", {f, d}))));
  AddParam(Hidden(width, ByOutput(Weight(prefix + "up_proj.weight", {f, d}))));
  AddOne(Hidden(width,
                ByInput(Weight(prefix + "down_proj.weight", {d, f}, ParamInit::kNormalResidual))),
         sublayer);
}

void ParamTable::AddMoe(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const int64_t d = spec.d_model;
  const int64_t f = spec.moe.d_ff;
  const int64_t experts = spec.moe.experts;
  const double width = MupWidth(spec);
  AddOne(Output(width, Fp32(Weight(prefix + "router.weight", {experts, d}))), sublayer);
  const auto name = [&](int64_t e, const char* matrix) {
    return prefix + "experts." + std::to_string(e) + "." + matrix + ".weight";
  };
  AddStorage(prefix + "experts.gate_up", {experts, 2 * f, d}, sublayer);
  for (int64_t e = 0; e < experts; ++e) {
    AddParam(Hidden(width, Expert(Weight(name(e, "gate_proj"), {f, d}))));
    AddParam(Hidden(width, Expert(Weight(name(e, "up_proj"), {f, d}))));
  }
  AddStorage(prefix + "experts.down", {experts, d, f}, sublayer);
  for (int64_t e = 0; e < experts; ++e) {
    AddParam(
        Hidden(width, Expert(Weight(name(e, "down_proj"), {d, f}, ParamInit::kNormalResidual))));
  }
}

void ParamTable::AddStorage(std::string name, std::vector<int64_t> shape, int sublayer) {
  const auto [at, added] = storage_by_name_.emplace(name, static_cast<int>(storages_.size()));
  KRAIT_CHECK(added);
  storages_.push_back({std::move(name), std::move(shape), sublayer, {}});
}

void ParamTable::AddParam(Param param) {
  Storage& storage = storages_.back();
  param.storage = static_cast<int>(storages_.size()) - 1;
  if (!storage.params.empty()) {
    const Param& before = params_[static_cast<size_t>(storage.params.back())];
    param.offset = before.offset + before.numel();
  }
  const int index = static_cast<int>(params_.size());
  const auto [at, added] = by_name_.emplace(param.name, index);
  KRAIT_CHECK(added);
  storage.params.push_back(index);
  params_.push_back(std::move(param));
}

void ParamTable::AddOne(Param param, int sublayer) {
  AddStorage(param.name, param.shape, sublayer);
  AddParam(std::move(param));
}

int ParamTable::Find(std::string_view name) const {
  const auto it = by_name_.find(std::string(name));
  return it == by_name_.end() ? -1 : it->second;
}

bool ParamTable::HasStorage(std::string_view name) const {
  return storage_by_name_.contains(std::string(name));
}

int ParamTable::FindStorage(std::string_view name) const {
  const auto it = storage_by_name_.find(std::string(name));
  if (it == storage_by_name_.end()) {
    KRAIT_FATAL("the parameter table has no storage " + std::string(name));
  }
  return it->second;
}

int64_t ParamTable::total() const {
  int64_t n = 0;
  for (const Storage& storage : storages_) n += storage.numel();
  return n;
}

int64_t ParamTable::active(const ModelSpec& spec) const {
  int64_t shared = 0;
  int64_t expert = 0;
  for (const Param& param : params_) {
    (param.shard.axis == MeshAxis::kExpert ? expert : shared) += param.numel();
  }
  // Experts are alike, so the sum over all of them divides evenly.
  return expert == 0 ? shared : shared + expert / spec.moe.experts * spec.moe.top_k;
}

}  // namespace krait
