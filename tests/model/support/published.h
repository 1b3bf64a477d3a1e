// Specs of published and reference models, for tests.
#ifndef KRAIT_TESTS_MODEL_SUPPORT_PUBLISHED_H_
#define KRAIT_TESTS_MODEL_SUPPORT_PUBLISHED_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "model/spec.h"

namespace krait {

struct JambaSizes {
  int64_t d_model, n_layers, heads, kv_heads, d_ff, experts, vocab = 65536;
  int64_t period = 8, moe_every = 2;  // attention : Mamba = 1 : period - 1; 0 = no MoE
};

inline ModelSpec JambaSpec(const JambaSizes& sizes) {
  ModelSpec spec;
  spec.vocab_size = sizes.vocab;
  spec.d_model = sizes.d_model;
  spec.n_layers = sizes.n_layers;
  spec.attention = {sizes.heads, sizes.kv_heads, sizes.d_model / sizes.heads, 0};
  spec.mamba.d_inner = 2 * sizes.d_model;
  spec.mamba.dt_rank = (sizes.d_model + 15) / 16;
  spec.mlp_d_ff = sizes.d_ff;
  spec.moe.experts = sizes.experts;
  spec.moe.d_ff = sizes.d_ff;
  const auto attention = AttentionLayers(1, sizes.period - 1, -1, sizes.n_layers);
  const auto moe = MoeLayers(sizes.moe_every, -1, sizes.n_layers);
  KRAIT_CHECK(attention.ok() && moe.ok());
  std::vector<LayerKinds> layers;
  for (size_t i = 0; i < attention->size(); ++i) layers.push_back({(*attention)[i], (*moe)[i]});
  spec.sublayers = MakeSublayers(layers);
  return spec;
}

inline ModelSpec JambaV01() { return JambaSpec({4096, 32, 32, 8, 14336, 16}); }
inline ModelSpec Jamba15Large() { return JambaSpec({8192, 72, 64, 8, 24576, 16}); }
inline ModelSpec Jamba3b() { return JambaSpec({2048, 16, 16, 4, 5632, 8}); }

}  // namespace krait

#endif  // KRAIT_TESTS_MODEL_SUPPORT_PUBLISHED_H_
