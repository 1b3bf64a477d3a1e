// `krait bench kernels`: every op family at named shapes.
#include <algorithm>
#include <memory>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/parallel_for.h"
#include "kernels/cuda/runtime.h"
#include "kernels/gemm.h"
#include "nlohmann/json.hpp"
#include "trainer/tools/bench.h"
#include "trainer/tools/bench_cases.h"

namespace krait {
namespace {

constexpr Shapes kCpuShapes = {.model = "bench-20m, B4 T512",
                               .batch = 4,
                               .t = 512,
                               .d = 320,
                               .i = 640,
                               .r = 20,
                               .f = 768,
                               .heads = 5,
                               .kv_heads = 5,
                               .head_dim = 64,
                               .experts = 4,
                               .vocabulary = 65536,
                               .params = 4 << 20};
constexpr Shapes kCudaShapes = {.model = "jamba-3b, B4 T4096",
                                .batch = 4,
                                .t = 4096,
                                .d = 2048,
                                .i = 4096,
                                .r = 128,
                                .f = 5632,
                                .heads = 16,
                                .kv_heads = 4,
                                .head_dim = 128,
                                .experts = 8,
                                .vocabulary = 65536,
                                .params = 1 << 27,
                                .dtype = DType::kBF16,
                                .device = Device::kCuda};
constexpr int kRotation = 3;  // sets of operands taken in turn
constexpr int kRepeats = 9;
// On the CPU reserved, and touched only where used.
constexpr int64_t kCpuArenaBytes = int64_t{2} << 30, kCudaArenaBytes = int64_t{16} << 30;
constexpr int64_t kCudaScratchBytes = int64_t{4} << 30;

// Median seconds of a call. On CUDA from rounds of ten calls between two events, after one round.
double SecondsOf(const std::vector<Op>& rotation, const Context& ctx) {
  const auto call = [&](int i) { rotation[static_cast<size_t>(i % kRotation)](ctx); };
  if (ctx.device == Device::kCpu) return Median(TimeCalls(kRepeats, call));
  constexpr int kCalls = 10;
  void *const begin = cuda::CreateEvent(/*timed=*/true), *const end = cuda::CreateEvent(true);
  std::vector<double> seconds;
  for (int round = 0; round <= kRepeats; ++round) {
    cuda::RecordEvent(begin, ctx.stream);
    for (int i = 0; i < kCalls; ++i) call(i);
    cuda::RecordEvent(end, ctx.stream);
    cuda::SynchronizeStream(ctx.stream);
    if (round > 0) seconds.push_back(cuda::SecondsBetween(begin, end) / kCalls);
  }
  cuda::DestroyEvent(begin);
  cuda::DestroyEvent(end);
  return Median(seconds);
}

// The rate of a large product in bf16 on CUDA, after seconds of load.
double CudaProductFlops() {
  constexpr int64_t kSize = 8192;
  constexpr double kWarmUpSeconds = 3;
  Arena arena("matrix product", Device::kCuda, int64_t{512} << 20);
  Context ctx;
  ctx.device = Device::kCuda;
  ctx.scratch = &arena;
  std::vector<Tensor> matrices;
  for (uint64_t i = 0; i < 3; ++i) {
    matrices.push_back(arena.Alloc(DType::kBF16, {kSize, kSize}));
    FillNormal(matrices.back(), i, ctx);
  }
  const std::vector<Op> product(kRotation, [matrices](const Context& c) {
    MatMul(matrices[0], matrices[1], false, matrices[2], true, /*accumulate=*/false, c);
  });
  const double until = MonotonicSeconds() + kWarmUpSeconds;
  double seconds = 0;
  do {
    seconds = SecondsOf(product, ctx);
  } while (MonotonicSeconds() < until);
  return 2.0 * kSize * kSize * kSize / seconds;
}

KernelBench Measure(const Case& c, const Shapes& shapes, double product_flops, double copy_bytes) {
  const bool cuda = shapes.device == Device::kCuda;
  Arena arena("bench operands", shapes.device, cuda ? kCudaArenaBytes : kCpuArenaBytes);
  Arena scratch("scratch", shapes.device, cuda ? kCudaScratchBytes : kCpuArenaBytes);
  Context ctx;
  ctx.device = shapes.device;
  ctx.scratch = &scratch;
  std::vector<Op> rotation;
  for (int i = 0; i < kRotation; ++i) {
    Operands operands(&arena, shapes, ctx);
    rotation.push_back(c.make(&operands));
  }
  for (const Op& op : rotation) op(ctx);  // pages, and what backward needs of forward
  const double seconds = SecondsOf(rotation, ctx);
  Profile profile;
  ctx.profile = &profile;
  rotation[0](ctx);
  double flops = 0, bytes = 0;
  for (const auto& [name, op] : profile.ops()) {
    flops += op.flops;
    bytes += static_cast<double>(op.bytes);
  }
  KernelBench bench{.name = c.name,
                    .family = c.family,
                    .direction = c.direction,
                    .shape = c.shape,
                    .ms = seconds * 1000};
  if (flops > 0) {
    bench.tflops = flops / seconds / 1e12;
    bench.of_limit = flops / seconds / product_flops;
  } else {
    bench.gbytes_per_s = bytes / seconds / 1e9;
    bench.of_limit = bytes / seconds / copy_bytes;
  }
  return bench;
}

}  // namespace

absl::StatusOr<KernelBenches> RunKernelBench(const std::string& only, Device device) {
  const bool on_cuda = device == Device::kCuda;
  const Shapes& shapes = on_cuda ? kCudaShapes : kCpuShapes;
  std::vector<Case> cases = AllCases(shapes);
  std::erase_if(cases, [&](const Case& c) { return !std::string(c.name).starts_with(only); });
  if (cases.empty()) {
    std::string names;
    for (const Case& c : AllCases(shapes)) {
      if (names.find(c.name) == std::string::npos)
        names += (names.empty() ? "" : ", ") + std::string(c.name);
    }
    return Error(ExitCode::kConfig, "--only " + only + ": no such op; there are " + names);
  }
  KernelBenches benches;
  benches.device = on_cuda ? cuda::Info().name : "cpu";
  benches.shapes = shapes.model;
  benches.dtype = Name(shapes.dtype);
  double product_flops = 0;
  if (on_cuda) {
    product_flops = CudaProductFlops();
  } else {
    SgemmMeter sgemm;
    sgemm.Measure(5);
    product_flops = sgemm.FlopsPerSecond();
  }
  const double copy = CopyBytesPerSecond(device);
  benches.product_tflops = product_flops / 1e12;
  benches.copy_gbytes_per_s = copy / 1e9;
  for (const Case& c : cases) {
    benches.kernels.push_back(Measure(c, shapes, product_flops, copy));
  }
  return benches;
}

std::string KernelBenchJson(const KernelBenches& benches) {
  nlohmann::ordered_json kernels = nlohmann::ordered_json::array();
  for (const KernelBench& k : benches.kernels) {
    nlohmann::ordered_json entry = {{"name", k.name},           {"family", Name(k.family)},
                                    {"direction", k.direction}, {"shape", k.shape},
                                    {"dtype", benches.dtype},   {"ms", k.ms}};
    if (k.tflops > 0) {
      entry["tflops"] = k.tflops;
    } else {
      entry["gbytes_per_s"] = k.gbytes_per_s;
    }
    entry["of_limit"] = k.of_limit;
    kernels.push_back(entry);
  }
  const nlohmann::ordered_json json = {{"device", benches.device},
                                       {"threads", MaxThreads()},
                                       {"shapes", benches.shapes},
                                       {"product_tflops", benches.product_tflops},
                                       {"copy_gbytes_per_s", benches.copy_gbytes_per_s},
                                       {"kernels", kernels}};
  return json.dump(2) + "\n";
}

std::string KernelBenchText(const KernelBenches& benches) {
  std::string text = absl::StrFormat(
      "%s, %s, shapes of %s\n"
      "limits: matrix product %.4g TFLOP/s, copy %.4g GB/s (read + write)\n"
      "%-20s %-9s %-32s %9s %18s %9s\n",
      benches.device == "cpu" ? absl::StrFormat("%d threads", MaxThreads()) : benches.device,
      benches.dtype, benches.shapes, benches.product_tflops, benches.copy_gbytes_per_s, "op", "",
      "shape", "ms", "rate", "of limit");
  for (const KernelBench& k : benches.kernels) {
    const std::string rate = k.tflops > 0 ? absl::StrFormat("%.4g TFLOP/s", k.tflops)
                                          : absl::StrFormat("%.4g GB/s", k.gbytes_per_s);
    text += absl::StrFormat("%-20s %-9s %-32s %9.3f %18s %8.1f%%\n", k.name, k.direction, k.shape,
                            k.ms, rate, k.of_limit * 100);
  }
  return text;
}

}  // namespace krait
