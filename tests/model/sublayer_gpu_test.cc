// Every kind of sublayer in bf16 on the GPU: on equal inputs it is as near to fp32 as the CPU's
// bf16 is, up to a factor of two, in its output and in all its gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/cuda/runtime.h"
#include "kernels/transfer.h"
#include "model/sublayer.h"
#include "model/support/tiny_model.h"

namespace krait {
namespace {

using testing::Buf;

constexpr PassShape kShape{2, 160};  // long enough for the library's attention
constexpr int64_t kArena = int64_t{256} << 20;

// Sizes at which the fast kernels run.
ModelSpec Spec(const std::string& pattern) {
  ModelSpec spec = testing::TinySpec(pattern, 1);
  spec.d_model = 64;
  spec.attention = {.heads = 4, .kv_heads = 2, .head_dim = 16, .rope_theta = 100};
  spec.mamba.d_inner = 128;
  spec.mamba.d_state = 16;
  spec.mamba.d_conv = 4;
  spec.mamba.dt_rank = 8;
  spec.mlp_d_ff = 96;
  spec.moe.d_ff = 96;
  spec.moe.experts = 4;
  return spec;
}

std::vector<double> HostValues(Tensor t, const Context& ctx) {
  const std::vector<float> floats = DownloadFloats(t, ctx);
  return {floats.begin(), floats.end()};
}

void SetValues(Tensor t, const std::vector<double>& values, const Context& ctx) {
  Buf host(t.dtype(), {static_cast<int64_t>(values.size())});
  host.Assign(values);
  Upload(t, static_cast<Tensor>(host).raw(), ctx);
}

struct Named {
  std::string name;
  std::vector<double> values;
};

// Output and gradients of sublayer `index`; weights and inputs are rounded to bf16 in every run.
std::vector<Named> RunSublayer(const ModelSpec& spec, int index, Placement placement) {
  const ParamTable table(spec);
  Arena values("weights", placement.device, kArena), grads("gradients", placement.device, kArena);
  Arena keep("activations", placement.device, kArena), scratch("scratch", placement.device, kArena);
  Context ctx;
  ctx.device = placement.device;
  ctx.scratch = &scratch;
  Weights weights(&table, placement, /*with_grad=*/true, &values, &grads);
  {
    Arena source_arena("weights", Device::kCpu, kArena), none("gradients", Device::kCpu, 0);
    const Weights source(&table, {.device = Device::kCpu, .compute = DType::kBF16},
                         /*with_grad=*/false, &source_arena, &none);
    testing::RandomiseWeights(source, 3, /*router_scale=*/3);
    for (size_t p = 0; p < table.params().size(); ++p) {
      const int i = static_cast<int>(p);
      SetValues(weights.Param(i), testing::Values(source.Param(i)), ctx);
    }
  }
  const int64_t m = kShape.tokens(), d = spec.d_model;
  const auto tensor = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return keep.Alloc(dtype, shape);
  };
  const DType compute = placement.compute, wide = Wide(compute);
  const Tensor x = tensor(compute, {m, d}), y = tensor(compute, {m, d});
  const Tensor dx = tensor(compute, {m, d}), dy = tensor(compute, {m, d});
  const Tensor doc_start = tensor(DType::kI32, {kShape.batch, kShape.seq_len});
  Buf rounded(DType::kBF16, {m, d});
  SetValues(x, testing::Values(rounded.FillNormal(5)), ctx);
  SetValues(dy, testing::Values(rounded.FillNormal(6)), ctx);
  std::vector<int32_t> starts;
  for (int64_t b = 0; b < kShape.batch; ++b) {
    for (int64_t t = 0; t < kShape.seq_len; ++t)
      starts.push_back(static_cast<int32_t>(t >= 50 + b ? 50 + b : 0));
  }
  Upload(doc_start, starts.data(), ctx);

  RouterStats router;
  router.prob_sum = tensor(wide, {1, spec.moe.experts});
  router.choice_count = tensor(DType::kI64, {1, spec.moe.experts});
  router.z_sum = tensor(wide, {1});
  for (const Tensor& sum : {router.prob_sum, router.choice_count, router.z_sum}) Fill(sum, 0, ctx);
  PassContext pass;
  pass.shape = kShape;
  pass.documents.doc_start = doc_start;
  pass.router = &router;
  pass.ctx = &ctx;

  const auto module = MakeSublayer(spec, LocalSizesOf(spec, Mesh()), table, index, 0);
  const auto saved = module->NewSaved();
  weights.BeginPass(ctx, /*first=*/true, /*last=*/true);
  module->Forward(y, x, weights, &keep, saved.get(), /*state=*/nullptr, pass);
  module->Backward(dx, dy, x, weights, saved.get(), /*state=*/nullptr, pass);
  std::vector<Named> results = {{"y", HostValues(y, ctx)}, {"dx", HostValues(dx, ctx)}};
  for (size_t p = 0; p < table.params().size(); ++p) {
    const Param& param = table.params()[p];
    const bool residual_norm = param.name.find("input_layernorm") != std::string::npos ||
                               param.name.find("pre_ff_layernorm") != std::string::npos;
    if (table.storages()[static_cast<size_t>(param.storage)].sublayer != index || residual_norm) {
      continue;
    }
    results.push_back({param.name, HostValues(weights.ParamGrad(static_cast<int>(p)), ctx)});
  }
  return results;
}

struct Kind {
  const char* name;
  const char* pattern;
  int index;
};
class SublayerGpu : public ::testing::TestWithParam<Kind> {};

TEST_P(SublayerGpu, Bf16IsAsNearToFloat32AsTheCpus) {
  std::string reason;
  if (!cuda::Available(&reason)) GTEST_SKIP() << "no GPU: " << reason;
  const ModelSpec spec = Spec(GetParam().pattern);
  const auto run = [&](Device device, DType compute) {
    return RunSublayer(spec, GetParam().index, {.device = device, .compute = compute});
  };
  const auto exact = run(Device::kCpu, DType::kF32), cpu = run(Device::kCpu, DType::kBF16),
             gpu = run(Device::kCuda, DType::kBF16);
  ASSERT_EQ(gpu.size(), exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    const double of_cpu = testing::RelativeError(cpu[i].values, exact[i].values);
    const double of_gpu = testing::RelativeError(gpu[i].values, exact[i].values);
    std::printf("%-55s GPU %.2e CPU %.2e\n", exact[i].name.c_str(), of_gpu, of_cpu);
    // Where the CPU's mode has no rounding on the way, half of one of bf16.
    EXPECT_LE(of_gpu, std::max(2 * of_cpu, 0x1p-10)) << exact[i].name;
  }
}

INSTANTIATE_TEST_SUITE_P(, SublayerGpu,
                         ::testing::Values(Kind{"attention", "a", 0}, Kind{"mamba", "m", 0},
                                           Kind{"mlp", "m", 1}, Kind{"moe", "mE", 1}),
                         [](const auto& kind) { return std::string(kind.param.name); });

}  // namespace
}  // namespace krait
