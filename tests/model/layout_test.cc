#include "model/layout.h"

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/support/meshes.h"
#include "model/support/published.h"

namespace krait {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// Empty when the boxes tile every tensor once, else the first that they do not.
std::string NotTiled(const ParamTable& table, const std::vector<std::vector<OwnedBox>>& ranks) {
  for (size_t p = 0; p < table.params().size(); ++p) {
    const Param& param = table.params()[p];
    std::vector<int> count(static_cast<size_t>(param.numel()), 0);
    for (const std::vector<OwnedBox>& owned : ranks) {
      for (const OwnedBox& part : owned) {
        if (part.box.param != static_cast<int>(p)) continue;
        ForElements(param, part.box, [&](int64_t i, int64_t) { ++count[i]; });
      }
    }
    const auto wrong = std::find_if(count.begin(), count.end(), [](int c) { return c != 1; });
    if (wrong != count.end()) {
      return param.name + " element " + std::to_string(wrong - count.begin()) + ": " +
             std::to_string(*wrong) + " owners";
    }
  }
  return "";
}

TEST(Layout, EveryTensorIsCutOwnedOnceAndPutTogetherAgain) {
  ForTheGrid([](const ModelSpec&, const ParamTable& table, const Mesh& mesh) {
    const std::vector<Layout> layouts = AllRanks(table, mesh);
    const auto& params = table.params();
    std::vector<std::vector<int64_t>> joined(params.size());
    for (size_t p = 0; p < params.size(); ++p) {
      joined[p].assign(static_cast<size_t>(params[p].numel()), -1);
    }
    std::vector<std::vector<OwnedBox>> owned;
    for (const Layout& layout : layouts) {
      // Local memory: every element holds its published index, padding -1.
      std::vector<std::vector<int64_t>> memory;
      for (const Flat& flat : layout.flats()) {
        memory.emplace_back(static_cast<size_t>(flat.numel), -1);
      }
      for (const LocalStorage& storage : layout.storages()) {
        EXPECT_EQ(storage.offset % Layout::kAlignment, 0);
        int64_t used = 0;
        std::vector<int64_t>& flat = memory[storage.flat];
        for (const ParamBox& box : storage.boxes) {
          EXPECT_EQ(box.begin, storage.offset + used);
          used += box.numel();
          ForElements(params[box.param], box, [&](int64_t i, int64_t at) {
            int64_t& element = flat[box.begin + at];
            EXPECT_EQ(element, -1);
            element = i;
          });
        }
        EXPECT_EQ(used, storage.rows * (storage.numel() / storage.shape[0]));
        EXPECT_LE(used, storage.numel());
      }
      owned.push_back(layout.Owned());
      for (const OwnedBox& part : owned.back()) {
        const Bucket& bucket = layout.buckets()[part.bucket];
        EXPECT_GE(part.box.begin, layout.Own(part.bucket).begin);
        EXPECT_LE(part.box.begin + part.box.numel(), layout.Own(part.bucket).end);
        const auto p = static_cast<size_t>(part.box.param);
        ForElements(params[p], part.box, [&](int64_t i, int64_t at) {
          joined[p][i] = memory[bucket.flat][part.box.begin + at];
        });
      }
    }
    EXPECT_EQ(NotTiled(table, owned), "");
    for (size_t p = 0; p < params.size(); ++p) {
      for (size_t i = 0; i < joined[p].size(); ++i) {
        ASSERT_EQ(joined[p][i], static_cast<int64_t>(i)) << params[p].name;
      }
    }
  });
}

TEST(Layout, AnOwnerCountedTwiceOrLeftOutIsSeen) {
  const ModelSpec spec = MeshModels()[0];
  const ParamTable table(spec, 3);
  std::vector<std::vector<OwnedBox>> owned;
  for (const Layout& layout : AllRanks(table, {.data = 2, .tensor = 3, .expert = 3})) {
    owned.push_back(layout.Owned());
  }
  ASSERT_EQ(NotTiled(table, owned), "");
  auto twice = owned;
  twice[0].push_back(owned[4][7]);
  EXPECT_THAT(NotTiled(table, twice), HasSubstr(": 2 owners"));
  auto without = owned;
  without[4].erase(without[4].begin() + 7);
  EXPECT_THAT(NotTiled(table, without), HasSubstr(": 0 owners"));
  auto longer = owned;
  longer[5][3].box.extent[0] -= 1;
  EXPECT_THAT(NotTiled(table, longer), HasSubstr(": 0 owners"));
}

TEST(Layout, RanksHaveEqualSizesAndReplicasEqualLayouts) {
  ForTheGrid([](const ModelSpec&, const ParamTable& table, const Mesh& mesh) {
    const std::vector<Layout> layouts = AllRanks(table, mesh);
    const Layout& first = layouts.front();
    for (const Layout& layout : layouts) {
      ASSERT_EQ(layout.sets().size(), first.sets().size());
      ASSERT_EQ(layout.flats().size(), first.flats().size());
      ASSERT_EQ(layout.buckets().size(), first.buckets().size());
      for (size_t f = 0; f < first.flats().size(); ++f) {
        const Flat& flat = layout.flats()[f];
        EXPECT_EQ(flat.replicas, first.flats()[f].replicas);
        EXPECT_EQ(flat.numel, first.flats()[f].numel);
        EXPECT_EQ(flat.storages, first.flats()[f].storages);
        // A set of ranks agrees on being one.
        const std::vector<int>& ranks = layout.sets()[flat.replicas];
        EXPECT_TRUE(std::binary_search(ranks.begin(), ranks.end(), layout.mesh().rank));
        for (const int r : ranks) {
          EXPECT_EQ(layouts[r].sets()[flat.replicas], ranks);
        }
      }
      for (size_t b = 0; b < first.buckets().size(); ++b) {
        EXPECT_EQ(layout.buckets()[b].flat, first.buckets()[b].flat);
        EXPECT_EQ(layout.buckets()[b].begin, first.buckets()[b].begin);
        EXPECT_EQ(layout.buckets()[b].end, first.buckets()[b].end);
        EXPECT_EQ(layout.buckets()[b].cuts, first.buckets()[b].cuts);
      }
      for (size_t s = 0; s < first.storages().size(); ++s) {
        EXPECT_EQ(layout.storages()[s].shape, first.storages()[s].shape);
        EXPECT_EQ(layout.storages()[s].offset, first.storages()[s].offset);
      }
    }
  });
}

TEST(Layout, BucketsTileFlatsAndAreCutAtRows) {
  ForTheGrid([](const ModelSpec&, const ParamTable& table, const Mesh& mesh) {
    Mesh own = mesh;
    own.rank = mesh.world() - 1;
    const Layout layout(&table, own, kSmallBucket);
    // Where a cut may be: at storages and rows of boxes (padding rows of a vocabulary too).
    std::vector<std::set<int64_t>> rows(layout.flats().size());
    int64_t longest_row = 0;
    for (const LocalStorage& storage : layout.storages()) {
      std::set<int64_t>& at = rows[storage.flat];
      at.insert(storage.offset);
      int64_t end = storage.offset;
      for (const ParamBox& box : storage.boxes) {
        for (int64_t r = 0; r < box.extent[0]; ++r) at.insert(box.begin + r * box.row());
        longest_row = std::max(longest_row, box.row());
        end = box.begin + box.numel();
      }
      const int64_t width = storage.numel() / storage.shape[0];
      for (; end < storage.offset + storage.numel(); end += width) at.insert(end);
    }
    std::vector<int64_t> covered(layout.flats().size(), 0);
    std::vector<const Bucket*> last(layout.flats().size());
    for (const Bucket& bucket : layout.buckets()) {
      const auto f = static_cast<size_t>(bucket.flat);
      const Flat& flat = layout.flats()[f];
      EXPECT_EQ(bucket.begin, covered[f]);  // in the order of the flat
      covered[f] = bucket.end;
      last[f] = &bucket;
      ASSERT_EQ(bucket.cuts.size(), layout.sets()[flat.replicas].size() + 1);
      EXPECT_EQ(bucket.cuts.front(), bucket.begin);
      EXPECT_EQ(bucket.cuts.back(), bucket.end);
      EXPECT_TRUE(std::is_sorted(bucket.cuts.begin(), bucket.cuts.end()));
      const auto ranks = static_cast<int64_t>(bucket.cuts.size()) - 1;
      for (size_t i = 0; i < bucket.cuts.size(); ++i) {
        const int64_t cut = bucket.cuts[i];
        EXPECT_TRUE(cut == flat.numel || rows[f].count(cut) == 1) << cut;
        // Even, but for a row and padding.
        const int64_t even =
            bucket.begin + (bucket.end - bucket.begin) * static_cast<int64_t>(i) / ranks;
        EXPECT_LE(std::abs(cut - even), longest_row + Layout::kAlignment);
      }
    }
    for (const Bucket& bucket : layout.buckets()) {
      const int64_t slack = longest_row + Layout::kAlignment;
      EXPECT_LE(bucket.end - bucket.begin, 2 * kSmallBucket + slack);
      if (&bucket != last[bucket.flat]) {
        EXPECT_GE(bucket.end - bucket.begin, kSmallBucket - slack);
      }
    }
    for (size_t f = 0; f < covered.size(); ++f) EXPECT_EQ(covered[f], layout.flats()[f].numel);
    // A storage knows its buckets.
    for (const LocalStorage& storage : layout.storages()) {
      std::vector<int> expected;
      for (size_t b = 0; b < layout.buckets().size(); ++b) {
        const Bucket& bucket = layout.buckets()[b];
        if (bucket.flat == storage.flat && bucket.begin < storage.offset + storage.numel() &&
            storage.offset < bucket.end) {
          expected.push_back(static_cast<int>(b));
        }
      }
      EXPECT_EQ(storage.buckets, expected);
    }
  });
}

bool Contains(const std::vector<ElementRange>& ranges, int64_t element) {
  return std::any_of(ranges.begin(), ranges.end(), [element](const ElementRange& range) {
    return range.begin <= element && element < range.end;
  });
}

TEST(Layout, DecayAndZeroRangesFollowTheTable) {
  ForTheGrid([](const ModelSpec&, const ParamTable& table, const Mesh& mesh) {
    const Layout layout(&table, mesh, kSmallBucket);
    for (const LocalStorage& storage : layout.storages()) {
      const Flat& flat = layout.flats()[storage.flat];
      for (const ParamBox& box : storage.boxes) {
        const Param& param = table.params()[box.param];
        for (int64_t at = box.begin; at < box.begin + box.numel(); ++at) {
          ASSERT_EQ(Contains(flat.zero, at), param.grad_write == GradWrite::kZeroed) << param.name;
          int decays = 0;
          for (const int b : storage.buckets) {
            const Bucket& bucket = layout.buckets()[b];
            decays += Contains(bucket.decay, at) ? 1 : 0;
          }
          ASSERT_EQ(decays, param.decay ? 1 : 0) << param.name;
        }
      }
    }
    const auto expect_sorted = [](const std::vector<ElementRange>& ranges, int64_t begin,
                                  int64_t end) {
      for (const ElementRange& range : ranges) {
        EXPECT_GE(range.begin, begin);
        EXPECT_LT(range.begin, range.end);
        begin = range.end + 1;
      }
      EXPECT_LE(begin, end + 1);
    };
    for (const Flat& flat : layout.flats()) expect_sorted(flat.zero, 0, flat.numel);
    for (const Bucket& bucket : layout.buckets()) {
      expect_sorted(bucket.decay, bucket.begin, bucket.end);
      EXPECT_LE(bucket.decay.size(), 3U);
    }
  });
}

TEST(Layout, ScaledRangesFollowTheTable) {
  ForTheGrid([](ModelSpec spec, const ParamTable& plain, const Mesh& mesh) {
    const Layout before(&plain, mesh, kSmallBucket);
    for (const Bucket& bucket : before.buckets()) EXPECT_TRUE(bucket.scaled.empty());
    spec.mup_base_d_model = spec.d_model / 2;
    const ParamTable table(spec, mesh.tensor);
    const Layout layout(&table, mesh, kSmallBucket);
    for (const LocalStorage& storage : layout.storages()) {
      for (const ParamBox& box : storage.boxes) {
        const Param& param = table.params()[box.param];
        for (int64_t at = box.begin; at < box.begin + box.numel(); ++at) {
          double scale = 1;
          for (const int b : storage.buckets) {
            const Bucket& bucket = layout.buckets()[b];
            ASSERT_EQ(bucket.scaled.size(), bucket.lr_scales.size());
            for (size_t r = 0; r < bucket.scaled.size(); ++r) {
              if (Contains({bucket.scaled[r]}, at)) scale *= bucket.lr_scales[r];
            }
          }
          ASSERT_EQ(scale, param.lr_scale) << param.name;
        }
      }
    }
    for (const Bucket& bucket : layout.buckets()) EXPECT_LE(bucket.scaled.size(), 4U);
  });
}

TEST(Layout, FlatsLieInBackwardOrder) {
  for (const ModelSpec& spec : MeshModels()) {
    const ParamTable table(spec);
    const Layout layout(&table, Mesh{}, /*bucket_elements=*/1);  // every sublayer closes
    ASSERT_THAT(layout.flats(), SizeIs(2));                      // compute and f32
    for (const Flat& flat : layout.flats()) {
      std::vector<int> sublayers;
      for (const int s : flat.storages) {
        sublayers.push_back(table.storages()[s].sublayer);
      }
      if (flat.dtype_class == DTypeClass::kCompute) {
        EXPECT_EQ(table.storages()[flat.storages.back()].name, "model.embed_tokens.weight");
        EXPECT_EQ(
            table.storages()[flat.storages.front()].name,
            spec.tie_embeddings ? "model.layers.3.feed_forward.experts.down" : "lm_head.weight");
        sublayers.pop_back();
        if (!spec.tie_embeddings) sublayers.erase(sublayers.begin());
      } else {
        EXPECT_EQ(table.storages()[flat.storages.front()].name, "model.final_layernorm.weight");
        sublayers.erase(sublayers.begin());
      }
      EXPECT_TRUE(std::is_sorted(sublayers.rbegin(), sublayers.rend()));
    }
    // Buckets of both flats in the order in which their last gradient comes.
    std::vector<int> completed;
    for (size_t b = 0; b < layout.buckets().size(); ++b) {
      int first = static_cast<int>(layout.storages().size());
      for (size_t s = layout.storages().size(); s-- > 0;) {
        const std::vector<int>& of = layout.storages()[s].buckets;
        if (std::count(of.begin(), of.end(), static_cast<int>(b)) > 0) first = static_cast<int>(s);
      }
      completed.push_back(first);
    }
    EXPECT_TRUE(std::is_sorted(completed.rbegin(), completed.rend()));
  }
}

// The boxes of a parameter on a rank.
std::vector<ParamBox> BoxesOf(const Layout& layout, const std::string& name) {
  std::vector<ParamBox> boxes;
  const int p = layout.table().Find(name);
  EXPECT_GE(p, 0) << name;
  for (const LocalStorage& storage : layout.storages()) {
    for (const ParamBox& box : storage.boxes) {
      if (box.param == p) boxes.push_back(box);
    }
  }
  return boxes;
}
const LocalStorage& StorageOf(const Layout& layout, const std::string& name) {
  return layout.storages()[layout.table().FindStorage(name)];
}

TEST(Layout, CutsByHand) {
  const ModelSpec spec =
      MeshModels()[0];  // D 24, 6 heads of 4, 3 K/V heads, I 48, F 36, E 6, V 131
  const ParamTable table(spec, 3);
  const Layout layout(&table, {.data = 2, .tensor = 3, .expert = 3, .rank = 4});  // d 1, t 1
  const auto expect = [&](const std::string& name, std::vector<std::vector<int64_t>> offsets,
                          const std::vector<int64_t>& extent) {
    const std::vector<ParamBox> boxes = BoxesOf(layout, name);
    ASSERT_EQ(boxes.size(), offsets.size()) << name;
    for (size_t i = 0; i < boxes.size(); ++i) {
      EXPECT_EQ(boxes[i].offset, offsets[i]) << name;
      EXPECT_EQ(boxes[i].extent, extent) << name;
    }
  };
  expect("model.layers.0.mamba.in_proj.weight", {{16, 0}, {64, 0}}, {16, 24});  // of x and of z
  expect("model.layers.0.mamba.in_proj.bias", {{16}, {64}}, {16});
  expect("model.layers.0.mamba.conv1d.weight", {{16, 0, 0}}, {16, 1, 4});
  expect("model.layers.0.mamba.x_proj.weight", {{0, 16}}, {2 + 2 * 16, 16});
  expect("model.layers.0.mamba.dt_proj.weight", {{16, 0}}, {16, 2});
  expect("model.layers.0.mamba.A_log", {{16, 0}}, {16, 16});
  expect("model.layers.0.mamba.out_proj.bias", {{0}}, {24});
  expect("model.layers.0.mamba.dt_layernorm.weight", {{0}}, {2});
  expect("model.layers.1.self_attn.q_proj.weight", {{8, 0}}, {8, 24});
  expect("model.layers.1.self_attn.k_proj.weight", {{4, 0}}, {4, 24});
  expect("model.layers.1.self_attn.o_proj.weight", {{0, 8}}, {24, 8});
  expect("model.layers.0.feed_forward.up_proj.weight", {{12, 0}}, {12, 24});
  expect("model.layers.0.feed_forward.down_proj.weight", {{0, 12}}, {24, 12});
  expect("model.layers.1.feed_forward.experts.2.up_proj.weight", {{0, 0}}, {36, 24});
  expect("model.layers.1.feed_forward.experts.1.up_proj.weight", {}, {});
  expect("model.layers.1.feed_forward.experts.4.up_proj.weight", {}, {});
  expect("model.layers.1.feed_forward.router.weight", {{0, 0}}, {6, 24});
  expect("lm_head.weight", {{64, 0}}, {64, 24});

  EXPECT_THAT(StorageOf(layout, "model.layers.1.self_attn.qkv").shape, ElementsAre(16, 24));
  EXPECT_THAT(StorageOf(layout, "model.layers.0.mamba.in_proj.weight").shape, ElementsAre(32, 24));
  EXPECT_THAT(StorageOf(layout, "model.layers.0.mamba.conv1d.weight").shape, ElementsAre(16, 4));
  EXPECT_THAT(StorageOf(layout, "model.layers.0.mamba.x_proj.weight").shape, ElementsAre(34, 16));
  EXPECT_THAT(StorageOf(layout, "model.layers.1.feed_forward.experts.gate_up").shape,
              ElementsAre(2, 72, 24));
  EXPECT_THAT(StorageOf(layout, "model.layers.1.feed_forward.experts.down").shape,
              ElementsAre(2, 24, 36));

  const LocalSizes sizes = LocalSizesOf(spec, layout.mesh());
  EXPECT_EQ(sizes.heads, 2);
  EXPECT_EQ(sizes.kv_heads, 1);
  EXPECT_EQ(sizes.d_inner, 16);
  EXPECT_EQ(sizes.mlp_d_ff, 12);
  EXPECT_EQ(sizes.experts, 2);
  EXPECT_EQ(sizes.first_expert, 2);
  EXPECT_EQ(sizes.first_vocab_row, 64);
  EXPECT_EQ(sizes.vocab_rows, 64);
  EXPECT_EQ(sizes.padded_vocab_rows, 64);
}

TEST(Layout, SharedKvHeads) {
  const ModelSpec spec = MeshModels()[2];  // 4 heads, 2 K/V heads of 8
  const ParamTable table(spec, 4);
  const std::vector<Layout> layouts = AllRanks(table, {.data = 2, .tensor = 4});
  const std::string prefix = "model.layers.1.self_attn.";
  for (const Layout& layout : layouts) {
    const int t = layout.mesh().tensor_index();
    EXPECT_THAT(StorageOf(layout, prefix + "q_proj.weight").shape, ElementsAre(8, 32));
    const LocalStorage& kv = StorageOf(layout, prefix + "kv");
    EXPECT_THAT(kv.shape, ElementsAre(16, 32));
    ASSERT_THAT(kv.boxes, SizeIs(2));
    EXPECT_THAT(kv.boxes[0].offset, ElementsAre(t / 2 * 8, 0));
    EXPECT_THAT(kv.boxes[1].offset, ElementsAre(t / 2 * 8, 0));
    const Flat& flat = layout.flats()[kv.flat];
    EXPECT_EQ(layout.sets()[flat.replicas],
              t < 2 ? std::vector<int>({0, 1, 4, 5}) : std::vector<int>({2, 3, 6, 7}));
    EXPECT_NE(kv.flat, StorageOf(layout, prefix + "q_proj.weight").flat);
  }
}

// 131 ids on four tensor ranks: 64, 64, 3 and none, in memory for 64 each.
TEST(Layout, ARankWithNothingButVocabularyPadding) {
  const ModelSpec spec = MeshModels()[1];
  const ParamTable table(spec, 4);
  const std::vector<Layout> layouts = AllRanks(table, {.tensor = 4});
  const int64_t rows[] = {64, 64, 3, 0};
  for (const Layout& layout : layouts) {
    for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) {
      const LocalStorage& storage = StorageOf(layout, name);
      EXPECT_THAT(storage.shape, ElementsAre(64, spec.d_model));
      EXPECT_EQ(storage.rows, rows[layout.mesh().rank]);
      EXPECT_EQ(storage.boxes.empty(), storage.rows == 0);
      EXPECT_FALSE(storage.buckets.empty());  // it takes part in all that happens to a bucket
    }
    const LocalSizes sizes = LocalSizesOf(spec, layout.mesh());
    EXPECT_EQ(sizes.vocab_rows, rows[layout.mesh().rank]);
    EXPECT_EQ(sizes.first_vocab_row, std::min(131, 64 * layout.mesh().rank));
  }
}

