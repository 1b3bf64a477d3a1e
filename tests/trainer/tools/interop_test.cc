// Hugging Face folders in and out: the same bits, every layout of weight files, refusals.
#include "trainer/tools/interop.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <bit>
#include <filesystem>
#include <fstream>

#include "kernels/transfer.h"
#include "model/hf.h"
#include "model/names.h"
#include "model/params.h"
#include "nlohmann/json.hpp"
#include "paths.h"
#include "support/golden.h"
#include "support/hf_folder.h"
#include "support/tiny_run.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/tools/hf_folder.h"
#include "trainer/tools/inference.h"
#include "trainer/tools/probe.h"

namespace krait {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::ReadTensor;

const std::string kGolden = KRAIT_TEST_GOLDEN "/jamba-micro";

void Ignore(const std::string&) {}

SafetensorsReader Folder(const std::string& path) {
  auto reader = SafetensorsReader::OpenFolder(path);
  if (!reader.ok()) KRAIT_FATAL(MessageOf(reader.status()));
  return *reader;
}

class InteropTest : public ::testing::Test {
 protected:
  InteropTest() { omp_set_num_threads(1); }
  // Imports the folder and returns the checkpoint's path.
  std::string Import(const std::string& hf, const std::string& name) const {
    ImportOptions options;
    options.hf = hf;
    options.out = folder_ / name;
    options.tokenizer = "bytes";
    const absl::Status status = ImportHf(options, Ignore);
    EXPECT_TRUE(status.ok()) << status;
    return options.out;
  }
  ExportOptions Export(const std::string& checkpoint, const std::string& name) const {
    ExportOptions options;
    options.checkpoint = checkpoint;
    options.hf = folder_ / name;
    return options;
  }
  // A folder with the golden config and the given weights.
  void WriteFolder(const std::string& name,
                   const std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>>&
                       tensors) const {
    std::filesystem::create_directories(folder_ / name);
    std::filesystem::copy_file(kGolden + "/config.json", folder_ / (name + "/config.json"));
    std::vector<SafetensorsWriter::Item> items;
    for (const auto& [tensor, content] : tensors) {
      items.push_back({tensor, DType::kF32, content.first});
    }
    auto writer = SafetensorsWriter::Create(folder_ / (name + "/model.safetensors"), items, {});
    KRAIT_CHECK(writer.ok());
    for (const auto& [tensor, content] : tensors) {
      KRAIT_CHECK(
          writer->Write(content.second.data(), static_cast<int64_t>(content.second.size() * 4))
              .ok());
    }
    KRAIT_CHECK(writer->Finish().ok());
  }
  static std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>>
  GoldenTensors() {
    const SafetensorsReader reader = Folder(kGolden);
    std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>> tensors;
    for (const auto& [name, entry] : reader.entries()) {
      const std::vector<double> values = ReadTensor(reader, name);
      tensors[name] = {entry.shape, {values.begin(), values.end()}};
    }
    return tensors;
  }
  void ExpectGoldenWeights(const std::string& folder) const {
    const SafetensorsReader golden = Folder(kGolden), out = Folder(folder);
    EXPECT_EQ(out.entries().size(), golden.entries().size());
    for (const auto& [name, entry] : golden.entries()) {
      ASSERT_TRUE(out.entries().contains(name)) << name;
      EXPECT_EQ(out.entries().at(name).shape, entry.shape) << name;
      EXPECT_EQ(ReadTensor(out, name), ReadTensor(golden, name)) << name;
    }
  }
  TempFolder folder_;
};

TEST_F(InteropTest, ImportAndExportKeepEveryBit) {
  const std::string checkpoint = Import(kGolden, "checkpoint");
  const auto report = ExportHf(Export(checkpoint, "out"), Ignore);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->tensors, 163);
  EXPECT_EQ(report->files, 1);
  ExpectGoldenWeights(folder_ / "out");
  std::ifstream in(folder_ / "out/config.json");
  const auto config = nlohmann::json::parse(in);
  EXPECT_EQ(config["model_type"], "jamba");
  EXPECT_EQ(config["dtype"], "float32");
  EXPECT_EQ(config["attn_layer_offset"], 2);
  EXPECT_TRUE(std::filesystem::exists(folder_ / "out/generation_config.json"));
  // Once more round: the tokenizer's name travels in the weight file.
  ImportOptions again;
  again.hf = folder_ / "out";
  again.out = folder_ / "again";
  ASSERT_TRUE(ImportHf(again, Ignore).ok());
  const auto opened = OpenCheckpoint(again.out);
  ASSERT_TRUE(opened.ok());
  EXPECT_EQ(opened->meta.tokenizer, "bytes");
}

