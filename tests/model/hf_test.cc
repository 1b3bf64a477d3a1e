#include "model/hf.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/params.h"
#include "model/support/published.h"
#include "paths.h"

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

HfConfig ReadAll(const std::string& json) {
  const auto config = ReadHfConfig(json, "config.json");
  EXPECT_TRUE(config.ok()) << MessageOf(config.status());
  return config.ok() ? *config : HfConfig();
}

ModelSpec Read(const std::string& json) { return ReadAll(json).spec; }

std::string ReadError(const std::string& json) {
  const auto spec = ReadHfConfig(json, "some/config.json");
  EXPECT_FALSE(spec.ok());
  EXPECT_EQ(ExitCodeOf(spec.status()), ExitCode::kConfig);
  return MessageOf(spec.status());
}

std::string WriteError(const ModelSpec& spec) {
  const auto json = WriteHfConfig(spec, "");
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
  EXPECT_EQ(ParamTable(reasoning).total(), 3'029'337'472);

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
      {R"({"head_dim": 0})", "head_dim"},
      {R"({"attn_layer_offset": 8})", "attn_layer_offset"},
      {R"({"expert_layer_period": 0})", "expert_layer_period"},
      {R"({"num_experts_per_tok": 17})", "num_experts_per_tok"},
      {R"({"num_experts": 4096, "num_hidden_layers": 4096})", "num_experts"},
      {R"({"mamba_dt_rank": "big"})", "mamba_dt_rank"},
      {R"({"mamba_d_conv": 9})", "mamba_d_conv"},
      {R"({"tie_word_embeddings": "yes"})", "tie_word_embeddings"},
      {R"({"rms_norm_eps": -1})", "rms_norm_eps"},
      {R"({"rms_norm_eps": 0})", "rms_norm_eps"},
      {R"({"initializer_range": 0.0})", "initializer_range"},
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

// Every published config that is known, against the parameters that transformers counts
// (tests/golden/README.md).
TEST(HfConfig, CountsOfPublishedConfigs) {
  std::ifstream file(KRAIT_TEST_GOLDEN "/hf-folders/published.json");
  int refused = 0;
  for (const nlohmann::json& published : nlohmann::json::parse(file)) {
    const std::string name = published["name"];
    nlohmann::json config = published["config"];
    // Said in words elsewhere; the shape is a Jamba's all the same.
    config.erase("quantization_config");
    config.erase("architectures");
    if (published["parameters"].is_null()) {
      EXPECT_THAT(ReadError(config.dump()), HasSubstr("attn_layer_offset")) << name;
      ++refused;
      continue;
    }
    const HfConfig read = ReadAll(config.dump());
    EXPECT_EQ(ParamTable(read.spec).total(), published["parameters"].get<int64_t>()) << name;
    EXPECT_EQ(read.spec.pad_token, 0) << name;
    EXPECT_TRUE(read.notes.empty()) << name;
    // Written again it is the same model, and nothing is lost beside it.
    const auto written = WriteHfConfig(read.spec, read.kept);
    ASSERT_TRUE(written.ok()) << name;
    const ParamTable before(read.spec), after(Read(*written));
    ASSERT_EQ(after.params().size(), before.params().size()) << name;
    for (size_t p = 0; p < before.params().size(); ++p) {
      EXPECT_EQ(after.params()[p].name, before.params()[p].name);
      EXPECT_EQ(after.params()[p].shape, before.params()[p].shape);
    }
    const auto again = nlohmann::json::parse(*written);
    const auto kept = nlohmann::json::parse(read.kept);
    for (const auto& [key, value] : kept.items()) {
      EXPECT_EQ(again.at(key), value) << name << " " << key;
    }
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits",
                            "max_position_embeddings", "n_ctx", "d_model", "id2label"}) {
      EXPECT_EQ(again.value(key, nlohmann::json()), config.value(key, nlohmann::json()))
          << name << " " << key;
    }
    for (const char* key : {"_name_or_path", "auto_map", "torch_dtype", "transformers_version"}) {
      EXPECT_FALSE(again.contains(key)) << name << " " << key;
    }
  }
  EXPECT_EQ(refused, 1);
}

TEST(HfConfig, HeadDimIsReadAndWritten) {
  const ModelSpec spec = Read(R"({"head_dim": 64, "num_hidden_layers": 8})");
  EXPECT_EQ(spec.attention.head_dim, 64);
  auto json = WriteHfConfig(spec, "");
  ASSERT_TRUE(json.ok());
  EXPECT_EQ(nlohmann::json::parse(*json)["head_dim"], 64);
  EXPECT_EQ(Read(*json).attention.head_dim, 64);
  // Also where the heads do not divide hidden_size; and as d_model / heads nothing is said.
  EXPECT_EQ(Read(R"({"hidden_size": 4100, "head_dim": 64})").attention.head_dim, 64);
  json = WriteHfConfig(Read(R"({"head_dim": 128, "num_hidden_layers": 8})"), "");
  ASSERT_TRUE(json.ok());
  EXPECT_FALSE(nlohmann::json::parse(*json).contains("head_dim"));
  EXPECT_EQ(Read(R"({"head_dim": null})").attention.head_dim, 128);
}