TEST(Layout, OneRankHoldsTheTable) {
  for (const ModelSpec& spec : {MeshModels()[0], Jamba3b()}) {
    const ParamTable table(spec);
    const Layout layout(&table, Mesh{});
    EXPECT_THAT(layout.sets(), SizeIs(1));
    for (size_t s = 0; s < layout.storages().size(); ++s) {
      const LocalStorage& storage = layout.storages()[s];
      std::vector<int64_t> shape = storage.shape;
      shape[0] = storage.rows;
      EXPECT_EQ(shape, table.storages()[s].shape) << table.storages()[s].name;
    }
    int64_t owned = 0;
    for (const OwnedBox& part : layout.Owned()) owned += part.box.numel();
    EXPECT_EQ(owned, table.total());
  }
}

TEST(Layout, BucketsOfALargeModel) {
  const ModelSpec spec = Jamba3b();
  for (const Mesh& mesh :
       {Mesh{}, Mesh{.data = 8, .expert = 8}, Mesh{.data = 4, .tensor = 2, .expert = 4}}) {
    const ParamTable table(spec, mesh.tensor);
    const Layout layout(&table, mesh);
    std::vector<int64_t> left(layout.flats().size());
    for (size_t f = 0; f < left.size(); ++f) left[f] = layout.flats()[f].numel;
    for (const Bucket& bucket : layout.buckets()) {
      const int64_t mib = (bucket.end - bucket.begin) * 4 >> 20;
      int64_t& rest = left[bucket.flat];
      rest -= bucket.end - bucket.begin;
      EXPECT_LE(mib, 128);
      if (rest > 0) {
        EXPECT_GE(mib, 63);
      }
    }
    size_t zero = 0;
    for (const Flat& flat : layout.flats()) zero += flat.zero.size();
    EXPECT_LE(zero, 24U);  // not one per tensor (232 of them are zeroed)
  }
}

TEST(CheckMesh, NamesWhatDoesNotDivide) {
  const ModelSpec spec = MeshModels()[0];
  EXPECT_TRUE(CheckMesh(spec, {.data = 2, .tensor = 3, .expert = 6}).ok());
  const absl::Status status = CheckMesh(spec, {.data = 2, .tensor = 4, .expert = 5});
  EXPECT_EQ(ExitCodeOf(status), ExitCode::kConfig);
  const std::string message = MessageOf(status);
  EXPECT_THAT(message, HasSubstr("parallel.tensor 4 does not divide model.attention.heads 6, as 1, "
                                 "2, 3, 6 do"));
  EXPECT_THAT(message, HasSubstr("parallel.tensor 4 must divide model.attention.kv_heads 3 or be a "
                                 "multiple of it"));
  EXPECT_THAT(message, HasSubstr("parallel.expert 5 does not divide the ranks of a stage 8"));
  EXPECT_THAT(message, HasSubstr("parallel.expert 5 does not divide model.moe.experts 6"));
}

}  // namespace
}  // namespace krait