TEST_F(InteropTest, LeftoversOfKilledExportsAreRemovedByTheNextOne) {
  const std::string checkpoint = Import(kGolden, "checkpoint");
  folder_.Write("out.export-1234567/model.safetensors", "half");
  folder_.Write("out.export-mine/model.safetensors", "a user's");
  folder_.Write("out.replaced-1234567/model.safetensors", "perhaps the only one");
  const auto exists = [&](const std::string& name) {
    return std::filesystem::exists(folder_ / name);
  };
  ASSERT_TRUE(ExportHf(Export(checkpoint, "out"), Ignore).ok());
  EXPECT_FALSE(exists("out.export-1234567"));
  EXPECT_TRUE(exists("out.export-mine") && exists("out.replaced-1234567"));
  ExportOptions again = Export(checkpoint, "out");
  again.force = true;
  ASSERT_TRUE(ExportHf(again, Ignore).ok());
  EXPECT_FALSE(exists("out.replaced-1234567"));
  EXPECT_TRUE(exists("out.export-mine"));
}

// In the middle of one, of the same folder: told, and the first one ends well.
TEST_F(InteropTest, ASecondOneOfTheSameFolderAtOnceIsTold) {
  ImportOptions in;
  in.hf = kGolden;
  in.out = folder_ / "checkpoint";
  in.force = true;
  ImportOptions second_in = in;
  second_in.out += "/";
  absl::Status second;
  in.progress = [&](int64_t done, int64_t /*total*/) {
    if (done == 0) second = ImportHf(second_in, Ignore);
    return absl::OkStatus();
  };
  ASSERT_TRUE(ImportHf(in, Ignore).ok());
  EXPECT_EQ(ExitCodeOf(second), ExitCode::kConfig);
  EXPECT_EQ(MessageOf(second), "--out " + second_in.out +
                                   " is being written by another krait, which holds " + in.out +
                                   ".lock: wait for it, or name another folder");
  EXPECT_FALSE(std::filesystem::exists(in.out + ".lock"));

  ExportOptions out = Export(in.out, "out");
  const ExportOptions second_out = out;
  second = absl::OkStatus();
  out.progress = [&](int64_t done, int64_t /*total*/) {
    if (done == 0) second = ExportHf(second_out, Ignore).status();
    return absl::OkStatus();
  };
  ASSERT_TRUE(ExportHf(out, Ignore).ok());
  EXPECT_EQ(ExitCodeOf(second), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(second), HasSubstr("out is being written by another krait"));
  EXPECT_FALSE(std::filesystem::exists(out.hf + ".lock"));
  // What a killed one left is taken over, and goes.
  folder_.Write("left.lock", "");
  EXPECT_TRUE(ExportHf(Export(in.out, "left"), Ignore).ok());
  EXPECT_FALSE(std::filesystem::exists(folder_ / "left.lock"));
}

