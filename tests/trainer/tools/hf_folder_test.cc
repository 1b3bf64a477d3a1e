// Hugging Face folders as they are found: what is read, by value, and what is refused.
#include "trainer/tools/hf_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <filesystem>

#include "model/names.h"
#include "paths.h"
#include "support/golden.h"
#include "support/gradcheck.h"
#include "support/hf_folder.h"
#include "support/temp_folder.h"
#include "trainer/tools/interop.h"
#include "trainer/tools/probe.h"

namespace krait {
namespace {

using ::testing::AllOf;
using testing::EditJson;
using testing::EditTensors;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::RawFloats;
using testing::RawTensor;
using testing::RawTensors;
using testing::ReadJson;
using testing::ReadTensor;
using testing::RelativeError;
using testing::RenameTensors;

const std::string kGolden = KRAIT_TEST_GOLDEN "/hf-folders/";
constexpr double kForward = 2e-6;
// One of the small models is worse conditioned: transformers' own fp32 logits are 1.06e-6 from
// those in double. Ten times that, as for other golden values.
constexpr double kForwardOfOtherHead = 1.06e-5;
constexpr double kGradient = 2e-5;

SafetensorsReader File(const std::string& path) {
  auto reader = SafetensorsReader::OpenFile(path);
  if (!reader.ok()) KRAIT_FATAL(MessageOf(reader.status()));
  return *reader;
}

class HfFolderTest : public ::testing::Test {
 protected:
  HfFolderTest() { omp_set_num_threads(1); }
  // A copy to edit of a golden folder.
  std::string Copy(const std::string& golden, const std::string& name = "hf") const {
    const std::string path = folder_ / name;
    std::filesystem::remove_all(path);
    std::filesystem::copy(kGolden + golden, path);
    std::filesystem::rename(path + "/expect.safetensors", folder_ / "expect.safetensors");
    return path;
  }
  // krait probe of a folder over the inputs that `golden` has expectations for; the notes.
  std::vector<std::string> Probe(const std::string& hf, const std::string& golden) {
    ProbeOptions options;
    options.hf = hf;
    options.batches = kGolden + golden + "/expect.safetensors";
    options.out = folder_ / "probe.safetensors";
    std::filesystem::remove(options.out);
    std::vector<std::string> notes;
    const absl::Status status =
        RunProbe(options, [&](const std::string& note) { notes.push_back(note); });
    EXPECT_TRUE(status.ok()) << status;
    return notes;
  }
  void ExpectLogits(const std::string& golden) const {
    EXPECT_LE(RelativeError(ReadTensor(File(folder_ / "probe.safetensors"), "logits"),
                            ReadTensor(File(kGolden + golden + "/expect.safetensors"), "logits")),
              golden == "tied_head_other" ? kForwardOfOtherHead : kForward)
        << golden;
  }
  // Imports a folder and exports it again; the path of the new folder.
  std::string Travel(const std::string& hf, int64_t shard_bytes = 1 << 30) const {
    for (const char* name : {"checkpoint", "travelled"}) {
      std::filesystem::remove_all(folder_ / name);
    }
    ImportOptions in;
    in.hf = hf;
    in.out = folder_ / "checkpoint";
    absl::Status status = ImportHf(in, [](const std::string&) {});
    EXPECT_TRUE(status.ok()) << status;
    ExportOptions out;
    out.checkpoint = in.out;
    out.hf = folder_ / "travelled";
    out.shard_bytes = shard_bytes;
    status = ExportHf(out, [](const std::string&) {}).status();
    EXPECT_TRUE(status.ok()) << status;
    return out.hf;
  }
  // What import says of a folder that it does not take, in at most `lines` lines.
  std::string Refused(const std::string& hf, ptrdiff_t lines = 1) const {
    ImportOptions in;
    in.hf = hf;
    in.out = folder_ / "refused";
    const absl::Status status = ImportHf(in, [](const std::string&) {});
    EXPECT_FALSE(status.ok());
    const std::string message = MessageOf(status);
    EXPECT_LT(std::count(message.begin(), message.end(), '\n'), lines) << message;
    EXPECT_FALSE(std::filesystem::exists(in.out));
    return message;
  }
  TempFolder folder_;
};

TEST_F(HfFolderTest, LogitsOfTransformers) {
  for (const char* golden : {"head_dim", "fp16", "legacy_names", "base_model_tied",
                             "tied_head_other", "padding_row", "padding_row_tied"}) {
    Probe(kGolden + golden, golden);
    ExpectLogits(golden);
    Probe(Travel(kGolden + golden), golden);
    ExpectLogits(golden);
  }
}

TEST_F(HfFolderTest, PaddingRowGetsTheGradientOfTransformers) {
  for (const std::string golden : {"padding_row", "padding_row_tied"}) {
    Probe(kGolden + golden, golden);
    const std::string grad = "grad.model.embed_tokens.weight";
    const auto want = ReadTensor(File(kGolden + golden + "/expect.safetensors"), grad);
    const auto got = ReadTensor(File(folder_ / "probe.safetensors"), grad);
    EXPECT_LE(RelativeError(got, want), kGradient) << golden;
    // The row of id 3, in eight columns.
    const bool zero =
        std::all_of(got.begin() + 24, got.begin() + 32, [](double g) { return g == 0; });
    EXPECT_EQ(zero, golden == "padding_row");
  }
}

TEST_F(HfFolderTest, OtherHeadOfATiedModelUntiesIt) {
  const std::string golden = "tied_head_other";
  EXPECT_THAT(Probe(kGolden + golden, golden),
              ElementsAre(AllOf(HasSubstr("lm_head.weight"), HasSubstr("untied"))));
  const std::string out = Travel(kGolden + golden);
  EXPECT_EQ(ReadJson(out + "/config.json")["tie_word_embeddings"], false);
  EXPECT_TRUE(File(out + "/model.safetensors").entries().contains(kHeadName));
}

TEST_F(HfFolderTest, TiedMatrixInEveryForm) {
  const std::string golden = "padding_row_tied", hf = Copy(golden);
  const auto logits = [&] {
    Probe(hf, golden);
    return ReadTensor(File(folder_ / "probe.safetensors"), "logits");
  };
  const auto once = logits();
  EditTensors(hf, [](RawTensors* t) { (*t)[kHeadName] = t->at(kEmbeddingName); });
  EXPECT_EQ(logits(), once);
  EXPECT_THAT(Probe(hf, golden), IsEmpty());
  EXPECT_EQ(ReadJson(Travel(hf) + "/config.json")["tie_word_embeddings"], true);
  // Under the head's name alone, also of a base model.
  EditTensors(hf, [](RawTensors* t) { t->erase(kEmbeddingName); });
  EXPECT_EQ(logits(), once);
  RenameTensors(hf, [](const std::string& name) {
    return name.starts_with("model.") ? name.substr(6) : name;
  });
  EXPECT_EQ(logits(), once);
  Probe(Travel(hf), golden);
  ExpectLogits(golden);
  // Equal numbers in another dtype are equal.
  EditTensors(hf, [](RawTensors* t) {
    const RawTensor head = t->at(kHeadName);
    std::string wide;
    for (size_t i = 0; i < head.bytes.size(); i += 4) {
      float value;
      std::memcpy(&value, &head.bytes[i], 4);
      const double doubled = value;
      wide.append(reinterpret_cast<const char*>(&doubled), 8);
    }
    (*t)["embed_tokens.weight"] = {"F64", head.shape, wide};
  });
  EXPECT_EQ(logits(), once);
  EXPECT_THAT(Probe(hf, golden), IsEmpty());

  EditTensors(hf, [](RawTensors* t) {
    t->at(kHeadName) = RawFloats({41, 8}, std::vector<float>(41 * 8));
  });
  EXPECT_THAT(Refused(hf),
              AllOf(HasSubstr("lm_head.weight has shape [41,8]"), HasSubstr("[40,8]")));
}

TEST_F(HfFolderTest, BuffersArePassedOverWithOneLine) {
  const std::string golden = "padding_row", hf = Copy(golden);
  EditTensors(hf, [](RawTensors* t) {
    (*t)["model.layers.2.self_attn.rotary_emb.inv_freq"] = RawFloats({2}, {1, 0.5});
    (*t)["model.rotary_emb.original_inv_freq"] = RawFloats({2}, {1, 0.5});
    (*t)["model.position_ids"] = {"I64", {1}, std::string(8, '\0')};
    (*t)["model.layers.2.self_attn.causal_mask"] = {"BOOL", {3}, std::string(3, '\1')};
    (*t)["model.half.inv_freq"] = {"F8_E4M3", {3}, std::string(3, '\1')};
  });
  EXPECT_THAT(Probe(hf, golden), ElementsAre(AllOf(HasSubstr("5 buffers"),
                                                   HasSubstr("self_attn.rotary_emb.inv_freq"))));
  ExpectLogits(golden);
  EXPECT_EQ(File(Travel(hf) + "/model.safetensors").entries().size(),
            File(kGolden + golden + "/model.safetensors").entries().size());
}

TEST_F(HfFolderTest, WhatPythonCallsJson) {
  const std::string golden = "padding_row", hf = Copy(golden);
  for (const char* name : {"/config.json", "/generation_config.json"}) {
    std::string text = testing::ReadBytes(hf + name);
    text.insert(text.rfind('}'),
                R"(, "time_step_limit": [0.0, Infinity], "floor": -Infinity, "none": NaN,
                   "Infinity": "NaN, -Infinity and \" NaN")");
    testing::WriteBytes(hf + name, text);
  }
  Probe(hf, golden);
  ExpectLogits(golden);
  // As it was, to be read by Python.
  const std::string out = Travel(hf);
  for (const char* name : {"/config.json", "/generation_config.json"}) {
    const std::string text = testing::ReadBytes(out + name);
    EXPECT_THAT(text, HasSubstr("    Infinity\n")) << name;
    EXPECT_THAT(text, HasSubstr("\"floor\": -Infinity")) << name;
    EXPECT_THAT(text, HasSubstr("\"none\": NaN")) << name;
    EXPECT_THAT(text, HasSubstr(R"("Infinity": "NaN, -Infinity and \" NaN")")) << name;
  }
}

TEST_F(HfFolderTest, OtherWordsForTheSame) {
  const std::string golden = "padding_row", hf = Copy(golden);
  for (const char* name : {"silu", "swish", "SiLU", "Swish"}) {
    EditJson(hf + "/config.json", [&](nlohmann::json* json) { (*json)["hidden_act"] = name; });
    Probe(hf, golden);
    ExpectLogits(golden);
  }
  EditJson(hf + "/config.json", [&](nlohmann::json* json) {
    (*json)["layers_block_type"] = {"mamba", "mamba", "attention"};
    (*json)["layers_num_experts"] = {1, 2, 1};
    (*json)["num_local_experts"] = 2;
    (*json)["architectures"] = nullptr;
    (*json)["quantization_config"] = nullptr;
  });
  Probe(hf, golden);
  ExpectLogits(golden);
}

TEST_F(HfFolderTest, NoExpertsIsDense) {
  const std::string hf = Copy("legacy_names");
  // The MoE layer's first expert as its MLP: in the old code a layer of one expert has no router.
  EditTensors(hf, [](RawTensors* t) {
    std::erase_if(*t, [](const auto& item) {
      return item.first.find("moe.experts.1.") != std::string::npos ||
             item.first.ends_with("moe.router.weight");
    });
  });
  std::vector<double> logits;
  for (const int experts : {1, 0}) {
    for (const int chosen : {1, 0}) {
      EditJson(hf + "/config.json", [&](nlohmann::json* json) {
        (*json)["num_experts"] = experts;
        (*json)["num_experts_per_tok"] = chosen;
      });
      Probe(hf, "legacy_names");
      const auto now = ReadTensor(File(folder_ / "probe.safetensors"), "logits");
      if (logits.empty()) logits = now;
      EXPECT_EQ(now, logits);
    }
  }
  const std::string out = Travel(hf);
  EXPECT_EQ(ReadJson(out + "/config.json")["num_experts"], 1);
  Probe(out, "legacy_names");
  EXPECT_EQ(ReadTensor(File(folder_ / "probe.safetensors"), "logits"), logits);
}

TEST_F(HfFolderTest, WhatItSaysBeyondTheModelSurvives) {
  const std::string hf = Copy("padding_row");
  EditJson(hf + "/config.json", [](nlohmann::json* json) {
    (*json)["use_mamba_kernels"] = true;
    (*json)["output_router_logits"] = true;
    (*json)["sep_token_id"] = 5;
    (*json)["_name_or_path"] = "somewhere";
  });
  EditJson(hf + "/generation_config.json", [](nlohmann::json* json) {
    (*json)["temperature"] = 0.4;
    (*json)["eos_token_id"] = {2, 7, 9};
  });
  const nlohmann::json before = ReadJson(hf + "/config.json");
  for (const int64_t shard_bytes : {int64_t{1} << 30, int64_t{4000}}) {
    const std::string out = Travel(hf, shard_bytes);
    const nlohmann::json config = ReadJson(out + "/config.json");
    for (const char* key :
         {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "max_position_embeddings",
          "output_router_logits", "use_mamba_kernels", "use_cache"}) {
      EXPECT_EQ(config[key], before[key]) << key;
    }
    EXPECT_FALSE(config.contains("_name_or_path"));
    EXPECT_EQ(ReadJson(out + "/generation_config.json"), ReadJson(hf + "/generation_config.json"));
    // From shards as from one file, and so once more.
    const auto again = HfFolder::Open(out);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(again->spec().pad_token, 3);
    EXPECT_EQ(nlohmann::json::parse(again->kept())["eos_token_id"], before["eos_token_id"]);
  }
}

TEST_F(HfFolderTest, WhatItDoesNotSay) {
  const std::string hf = Copy("padding_row");
  std::filesystem::remove(hf + "/generation_config.json");
  EditJson(hf + "/config.json", [](nlohmann::json* json) {
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id", "use_mamba_kernels",
                            "output_router_logits", "max_position_embeddings"}) {
      json->erase(key);
    }
  });
  // JambaConfig's own defaults hold.
  std::string out = Travel(hf);
  nlohmann::json config = ReadJson(out + "/config.json");
  EXPECT_EQ(config["pad_token_id"], 0);
  EXPECT_EQ(config["bos_token_id"], 1);
  EXPECT_EQ(config["eos_token_id"], 2);
  // With the default, true, transformers 4.x needs a GPU and the mamba kernels.
  EXPECT_EQ(config["use_mamba_kernels"], false);
  EXPECT_EQ(config["output_router_logits"], false);
  EXPECT_FALSE(config.contains("max_position_embeddings"));
  EXPECT_EQ(ReadJson(out + "/generation_config.json")["eos_token_id"], 2);
  EXPECT_EQ(HfFolder::Open(hf)->spec().pad_token, 0);

