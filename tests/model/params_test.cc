#include "model/params.h"

#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/support/published.h"

namespace krait {
namespace {

using ::testing::ElementsAre;

const Param& Get(const ParamTable& table, const std::string& name) {
  const int index = table.Find(name);
  EXPECT_GE(index, 0) << name;
  return table.params()[static_cast<size_t>(index < 0 ? 0 : index)];
}

TEST(ParamTable, CountsOfPublishedModels) {
  struct Case {
    ModelSpec spec;
    int64_t total, active, tensors;
  };
  // Totals follow from the published shapes; v0.1 has 3 + 28*14 + 4*6 + 16*3 + 16*49 tensors.
  const Case cases[] = {
      {JambaV01(), 51'570'323'328, 12'110'311'296, 1251},
      {Jamba15Large(), 398'555'145'696, 94'149'338'592, -1},
      {JambaSpec({4096, 8, 32, 8, 14336, 16}), 13'295'237'088, -1, -1},  // jamba-small-v1
      {JambaSpec({4096, 32, 32, 8, 14336, 1, 65536, 8, 0}), 9'290'690'432, 9'290'690'432, -1},
      {JambaSpec({128, 8, 2, 1, 14336, 4, 65536, 4}), 127'679'344, -1, -1},  // Jamba-tiny-random
  };
  for (const Case& c : cases) {
    const ParamTable table(c.spec);
    EXPECT_EQ(table.total(), c.total);
    if (c.active >= 0) {
      EXPECT_EQ(table.active(c.spec), c.active);
    }
    if (c.tensors >= 0) {
      EXPECT_EQ(static_cast<int64_t>(table.params().size()), c.tensors);
    }
  }
  const ModelSpec spec = Jamba3b();
  const ParamTable table(spec);
  EXPECT_NEAR(static_cast<double>(table.total()), 3.151e9, 0.0005e9);
  EXPECT_NEAR(static_cast<double>(table.active(spec)), 1.490e9, 0.0005e9);
}

TEST(Flops, ReferenceFigures) {
  EXPECT_NEAR(FlopsPerToken(JambaV01(), 4096), 71.49e9, 0.005e9);
  EXPECT_NEAR(FlopsPerToken(Jamba3b(), 4096), 8.247e9, 0.0005e9);
  // jamba-block
  EXPECT_NEAR(FlopsPerToken(JambaSpec({4096, 8, 32, 8, 14336, 4}), 4096), 19.08e9, 0.005e9);
}

TEST(ParamTable, PiecesTileTheirStorages) {
  const ParamTable table(JambaV01());
  std::set<int> seen;
  for (const Storage& storage : table.storages()) {
    int64_t end = 0;
    for (const int p : storage.params) {
      const Param& param = table.params()[static_cast<size_t>(p)];
      EXPECT_EQ(param.offset, end) << param.name;
      EXPECT_EQ(&table.storages()[static_cast<size_t>(param.storage)], &storage);
      EXPECT_TRUE(seen.insert(p).second);
      end += param.numel();
    }
    EXPECT_EQ(end, storage.numel()) << storage.name;
  }
  EXPECT_EQ(seen.size(), table.params().size());
}

TEST(ParamTable, GluedStorages) {
  const ParamTable table(JambaV01());
  const auto shape = [&](const std::string& storage) {
    return table.storages()[static_cast<size_t>(table.FindStorage(storage))].shape;
  };
  EXPECT_THAT(shape("model.layers.4.self_attn.qkv"), ElementsAre(6144, 4096));
  EXPECT_THAT(shape("model.layers.0.feed_forward.gate_up"), ElementsAre(28672, 4096));
  EXPECT_THAT(shape("model.layers.1.feed_forward.experts.gate_up"), ElementsAre(16, 28672, 4096));
  EXPECT_THAT(shape("model.layers.1.feed_forward.experts.down"), ElementsAre(16, 4096, 14336));
  EXPECT_THAT(shape("model.layers.0.mamba.conv1d.weight"), ElementsAre(8192, 4));
  EXPECT_THAT(Get(table, "model.layers.0.mamba.conv1d.weight").shape, ElementsAre(8192, 1, 4));

  // v follows q and k; expert 3's up rows follow its gate rows.
  EXPECT_EQ(Get(table, "model.layers.4.self_attn.v_proj.weight").offset, 5120 * 4096);
  EXPECT_EQ(Get(table, "model.layers.1.feed_forward.experts.3.up_proj.weight").offset,
            int64_t{7} * 14336 * 4096);
  EXPECT_EQ(table.Find("model.layers.4.mamba.D"), -1);  // layer 4 is attention
}

// The table of model/params.h; without muP, and at the base's width, all is 1.
TEST(ParamTable, MupScales) {
  ModelSpec spec = JambaV01();
  const auto all_one = [](const ParamTable& table) {
    for (const Param& param : table.params()) {
      if (param.init_scale != 1 || param.lr_scale != 1) return false;
    }
    return true;
  };
  EXPECT_TRUE(all_one(ParamTable(spec)));
  spec.mup_base_d_model = spec.d_model;
  EXPECT_TRUE(all_one(ParamTable(spec)));

  spec.mup_base_d_model = spec.d_model / 16;
  const auto expect = [&spec](const std::string& name, double init, double lr) {
    const ParamTable table(spec);
    EXPECT_EQ(Get(table, name).init_scale, init) << name;
    EXPECT_EQ(Get(table, name).lr_scale, lr) << name;
  };
  const std::string mamba = "model.layers.0.mamba.", attention = "model.layers.4.self_attn.";
  for (const std::string& hidden :
       {mamba + "in_proj.weight", mamba + "x_proj.weight", mamba + "out_proj.weight",
        attention + "q_proj.weight", attention + "v_proj.weight", attention + "o_proj.weight",
        std::string("model.layers.0.feed_forward.down_proj.weight"),
        std::string("model.layers.1.feed_forward.experts.3.up_proj.weight")}) {
    expect(hidden, 0.25, 1.0 / 16);
  }
  for (const char* output : {"lm_head.weight", "model.layers.1.feed_forward.router.weight"}) {
    expect(output, 1.0 / 16, 1.0 / 16);
  }
  for (const std::string& unchanged :
       {std::string("model.embed_tokens.weight"), std::string("model.final_layernorm.weight"),
        mamba + "conv1d.weight", mamba + "A_log", mamba + "D", mamba + "dt_proj.bias",
        mamba + "b_layernorm.weight"}) {
    expect(unchanged, 1, 1);
  }
  // R grows where it is the one of `auto`; its uniform values scale by themselves.
  expect(mamba + "dt_proj.weight", 1, 1.0 / 16);
  spec.init_scheme = InitScheme::kHf;
  expect(mamba + "dt_proj.weight", 0.25, 1.0 / 16);
  spec.mamba.dt_rank = 7;
  expect(mamba + "dt_proj.weight", 1, 1);
}

TEST(ParamTable, Attributes) {
  ModelSpec spec = JambaV01();
  spec.mamba.proj_bias = true;
  const ParamTable table(spec);
  const std::string mamba = "model.layers.0.mamba.";
  for (const char* name :
       {"model.layers.0.input_layernorm.weight", "model.layers.0.pre_ff_layernorm.weight",
        "model.final_layernorm.weight", "model.layers.0.mamba.conv1d.bias",
        "model.layers.0.mamba.dt_proj.bias", "model.layers.0.mamba.in_proj.bias",
        "model.layers.0.mamba.out_proj.bias", "model.layers.0.mamba.A_log",
        "model.layers.0.mamba.D", "model.layers.0.mamba.dt_layernorm.weight"}) {
    EXPECT_FALSE(Get(table, name).decay) << name;
  }
  int64_t without_decay = 0;
  for (const Param& param : table.params()) without_decay += param.decay ? 0 : 1;
  EXPECT_EQ(without_decay, 32 * 2 + 1 + 28 * 9);  // norms; per Mamba: 4 biases, A_log, D, 3 norms

  for (const char* name : {"A_log", "D", "dt_proj.bias", "b_layernorm.weight"}) {
    EXPECT_EQ(Get(table, mamba + name).dtype_class, DTypeClass::kFp32) << name;
  }
  EXPECT_EQ(Get(table, "model.layers.1.feed_forward.router.weight").dtype_class, DTypeClass::kFp32);
  EXPECT_EQ(Get(table, mamba + "dt_proj.weight").dtype_class, DTypeClass::kCompute);

  const Param& in_proj = Get(table, mamba + "in_proj.weight");
  EXPECT_EQ(in_proj.shard.axis, MeshAxis::kTensor);
  EXPECT_EQ(in_proj.shard.dim, 0);
  EXPECT_THAT(in_proj.shard.segments, ElementsAre(8192, 8192));
  EXPECT_EQ(Get(table, mamba + "x_proj.weight").shard.dim, 1);
  EXPECT_EQ(Get(table, mamba + "c_layernorm.weight").shard.axis, MeshAxis::kNone);
  EXPECT_EQ(Get(table, mamba + "out_proj.bias").shard.axis, MeshAxis::kNone);
  EXPECT_EQ(Get(table, "lm_head.weight").shard.axis, MeshAxis::kVocabulary);
  const std::string attention = "model.layers.4.self_attn.";
  EXPECT_EQ(Get(table, attention + "k_proj.weight").shard.unit, 128);
  EXPECT_EQ(Get(table, attention + "o_proj.weight").shard.unit, 128);
  EXPECT_EQ(Get(table, attention + "o_proj.weight").shard.dim, 1);
  const Param& expert = Get(table, "model.layers.1.feed_forward.experts.15.down_proj.weight");
  EXPECT_EQ(expert.shard.axis, MeshAxis::kExpert);
  EXPECT_EQ(expert.init, ParamInit::kNormalResidual);
}

TEST(ParamTable, GradWrites) {
  ModelSpec spec = JambaV01();
  spec.mamba.proj_bias = true;
  // The gradients of matrix products; an untied embedding only adds rows.
  const auto overwritten = [](const std::string& name) {
    for (const char* part : {"embed_tokens", "norm", "bias", "conv1d", "A_log", ".D"}) {
      if (name.find(part) != std::string::npos) return false;
    }
    return true;
  };
  const ParamTable table(spec);
  for (const Param& param : table.params()) {
    EXPECT_EQ(param.grad_write == GradWrite::kOverwrite, overwritten(param.name)) << param.name;
  }
  spec.tie_embeddings = true;
  EXPECT_EQ(Get(ParamTable(spec), "model.embed_tokens.weight").grad_write, GradWrite::kOverwrite);
}

// Eight K/V heads: up to eight tensor ranks have q, k and v rows of their own.
TEST(ParamTable, SharedKvHeadsAreAStorageOfTheirOwn) {
  const std::string prefix = "model.layers.4.self_attn.";
  const ParamTable own(JambaV01(), 8);
  EXPECT_EQ(Get(own, prefix + "v_proj.weight").storage, own.FindStorage(prefix + "qkv"));
  const ParamTable shared(JambaV01(), 16);
  const int kv = shared.FindStorage(prefix + "kv");
  EXPECT_EQ(Get(shared, prefix + "q_proj.weight").storage,
            shared.FindStorage(prefix + "q_proj.weight"));
  EXPECT_EQ(Get(shared, prefix + "k_proj.weight").storage, kv);
  EXPECT_EQ(Get(shared, prefix + "v_proj.weight").storage, kv);
  EXPECT_EQ(Get(shared, prefix + "v_proj.weight").offset, 1024 * 4096);
  EXPECT_EQ(shared.total(), own.total());
  EXPECT_EQ(shared.params().size(), own.params().size());
}

TEST(ParamTable, Options) {
  ModelSpec spec = JambaV01();
  spec.tie_embeddings = true;
  spec.mamba.inner_norms = false;
  spec.mamba.conv_bias = false;
  const ParamTable table(spec);
  EXPECT_EQ(table.Find("lm_head.weight"), -1);
  EXPECT_EQ(table.Find("model.layers.0.mamba.dt_layernorm.weight"), -1);
  EXPECT_EQ(table.Find("model.layers.0.mamba.conv1d.bias"), -1);
  EXPECT_EQ(static_cast<int64_t>(table.params().size()), 1251 - 1 - 28 * 4);
}

}  // namespace
}  // namespace krait
