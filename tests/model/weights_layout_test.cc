// Weights of every rank of every layout against those of one rank.
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "model/support/meshes.h"
#include "model/weights.h"

namespace krait {
namespace {

Weights Initialised(const ModelSpec& spec, const ParamTable& table, const Mesh& mesh,
                    Arena* arena) {
  Weights weights(&table, {}, /*with_grad=*/false, arena, nullptr, mesh);
  Arena scratch("scratch", Device::kCpu, 4 << 20);
  Context ctx;
  ctx.scratch = &scratch;
  weights.Init(spec, 7, ctx);
  return weights;
}

// Every box of every rank of every layout has the values of one rank, bit for bit, the owned ones
// put together are the whole model, and padding is zero.
TEST(WeightsLayout, EveryLayoutIsInitialisedAlike) {
  // The values of each published tensor on one rank.
  const auto whole = [](const ModelSpec& spec) {
    const ParamTable table(spec);
    Arena arena("weights", Device::kCpu, 16 << 20);
    const Weights weights = Initialised(spec, table, Mesh{}, &arena);
    std::vector<std::vector<float>> values;
    for (size_t p = 0; p < table.params().size(); ++p) {
      const Tensor t = weights.Param(static_cast<int>(p));
      values.emplace_back(t.data<float>(), t.data<float>() + t.numel());
    }
    return values;
  };
  const std::vector<ModelSpec> models = MeshModels();
  std::vector<std::vector<std::vector<float>>> expected;
  for (const ModelSpec& spec : models) expected.push_back(whole(spec));

  ForTheGrid([&](const ModelSpec& spec, const ParamTable& table, Mesh mesh) {
    size_t model = 0;
    while (models[model].attention.heads != spec.attention.heads) ++model;
    std::vector<std::vector<float>> joined;
    for (const Param& param : table.params()) {
      joined.emplace_back(static_cast<size_t>(param.numel()), -1.0F);
    }
    for (mesh.rank = 0; mesh.rank < mesh.world(); ++mesh.rank) {
      Arena arena("weights", Device::kCpu, 16 << 20);
      const Weights weights = Initialised(spec, table, mesh, &arena);
      const Layout& layout = weights.layout();
      std::vector<std::vector<bool>> inside;  // a box
      for (const Flat& flat : layout.flats()) inside.emplace_back(static_cast<size_t>(flat.numel));
      for (const LocalStorage& storage : layout.storages()) {
        const float* flat = weights.FlatWeight(storage.flat).data<float>();
        for (const ParamBox& box : storage.boxes) {
          const std::vector<float>& values = expected[model][box.param];
          ForElements(table.params()[box.param], box, [&](int64_t i, int64_t at) {
            ASSERT_EQ(flat[box.begin + at], values[i]) << table.params()[box.param].name;
            inside[storage.flat][box.begin + at] = true;
          });
        }
      }
      for (const OwnedBox& part : layout.Owned()) {
        const float* flat =
            weights.FlatWeight(layout.buckets()[part.bucket].flat).data<float>() + part.box.begin;
        ForElements(table.params()[part.box.param], part.box,
                    [&](int64_t i, int64_t at) { joined[part.box.param][i] = flat[at]; });
      }
      for (size_t f = 0; f < inside.size(); ++f) {
        const float* flat = weights.FlatWeight(static_cast<int>(f)).data<float>();
        for (size_t i = 0; i < inside[f].size(); ++i) {
          ASSERT_TRUE(inside[f][i] || flat[i] == 0);
        }
      }
    }
    EXPECT_EQ(joined, expected[model]);
  });
}

}  // namespace
}  // namespace krait