  EditJson(hf + "/config.json", [](nlohmann::json* json) {
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) (*json)[key] = nullptr;
  });
  config = ReadJson(Travel(hf) + "/config.json");
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
    EXPECT_TRUE(config.at(key).is_null()) << key;
  }
  EXPECT_EQ(HfFolder::Open(hf)->spec().pad_token, -1);

  // As nn.Embedding counts: -1 is the last row.
  EditJson(hf + "/config.json", [](nlohmann::json* json) { (*json)["pad_token_id"] = -1; });
  EXPECT_EQ(HfFolder::Open(hf)->spec().pad_token, 39);
  EXPECT_EQ(ReadJson(Travel(hf) + "/config.json")["pad_token_id"], -1);
  EditJson(hf + "/config.json", [](nlohmann::json* json) { (*json)["pad_token_id"] = 40; });
  EXPECT_THAT(Refused(hf), AllOf(HasSubstr("pad_token_id"), HasSubstr("40")));
}

TEST_F(HfFolderTest, QuantisedWeightsAreRefusedByTheirMethod) {
  const std::string hf = Copy("padding_row");
  const std::pair<const char*, std::vector<std::string>> cases[] = {
      {R"({"quant_method": "compressed-tensors", "format": "float-quantized"})",
       {"compressed-tensors", "float-quantized"}},
      {R"({"quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false})",
       {"bitsandbytes, 4 bit"}},
      {R"({"load_in_8bit": true})", {"bitsandbytes, 8 bit"}},
      {R"({"quant_method": "gptq", "bits": 4})", {"gptq, 4 bit"}},
      {R"({"quant_method": "fp8", "fmt": "e4m3"})", {"fp8"}},
      {R"({"weight_block_size": [128, 128]})", {"quantization_config"}}};
  for (const auto& [quantised, parts] : cases) {
    EditJson(hf + "/config.json", [&](nlohmann::json* json) {
      (*json)["quantization_config"] = nlohmann::json::parse(quantised);
      (*json)["hidden_act"] = "gelu";  // not worth a word beside it
    });
    const std::string message = Refused(hf);
    for (const std::string& part : parts) EXPECT_THAT(message, HasSubstr(part));
    EXPECT_THAT(message, AllOf(HasSubstr("quantised"), HasSubstr(hf + "/config.json")));
  }
}

