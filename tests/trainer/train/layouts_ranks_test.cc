// Every layout of the ranks at hand against one rank, in f64: a model with everything, cut in every
// way. The order of sums differs between layouts, the values do not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/optimizer.h"
#include "model/bucket_exchange.h"
#include "model/support/meshes.h"
#include "model/support/tiny_model.h"
#include "parallel/collective_log.h"
#include "support/ranks.h"
#include "trainer/train/optimizer_state.h"

namespace krait::testing {
namespace {

// 4 KiB of f64: the small model has many buckets.
constexpr int64_t kBucket = 512;
constexpr int64_t kSeqLen = 6, kPasses = 3;  // of a step
constexpr double kBound = 1e-11;
// Adam divides by the size of a gradient: where one is near 0, a difference of rounding grows to a
// share of the rate.
constexpr double kRate = 1e-3;

// What the models of the grid have on or off.
struct Variant {
  std::string name;
  ModelSpec spec;
  Recompute recompute = Recompute::kNone;
  double expert_slack = 1.5;
};

std::vector<Variant> Variants() {
  const std::vector<ModelSpec> models = MeshModels();
  std::vector<Variant> variants;
  const auto add = [&](const std::string& name, size_t model, Recompute recompute,
                       const std::function<void(ModelSpec*)>& change, double slack = 1.5) {
    variants.push_back({name, models[model], recompute, slack});
    variants.back().spec.moe.aux_loss = 0.3;
    change(&variants.back().spec);
  };
  add("biases, z-loss", 0, Recompute::kNone, [](ModelSpec* spec) {
    spec->moe.z_loss = 0.2;
    spec->moe.top_k = 3;
  });
  add("no inner norms, RoPE, layer pools", 0, Recompute::kNorms, [](ModelSpec* spec) {
    spec->mamba.inner_norms = false;
    spec->attention.rope_theta = 100;
    spec->moe.aux_pool = AuxPool::kLayer;
    spec->moe.renormalize = true;
  });
  add("one K/V head, statistics of a sequence, activation loss, muP", 1, Recompute::kMixers,
      [](ModelSpec* spec) {
        spec->moe.aux_sequences = 1;
        spec->moe.z_loss = 0.1;
        spec->activation_loss = 0.2;
        spec->mup_base_d_model = spec->d_model / 4;
      });
  add("tied, a pad token", 2, Recompute::kLayer, [](ModelSpec* spec) { spec->pad_token = 3; });
  add(
      "three rounds of experts", 0, Recompute::kLayer,
      [](ModelSpec* spec) { spec->moe.z_loss = 0.2; }, /*slack=*/0.34);
  return variants;
}

// A rank's model, optimizer and memory.
class Rank {
 public:
  Rank(const Variant& variant, const Mesh& mesh, World* world, DType reduce = DType::kF64)
      : mesh_(mesh),
        table_(variant.spec, mesh.tensor),
        arena_("test", Device::kCpu, int64_t{64} << 20),
        weights_(&table_, {.device = Device::kCpu, .compute = DType::kF64}, true, &arena_, &arena_,
                 mesh, kBucket),
        sums_(DType::kF64, {64}),
        loss_scale_(DType::kF64, {1}),
        control_(DType::kF64, {kAdamWControlSize}) {
    if (world != nullptr) {
      groups_.emplace(world, mesh, variant.expert_slack);
      exchange_.emplace(&weights_.layout(), &*groups_, DType::kF64, reduce, &arena_);
      weights_.SetExchange(&*exchange_);
    }
    optimizer_.emplace(&weights_, OptimizerConfig{.lr = kRate, .clip = 0.5}, &arena_, ctx_,
                       exchange());
    model_.emplace(variant.spec, &weights_, variant.recompute, SublayerRange{},
                   groups_.has_value() ? &*groups_ : nullptr);
  }

