// Uses of weights that do not balance are fatal and name the storage; a step's first write of a
// gradient overwrites, later ones add.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/activation.h"
#include "kernels/base/exit_code.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::RelativeError;
using testing::TestBatch;
using testing::TinyModel;

ModelSpec MixedSpec() {
  ModelSpec spec = testing::TinySpec("m aE mE", 3);
  spec.moe.aux_loss = 0.1;
  spec.moe.z_loss = 0.05;
  return spec;
}

// A step into which `disturb` puts a use of a weight too many or too few, before the forward or
// between forward and backward.
class BalanceDeathTest : public ::testing::Test {
 protected:
  BalanceDeathTest() : model_(MixedSpec(), DType::kF32), batch_(1, 6, 11, 1) {
    omp_set_num_threads(1);  // a forked process has no pool of threads
    testing::RandomiseWeights(model_.weights(), 11, 2);
    for (const char* name : {"model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight",
                             "model.layers.2.mamba.x_proj.weight", "lm_head.weight"}) {
      storages_.push_back(model_.table().FindStorage(name));
    }
  }
  // Exits with the fatal path's code and a message that names the storage.
  template <typename Fn>
  void ExpectNamed(int storage, const Fn& statement) {
    const std::string name = model_.table().storages()[static_cast<size_t>(storage)].name;
    EXPECT_EXIT(statement(), ::testing::ExitedWithCode(static_cast<int>(ExitCode::kInternal)),
                name + ": after a ");
  }
  template <typename Fn>
  void Forward(const Fn& disturb) {
    model_.BeginStep(batch_);
    model_.weights().BeginPass(model_.ctx(), true, true);
    disturb();
    model_.Pass(batch_, 1, /*backward=*/false);
  }
  template <typename Fn>
  void Backward(const Fn& disturb) {
    const auto set = model_.model().NewActivations(batch_.value().shape, &arena_);
    model_.BeginStep(batch_);
    model_.weights().BeginPass(model_.ctx(), true, true);
    model_.model().Forward(batch_, model_.loss_scale(), model_.sums(), set.get(), model_.ctx());
    disturb();
    model_.model().Backward(batch_, 1, set.get(), model_.ctx());
  }
  TinyModel model_;
  TestBatch batch_;
  Arena arena_{"activations", Device::kCpu, 1 << 24};
  std::vector<int> storages_;
};

TEST_F(BalanceDeathTest, BalancedStepsPass) {
  for (int step = 0; step < 2; ++step) {
    Forward([] {});
    Backward([] {});
  }
}

TEST_F(BalanceDeathTest, TakenAndNotReleased) {
  for (const int s : storages_) {
    ExpectNamed(s, [&] { Forward([&] { model_.weights().Get(s); }); });
    ExpectNamed(s, [&] { Backward([&] { model_.weights().Get(s); }); });
  }
}

TEST_F(BalanceDeathTest, ReleasedAndNotTaken) {
  for (const int s : storages_) {
    ExpectNamed(s, [&] { Forward([&] { model_.weights().Release(s); }); });
    ExpectNamed(s, [&] { Backward([&] { model_.weights().Release(s); }); });
  }
}

TEST_F(BalanceDeathTest, GradientReadyTwiceOrInAForward) {
  for (const int s : storages_) {
    ExpectNamed(s, [&] { Forward([&] { model_.weights().GradReady(s); }); });
    ExpectNamed(s, [&] { Backward([&] { model_.weights().GradReady(s); }); });
  }
}

TEST_F(BalanceDeathTest, GradientNotReady) {
  Weights& weights = model_.weights();
  for (const int s : storages_) weights.GradReady(s);
  weights.EndBackward(storages_);
  for (const int missing : storages_) {
    ExpectNamed(missing, [&] {
      for (const int s : storages_) {
        if (s != missing) weights.GradReady(s);
      }
      weights.EndBackward(storages_);
    });
  }
}

// A backward of a range that reports what it has not computed, or the other way round, is found: it
// is checked against the storages of the range.
TEST_F(BalanceDeathTest, GradientOfAnotherRange) {
  Weights& weights = model_.weights();
  ExpectNamed(storages_[0], [&] {
    weights.GradReady(storages_[0]);
    weights.EndBackward({});
  });
}

// Gradients of two passes of one step.
std::vector<std::vector<double>> Gradients(TinyModel* model,
                                           const std::vector<const Batch*>& passes, double before) {
  for (const auto& pair : model->Pairs()) Fill(pair.gradient, before, model->ctx());
  model->BeginStep(*passes[0]);
  for (size_t i = 0; i < passes.size(); ++i) {
    model->weights().BeginPass(model->ctx(), i == 0, i + 1 == passes.size());
    model->Pass(*passes[i], /*passes=*/2, /*backward=*/true);
  }
  return model->Gradients();
}

class FirstWrite : public ::testing::TestWithParam<bool> {};

TEST_P(FirstWrite, OverwritesAndLaterOnesAdd) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  ModelSpec spec = MixedSpec();
  spec.tie_embeddings = GetParam();
  spec.mamba.proj_bias = true;
  spec.moe.top_k = 1;
  spec.moe.experts = 12;  // more than tokens: some get none
  TinyModel model(spec, DType::kF64, Recompute::kNorms);
  testing::RandomiseWeights(model.weights(), 11, 2);
  const TestBatch a(1, 6, spec.vocab_size, 1), b(1, 6, spec.vocab_size, 2);
  const Batch &pass_a = a, &pass_b = b;

  const auto of_a = Gradients(&model, {&pass_a}, 0), of_b = Gradients(&model, {&pass_b}, 0);
  EXPECT_EQ(Gradients(&model, {&pass_a}, kNan), of_a);
  EXPECT_EQ(Gradients(&model, {&pass_a}, 123), of_a);
  const auto of_both = Gradients(&model, {&pass_a, &pass_b}, kNan);
  int idle = 0;
  for (size_t p = 0; p < of_a.size(); ++p) {
    std::vector<double> sum = of_a[p];
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += of_b[p][i];
    const std::string& name = model.table().params()[p].name;
    EXPECT_LE(RelativeError(of_both[p], sum), 1e-12) << name;
    const bool zero = std::all_of(of_a[p].begin(), of_a[p].end(), [](double x) { return x == 0; });
    if (zero) {
      EXPECT_NE(name.find(".experts."), std::string::npos) << name << " has no gradient";
      ++idle;
    }
  }
  // Two MoE sublayers, at least six idle experts of three matrices in each.
  EXPECT_GE(idle, 2 * 6 * 3);
}

INSTANTIATE_TEST_SUITE_P(Embeddings, FirstWrite, ::testing::Bool(), [](const auto& test) {
  return std::string(test.param ? "Tied" : "Untied");
});

}  // namespace
}  // namespace krait
