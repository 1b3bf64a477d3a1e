#include "model/hf.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/params.h"
#include "model/support/published.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::vector<int> LayersOf(const ModelSpec& spec, SublayerKind kind) {
  std::vector<int> layers;
  for (const Sublayer& sublayer : spec.sublayers) {
    if (sublayer.kind == kind) layers.push_back(sublayer.layer);
  }
  return layers;
}

ModelSpec Read(const std::string& json) {
  const auto spec = SpecFromHfConfig(json, "config.json");
  EXPECT_TRUE(spec.ok()) << MessageOf(spec.status());
  return spec.ok() ? *spec : ModelSpec();
}

std::string ReadError(const std::string& json) {
  const auto spec = SpecFromHfConfig(json, "some/config.json");
  EXPECT_FALSE(spec.ok());
  EXPECT_EQ(ExitCodeOf(spec.status()), ExitCode::kConfig);
  return MessageOf(spec.status());
}

std::string WriteError(const ModelSpec& spec) {
  const auto json = HfConfigFromSpec(spec);
  EXPECT_FALSE(json.ok()) << *json;
  EXPECT_EQ(ExitCodeOf(json.status()), ExitCode::kConfig);
  return MessageOf(json.status());
}

// ai21labs/Jamba-v0.1 as published, old keys included.
constexpr const char* kJambaV01 = R"({
  "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4,
  "attn_layer_period": 8, "bos_token_id": 1, "calc_logits_for_entire_prompt": false,
  "eos_token_id": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 256,
  "mamba_expand": 2, "mamba_inner_layernorms": true, "mamba_proj_bias": false,
  "model_type": "jamba", "n_ctx": 262144, "num_attention_heads": 32, "num_experts": 16,
  "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "output_router_logits": false, "pad_token_id": 0, "rms_norm_eps": 1e-06,
  "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": true,
  "use_mamba_kernels": true, "vocab_size": 65536})";

TEST(HfConfig, ReadsPublishedConfigs) {
  const ModelSpec v01 = Read(kJambaV01);
  EXPECT_EQ(ParamTable(v01).total(), 51'570'323'328);
  EXPECT_EQ(ParamTable(v01).active(v01), 12'110'311'296);
  EXPECT_THAT(LayersOf(v01, SublayerKind::kAttention), ElementsAre(4, 12, 20, 28));
  EXPECT_EQ(v01.Count(SublayerKind::kMoe), 16);

  // The defaults of JambaConfig are v0.1 itself.
  EXPECT_EQ(ParamTable(Read(R"({"model_type": "jamba"})")).total(), 51'570'323'328);

  const ModelSpec tiny = Read(
      R"({"model_type": "jamba", "hidden_size": 128, "num_hidden_layers": 8,
          "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4,
          "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_dt_rank": "auto"})");
  EXPECT_EQ(ParamTable(tiny).total(), 127'679'344);
  EXPECT_EQ(tiny.mamba.dt_rank, 8);

  // Jamba-Reasoning-3B's layout: period 14, multi-query, tied, dense.
  const ModelSpec reasoning = Read(
      R"({"model_type": "jamba", "hidden_size": 2560, "num_hidden_layers": 28,
          "attn_layer_period": 14, "attn_layer_offset": 7, "num_experts": 1,
          "num_experts_per_tok": 1, "num_attention_heads": 20, "num_key_value_heads": 1,
          "intermediate_size": 8192, "mamba_dt_rank": 160, "tie_word_embeddings": true})");
  EXPECT_THAT(LayersOf(reasoning, SublayerKind::kAttention), ElementsAre(7, 21));
  EXPECT_FALSE(reasoning.Has(SublayerKind::kMoe));
  EXPECT_NEAR(static_cast<double>(ParamTable(reasoning).total()), 3.03e9, 0.01e9);

  const ModelSpec dense = Read(R"({"num_experts": 1})");
  EXPECT_EQ(ParamTable(dense).total(), 9'290'690'432);
  EXPECT_EQ(Read(R"({"num_local_experts": 4})").moe.experts, 4);
  // null means as many key/value heads as heads; missing means JambaConfig's 8.
  EXPECT_EQ(Read(R"({"num_key_value_heads": null})").attention.kv_heads, 32);
  EXPECT_EQ(Read(R"({"num_attention_heads": 16})").attention.kv_heads, 8);
}

TEST(HfConfig, ReadsTheGoldenConfig) {
  std::ifstream file(std::string(KRAIT_TEST_GOLDEN) + "/jamba-micro/config.json");
  std::stringstream text;
  text << file.rdbuf();
  const ModelSpec spec = Read(text.str());
  EXPECT_EQ(spec.d_model, 64);
  EXPECT_EQ(spec.mamba.dt_rank, 4);
  EXPECT_THAT(LayersOf(spec, SublayerKind::kAttention), ElementsAre(2, 6));
  EXPECT_THAT(LayersOf(spec, SublayerKind::kMoe), ElementsAre(1, 3, 5, 7));
}

TEST(HfConfig, LayerTypesMustAgree) {
  const std::string head =
      R"({"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "layer_types": )";
  Read(head + R"(["mamba", "mamba", "full_attention", "mamba"]})");
  Read(head + R"(["linear_attention", "mamba", "full_attention", "mamba"]})");
  EXPECT_THAT(ReadError(head + R"(["mamba", "full_attention", "mamba", "mamba"]})"),
              AllOf(HasSubstr("layer_types"), HasSubstr("layer 1")));
  EXPECT_THAT(ReadError(head + R"(["mamba"]})"), HasSubstr("layer_types"));
}

TEST(HfConfig, RefusesWithPathAndKey) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"model_type": "llama"})", "model_type"},
      {R"({"hidden_act": "gelu"})", "hidden_act"},
      {R"({"attention_dropout": 0.1})", "attention_dropout"},
      {R"({"hidden_size": 4100})", "num_attention_heads"},
      {R"({"hidden_size": -4096})", "hidden_size"},
      {R"({"hidden_size": 4096.5})", "hidden_size"},
      {R"({"hidden_size": "4096"})", "hidden_size"},
      {R"({"hidden_size": 99999999999999999999})", "hidden_size"},
      {R"({"vocab_size": 9223372036854775808})", "vocab_size"},
      {R"({"num_hidden_layers": 2000000000})", "num_hidden_layers"},
      {R"({"num_key_value_heads": 5})", "num_key_value_heads"},
      {R"({"head_dim": 64})", "head_dim"},
      {R"({"attn_layer_offset": 8})", "attn_layer_offset"},
      {R"({"expert_layer_period": 0})", "expert_layer_period"},
      {R"({"num_experts_per_tok": 17})", "num_experts_per_tok"},
      {R"({"num_experts": 4096, "num_hidden_layers": 4096})", "num_experts"},
      {R"({"mamba_dt_rank": "big"})", "mamba_dt_rank"},
      {R"({"mamba_d_conv": 9})", "mamba_d_conv"},
      {R"({"tie_word_embeddings": "yes"})", "tie_word_embeddings"},
      {R"({"rms_norm_eps": -1})", "rms_norm_eps"},
      {R"({"vocab_size": 1, "vocab_size": 2})", "vocab_size"},
      {R"([1])", "object"},
      {R"({"vocab_size": 1)", "JSON"},
      {"", "JSON"},
  };
  for (const auto& [json, key] : cases) {
    EXPECT_THAT(ReadError(json), AllOf(HasSubstr("some/config.json"), HasSubstr(key))) << json;
  }
  // All at once.
  EXPECT_THAT(ReadError(R"({"hidden_act": "gelu", "vocab_size": 0})"),
              AllOf(HasSubstr("hidden_act"), HasSubstr("vocab_size")));
}