  // Gradients and losses of kPasses passes of `rows` sequences per data rank; the gradients of what
  // this rank owns are then those of all.
  std::vector<double> Gradients(const TestBatch& batch, int64_t rows, int64_t targets) {
    sums_.Fill(0);
    Set(loss_scale_, 0, 1.0 / static_cast<double>(targets));
    Arena activations("activations", Device::kCpu, int64_t{64} << 20);
    const PassShape shape{.batch = rows, .seq_len = kSeqLen, .ranks = mesh_.tensor};
    const auto set = model_->NewActivations(shape, &activations);
    const int64_t pass = rows * mesh_.data;
    for (int64_t k = 0; k < kPasses; ++k) {
      const auto part = [&](Tensor t) {
        return t.Slice(0, k * pass + mesh_.data_index() * rows, rows);
      };
      Batch own;
      own.shape = shape;
      own.tokens = part(batch.value().tokens);
      own.targets = part(batch.value().targets);
      own.documents.doc_start = part(batch.value().documents.doc_start);
      weights_.BeginPass(ctx_, k == 0, k + 1 == kPasses);
      model_->Forward(own, loss_scale_, sums(), set.get(), ctx_);
      model_->Backward(own, 1.0 / static_cast<double>(kPasses), set.get(), ctx_);
    }
    overflow_rounds_ = model_->TakeOverflowRounds();
    if (groups_.has_value()) groups_->stage().AllReduceSum("sums", sums(), ctx_);
    std::vector<double> losses = {Get(sums_, kSumCrossEntropy) / static_cast<double>(targets)};
    const auto shares = static_cast<double>(kPasses * mesh_.stage());
    losses.push_back(Get(sums_, kSumAuxLoss) / shares);
    losses.push_back(Get(sums_, kSumZLoss) / shares);
    losses.push_back(Get(sums_, kSumSquares));
    return losses;
  }
  // The norm of the gradient.
  double Update() {
    Buf square(DType::kF64, {1});
    optimizer_->SumOfSquares(square, ctx_);
    if (groups_.has_value()) groups_->stage().AllReduceSum("norm", square, ctx_);
    optimizer_->Update(kRate, sums().Slice(0, 0, kSumImbalance), square, control_, ctx_);
    return Get(control_, kAdamWNorm);
  }

  Weights& weights() { return weights_; }
  const ParamTable& table() const { return table_; }
  HybridModel& model() { return *model_; }
  int64_t overflow_rounds() const { return overflow_rounds_; }
  Context* ctx() { return ctx_.get(); }

 private:
  Tensor sums() { return sums_.tensor().Slice(0, 0, model_->SumsSize()); }
  BucketExchange* exchange() { return exchange_.has_value() ? &*exchange_ : nullptr; }

  Mesh mesh_;
  ParamTable table_;
  Arena arena_;
  TestContext ctx_;
  Weights weights_;
  std::optional<Groups> groups_;
  std::optional<BucketExchange> exchange_;
  std::optional<OptimizerState> optimizer_;
  std::optional<HybridModel> model_;
  Buf sums_, loss_scale_, control_;
  int64_t overflow_rounds_ = 0;
};

// What one rank makes of a step's rows, whatever the layout of the others.
struct Reference {
  // Documents of uneven lengths; every fourth sequence has no target at all, so that a data rank of
  // a pass may have none.
  Reference(const Variant& variant, int64_t pass)
      : whole(variant, {}, nullptr),
        batch(kPasses * pass, kSeqLen, variant.spec.vocab_size, /*seed=*/5, Documents(pass)) {
    RandomiseWeights(whole.weights(), /*seed=*/3, /*router_scale=*/2);
    const auto params = static_cast<int>(whole.table().params().size());
    for (int p = 0; p < params; ++p) start.push_back(Values(whole.weights().Param(p)));
    for (int64_t i = 0; i < kPasses * pass * kSeqLen; ++i) {
      if (i / kSeqLen % 4 == 3) Set(batch.value().targets, i, -1);
      targets += Get(batch.value().targets, i) >= 0 ? 1 : 0;
    }
    for (Step& step : steps) {
      step.losses = whole.Gradients(batch, pass, targets);
      for (int p = 0; p < params; ++p) {
        step.gradients.push_back(Values(whole.weights().ParamGrad(p)));
      }
      step.norm = whole.Update();
    }
    for (int p = 0; p < params; ++p) end.push_back(Values(whole.weights().Param(p)));
  }
  static std::vector<std::vector<int>> Documents(int64_t pass) {
    std::vector<std::vector<int>> documents;
    for (int i = 0; i < kPasses * pass; ++i) {
      documents.push_back(i % 3 == 0 ? std::vector<int>{} : std::vector<int>{i % 4 + 1, 5});
    }
    return documents;
  }

