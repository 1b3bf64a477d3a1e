// The names that Hugging Face's Jamba gives its weights.
#ifndef KRAIT_MODEL_NAMES_H_
#define KRAIT_MODEL_NAMES_H_

#include <string>

#include "model/spec.h"

namespace krait {

inline constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
inline constexpr char kFinalNormName[] = "model.final_layernorm.weight";
inline constexpr char kHeadName[] = "lm_head.weight";

// What the names of a sublayer's weights begin with: "model.layers.3.mamba.".
std::string SublayerPrefix(SublayerKind kind, int layer);
// The norm before a sublayer: "model.layers.3.input_layernorm.weight".
std::string NormName(SublayerKind kind, int layer);

}  // namespace krait

#endif  // KRAIT_MODEL_NAMES_H_
