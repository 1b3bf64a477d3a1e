// Replica and sum sets of layouts against the parallel contract.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/layout.h"
#include "model/support/meshes.h"

namespace krait {
namespace {

using ::testing::ElementsAre;

// Who holds the same elements as `rank`, written down from the parallel contract. One context rank:
// rank = data index * tensor + tensor index.
std::vector<int> ExpectedReplicas(const std::string& name, const ModelSpec& spec, const Mesh& mesh,
                                  int rank) {
  std::vector<int> same;
  const int64_t sharers = std::max<int64_t>(1, mesh.tensor / spec.attention.kv_heads);
  for (int r = 0; r < mesh.data * mesh.tensor; ++r) {
    const int t = r % mesh.tensor;
    const int own = rank % mesh.tensor;
    bool alike = t == own;  // cut over the tensor ranks, the same on all data ranks
    if (name.find(".experts.") != std::string::npos) {
      alike = r % mesh.expert == rank % mesh.expert;
    } else if (name.find("norm") != std::string::npos || name.find("router") != std::string::npos ||
               name.find("out_proj.bias") != std::string::npos) {
      alike = true;
    } else if (name.find("k_proj") != std::string::npos ||
               name.find("v_proj") != std::string::npos) {
      alike = t / sharers == own / sharers;
    }
    if (alike) same.push_back(r);
  }
  return same;
}

TEST(LayoutSets, ReplicaSetsAreTheRanksThatHoldTheSameElements) {
  ForTheGrid([](const ModelSpec& spec, const ParamTable& table, const Mesh& mesh) {
    const std::vector<Layout> layouts = AllRanks(table, mesh);
    // Which boxes a rank holds of each parameter.
    using Boxes = std::set<std::pair<std::vector<int64_t>, std::vector<int64_t>>>;
    std::vector<std::vector<Boxes>> held(layouts.size(), std::vector<Boxes>(table.params().size()));
    for (size_t r = 0; r < layouts.size(); ++r) {
      for (const LocalStorage& storage : layouts[r].storages()) {
        for (const ParamBox& box : storage.boxes) {
          held[r][box.param].insert({box.offset, box.extent});
        }
      }
    }
    for (size_t r = 0; r < layouts.size(); ++r) {
      for (size_t p = 0; p < table.params().size(); ++p) {
        const Param& param = table.params()[p];
        if (held[r][p].empty()) continue;
        const LocalStorage& storage = layouts[r].storages()[param.storage];
        const Flat& flat = layouts[r].flats()[storage.flat];
        const std::vector<int> expected =
            ExpectedReplicas(param.name, spec, mesh, static_cast<int>(r));
        EXPECT_EQ(layouts[r].sets()[flat.replicas], expected) << param.name;
        std::vector<int> holders;
        for (size_t other = 0; other < layouts.size(); ++other) {
          if (held[other][p] == held[r][p]) holders.push_back(static_cast<int>(other));
        }
        EXPECT_EQ(holders, expected) << param.name;
      }
    }
  });
}

// What a rank's gradient of a tensor is a sum over, by the parallel contract: pairs of the rank
// that owns a token and a query head (one head where heads do not matter).
std::vector<std::pair<int, int64_t>> Summands(const std::string& name, const ModelSpec& spec,
                                              const Mesh& mesh, int rank) {
  std::vector<std::pair<int, int64_t>> summands;
  const bool replicated = name.find("norm") != std::string::npos ||
                          name.find("router") != std::string::npos ||
                          name.find("out_proj.bias") != std::string::npos;
  const bool key_value =
      name.find("k_proj") != std::string::npos || name.find("v_proj") != std::string::npos;
  for (int owner = 0; owner < mesh.world(); ++owner) {
    if (replicated) {  // own tokens: sequence parallel
      if (owner == rank) summands.emplace_back(owner, 0);
    } else if (name.find(".experts.") != std::string::npos) {  // those of the expert group
      if (owner / mesh.expert == rank / mesh.expert) summands.emplace_back(owner, 0);
    } else if (owner / mesh.tensor == rank / mesh.tensor) {  // those of the tensor ranks
      if (!key_value) {
        summands.emplace_back(owner, 0);
        continue;
      }
      const int64_t heads = spec.attention.heads / mesh.tensor;
      for (int64_t h = 0; h < heads; ++h) {
        summands.emplace_back(owner, rank % mesh.tensor * heads + h);
      }
    }
  }
  return summands;
}

// Whether the gradients of `sum` add up to each token's, for each query head of the K/V heads that
// `rank` holds, exactly once.
bool CoversOnce(const std::vector<int>& sum, const std::string& name, const ModelSpec& spec,
                const Mesh& mesh, int rank) {
  std::map<std::pair<int, int64_t>, int> count;
  for (const int r : sum) {
    for (const auto& summand : Summands(name, spec, mesh, r)) ++count[summand];
  }
  size_t expected = static_cast<size_t>(mesh.world());
  if (name.find("k_proj") != std::string::npos || name.find("v_proj") != std::string::npos) {
    const AttentionSpec& a = spec.attention;
    const int64_t kv_heads = std::max<int64_t>(1, a.kv_heads / mesh.tensor);
    const int64_t first_kv = rank % mesh.tensor * a.kv_heads / mesh.tensor;
    const int64_t queries = a.heads / a.kv_heads;
    expected *= static_cast<size_t>(kv_heads * queries);
    for (const auto& [summand, times] : count) {
      if (summand.second < first_kv * queries ||
          summand.second >= (first_kv + kv_heads) * queries) {
        return false;
      }
    }
  }
  return count.size() == expected && std::all_of(count.begin(), count.end(), [](const auto& entry) {
           return entry.second == 1;
         });
}

TEST(LayoutSets, SumSetsAddEveryTokenOnce) {
  ForTheGrid([](const ModelSpec& spec, const ParamTable& table, const Mesh& mesh) {
    for (const Layout& layout : AllRanks(table, mesh)) {
      for (const LocalStorage& storage : layout.storages()) {
        const Flat& flat = layout.flats()[storage.flat];
        const std::vector<int>& sum = layout.sets()[flat.sum];
        for (const ParamBox& box : storage.boxes) {
          const std::string& name = table.params()[box.param].name;
          EXPECT_TRUE(CoversOnce(sum, name, spec, mesh, layout.mesh().rank))
              << name << " on rank " << layout.mesh().rank;
        }
      }
    }
  });
}

TEST(LayoutSets, AWrongSumSetIsSeen) {
  const ModelSpec spec = MeshModels()[1];  // one K/V head
  const Mesh mesh{.data = 2, .tensor = 4, .expert = 4, .rank = 5};
  const std::string norm = "model.layers.0.mamba.dt_layernorm.weight";
  const std::string key = "model.layers.1.self_attn.k_proj.weight";
  const std::string query = "model.layers.1.self_attn.q_proj.weight";
  const std::vector<int> all = {0, 1, 2, 3, 4, 5, 6, 7};
  const std::vector<int> data = {1, 5};
  EXPECT_TRUE(CoversOnce(all, norm, spec, mesh, 5));
  EXPECT_FALSE(CoversOnce(data, norm, spec, mesh, 5));  // the classic error
  EXPECT_TRUE(CoversOnce(all, key, spec, mesh, 5));
  EXPECT_FALSE(CoversOnce(data, key, spec, mesh, 5));
  EXPECT_TRUE(CoversOnce(data, query, spec, mesh, 5));
  EXPECT_FALSE(CoversOnce(all, query, spec, mesh, 5));
  EXPECT_FALSE(CoversOnce({5}, query, spec, mesh, 5));
}

TEST(Mesh, SetsWithContextRanks) {
  const Mesh mesh{.data = 2, .context = 2, .tensor = 2, .expert = 4, .rank = 5};
  EXPECT_EQ(mesh.data_index(), 1);
  EXPECT_EQ(mesh.context_index(), 0);
  EXPECT_EQ(mesh.tensor_index(), 1);
  EXPECT_THAT(mesh.TensorReplicas(1), ElementsAre(1, 3, 5, 7));
  EXPECT_THAT(mesh.TensorReplicas(2), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_THAT(mesh.ExpertReplicas(), ElementsAre(1, 5));
  Mesh second{.pipeline = 2, .data = 2, .tensor = 2, .expert = 2, .rank = 6};
  EXPECT_THAT(second.TensorReplicas(1), ElementsAre(4, 6));
  EXPECT_THAT(second.ExpertReplicas(), ElementsAre(4, 6));
}

}  // namespace
}  // namespace krait