TEST(HfConfig, OtherWordsAndNumbers) {
  for (const char* name : {"silu", "swish", "SiLU", "Swish", "SILU"}) {
    Read(std::string(R"({"hidden_act": ")") + name + "\"}");
  }
  const ModelSpec none = Read(R"({"num_experts": 0, "num_experts_per_tok": 0})");
  EXPECT_EQ(ParamTable(none).total(), 9'290'690'432);
  EXPECT_FALSE(none.Has(SublayerKind::kMoe));
  EXPECT_FALSE(Read(R"({"num_local_experts": 0})").Has(SublayerKind::kMoe));
  // As Python writes them; where a value is used, it has to be finite.
  Read(R"({"time_step_limit": [0.0, Infinity], "x": {"y": NaN}})");
  EXPECT_THAT(ReadError(R"({"rms_norm_eps": Infinity})"), HasSubstr("rms_norm_eps is Infinity"));
  EXPECT_THAT(ReadError(R"({"router_aux_loss_coef": NaN})"), HasSubstr("is NaN"));
  // Of the code before 4.40.
  EXPECT_FALSE(Read(R"({"mamba_inner_layernorms": false})").mamba.inner_norms);
  EXPECT_TRUE(ReadAll(R"({"sliding_window": null})").notes.empty());
  EXPECT_THAT(ReadAll(R"({"sliding_window": 4096})").notes,
              ElementsAre(HasSubstr("sliding_window 4096")));
}

TEST(HfConfig, PadTokenIsTheModelsWhereItDiffers) {
  const auto written = [](const HfConfig& config) {
    const auto json = WriteHfConfig(config.spec, config.kept);
    EXPECT_TRUE(json.ok());
    return nlohmann::json::parse(*json)["pad_token_id"];
  };
  HfConfig config = ReadAll(R"({"num_hidden_layers": 8, "pad_token_id": 3})");
  EXPECT_EQ(config.spec.pad_token, 3);
  EXPECT_EQ(written(config), 3);
  config.spec.pad_token = 5;
  EXPECT_EQ(written(config), 5);
  // A run that trains the row still knows the tokenizer's id.
  config.spec.pad_token = -1;
  EXPECT_EQ(written(config), 3);
  config.kept.clear();
  EXPECT_TRUE(written(config).is_null());
  config.spec.pad_token = 0;
  EXPECT_EQ(written(config), 0);
  EXPECT_EQ(ReadAll(R"({"pad_token_id": -2})").spec.pad_token, 65534);
  EXPECT_THAT(ReadError(R"({"pad_token_id": 65536})"), HasSubstr("pad_token_id"));
  EXPECT_THAT(ReadError(R"({"pad_token_id": [0]})"), HasSubstr("pad_token_id"));
}

TEST(HfNames, OfEveryVersion) {
  const ModelSpec spec = JambaV01();  // experts at odd layers
  const std::pair<const char*, const char*> cases[] = {
      {"model.layers.4.self_attn.q_proj.weight", "model.layers.4.self_attn.q_proj.weight"},
      {"layers.4.self_attn.q_proj.weight", "model.layers.4.self_attn.q_proj.weight"},
      {"embed_tokens.weight", "model.embed_tokens.weight"},
      {"final_layernorm.weight", "model.final_layernorm.weight"},
      {"model.embed_tokens.weight", "model.embed_tokens.weight"},
      {"lm_head.weight", "lm_head.weight"},
      {"model.layers.3.pre_moe_layernorm.weight", "model.layers.3.pre_ff_layernorm.weight"},
      {"model.layers.3.mamba.B_layernorm.weight", "model.layers.3.mamba.b_layernorm.weight"},
      {"layers.3.mamba.C_layernorm.weight", "model.layers.3.mamba.c_layernorm.weight"},
      {"model.layers.3.moe.router.weight", "model.layers.3.feed_forward.router.weight"},
      {"model.layers.3.moe.experts.0.up_proj.weight",
       "model.layers.3.feed_forward.experts.0.up_proj.weight"},
      {"model.layers.2.moe.experts.0.up_proj.weight", "model.layers.2.feed_forward.up_proj.weight"},
      {"model.layers.2.moe.experts.1.up_proj.weight",
       "model.layers.2.feed_forward.experts.1.up_proj.weight"},
      {"model.layers.99.moe.experts.0.up_proj.weight",
       "model.layers.99.feed_forward.experts.0.up_proj.weight"},
      {"model.layers.x.moe.router.weight", "model.layers.x.moe.router.weight"},
      {"model.layers.99999999999999.moe.router.weight",
       "model.layers.99999999999999.moe.router.weight"},
      {"model.layers.", "model.layers."},
      {"", ""}};
  for (const auto& [stored, published] : cases) {
    EXPECT_EQ(PublishedName(stored, spec), published) << stored;
  }
  ModelSpec tied = spec;
  tied.tie_embeddings = true;
  const ParamTable table(tied);
  EXPECT_EQ(HfSources(table.params()[0], tied).back().name, "lm_head.weight");
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
    const auto json = WriteHfConfig(spec, "");
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
  const auto json = WriteHfConfig(spec, "");
  ASSERT_TRUE(json.ok()) << MessageOf(json.status());
  EXPECT_EQ(Read(*json).mamba.dt_rank, (spec.d_model + 15) / 16);
}

TEST(HfConfig, WrittenKeysAreHuggingFaces) {
  const auto json = WriteHfConfig(JambaV01(), "");
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
  EXPECT_TRUE(WriteHfConfig(pure, "").ok());
  ModelSpec all_moe = WithLayers("mE", 8);
  all_moe.moe.d_ff = 64;
  const auto json = WriteHfConfig(all_moe, "");
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