  struct Step {
    std::vector<double> losses;
    std::vector<std::vector<double>> gradients;  // of each published tensor
    double norm = 0;
  };
  Rank whole;
  TestBatch batch;
  int64_t targets = 0;
  std::vector<std::vector<double>> start, end;  // weights
  std::array<Step, 5> steps;
};

// The largest difference of a box of a published tensor from its reference, relative to the largest
// value of the whole tensor.
double BoxDifference(const Param& param, const ParamBox& box, Tensor flat,
                     const std::vector<double>& reference) {
  double most = 1e-30, different = 0;
  for (const double value : reference) most = std::max(most, std::abs(value));
  ForElements(param, box, [&](int64_t from, int64_t to) {
    const double off = std::abs(Get(flat, box.begin + to) - reference[static_cast<size_t>(from)]);
    different = off <= different ? different : off;  // NaN comes through
  });
  return different / most;
}

// Where a layout's values are not those of the reference: what, and by how much.
struct Differences {
  void Add(const std::string& what, double off) {
    largest = std::max(largest, off);
    if (!(off <= bound)) all.push_back(what + ": " + std::to_string(off / bound) + " bounds");
  }
  void Add(const std::string& what, double actual, double expected) {
    Add(what, std::abs(actual - expected) / std::max(1.0, std::abs(expected)));
  }
  double bound = kBound, largest = 0;
  std::vector<std::string> all;
};

// `steps` steps of a layout on the ranks of `world`; this rank's differences.
Differences Compare(const Variant& variant, const Reference& reference, int64_t pass, Mesh mesh,
                    World* world, size_t steps = 5, DType reduce = DType::kF64) {
  mesh.rank = world->rank();
  Differences differences;
  // Each part of a gradient is rounded once, on each of two levels.
  if (reduce == DType::kBF16) differences.bound = 0.05;
  Rank part(variant, mesh, world, reduce);
  const Layout& layout = part.weights().layout();
  const auto& params = part.table().params();
  // The published tensors' places do not depend on the layout.
  KRAIT_CHECK(params.size() == reference.start.size());
  for (const LocalStorage& storage : layout.storages()) {
    const Tensor flat = part.weights().FlatWeight(storage.flat);
    for (const ParamBox& box : storage.boxes) {
      ForElements(params[static_cast<size_t>(box.param)], box, [&](int64_t from, int64_t to) {
        Set(flat, box.begin + to,
            reference.start[static_cast<size_t>(box.param)][static_cast<size_t>(from)]);
      });
    }
  }
  for (size_t s = 0; s < steps; ++s) {
    const Reference::Step& step = reference.steps[s];
    const std::string at = " of step " + std::to_string(s);
    const std::vector<double> losses =
        part.Gradients(reference.batch, pass / mesh.data, reference.targets);
    differences.Add("cross-entropy" + at, losses[0], step.losses[0]);
    differences.Add("aux loss" + at, losses[1], step.losses[1]);
    differences.Add("z-loss" + at, losses[2], step.losses[2]);
    differences.Add("squares" + at, losses[3], step.losses[3]);
    for (const OwnedBox& owned : layout.Owned()) {
      const auto p = static_cast<size_t>(owned.box.param);
      const int flat = layout.buckets()[static_cast<size_t>(owned.bucket)].flat;
      differences.Add(
          "gradient of " + params[p].name + at,
          BoxDifference(params[p], owned.box, part.weights().FlatGrad(flat), step.gradients[p]));
    }
    differences.Add("norm" + at, part.Update(), step.norm);
  }
  for (const LocalStorage& storage : layout.storages()) {
    if (steps < reference.steps.size()) break;
    for (const ParamBox& box : storage.boxes) {
      const auto p = static_cast<size_t>(box.param);
      differences.Add(
          params[p].name + " at the end",
          BoxDifference(params[p], box, part.weights().FlatWeight(storage.flat), reference.end[p]));
    }
  }
  if (variant.expert_slack < 1 && mesh.expert > 1) {
    EXPECT_GE(part.overflow_rounds(), 2);
  }
  return differences;
}

// Calls test(mesh, sequences of a pass) for every layout that the model has on these ranks.
template <typename Test>
void ForLayouts(const Variant& variant, const Test& test) {
  const int world = TestWorld()->size();
  for (int tensor = 1; tensor <= world; ++tensor) {
    for (int expert = 1; expert <= world; ++expert) {
      if (world % tensor != 0 || world % expert != 0) continue;
      const Mesh mesh{.data = world / tensor, .tensor = tensor, .expert = expert};
      // Tokens are cut anywhere in a sequence.
      const int64_t pass = 4 % mesh.data == 0 ? 4 : mesh.data;
      if (pass * kSeqLen / mesh.data % tensor != 0) continue;
      if (!CheckMesh(variant.spec, mesh).ok()) continue;
      SCOPED_TRACE(variant.name + ", " + MeshName(mesh));
      test(mesh, pass);
    }
  }
}

TEST(Layouts, EqualOneRank) {
  int count = 0;
  for (const Variant& variant : Variants()) {
    std::map<int64_t, std::unique_ptr<Reference>> references;
    ForLayouts(variant, [&](const Mesh& mesh, int64_t pass) {
      if (::testing::Test::HasFailure()) return;
      auto& reference = references[pass];
      if (reference == nullptr) reference = std::make_unique<Reference>(variant, pass);
      const Differences differences = Compare(variant, *reference, pass, mesh, TestWorld());
      EXPECT_THAT(differences.all, ::testing::IsEmpty());
      ++count;
    });
  }
  EXPECT_GT(count, 5);
  if (TestWorld()->first()) std::printf("%d layouts\n", count);
}

// Gradients and weights that travel within machines and then between them.
TEST(Layouts, SeveralMachinesEqualOneRank) {
  const Variant variant = Variants().front();
  for (int machine = 2; machine < TestWorld()->size(); ++machine) {
    if (TestWorld()->size() % machine != 0) continue;
    SCOPED_TRACE("machines of " + std::to_string(machine));
    SplitWorld split(TestWorld(), machine);
    ForLayouts(variant, [&](const Mesh& mesh, int64_t pass) {
      const Reference reference(variant, pass);
      EXPECT_THAT(Compare(variant, reference, pass, mesh, &split, /*steps=*/2).all,
                  ::testing::IsEmpty());
      if (mesh.tensor > 1) return;
      for (World* const machines : {TestWorld(), static_cast<World*>(&split)}) {
        const Differences rounded =
            Compare(variant, reference, pass, mesh, machines, /*steps=*/1, DType::kBF16);
        EXPECT_THAT(rounded.all, ::testing::IsEmpty()) << "gradients in bf16";
        EXPECT_GT(rounded.largest, 1e-5);
      }
    });
  }
}

// The ranks of another world on machines of two, but what collectives of one name bring from the
// others is lost: zeros arrive.
class FaultyWorld : public World {
 public:
  FaultyWorld(World* world, std::string fault)
      : World(world->rank(), world->size(), world->rank() % 2, 2, world->rank() / 2 * 2),
        world_(world),
        fault_(std::move(fault)) {}
  // Of all collectives so far.
  const std::set<std::string>& names() const { return names_; }