TEST_F(InteropTest, ProgressCountsElementsAndItsErrorLeavesNothing) {
  ImportOptions in;
  in.hf = kGolden;
  in.out = folder_ / "stopped";
  int64_t calls = 0, last = -1;
  const auto stop_at = [&](int64_t call) {
    calls = 0, last = -1;
    return [&, call](int64_t done, int64_t total) {
      EXPECT_GT(done, last);
      EXPECT_LT(done, total);
      last = done;
      return ++calls == call ? Error(ExitCode::kStopped, "stopped") : absl::OkStatus();
    };
  };
  in.progress = stop_at(100);
  EXPECT_EQ(ExitCodeOf(ImportHf(in, Ignore)), ExitCode::kStopped);
  EXPECT_FALSE(std::filesystem::exists(in.out));
  in.progress = stop_at(-1);
  ASSERT_TRUE(ImportHf(in, Ignore).ok());
  EXPECT_GE(calls, 163);

  ExportOptions out = Export(in.out, "export");
  out.progress = stop_at(100);
  EXPECT_EQ(ExitCodeOf(ExportHf(out, Ignore).status()), ExitCode::kStopped);
  EXPECT_FALSE(std::filesystem::exists(out.hf));
  out.progress = stop_at(-1);
  EXPECT_TRUE(ExportHf(out, Ignore).ok());
}

TEST_F(InteropTest, ProbeOfTheExportIsProbeOfTheOriginal) {
  const auto report = ExportHf(Export(Import(kGolden, "checkpoint"), "out"), Ignore);
  ASSERT_TRUE(report.ok()) << report.status();
  std::string outputs[2];
  for (int i = 0; i < 2; ++i) {
    ProbeOptions options;
    options.hf = i == 0 ? kGolden : folder_ / "out";
    options.batches = kGolden + "/trajectory.safetensors";
    options.out = folder_ / "probe.safetensors";
    options.force = true;
    options.steps = 2;
    ASSERT_TRUE(RunProbe(options).ok());
    outputs[i] = *ReadFile(options.out, 1 << 30, ExitCode::kData);
  }
  EXPECT_EQ(outputs[0], outputs[1]);
}