ModelSpec WithLayers(const std::string& pattern, int64_t n_layers) {
  ModelSpec spec = JambaSpec({128, 8, 4, 2, 256, 4});
  spec.n_layers = n_layers;
  const auto layers = ParsePattern(pattern, n_layers);
  EXPECT_TRUE(layers.ok());
  spec.sublayers = MakeSublayers(*layers);
  return spec;
}

TEST(HfConfig, RoundTrip) {
  for (const char* pattern : {"m mE m mE a mE m mE", "m", "a", "mE", "aE", "a m m", "m m a",
                              "m m m m m m m a", "mE m m", "m aE m", "a mE", "m m m m m m m aE"}) {
    ModelSpec spec = WithLayers(pattern, 8);
    spec.tie_embeddings = true;
    spec.mamba.proj_bias = true;
    spec.mamba.conv_bias = false;
    spec.mamba.dt_rank = 5;
    spec.norm_eps = 1e-5;
    spec.moe.aux_loss = 0.02;
    const auto json = HfConfigFromSpec(spec);
    ASSERT_TRUE(json.ok()) << pattern << ": " << MessageOf(json.status());
    const ModelSpec back = Read(*json);
    ASSERT_EQ(back.sublayers.size(), spec.sublayers.size());
    for (size_t s = 0; s < spec.sublayers.size(); ++s) {
      EXPECT_EQ(back.sublayers[s].kind, spec.sublayers[s].kind) << pattern << " sublayer " << s;
    }
    EXPECT_EQ(back.tie_embeddings, true);
    EXPECT_EQ(back.norm_eps, 1e-5);
    EXPECT_EQ(back.moe.aux_loss, 0.02);
    const ParamTable want(spec);
    const ParamTable got(back);
    ASSERT_EQ(got.params().size(), want.params().size()) << pattern;
    for (size_t p = 0; p < want.params().size(); ++p) {
      EXPECT_EQ(got.params()[p].name, want.params()[p].name);
      EXPECT_EQ(got.params()[p].shape, want.params()[p].shape);
    }
  }
}

// A model without Mamba has no rank; the file holds one that the reader takes.
TEST(HfConfig, RoundTripWithoutMamba) {
  ModelSpec spec = WithLayers("a aE", 4);
  spec.mamba.dt_rank = 0;
  const auto json = HfConfigFromSpec(spec);
  ASSERT_TRUE(json.ok()) << MessageOf(json.status());
  EXPECT_EQ(Read(*json).mamba.dt_rank, (spec.d_model + 15) / 16);
}

