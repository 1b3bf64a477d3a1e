// The rate of RMSNorm on the GPU beside that of a device copy of the same run, in bytes that must
// move (each operand counted once).
//
//   build/cuda/tests/bench_rms_norm_gpu_bench [M D]        default 16384 4096, bf16
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/random.h"
#include "kernels/cuda/runtime.h"
#include "kernels/rms_norm.h"

namespace krait {
namespace {

// The median over 21 rounds of the time of one call, from rounds of 20 calls.
double Milliseconds(const std::function<void(int)>& call) {
  std::vector<double> rounds;
  for (int round = 0; round < 24; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20; ++i) call(i);
    cuda::Synchronize();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (round >= 3) rounds.push_back(took.count() / 20);  // the first are warm-up
  }
  std::nth_element(rounds.begin(), rounds.begin() + 10, rounds.end());
  return rounds[10];
}

int Main(int64_t rows, int64_t cols) {
  std::string reason;
  if (!cuda::Available(&reason)) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 1;
  }
  // Three sets of operands, used in turn, so that no call finds its operands in the cache.
  constexpr int kSets = 3;
  const int64_t bytes = rows * cols * 2;
  Arena memory("operands", Device::kCuda,
               kSets * (4 * bytes + rows * 4) + cols * 8 + (int64_t{1} << 20));
  Arena scratch("scratch", Device::kCuda, int64_t{256} << 20);
  Context ctx;
  ctx.device = Device::kCuda;
  ctx.scratch = &scratch;
  const Tensor w = memory.Alloc(DType::kF32, {cols}), dw = memory.Alloc(DType::kF32, {cols});
  const std::vector<float> ones(static_cast<size_t>(cols), 1.0f);
  cuda::CopyToDevice(w.raw(), ones.data(), cols * 4);
  std::vector<uint16_t> host(static_cast<size_t>(rows * cols));
  const RandomStream random(1, RandomPurpose::kSynthetic, 0);
  constexpr size_t kPeriod = 1'000'003;  // random values, repeated
  for (size_t i = 0; i < host.size(); ++i) {
    const auto value = i < kPeriod ? static_cast<float>(random.Uniform(i) * 4 - 2) : 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    host[i] = i < kPeriod ? static_cast<uint16_t>(bits >> 16) : host[i - kPeriod];
  }
  Tensor a[kSets], b[kSets], c[kSets], d[kSets], rstd[kSets];
  for (int s = 0; s < kSets; ++s) {
    for (Tensor* t : {&a[s], &b[s], &c[s], &d[s]}) {
      *t = memory.Alloc(DType::kBF16, {rows, cols});
      cuda::CopyToDevice(t->raw(), host.data(), bytes);
    }
    rstd[s] = memory.Alloc(DType::kF32, {rows});
  }

  std::printf("RMSNorm, M %ld, D %ld, bf16\n", static_cast<long>(rows), static_cast<long>(cols));
  double copy_rate = 0;
  const auto report = [&](const char* name, int64_t moved, const std::function<void(int)>& call) {
    const double ms = Milliseconds([&](int i) { call(i % kSets); });
    const double rate = static_cast<double>(moved) / ms * 1e-6;
    if (copy_rate == 0) copy_rate = rate;
    std::printf("%-20s %8.4f ms %6.0f GB/s %6.1f %% of the copy\n", name, ms, rate,
                100 * rate / copy_rate);
  };
  const int64_t stats = rows * 4;
  report("device copy", 2 * bytes,
         [&](int s) { cuda::CopyOnDevice(b[s].raw(), a[s].raw(), bytes, ctx.stream); });
  report("forward", 2 * bytes + stats,
         [&](int s) { RmsNormForward(b[s], rstd[s], a[s], w, 1e-6, ctx); });
  report("backward", 3 * bytes + stats,
         [&](int s) { RmsNormBackward(c[s], dw, b[s], a[s], rstd[s], w, false, ctx); });
  report("residual forward", 4 * bytes + stats,
         [&](int s) { ResidualRmsNormForward(c[s], d[s], rstd[s], a[s], b[s], w, 1e-6, ctx); });
  report("residual backward", 4 * bytes + stats,
         [&](int s) { ResidualRmsNormBackward(d[s], dw, b[s], a[s], rstd[s], w, ctx); });
  return 0;
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  return krait::Main(argc > 2 ? std::atol(argv[1]) : 16384, argc > 2 ? std::atol(argv[2]) : 4096);
}