TEST_F(InteropTest, ShardsWithAnIndex) {
  ExportOptions options = Export(Import(kGolden, "checkpoint"), "out");
  options.shard_bytes = 500'000;
  const auto report = ExportHf(options, Ignore);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_GE(report->files, 5);
  EXPECT_TRUE(std::filesystem::exists(folder_ / "out/model.safetensors.index.json"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/model.safetensors"));
  for (const auto& entry : std::filesystem::directory_iterator(folder_ / "out")) {
    // The data of a shard is below the limit; its header comes on top.
    EXPECT_LT(entry.file_size(), 520'000u) << entry.path();
  }
  ExpectGoldenWeights(folder_ / "out");
  ASSERT_TRUE(ExportHf(Export(Import(folder_ / "out", "second"), "whole"), Ignore).ok());
  ExpectGoldenWeights(folder_ / "whole");
}

TEST_F(InteropTest, FusedExpertsReadLikeSeparateOnes) {
  auto tensors = GoldenTensors();
  constexpr int64_t kExperts = 4, kF = 96, kD = 64;
  for (int layer : {1, 3, 5, 7}) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".feed_forward.experts.";
    std::vector<float> gate_up, down;
    for (int e = 0; e < kExperts; ++e) {
      const std::string expert = prefix + std::to_string(e) + ".";
      for (const char* name : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
        const auto node = tensors.extract(expert + name);
        auto& to = std::string(name) == "down_proj.weight" ? down : gate_up;
        to.insert(to.end(), node.mapped().second.begin(), node.mapped().second.end());
      }
    }
    tensors[prefix + "gate_up_proj"] = {{kExperts, 2 * kF, kD}, gate_up};
    tensors[prefix + "down_proj"] = {{kExperts, kD, kF}, down};
  }
  WriteFolder("fused", tensors);
  ASSERT_TRUE(ExportHf(Export(Import(folder_ / "fused", "checkpoint"), "out"), Ignore).ok());
  ExpectGoldenWeights(folder_ / "out");
}

TEST_F(InteropTest, Bf16RoundsToNearestEven) {
  ExportOptions options = Export(Import(kGolden, "checkpoint"), "out");
  options.dtype = DType::kBF16;
  ASSERT_TRUE(ExportHf(options, Ignore).ok());
  const SafetensorsReader golden = Folder(kGolden), out = Folder(folder_ / "out");
  for (const auto& [name, entry] : golden.entries()) {
    ASSERT_EQ(out.entries().at(name).dtype, DType::kBF16);
    const std::vector<double> exact = ReadTensor(golden, name), rounded = ReadTensor(out, name);
    for (size_t i = 0; i < exact.size(); ++i) {
      // The two neighbours in bf16; the nearer one, on a tie the one with an even last bit.
      const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(exact[i])) & 0xffff0000u;
      const double below = std::bit_cast<float>(bits);
      const double above = std::bit_cast<float>(bits + 0x10000u);
      const double to_below = std::abs(exact[i] - below), to_above = std::abs(above - exact[i]);
      const bool below_even = (bits >> 16 & 1) == 0;
      const bool down = to_below < to_above || (to_below == to_above && below_even);
      ASSERT_EQ(rounded[i], down ? below : above) << name << " " << i << " " << exact[i];
    }
  }
}

// What is stored in bf16 stays so in the checkpoint, and everything reads it.
TEST_F(InteropTest, BF16KeepsItsSize) {
  ExportOptions options = Export(Import(kGolden, "checkpoint"), "half");
  options.dtype = DType::kBF16;
  ASSERT_TRUE(ExportHf(options, Ignore).ok());
  const auto opened = OpenCheckpoint(Import(folder_ / "half", "from_half"));
  ASSERT_TRUE(opened.ok());
  for (const ManifestBox& box : opened->boxes) EXPECT_EQ(box.dtype, DType::kBF16) << box.name;
  EXPECT_TRUE(VerifyCheckpoint(*opened).ok());
  const SafetensorsReader half = Folder(folder_ / "half");
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    ExportOptions again = Export(folder_ / "from_half", dtype == DType::kF32 ? "wide" : "same");
    again.dtype = dtype;
    ASSERT_TRUE(ExportHf(again, Ignore).ok());
    const SafetensorsReader out = Folder(again.hf);
    for (const auto& [name, entry] : half.entries()) {
      ASSERT_EQ(out.entries().at(name).dtype, dtype);
      EXPECT_EQ(ReadTensor(out, name), ReadTensor(half, name)) << name;
    }
  }
  const auto loaded = InferenceModel::Load(
      folder_ / "from_half", [](const std::string&) {}, Placement());
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Tensor head = (*loaded)->weights().Param((*loaded)->weights().table().Find(kHeadName));
  EXPECT_EQ(DownloadFloats(head, Context())[7], ReadTensor(half, kHeadName)[7]);
}

TEST_F(InteropTest, BrokenFoldersAreRefusedAllAtOnce) {
  auto tensors = GoldenTensors();
  tensors.erase("model.layers.0.mamba.D");
  tensors["model.layers.0.mamba.E"] = {{128}, std::vector<float>(128)};
  tensors["lm_head.weight"] = {{64, 256}, std::vector<float>(64 * 256)};
  WriteFolder("broken", tensors);
  ImportOptions options;
  options.hf = folder_ / "broken";
  options.out = folder_ / "checkpoint";
  const absl::Status status = ImportHf(options, Ignore);
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kNoCheckpoint);
  EXPECT_THAT(MessageOf(status),
              AllOf(HasSubstr("lacks model.layers.0.mamba.D"),
                    HasSubstr("holds what the config does not: model.layers.0.mamba.E"),
                    HasSubstr("lm_head.weight has shape [64,256], but the config makes it "
                              "[256,64]")));
  EXPECT_FALSE(std::filesystem::exists(options.out));

  options.hf = folder_ / "none";
  EXPECT_EQ(ExitCodeOf(ImportHf(options, Ignore)), ExitCode::kNoCheckpoint);
  options.hf = kGolden;
  options.out = folder_.Write("file", "in the way");
  EXPECT_EQ(ExitCodeOf(ImportHf(options, Ignore)), ExitCode::kConfig);
}