TEST_F(HfFolderTest, QuantisedWeightsWithoutAWordInTheConfig) {
  const std::string q = "model.layers.2.self_attn.q_proj.weight";
  const std::function<void(RawTensors*)> edits[] = {
      // FP8 with its scales; 4 and 8 bits of bitsandbytes; GPTQ.
      [&](RawTensors* t) {
        t->at(q) = {"F8_E4M3", {8, 8}, std::string(64, '\1')};
        (*t)[q + "_scale"] = RawFloats({1}, {0.5});
      },
      [&](RawTensors* t) {
        for (auto& [name, tensor] : *t) {
          if (tensor.shape.size() == 2) tensor = {"U8", {5, 1}, std::string(5, '\1')};
        }
        (*t)[q + ".absmax"] = {"U8", {1}, "x"};
        (*t)[q + ".quant_state.bitsandbytes__nf4"] = {"U8", {1}, "x"};
      },
      [&](RawTensors* t) {
        t->at(q) = {"I8", {8, 8}, std::string(64, '\1')};
      },
      [&](RawTensors* t) {
        t->erase(q);
        (*t)["model.layers.2.self_attn.q_proj.qweight"] = {"I32", {1, 8}, std::string(32, '\1')};
        (*t)["model.layers.2.self_attn.q_proj.scales"] = {"F16", {1, 8}, std::string(16, '\1')};
      }};
  for (const auto& edit : edits) {
    const std::string hf = Copy("padding_row");
    EditTensors(hf, edit);
    EXPECT_THAT(Refused(hf), AllOf(HasSubstr("quantised"), HasSubstr("model.layers.")));
  }
}