 private:
  void Transfer(const std::vector<Message>& sends, const std::vector<Message>& receives,
                const std::function<void(int)>& /*waits_for*/) override {
    const std::string current = ReportCollectives().current;
    const std::string name = current.substr(0, current.find(" ("));
    names_.insert(name);
    world_->Exchange(sends, receives, "test");
    if (name != fault_) return;
    for (const Message& message : receives) {
      std::memset(message.data, 0, static_cast<size_t>(message.bytes));
    }
  }

  World* world_;
  std::string fault_;
  std::set<std::string> names_;
};

// That a missing exchange would be noticed: each collective of two layouts, one at a time.
TEST(Layouts, NoCollectiveIsIdle) {
  World* const world = TestWorld();
  if (world->size() != 4) return;
  Variant variant = Variants().front();
  variant.spec.attention.heads = 4;
  variant.spec.attention.kv_heads = 2;
  variant.spec.attention.head_dim = 6;
  variant.spec.moe.experts = 4;
  variant.spec.moe.d_ff = variant.spec.mlp_d_ff = 36;
  variant.expert_slack = 0.4;  // so that rows travel again in the backward
  const Mesh mesh{.data = 2, .tensor = 2, .expert = 4};
  ASSERT_TRUE(CheckMesh(variant.spec, mesh).ok());
  const Reference reference(variant, /*pass=*/4);
  FaultyWorld sound(world, "");
  EXPECT_THAT(Compare(variant, reference, 4, mesh, &sound, /*steps=*/2).all, ::testing::IsEmpty());
  EXPECT_GT(sound.names().size(), 25u);
  for (const std::string& name : sound.names()) {
    // Ranks that disagree about these send what nobody awaits.
    if (name == "moe: counts" || name == "gather of numbers") continue;
    FaultyWorld faulty(world, name);
    const Differences differences = Compare(variant, reference, 4, mesh, &faulty, /*steps=*/2);
    int64_t found = 0;
    for (const int64_t on_rank : world->AllGather(static_cast<int64_t>(differences.all.size()))) {
      found += on_rank;
    }
    EXPECT_GT(found, 0) << "nothing depends on: " << name;
  }
}

// On GPUs gradients travel under the rest of the backward pass, weights under the updates and the
// forward pass before their own, as far as this is the order in which they are enqueued.
TEST(Layouts, TrafficIsIssuedEarlyAndWaitedForLate) {
  World* const world = TestWorld();
  if (world->size() != 4) return;
  Variant variant = Variants().front();
  variant.spec = MeshModels()[2];
  variant.spec.tie_embeddings = false;
  variant.spec.moe.aux_loss = 0.3;
  for (const int expert : {1, 4}) {
    SCOPED_TRACE("experts over " + std::to_string(expert));
    const Mesh mesh{.data = 4, .expert = expert, .rank = world->rank()};
    ASSERT_TRUE(CheckMesh(variant.spec, mesh).ok());
    Rank rank(variant, mesh, world);
    const size_t flats = rank.weights().layout().flats().size();
    for (size_t f = 0; f < flats; ++f) {
      const Tensor flat = rank.weights().FlatWeight(static_cast<int>(f));
      for (int64_t i = 0; i < flat.numel(); ++i) Set(flat, i, 0.01 * static_cast<double>(i % 7));
    }
    const TestBatch batch(kPasses * 4, kSeqLen, variant.spec.vocab_size, /*seed=*/5,
                          Reference::Documents(4));
    EnqueueOrder order;
    rank.ctx()->order = &order;
    rank.Gradients(batch, 1, /*targets=*/100);
    rank.Update();
    const size_t count = order.traffic().size();
    rank.Gradients(batch, 1, /*targets=*/100);  // its forward pass waits for weights
    rank.ctx()->order = nullptr;
    struct Sum {
      int64_t bytes = 0, beside = 0, late = 0;
    };
    std::map<std::string, Sum> sums;
    for (size_t i = 0; i < count; ++i) {
      const EnqueueOrder::Traffic& traffic = order.traffic()[i];
      EXPECT_GE(traffic.waited, traffic.issued) << traffic.name;
      Sum& sum = sums[traffic.name];
      sum.bytes += traffic.bytes;
      sum.beside += traffic.work_beside > 0 ? traffic.bytes : 0;
      // A bucket may hold nothing but rows of padding.
      if (traffic.final_op > 0) sum.late = std::max(sum.late, traffic.issued - traffic.final_op);
    }
    // The last sublayer's gradients and the first one's weights have little to hide behind.
    for (const char* name : {"gradients", "weights"}) {
      EXPECT_GT(sums[name].bytes, 0) << name;
      EXPECT_GT(static_cast<double>(sums[name].beside), 0.8 * static_cast<double>(sums[name].bytes))
          << name;
    }
    // At the end of the sublayer that has made the last of a bucket, and behind its update.
    EXPECT_LT(sums["gradients"].late, 10);
    EXPECT_EQ(sums["weights"].late, 0);
    // The pass itself waits for the rows of experts.
    EXPECT_EQ(sums["moe: rows to their experts"].beside, 0);
    EXPECT_EQ(sums["moe: rows to their experts"].bytes > 0, expert > 1);
    for (const auto& [name, sum] : sums) {
      if (!world->first()) break;
      std::printf(
          "experts over %d: %s: %lld bytes, %lld beside work, issued at most %lld ops late\n",
          expert, name.c_str(), static_cast<long long>(sum.bytes),
          static_cast<long long>(sum.beside), static_cast<long long>(sum.late));
    }
  }
}

}  // namespace
}  // namespace krait::testing
