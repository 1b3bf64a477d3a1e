// The grid of layouts and the models that layout tests run over.
#ifndef KRAIT_TESTS_MODEL_SUPPORT_MESHES_H_
#define KRAIT_TESTS_MODEL_SUPPORT_MESHES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/check.h"
#include "model/layout.h"
#include "model/params.h"
#include "model/spec.h"
#include "parallel/mesh.h"

namespace krait {

// Three models of four layers with every kind of sublayer: 6 heads with 3 K/V heads, 6 experts and
// all biases; one K/V head, 131 ids on up to four tensor ranks (the last all padding); tied, 2 K/V
// heads.
inline std::vector<ModelSpec> MeshModels() {
  const auto make = [](int64_t vocab, int64_t heads, int64_t kv_heads, int64_t head_dim,
                       int64_t d_ff, int64_t experts) {
    ModelSpec spec;
    spec.vocab_size = vocab;
    spec.d_model = heads * head_dim;
    spec.n_layers = 4;
    spec.attention = {heads, kv_heads, head_dim, 0};
    spec.mamba.d_inner = 2 * spec.d_model;
    spec.mamba.dt_rank = (spec.d_model + 15) / 16;
    spec.mlp_d_ff = d_ff;
    spec.moe.experts = experts;
    spec.moe.d_ff = d_ff;
    const auto layers = ParsePattern("m aE a mE", spec.n_layers);
    KRAIT_CHECK(layers.ok());
    spec.sublayers = MakeSublayers(*layers);
    return spec;
  };
  std::vector<ModelSpec> models = {make(131, 6, 3, 4, 36, 6), make(131, 12, 1, 4, 12, 12),
                                   make(257, 4, 2, 8, 24, 4)};
  models[0].mamba.proj_bias = true;
  models[2].tie_embeddings = true;
  return models;
}

// Layouts of {1,2,3,4} tensor x {1,2,3,4} data x {1,2,3,4} expert ranks, up to 8, that divide.
inline std::vector<Mesh> MeshGrid(const ModelSpec& spec) {
  std::vector<Mesh> grid;
  for (int tensor = 1; tensor <= 4; ++tensor) {
    for (int data = 1; data <= 4; ++data) {
      for (int expert = 1; expert <= 4; ++expert) {
        const Mesh mesh{.data = data, .tensor = tensor, .expert = expert};
        if (mesh.world() <= 8 && CheckMesh(spec, mesh).ok()) grid.push_back(mesh);
      }
    }
  }
  return grid;
}

inline std::string MeshName(const Mesh& mesh) {
  return "tensor " + std::to_string(mesh.tensor) + " data " + std::to_string(mesh.data) +
         " expert " + std::to_string(mesh.expert);
}

// Calls visit(published index, box index) for every element of a box, in the box's order.
template <typename Visit>
void ForElements(const Param& param, const ParamBox& box, const Visit& visit) {
  const size_t rank = param.shape.size();
  std::vector<int64_t> at(rank, 0);
  const int64_t n = box.numel();
  for (int64_t i = 0; i < n; ++i) {
    int64_t index = 0;
    for (size_t d = 0; d < rank; ++d) {
      ASSERT_LT(at[d] + box.offset[d], param.shape[d]) << param.name;
      index = index * param.shape[d] + box.offset[d] + at[d];
    }
    visit(index, i);
    for (size_t d = rank; d-- > 0;) {
      if (++at[d] < box.extent[d]) break;
      at[d] = 0;
    }
  }
}

// Short enough that the small models have many buckets.
inline constexpr int64_t kSmallBucket = 2000;

// The layouts of all ranks of a mesh.
inline std::vector<Layout> AllRanks(const ParamTable& table, Mesh mesh,
                                    int64_t bucket_elements = kSmallBucket) {
  std::vector<Layout> layouts;
  for (mesh.rank = 0; mesh.rank < mesh.world(); ++mesh.rank) {
    layouts.emplace_back(&table, mesh, bucket_elements);
  }
  return layouts;
}

// Runs `test(spec, table, mesh)` for the grid of meshes over the three models.
template <typename Test>
void ForTheGrid(const Test& test) {
  int count = 0;
  for (const ModelSpec& spec : MeshModels()) {
    for (const Mesh& mesh : MeshGrid(spec)) {
      SCOPED_TRACE(MeshName(mesh) + ", " + std::to_string(spec.attention.heads) + " heads");
      test(spec, ParamTable(spec, mesh.tensor), mesh);
      ++count;
    }
  }
  EXPECT_GT(count, 60);
}

}  // namespace krait

#endif  // KRAIT_TESTS_MODEL_SUPPORT_MESHES_H_