TEST_F(HfFolderTest, WrappersAreNamed) {
  const std::pair<std::string, std::string> cases[] = {
      {"_orig_mod.", "torch.compile"},    {"module.", "DistributedDataParallel"},
      {"base_model.model.", "PEFT"},      {"module._orig_mod.", "torch.compile"},
      {"transformer.", "`transformer.`"}, {"model.", "`model.` before all names"}};
  for (const char* golden : {"padding_row", "padding_row_tied", "base_model_tied"}) {
    for (const auto& [prefix, who] : cases) {
      if (prefix == "model." && std::string(golden) == "base_model_tied") continue;
      const std::string hf = Copy(golden);
      RenameTensors(hf, [&](const std::string& name) { return prefix + name; });
      EXPECT_THAT(Refused(hf), AllOf(HasSubstr("`" + prefix + "`"), HasSubstr(who))) << golden;
    }
  }
  const std::string hf = Copy("padding_row");
  RenameTensors(hf, [](const std::string& name) {
    const size_t layer = name.find("layers.1.");
    return layer == std::string::npos ? name : std::string(name).insert(layer + 9, "_orig_mod.");
  });
  EXPECT_THAT(Refused(hf), AllOf(HasSubstr("`_orig_mod.`"), HasSubstr("torch.compile")));
}

