// Whole layers on the GPU in bf16, as a training step runs them, in TFLOP/s of their products, hot:
// medians of passes over a second that follow 2 s of load.
//
//   build/cuda/tests/bench_layers_gpu_bench [moe|head]
//
// moe: an MoE sublayer, router to combination, D 4096, F 14336, 8 experts, 2 of them for each of
// 16384 tokens, which an untrained router chooses; 6 D F for each chosen row forward, twice that
// backward. head: LM head and loss, forward and backward, 16384 rows x 4096 x 65536.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/base/clock.h"
#include "kernels/base/random.h"
#include "kernels/cuda/runtime.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/random_fill.h"
#include "kernels/transfer.h"
#include "model/sublayer.h"

namespace krait {
namespace {

constexpr int64_t kTokens = 16384, kWidth = 4096;
constexpr DType kBF16 = DType::kBF16, kF32 = DType::kF32;

void Randomise(Tensor t, uint64_t seed, double scale, const Context& ctx) {
  const RandomStream stream(seed, RandomPurpose::kSynthetic, 0);
  FillNormal(t.View({t.numel(), 1}), stream, 0, 1, scale, ctx);
}

// Median seconds between events that `pass` records: element i is from event i to event i + 1.
std::vector<double> Medians(size_t events, const std::function<void(void* const*)>& pass) {
  std::vector<void*> event(events);
  for (void*& e : event) e = cuda::CreateEvent(/*timed=*/true);
  std::vector<std::vector<double>> seconds(events - 1);
  const double start = MonotonicSeconds();
  while (MonotonicSeconds() < start + 3) {
    const bool warm = MonotonicSeconds() > start + 2;
    pass(event.data());
    cuda::Synchronize();
    for (size_t i = 0; warm && i + 1 < events; ++i) {
      seconds[i].push_back(cuda::SecondsBetween(event[i], event[i + 1]));
    }
  }
  for (void* e : event) cuda::DestroyEvent(e);
  std::vector<double> medians;
  for (std::vector<double>& all : seconds) {
    std::sort(all.begin(), all.end());
    medians.push_back(all[all.size() / 2]);
  }
  return medians;
}

void BenchMoe() {
  ModelSpec spec;
  spec.vocab_size = 64, spec.d_model = kWidth, spec.n_layers = 1;
  spec.attention = {.heads = 1, .kv_heads = 1, .head_dim = 64};
  spec.moe.experts = 8, spec.moe.top_k = 2, spec.moe.d_ff = 14336;
  spec.sublayers = MakeSublayers({{.attention = true, .moe = true}});
  const ParamTable table(spec);
  const Placement placement = {.device = Device::kCuda, .compute = kBF16};
  Arena values("weights", Device::kCuda, int64_t{3} << 30);
  Arena grads("gradients", Device::kCuda, int64_t{6} << 30);
  Arena keep("activations", Device::kCuda, int64_t{4} << 30);
  Arena scratch("scratch", Device::kCuda, int64_t{4} << 30);
  Context ctx;
  ctx.device = Device::kCuda;
  ctx.scratch = &scratch;
  Weights weights(&table, placement, /*with_grad=*/true, &values, &grads);
  weights.Init(spec, /*seed=*/1, ctx);
  const auto rows = [&] { return keep.Alloc(kBF16, {kTokens, kWidth}); };
  const Tensor x = rows(), y = rows(), dx = rows(), dy = rows();
  Randomise(x, 1, 1, ctx), Randomise(dy, 2, 1e-3, ctx);
  RouterStats router;
  router.prob_sum = keep.Alloc(kF32, {1, spec.moe.experts});
  router.choice_count = keep.Alloc(DType::kI64, {1, spec.moe.experts});
  router.z_sum = keep.Alloc(kF32, {1});
  for (const Tensor& sum : {router.prob_sum, router.choice_count, router.z_sum}) Fill(sum, 0, ctx);
  PassContext pass;
  pass.shape = {.batch = 4, .seq_len = kTokens / 4};
  pass.router = &router;
  pass.ctx = &ctx;
  const auto module = MakeSublayer(spec, LocalSizesOf(spec, Mesh()), table, 1, 0);
  const auto saved = module->NewSaved();
  const std::vector<double> seconds = Medians(3, [&](void* const* event) {
    const ArenaScope scope(&keep);
    weights.BeginPass(ctx, /*first=*/true, /*last=*/true);
    cuda::RecordEvent(event[0], nullptr);
    module->Forward(y, x, weights, &keep, saved.get(), /*state=*/nullptr, pass);
    cuda::RecordEvent(event[1], nullptr);
    module->Backward(dx, dy, x, weights, saved.get(), /*state=*/nullptr, pass);
    cuda::RecordEvent(event[2], nullptr);
  });
  const auto forward = 6.0 * static_cast<double>(spec.moe.top_k * kTokens) * kWidth *
                       static_cast<double>(spec.moe.d_ff);
  std::vector<int64_t> counts(static_cast<size_t>(spec.moe.experts));
  Download(counts.data(), router.choice_count, ctx);
  const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
  std::printf(
      "moe   forward %.3f ms %.0f TFLOP/s  backward %.3f ms %.0f TFLOP/s  (most used expert "
      "%.2f times the least used)\n",
      seconds[0] * 1e3, forward / seconds[0] * 1e-12, seconds[1] * 1e3,
      2 * forward / seconds[1] * 1e-12, static_cast<double>(*most) / static_cast<double>(*least));
}

void BenchHead() {
  constexpr int64_t kVocabulary = 65536;
  Arena memory("operands", Device::kCuda, int64_t{3} << 30);
  Arena scratch("scratch", Device::kCuda, int64_t{1} << 30);
  Context ctx;
  ctx.device = Device::kCuda;
  ctx.scratch = &scratch;
  const Tensor x = memory.Alloc(kBF16, {kTokens, kWidth});
  const Tensor work = memory.Alloc(kBF16, {kTokens, kWidth});
  const Tensor w = memory.Alloc(kBF16, {kVocabulary, kWidth});
  const Tensor dw = memory.Alloc(kF32, {kVocabulary, kWidth});
  const Tensor losses = memory.Alloc(kF32, {kTokens}), scale = memory.Alloc(DType::kF64, {1});
  const Tensor targets = memory.Alloc(DType::kI32, {kTokens});
  Randomise(x, 1, 1, ctx), Randomise(w, 2, 0.02, ctx);
  Fill(scale, 1.0 / kTokens, ctx);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < kTokens; ++i) ids.push_back(static_cast<int32_t>(i * 7919 % kVocabulary));
  Upload(targets, ids.data(), ctx);
  const double seconds = Medians(2, [&](void* const* event) {
    cuda::CopyOnDevice(work.raw(), x.raw(), x.bytes(), nullptr);  // its gradient takes its place
    cuda::RecordEvent(event[0], nullptr);
    LinearCrossEntropy(losses, work, dw, /*accumulate=*/false, w, targets,
                       WholeVocabulary(kVocabulary), scale, /*sink=*/nullptr, ctx);
    cuda::RecordEvent(event[1], nullptr);
  })[0];
  const double flops = 6.0 * kTokens * kWidth * kVocabulary;
  std::printf("head  %.3f ms %.0f TFLOP/s, %.0f MB of scratch\n", seconds * 1e3,
              flops / seconds * 1e-12, static_cast<double>(scratch.high_water()) * 1e-6);
}

int Main(const std::string& only) {
  std::string reason;
  if (!cuda::Available(&reason)) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 1;
  }
  if (only != "head") BenchMoe();
  if (only != "moe") BenchHead();
  return 0;
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) { return krait::Main(argc > 1 ? argv[1] : ""); }