TEST_F(InteropTest, ExportRefusesWhatTransformersCannotExpress) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10", "model.attention.rope_theta=10000"}).code, 0);
  const auto refused = ExportHf(Export(tiny / "run", "out"), Ignore);
  EXPECT_EQ(ExitCodeOf(refused.status()), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(refused.status()), HasSubstr("rope_theta"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out"));

  folder_.Write("full/file", "content");
  const auto full = ExportHf(Export(Import(kGolden, "checkpoint"), "full"), Ignore);
  EXPECT_EQ(ExitCodeOf(full.status()), ExitCode::kConfig);
  EXPECT_EQ(ExitCodeOf(ExportHf(Export(tiny / "none", "out"), Ignore).status()),
            ExitCode::kNoCheckpoint);
}

TEST_F(InteropTest, TrainedModelTravelsThroughTheCommandLine) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("run", {"train.steps=10"}).code, 0);
  ProcessResult result = TinyRun::Krait({"export", tiny / "run", "--hf", tiny / "hf"});
  ASSERT_EQ(result.code, 0) << result.err;
  result = TinyRun::Krait({"import", "--hf", tiny / "hf", "--out", tiny / "back"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto words = [&](const std::string& checkpoint) {
    return std::vector<std::string>{"generate", checkpoint, "--prompt", "scan", "--tokens", "20"};
  };
  const ProcessResult before = TinyRun::Krait(words(tiny / "run"));
  const ProcessResult after = TinyRun::Krait(words(tiny / "back"));
  EXPECT_EQ(after.code, 0) << after.err;
  EXPECT_EQ(before.out, after.out);
  result = tiny.Train("next", {"train.steps=10", "--init", tiny / "back"});
  EXPECT_EQ(result.code, 0) << result.err;
}

// What transformers stops at outlives the way through a checkpoint, a run that starts from it, and
// the run's resume.
TEST_F(InteropTest, ImportedTrainedAndExportedItStillStopsWhereItStopped) {
  const TinyRun tiny;
  ASSERT_EQ(tiny.Train("first", {"train.steps=10"}).code, 0);
  ASSERT_EQ(TinyRun::Krait({"export", tiny / "first", "--hf", tiny / "hf"}).code, 0);
  testing::EditJson(tiny / "hf/config.json", [](nlohmann::json* json) {
    (*json)["bos_token_id"] = 1;
    (*json)["eos_token_id"] = {105, 110};
    (*json)["pad_token_id"] = 0;
    (*json)["max_position_embeddings"] = 2048;
    (*json)["output_router_logits"] = true;
  });
  testing::EditJson(tiny / "hf/generation_config.json", [](nlohmann::json* json) {
    *json = {{"eos_token_id", {105, 110}}, {"do_sample", true}, {"temperature", 0.6}};
  });
  const nlohmann::json before = testing::ReadJson(tiny / "hf/config.json");
  ProcessResult result =
      TinyRun::Krait({"import", "--hf", tiny / "hf", "--out", tiny / "imported"});
  ASSERT_EQ(result.code, 0) << result.err;
  result = tiny.Train("run", {"train.steps=10", "checkpoint.every=5", "model.pad_token=0", "--init",
                              tiny / "imported"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("model.pad_token 0: its embedding row gets no gradient"));
  EXPECT_THAT(result.out, Not(HasSubstr("none here")));
  std::filesystem::remove_all(tiny / "run/checkpoints/step-00000010");
  result = tiny.Train("run", {"train.steps=10", "checkpoint.every=5", "model.pad_token=0",
                              "--resume", tiny / "run/checkpoints/step-00000005"});
  ASSERT_EQ(result.code, 0) << result.err;
  result = TinyRun::Krait({"export", tiny / "run", "--hf", tiny / "out", "--shard-size", "8KiB"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(testing::ReadJson(tiny / "out/config.json"), before);
  EXPECT_EQ(testing::ReadJson(tiny / "out/generation_config.json"),
            testing::ReadJson(tiny / "hf/generation_config.json"));
  // Trained all the same.
  const SafetensorsReader now = Folder(tiny / "out"), then = Folder(tiny / "hf");
  EXPECT_NE(ReadTensor(now, "lm_head.weight"), ReadTensor(then, "lm_head.weight"));

  // A run that does not follow the padding row is told.
  result = tiny.Train("other", {"train.steps=10", "--init", tiny / "imported"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("model.pad_token: 0 there, none here"));
}

// A model of 320 MiB through both directions.
TEST_F(InteropTest, MemoryIsThatOfAPiece) {
  constexpr int64_t kVocab = 81920, kWidth = 1024;
  auto config = testing::ReadJson(kGolden + "/config.json");
  for (const auto& [key, value] : std::map<std::string, int64_t>{{"vocab_size", kVocab},
                                                                 {"hidden_size", kWidth},
                                                                 {"intermediate_size", 1},
                                                                 {"num_hidden_layers", 1},
                                                                 {"num_experts", 1},
                                                                 {"mamba_expand", 1},
                                                                 {"attn_layer_period", 2},
                                                                 {"attn_layer_offset", 1},
                                                                 {"mamba_dt_rank", 1},
                                                                 {"mamba_d_state", 1}}) {
    config[key] = value;
  }
  config["tie_word_embeddings"] = true;
  folder_.Write("hf/config.json", config.dump());
  const auto spec = ReadHfConfig(config.dump(), "config.json");
  ASSERT_TRUE(spec.ok()) << spec.status();
  const ParamTable table(spec->spec);
  std::vector<SafetensorsWriter::Item> items;
  for (const Param& param : table.params()) items.push_back({param.name, DType::kF32, param.shape});
  {
    auto writer = SafetensorsWriter::Create(folder_ / "hf/model.safetensors", items, {});
    ASSERT_TRUE(writer.ok());
    std::vector<float> values(1 << 20, 0.25f);
    for (const Param& param : table.params()) {
      for (int64_t at = 0; at < param.numel(); at += 1 << 20) {
        const int64_t n = std::min<int64_t>(1 << 20, param.numel() - at);
        values[0] = static_cast<float>(at >> 20);
        ASSERT_TRUE(writer->Write(values.data(), 4 * n).ok());
      }
    }
    ASSERT_TRUE(writer->Finish().ok());
  }
  const int64_t bytes = 4 * table.total();
  ASSERT_GT(bytes, 320 << 20);
#ifdef KRAIT_SANITIZE  // its shadow takes an eighth, its libraries the rest
  constexpr int64_t most = 192 << 20;
#else
  constexpr int64_t most = 128 << 20;
#endif
  ProcessResult result =
      TinyRun::Krait({"import", "--hf", folder_ / "hf", "--out", folder_ / "checkpoint"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_LT(result.peak_bytes, most);
  result = TinyRun::Krait({"export", folder_ / "checkpoint", "--hf", folder_ / "out"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_LT(result.peak_bytes, most);
  const SafetensorsReader out = Folder(folder_ / "out");
  for (const int64_t piece : {0, 17, 79}) {
    float value = -1;
    ASSERT_TRUE(out.ReadF32(kEmbeddingName, piece << 20, 1, &value).ok());
    EXPECT_EQ(value, static_cast<float>(piece));
  }
}

}  // namespace
}  // namespace krait
