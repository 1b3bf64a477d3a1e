// What a hybrid model is: sizes, and the list of residual sublayers.
//
// A Jamba layer is two sublayers, a mixer (attention or Mamba) and a feed-forward (dense MLP or
// MoE); each computes x + f(RMSNorm(x)).
#ifndef KRAIT_MODEL_SPEC_H_
#define KRAIT_MODEL_SPEC_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace krait {

enum class SublayerKind : uint8_t { kAttention, kMamba, kMlp, kMoe };
const char* Name(SublayerKind kind);  // "attention", "mamba", "mlp", "moe"
// A layer is a mixer and a feed-forward.
inline bool IsMixer(SublayerKind kind) {
  return kind == SublayerKind::kAttention || kind == SublayerKind::kMamba;
}

struct Sublayer {
  SublayerKind kind;
  int layer;  // index of the published layer ("model.layers.N")
};

struct AttentionSpec {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  double rope_theta = 0;  // 0: no positions
};

struct MambaSpec {
  int64_t d_state = 16, d_conv = 4, expand = 2;
  int64_t d_inner = 0;  // expand * d_model
  int64_t dt_rank = 0;  // auto = ceil(d_model / 16)
  bool inner_norms = true, conv_bias = true, proj_bias = false;
};

enum class AuxPool : uint8_t { kModel, kLayer };

struct MoeSpec {
  int64_t experts = 16, top_k = 2, d_ff = 0;
  bool renormalize = false;
  double aux_loss = 0.001, z_loss = 0;
  AuxPool aux_pool = AuxPool::kModel;
  // Consecutive sequences over which the router's statistics are pooled; 0: all of a pass.
  int64_t aux_sequences = 0;
};

enum class InitScheme : uint8_t { kMamba, kHf };

struct ModelSpec {
  int64_t vocab_size = 0, d_model = 0, n_layers = 0;
  bool tie_embeddings = false;
  int64_t pad_token = -1;  // whose embedding row gets no gradient from the lookup; -1: none
  double norm_eps = 1e-6;
  AttentionSpec attention;
  MambaSpec mamba;
  int64_t mlp_d_ff = 0;
  // Coefficient of the activation loss (HybridModel::Forward); 0: none.
  double activation_loss = 0;
  MoeSpec moe;
  double init_std = 0.02;
  InitScheme init_scheme = InitScheme::kMamba;
  int64_t mup_base_d_model = 0;     // of optimizer.mup (model/params.h); 0: off
  std::vector<Sublayer> sublayers;  // 2 * n_layers, mixer before feed-forward

  bool Has(SublayerKind kind) const;
  int64_t Count(SublayerKind kind) const;
};

// "m mE m mE a mE m mE" repeated over n_layers: the words of a layout, one per layer.
struct LayerKinds {
  bool attention;
  bool moe;
};
// Layer i is attention iff ((i - offset) mod p) * a mod p < a, with a : m in lowest terms, p = a+m;
// offset -1 = floor(p / (2a)). Errors: both counts 0, offset out of [0, p), or a ratio with both
// kinds that yields none of one over n_layers.
absl::StatusOr<std::vector<bool>> AttentionLayers(int64_t a, int64_t m, int64_t offset,
                                                  int64_t n_layers);
// Layer i is MoE iff i mod every == offset; every 0 = none; offset -1 = every - 1.
absl::StatusOr<std::vector<bool>> MoeLayers(int64_t every, int64_t offset, int64_t n_layers);
// Words m | a | mE | aE separated by spaces.
absl::StatusOr<std::vector<LayerKinds>> ParsePattern(const std::string& pattern, int64_t n_layers);

std::vector<Sublayer> MakeSublayers(const std::vector<LayerKinds>& layers);

// FLOPs per token of one training step, forward x 3, causal attention halved (attention
// 4*D*(D + D*kv/heads) + 2*T*D, MLP and each chosen expert 6*D*F, Mamba
// 6*I*D + I*(11*N + 4*R + 1), head 2*D*V; with head_dim != D/heads the attention projections count
// their true sizes).
double FlopsPerToken(const ModelSpec& spec, int64_t seq_len);

}  // namespace krait

#endif  // KRAIT_MODEL_SPEC_H_
