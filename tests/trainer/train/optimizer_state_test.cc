#include "trainer/train/optimizer_state.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/activation.h"
#include "kernels/base/random.h"
#include "kernels/optimizer.h"
#include "model/support/meshes.h"

namespace krait {
namespace {

using Values = std::vector<std::vector<float>>;  // of each published tensor, row-major

constexpr uint64_t kSeed = 7;

// The upper half of a finite float, rounded to nearest even.
uint16_t Rounded(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Weights, gradients and optimizer state of one rank.
class RankState {
 public:
  RankState(const ModelSpec& spec, const ParamTable& table, const Mesh& mesh, DType compute)
      : weights_(&table, {.compute = compute}, true, &weight_arena_, &grad_arena_, mesh) {
    ctx_.scratch = &scratch_;
    optimizer_ = std::make_unique<OptimizerState>(&weights_, OptimizerConfig(), &arena_, ctx_);
    KRAIT_CHECK(optimizer_->Init(spec, kSeed, ctx_).ok());
  }

  // Gradients that are functions of the published element, of about 1e-3.
  void FillGradients() {
    const Layout& layout = weights_.layout();
    for (const LocalStorage& storage : layout.storages()) {
      float* flat = weights_.FlatGrad(storage.flat).data<float>();
      for (const ParamBox& box : storage.boxes) {
        const Param& param = weights_.table().params()[box.param];
        const RandomStream stream(1, RandomPurpose::kSynthetic, HashName(param.name));
        ForElements(param, box, [&](int64_t i, int64_t at) {
          flat[box.begin + at] = static_cast<float>(1e-3 * stream.Normal(static_cast<uint64_t>(i)));
        });
      }
    }
  }

  OptimizerState& optimizer() { return *optimizer_; }
  const Weights& weights() const { return weights_; }
  const Context& ctx() const { return ctx_; }
  double SumOfSquares() {
    optimizer_->SumOfSquares(sum_, ctx_);
    return sum_.data<double>()[0];
  }
  // With a sum of squares that is the same for every layout, so that the clip factor is.
  void Update() {
    Fill(sum_, 4, ctx_);
    optimizer_->Update(/*lr=*/0.01, Tensor(), sum_, control_, ctx_);
  }

 private:
  Arena weight_arena_{"weights", Device::kCpu, 16 << 20};
  Arena grad_arena_{"gradients", Device::kCpu, 16 << 20};
  Arena arena_{"optimizer", Device::kCpu, 64 << 20};
  Arena scratch_{"scratch", Device::kCpu, 64 << 20};
  Context ctx_;
  Weights weights_;
  std::unique_ptr<OptimizerState> optimizer_;
  Tensor sum_ = arena_.Alloc(DType::kF64, {1});
  Tensor control_ = arena_.Alloc(DType::kF64, {kAdamWControlSize});
};

// Adds a rank's f32 boxes of a slot to `values`, counting in `owners` who has each element.
void Join(const RankState& rank, const std::vector<CheckpointBox>& boxes, const std::string& slot,
          Values* values, std::vector<std::vector<int>>* owners) {
  const ParamTable& table = rank.weights().table();
  for (const CheckpointBox& box : boxes) {
    if (box.slot != slot) continue;
    ASSERT_EQ(box.dtype, DType::kF32);
    const int p = table.Find(box.name);
    const Param& param = table.params()[p];
    ASSERT_EQ(box.shape, param.shape);
    ForElements(param, {p, box.offset, box.extent, 0}, [&](int64_t i, int64_t at) {
      (*values)[p][i] = static_cast<const float*>(box.data)[at];
      ++(*owners)[p][i];
    });
  }
}

struct Step {
  Values weight, exp_avg, exp_avg_sq;
  double norm = 0;
};

// One step over all ranks of a mesh, put together from the boxes of their checkpoints.
Step StepOver(const ModelSpec& spec, const ParamTable& table, Mesh mesh, DType compute) {
  std::vector<std::unique_ptr<RankState>> ranks;
  double sum = 0;
  for (mesh.rank = 0; mesh.rank < mesh.world(); ++mesh.rank) {
    ranks.push_back(std::make_unique<RankState>(spec, table, mesh, compute));
    ranks.back()->FillGradients();
    sum += ranks.back()->SumOfSquares();
  }
  Step step;
  step.norm = std::sqrt(sum);
  Values* const slots[] = {&step.weight, &step.exp_avg, &step.exp_avg_sq};
  const char* const names[] = {"weight", "exp_avg", "exp_avg_sq"};
  std::vector<std::vector<int>> owners[3];
  for (int s = 0; s < 3; ++s) {
    for (const Param& param : table.params()) {
      slots[s]->emplace_back(static_cast<size_t>(param.numel()));
      owners[s].emplace_back(static_cast<size_t>(param.numel()));
    }
  }
  for (const auto& rank : ranks) {
    rank->Update();
    const std::vector<CheckpointBox> boxes = StateBoxes(rank->weights(), &rank->optimizer());
    for (int s = 0; s < 3; ++s) Join(*rank, boxes, names[s], slots[s], &owners[s]);
  }
  for (const auto& slot : owners) {
    for (size_t p = 0; p < slot.size(); ++p) {
      EXPECT_EQ(std::count(slot[p].begin(), slot[p].end(), 1), table.params()[p].numel())
          << table.params()[p].name;
    }
  }
  return step;
}

TEST(OptimizerState, EveryLayoutTakesTheStepOfOneRank) {
  const std::vector<ModelSpec> models = MeshModels();
  std::vector<Step> expected;
  for (const ModelSpec& spec : models) {
    expected.push_back(StepOver(spec, ParamTable(spec), Mesh{}, DType::kF32));
  }
  ForTheGrid([&](const ModelSpec& spec, const ParamTable& table, const Mesh& mesh) {
    size_t model = 0;
    while (models[model].attention.heads != spec.attention.heads) ++model;
    const Step step = StepOver(spec, table, mesh, DType::kF32);
    EXPECT_EQ(step.weight, expected[model].weight);
    EXPECT_EQ(step.exp_avg, expected[model].exp_avg);
    EXPECT_EQ(step.exp_avg_sq, expected[model].exp_avg_sq);
    // Sums of about 1e6 positive doubles in another order.
    EXPECT_NEAR(step.norm, expected[model].norm, 1e-12 * expected[model].norm);
  });
}

// With bf16 weights the masters take the f32 run's step, and the weights are their roundings.
TEST(OptimizerState, Bf16WeightsAreTheirMastersRounded) {
  const ModelSpec spec = MeshModels()[0];
  const Step expected = StepOver(spec, ParamTable(spec), Mesh{}, DType::kF32);
  const ParamTable table(spec, 3);
  const Mesh mesh{.data = 2, .tensor = 3, .expert = 2};
  EXPECT_EQ(StepOver(spec, table, mesh, DType::kBF16).weight, expected.weight);

  const ParamTable own(spec);
  RankState rank(spec, own, Mesh{}, DType::kBF16);
  const auto expect_rounded = [&](const char* when) {
    int compared = 0;
    for (const OptimizerState::Owned& owned : rank.optimizer().buckets()) {
      if (owned.weight.dtype() != DType::kBF16) continue;
      for (int64_t i = 0; i < owned.master.numel(); ++i) {
        ASSERT_EQ(owned.weight.data<BF16>()[i].bits, Rounded(owned.master.data<float>()[i]))
            << when;
        ++compared;
      }
    }
    EXPECT_GT(compared, 10000);
  };
  expect_rounded("after Init");
  rank.FillGradients();
  rank.Update();
  expect_rounded("after a step");
  for (const OptimizerState::Owned& owned : rank.optimizer().buckets()) {
    if (owned.weight.dtype() == DType::kBF16) Fill(owned.master, 0.1, rank.ctx());
  }
  rank.optimizer().MastersToWeights(rank.ctx());
  expect_rounded("after a load");
}

}  // namespace
}  // namespace krait