TEST_F(HfFolderTest, WhatLiesThereInsteadIsNamed) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"pytorch_model.bin"}, "pytorch_model.bin"},
      {{"pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"}, "pytorch_model-00001"},
      {{"model.fp16.safetensors"}, "a variant"},
      {{"model.safetensors.index.bf16.json", "model.bf16-00001-of-00002.safetensors"}, "a variant"},
      {{"adapter_model.safetensors", "adapter_config.json"}, "an adapter"},
      {{"adapter_model.bin"}, "an adapter"},
      {{"model-00001-of-00002.safetensors"}, "model.safetensors.index.json"},
      {{"weights.safetensors"}, "weights.safetensors"},
      {{"jamba.Q4_K_M.gguf"}, "jamba.Q4_K_M.gguf"},
      {{"README.md"}, "neither model.safetensors nor"}};
  for (const bool with_config : {true, false}) {
    for (const auto& [files, what] : cases) {
      const std::string hf = Copy("padding_row");
      std::filesystem::remove(hf + "/model.safetensors");
      if (!with_config) std::filesystem::remove(hf + "/config.json");
      for (const std::string& file : files) testing::WriteBytes(hf + "/" + file, "x");
      EXPECT_THAT(Refused(hf), AllOf(HasSubstr(hf), HasSubstr(what)));
    }
  }
  EXPECT_THAT(Refused(folder_ / "none"), HasSubstr("no such folder"));
  EXPECT_THAT(Refused(kGolden + "padding_row/config.json"), HasSubstr("is no folder"));
  const std::string hf = Copy("padding_row");
  testing::WriteBytes(hf + "/model.safetensors",
                      "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n");
  EXPECT_THAT(Refused(hf), HasSubstr("Git LFS pointer"));
  std::filesystem::remove(hf + "/config.json");
  EXPECT_THAT(Refused(hf), HasSubstr("config.json"));
}

