#include "model/params.h"

#include <utility>

#include "kernels/base/check.h"

namespace krait {
namespace {

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  return n;
}

// Rows of the table. Each takes the published name and shape; what is not said is the default of
// Param: compute dtype, N(0, std), decayed, sharded over tensor, partial gradients.

Param Weight(std::string name, std::vector<int64_t> shape, ParamInit init = ParamInit::kNormal) {
  Param param;
  param.name = std::move(name);
  param.shape = std::move(shape);
  param.init = init;
  return param;
}

// Cut by output rows over tensor ranks; `segments` are cut apart.
Param ByOutput(Param param, std::vector<int64_t> segments = {}) {
  param.shard = {MeshAxis::kTensor, 0, std::move(segments)};
  param.replicas = ReplicaSet::kData;
  return param;
}

// Cut by input columns.
Param ByInput(Param param) {
  param.shard = {MeshAxis::kTensor, 1, {}};
  param.replicas = ReplicaSet::kData;
  return param;
}

// On every rank of the stage; partial gradients, because ranks own different tokens.
Param Replicated(Param param) {
  param.shard = {};
  param.replicas = ReplicaSet::kAll;
  return param;
}

// One expert: whole on the ranks of its place in an expert group.
Param Expert(Param param) {
  param.shard = {MeshAxis::kExpert, 0, {}};
  param.replicas = ReplicaSet::kExpert;
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

Param Norm(std::string name, int64_t width) {
  return Fp32(NoDecay(Replicated(Weight(std::move(name), {width}, ParamInit::kOne))));
}

// dt, B, C norms: every tensor rank runs their backward alike on all-reduced gradients.
Param InnerNorm(std::string name, int64_t width) {
  Param param = Norm(std::move(name), width);
  param.grad = GradKind::kComplete;
  return param;
}

Param Bias(std::string name, int64_t width) {
  return NoDecay(Weight(std::move(name), {width}, ParamInit::kZero));
}

}  // namespace

int64_t Param::numel() const { return Product(shape); }
int64_t Storage::numel() const { return Product(shape); }

ParamTable::ParamTable(const ModelSpec& spec) {
  AddOne(ByOutput(Weight("model.embed_tokens.weight", {spec.vocab_size, spec.d_model})), -1);
  int previous_layer = -1;
  for (size_t s = 0; s < spec.sublayers.size(); ++s) {
    const Sublayer& sublayer = spec.sublayers[s];
    const int index = static_cast<int>(s);
    const std::string layer = "model.layers." + std::to_string(sublayer.layer) + ".";
    // The first sublayer of a layer is its mixer, the second its feed-forward.
    const bool first = sublayer.layer != previous_layer;
    previous_layer = sublayer.layer;
    AddOne(
        Norm(layer + (first ? "input_layernorm.weight" : "pre_ff_layernorm.weight"), spec.d_model),
        index);
    switch (sublayer.kind) {
      case SublayerKind::kAttention:
        AddAttention(spec, layer + "self_attn.", index);
        break;
      case SublayerKind::kMamba:
        AddMamba(spec, layer + "mamba.", index);
        break;
      case SublayerKind::kMlp:
        AddMlp(spec, layer + "feed_forward.", index);
        break;
      case SublayerKind::kMoe:
        AddMoe(spec, layer + "feed_forward.", index);
        break;
    }
  }
  AddOne(Norm("model.final_layernorm.weight", spec.d_model), -1);
  if (!spec.tie_embeddings) {
    AddOne(ByOutput(Weight("lm_head.weight", {spec.vocab_size, spec.d_model})), -1);
  }
  for (const Storage& storage : storages_) {
    int64_t end = 0;
    for (const int p : storage.params) end += params_[static_cast<size_t>(p)].numel();
    KRAIT_CHECK(end == storage.numel());
  }
}

void ParamTable::AddAttention(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const int64_t q = spec.attention.heads * spec.attention.head_dim;
  const int64_t kv = spec.attention.kv_heads * spec.attention.head_dim;
  const int64_t d = spec.d_model;
  AddStorage(prefix + "qkv", {q + 2 * kv, d}, sublayer);
  AddParam(ByOutput(Weight(prefix + "q_proj.weight", {q, d})));
  AddParam(ByOutput(Weight(prefix + "k_proj.weight", {kv, d})));
  AddParam(ByOutput(Weight(prefix + "v_proj.weight", {kv, d})));
  AddOne(ByInput(Weight(prefix + "o_proj.weight", {d, q}, ParamInit::kNormalResidual)), sublayer);
}

void ParamTable::AddMamba(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const MambaSpec& m = spec.mamba;
  const int64_t d = spec.d_model;
  const int64_t i = m.d_inner;
  AddOne(ByOutput(Weight(prefix + "in_proj.weight", {2 * i, d}), {i, i}), sublayer);
  if (m.proj_bias) AddOne(ByOutput(Bias(prefix + "in_proj.bias", 2 * i), {i, i}), sublayer);
  AddStorage(prefix + "conv1d.weight", {i, m.d_conv}, sublayer);
  AddParam(ByOutput(Weight(prefix + "conv1d.weight", {i, 1, m.d_conv})));
  if (m.conv_bias) AddOne(ByOutput(Bias(prefix + "conv1d.bias", i)), sublayer);
  AddOne(ByInput(Weight(prefix + "x_proj.weight", {m.dt_rank + 2 * m.d_state, i})), sublayer);
  if (m.inner_norms) {
    AddOne(InnerNorm(prefix + "dt_layernorm.weight", m.dt_rank), sublayer);
    AddOne(InnerNorm(prefix + "b_layernorm.weight", m.d_state), sublayer);
    AddOne(InnerNorm(prefix + "c_layernorm.weight", m.d_state), sublayer);
  }
  AddOne(ByOutput(Weight(prefix + "dt_proj.weight", {i, m.dt_rank}, ParamInit::kDtWeight)),
         sublayer);
  AddOne(Fp32(NoDecay(ByOutput(Weight(prefix + "dt_proj.bias", {i}, ParamInit::kDtBias)))),
         sublayer);
  AddOne(Fp32(NoDecay(ByOutput(Weight(prefix + "A_log", {i, m.d_state}, ParamInit::kALog)))),
         sublayer);
  AddOne(Fp32(NoDecay(ByOutput(Weight(prefix + "D", {i}, ParamInit::kOne)))), sublayer);
  AddOne(ByInput(Weight(prefix + "out_proj.weight", {d, i}, ParamInit::kNormalResidual)), sublayer);
  if (m.proj_bias) AddOne(Replicated(Bias(prefix + "out_proj.bias", d)), sublayer);
}

void ParamTable::AddMlp(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const int64_t d = spec.d_model;
  const int64_t f = spec.mlp_d_ff;
  AddStorage(prefix + "gate_up", {2 * f, d}, sublayer);
  AddParam(ByOutput(Weight(prefix + "gate_proj.weight", {f, d})));
  AddParam(ByOutput(Weight(prefix + "up_proj.weight", {f, d})));
  AddOne(ByInput(Weight(prefix + "down_proj.weight", {d, f}, ParamInit::kNormalResidual)),
         sublayer);
}

void ParamTable::AddMoe(const ModelSpec& spec, const std::string& prefix, int sublayer) {
  const int64_t d = spec.d_model;
  const int64_t f = spec.moe.d_ff;
  const int64_t experts = spec.moe.experts;
  AddOne(Fp32(Replicated(Weight(prefix + "router.weight", {experts, d}))), sublayer);
  const auto name = [&](int64_t e, const char* matrix) {
    return prefix + "experts." + std::to_string(e) + "." + matrix + ".weight";
  };
  AddStorage(prefix + "experts.gate_up", {experts, 2 * f, d}, sublayer);
  for (int64_t e = 0; e < experts; ++e) {
    AddParam(Expert(Weight(name(e, "gate_proj"), {f, d})));
    AddParam(Expert(Weight(name(e, "up_proj"), {f, d})));
  }
  AddStorage(prefix + "experts.down", {experts, d, f}, sublayer);
  for (int64_t e = 0; e < experts; ++e) {
    AddParam(Expert(Weight(name(e, "down_proj"), {d, f}, ParamInit::kNormalResidual)));
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
    (param.replicas == ReplicaSet::kExpert ? expert : shared) += param.numel();
  }
  // Experts are alike, so the sum over all of them divides evenly.
  return expert == 0 ? shared : shared + expert / spec.moe.experts * spec.moe.top_k;
}

}  // namespace krait