TEST(HfConfig, WrittenKeysAreHuggingFaces) {
  const auto json = HfConfigFromSpec(JambaV01());
  ASSERT_TRUE(json.ok());
  const auto config = nlohmann::json::parse(*json);
  const auto published = nlohmann::json::parse(kJambaV01);
  for (const char* key :
       {"architectures",       "attn_layer_offset",    "attn_layer_period",   "expert_layer_offset",
        "expert_layer_period", "hidden_act",           "hidden_size",         "intermediate_size",
        "mamba_conv_bias",     "mamba_d_conv",         "mamba_d_state",       "mamba_dt_rank",
        "mamba_expand",        "mamba_proj_bias",      "model_type",          "num_attention_heads",
        "num_experts",         "num_experts_per_tok",  "num_hidden_layers",   "num_key_value_heads",
        "rms_norm_eps",        "router_aux_loss_coef", "tie_word_embeddings", "vocab_size",
        "initializer_range"}) {
    EXPECT_EQ(config.at(key), published.at(key)) << key;
  }
}

TEST(HfConfig, RefusesToWriteWhatJambaCannotExpress) {
  EXPECT_THAT(WriteError(WithLayers("a a m m", 8)),
              AllOf(HasSubstr("attention layers 0, 1, 4, 5"), HasSubstr("period")));
  EXPECT_THAT(WriteError(WithLayers("m mE mE m", 8)), HasSubstr("moe layers 1, 2, 5, 6"));
  const auto with = [](auto change) {
    ModelSpec spec = JambaSpec({128, 8, 4, 2, 256, 4});
    change(&spec);
    return WriteError(spec);
  };
  EXPECT_THAT(with([](ModelSpec* s) { s->attention.rope_theta = 1e4; }), HasSubstr("rope_theta"));
  EXPECT_THAT(with([](ModelSpec* s) { s->attention.head_dim = 64; }), HasSubstr("head_dim"));
  EXPECT_THAT(with([](ModelSpec* s) { s->mamba.inner_norms = false; }), HasSubstr("inner_norms"));
  EXPECT_THAT(with([](ModelSpec* s) { s->moe.renormalize = true; }), HasSubstr("renormalize"));
  EXPECT_THAT(with([](ModelSpec* s) { s->moe.d_ff = 128; }), HasSubstr("d_ff"));
  EXPECT_THAT(with([](ModelSpec* s) { s->moe.experts = 1; }), HasSubstr("experts"));
  EXPECT_THAT(with([](ModelSpec* s) {
                s->moe.renormalize = true;
                s->attention.rope_theta = 1e4;
              }),
              AllOf(HasSubstr("renormalize"), HasSubstr("rope_theta")));

  // What does not occur in the layers is no obstacle.
  ModelSpec pure = WithLayers("m", 8);
  pure.attention.rope_theta = 1e4;
  pure.moe.renormalize = true;
  EXPECT_TRUE(HfConfigFromSpec(pure).ok());
  ModelSpec all_moe = WithLayers("mE", 8);
  all_moe.moe.d_ff = 64;
  const auto json = HfConfigFromSpec(all_moe);
  ASSERT_TRUE(json.ok());
  EXPECT_EQ(Read(*json).moe.d_ff, 64);
}

TEST(HfSources, SeparateAndFused) {
  const ModelSpec spec = JambaV01();
  const ParamTable table(spec);
  const auto sources = [&](const std::string& name) {
    const int p = table.Find(name);
    EXPECT_GE(p, 0) << name;
    return HfSources(table.params()[static_cast<size_t>(p)], spec);
  };
  const auto q = sources("model.layers.4.self_attn.q_proj.weight");
  ASSERT_EQ(q.size(), 1u);
  EXPECT_EQ(q[0].name, "model.layers.4.self_attn.q_proj.weight");
  EXPECT_EQ(q[0].begin, 0);

  const std::string experts = "model.layers.1.feed_forward.experts.";
  const int64_t matrix = int64_t{14336} * 4096;
  const auto gate = sources(experts + "12.gate_proj.weight");
  ASSERT_EQ(gate.size(), 2u);
  EXPECT_EQ(gate[0].name, experts + "12.gate_proj.weight");
  EXPECT_EQ(gate[1].name, experts + "gate_up_proj");
  EXPECT_THAT(gate[1].shape, ElementsAre(16, 28672, 4096));
  EXPECT_EQ(gate[1].begin, 24 * matrix);
  EXPECT_EQ(sources(experts + "12.up_proj.weight")[1].begin, 25 * matrix);
  const auto down = sources(experts + "3.down_proj.weight");
  ASSERT_EQ(down.size(), 2u);
  EXPECT_EQ(down[1].name, experts + "down_proj");
  EXPECT_THAT(down[1].shape, ElementsAre(16, 4096, 14336));
  EXPECT_EQ(down[1].begin, 3 * matrix);
  EXPECT_THAT(down[1].name, Not(HasSubstr("weight")));
}

}  // namespace
}  // namespace krait