TEST_F(HfFolderTest, ModelsOfAnotherKind) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"architectures": ["JambaForSequenceClassification"]})",
       "JambaForSequenceClassification"},
      {R"({"architectures": ["LlamaForCausalLM"]})", "LlamaForCausalLM"},
      {R"({"architectures": 3})", "architectures"},
      {R"({"layers_block_type": ["attention", "mamba", "mamba"]})", "layers_block_type"},
      {R"({"layers_block_type": ["mamba", "mamba"]})", "layers_block_type"},
      {R"({"layers_num_experts": [2, 2, 1]})", "layers_num_experts"},
      {R"({"num_local_experts": 8})", "num_local_experts"},
      {R"({"tie_word_embeddings": "maybe"})", "tie_word_embeddings"}};
  for (const auto& [members, key] : cases) {
    const std::string hf = Copy("padding_row");
    EditJson(hf + "/config.json",
             [&](nlohmann::json* json) { json->update(nlohmann::json::parse(members)); });
    EXPECT_THAT(Refused(hf), AllOf(HasSubstr(hf + "/config.json"), HasSubstr(key)));
  }
  // A base model that is not tied has no head; a weight under two names.
  std::string hf = Copy("padding_row");
  EditTensors(hf, [](RawTensors* t) { t->erase(kHeadName); });
  EXPECT_THAT(Refused(hf), AllOf(HasSubstr("lm_head.weight"), HasSubstr("tie_word_embeddings")));
  hf = Copy("padding_row");
  EditTensors(hf, [](RawTensors* t) {
    (*t)["layers.0.mamba.C_layernorm.weight"] = t->at("model.layers.0.mamba.c_layernorm.weight");
  });
  EXPECT_THAT(Refused(hf), HasSubstr("two names"));
}

TEST_F(HfFolderTest, SizesAreComparedBeforeMemoryIsAskedFor) {
  const std::string hf = Copy("padding_row");
  EditJson(hf + "/config.json", [](nlohmann::json* json) {
    (*json)["hidden_size"] = 8192;
    (*json)["intermediate_size"] = 24576;
    (*json)["num_hidden_layers"] = 72;
  });
  EXPECT_THAT(Refused(hf, 2), AllOf(HasSubstr("lacks model.layers.3."),
                                    HasSubstr("has shape [40,8]"), HasSubstr("more")));
  ProbeOptions options;
  options.hf = hf;
  options.batches = kGolden + "padding_row/expect.safetensors";
  options.out = folder_ / "probe.safetensors";
  EXPECT_EQ(ExitCodeOf(RunProbe(options)), ExitCode::kNoCheckpoint);
}

}  // namespace
}  // namespace krait
