// The selective scan on the GPU in bf16, with D, gate, bias and softplus: time, bytes that must
// move (each operand once) per second, and that rate as a share of a device copy of the same run.
// Then the time of a call between products that keep the card at its power limit, as in a step.
//
//   build/cuda/tests/bench_selective_scan_gpu_bench [B T I]      default: the project's shapes
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/random.h"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/selective_scan.h"
#include "kernels/gemm.h"
#include "kernels/selective_scan.h"

namespace krait {
namespace {

constexpr int64_t kStates = 16, kRank = 256;
constexpr int64_t kProduct = 8192;  // size of the products that load the card

// The median over rounds of the time of one call.
double Milliseconds(const std::function<void()>& call) {
  std::vector<double> rounds;
  for (int round = 0; round < 14; ++round) {
    constexpr int kCalls = 6;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    cuda::Synchronize();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (round >= 3) rounds.push_back(took.count() / kCalls);  // the first are warm-up
  }
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 2];
}

// The same between calls of `load`, over a second.
double MillisecondsAmong(const std::function<void()>& load, const std::function<void()>& call) {
  void *const begin = cuda::CreateEvent(true), *const end = cuda::CreateEvent(true);
  std::vector<double> rounds;
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - start < std::chrono::seconds(1)) {
    load();
    cuda::RecordEvent(begin, nullptr);
    call();
    cuda::RecordEvent(end, nullptr);
    load();
    cuda::Synchronize();
    rounds.push_back(cuda::SecondsBetween(begin, end) * 1e3);
  }
  cuda::DestroyEvent(begin), cuda::DestroyEvent(end);
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 2];
}

// Fills device memory with a pattern of normal values times `scale` plus `shift`.
void Fill(Tensor t, uint64_t seed, double scale, double shift) {
  constexpr int64_t kPeriod = 1'000'003;
  const RandomStream random(seed, RandomPurpose::kSynthetic, 0);
  const int64_t size = SizeOf(t.dtype()), count = std::min(kPeriod, t.numel());
  std::vector<char> host(static_cast<size_t>(count * size));
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(random.Normal(static_cast<uint64_t>(i)) * scale + shift);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(&host[static_cast<size_t>(i * size)],
                size == 2 ? static_cast<const void*>(&high) : &bits, static_cast<size_t>(size));
  }
  auto* to = static_cast<char*>(t.raw());
  cuda::CopyToDevice(to, host.data(), count * size);
  for (int64_t done = count; done < t.numel(); done *= 2) {
    cuda::CopyOnDevice(to + done * size, to, std::min(done, t.numel() - done) * size, nullptr);
  }
  cuda::Synchronize();
}

void Bench(int64_t batch, int64_t time, int64_t channels) {
  const int64_t tokens = batch * time, kept = ScanStates(Device::kCuda, time);
  const int64_t scratch_floats =
      cuda::ScanBackwardScratch(DType::kBF16, batch, time, channels, kStates);
  const int64_t width = kRank + 2 * kStates;
  Arena memory("operands", Device::kCuda,
               8 * tokens * channels * 2 + tokens * width * 6 +
                   batch * (kept + 4) * channels * kStates * 4 + channels * 256 +
                   3 * kProduct * kProduct * 2 + (int64_t{8} << 20));
  Arena scratch("scratch", Device::kCuda, scratch_floats * 4 + (int64_t{64} << 20));
  Context ctx;
  ctx.device = Device::kCuda;
  ctx.scratch = &scratch;
  const auto half = [&](Tensor t, int64_t i) { return t.Slice(2, i * channels, channels); };
  const Tensor xz = memory.Alloc(DType::kBF16, {batch, time, 2 * channels});
  const Tensor dxz = memory.Alloc(DType::kBF16, {batch, time, 2 * channels});
  const Tensor dt = memory.Alloc(DType::kBF16, {batch, time, channels});
  const Tensor ddt = memory.Alloc(DType::kBF16, {batch, time, channels});
  const Tensor y = memory.Alloc(DType::kBF16, {batch, time, channels});
  const Tensor dy = memory.Alloc(DType::kBF16, {batch, time, channels});
  const Tensor x_dbl = memory.Alloc(DType::kBF16, {batch, time, width});
  const Tensor dx_dbl = memory.Alloc(DType::kF32, {batch, time, width});
  const Tensor states = memory.Alloc(DType::kF32, {batch, kept, channels, kStates});
  const Tensor a_log = memory.Alloc(DType::kF32, {channels, kStates});
  const Tensor da = memory.Alloc(DType::kF32, {channels, kStates});
  const Tensor d = memory.Alloc(DType::kF32, {channels}),
               dd = memory.Alloc(DType::kF32, {channels});
  const Tensor bias = memory.Alloc(DType::kF32, {channels});
  const Tensor dbias = memory.Alloc(DType::kF32, {channels});
  Fill(xz, 1, 1, 0), Fill(dt, 2, 0.5, 0), Fill(dy, 3, 1, 0), Fill(x_dbl, 4, 1, 0);
  Fill(d, 5, 0.1, 1), Fill(bias, 6, 1, -4), Fill(a_log, 7, 0.8, 1.8);
  const SelectiveScanInputs in = {half(xz, 0),
                                  dt,
                                  x_dbl.Slice(2, kRank, kStates),
                                  x_dbl.Slice(2, kRank + kStates, kStates),
                                  half(xz, 1),
                                  a_log,
                                  d,
                                  bias,
                                  Tensor(),
                                  {}};
  const SelectiveScanGradients grad = {half(dxz, 0),
                                       ddt,
                                       half(dxz, 1),
                                       dx_dbl.Slice(2, kRank, kStates),
                                       dx_dbl.Slice(2, kRank + kStates, kStates),
                                       da,
                                       dd,
                                       dbias,
                                       Tensor()};
  const int64_t one = tokens * channels * 2, state_bytes = states.bytes();
  const double copy = static_cast<double>(2 * one) /
                      Milliseconds([&] { cuda::CopyOnDevice(ddt.raw(), dt.raw(), one, nullptr); });
  const auto run_forward = [&] { SelectiveScanForward(y, Tensor(), states, in, ctx); };
  const auto run_backward = [&] { SelectiveScanBackward(grad, y, dy, Tensor(), states, in, ctx); };
  const double forward = Milliseconds(run_forward), backward = Milliseconds(run_backward);
  Tensor product[3];
  for (Tensor& t : product) {
    t = memory.Alloc(DType::kBF16, {kProduct, kProduct});
    Fill(t, 8, 1, 0);
  }
  const auto load = [&] {
    for (int i = 0; i < 3; ++i) LinearForward(product[2], product[0], product[1], Tensor(), ctx);
  };
  const double hot_forward = MillisecondsAmong(load, run_forward);
  const double hot_backward = MillisecondsAmong(load, run_backward);
  const auto rate = [&](double ms, int64_t bytes) { return static_cast<double>(bytes) / ms; };
  const double f = rate(forward, 4 * one + state_bytes), b = rate(backward, 8 * one + state_bytes);
  std::printf(
      "B%ld T%ld I%ld  copy %.0f GB/s  forward %.3f ms %.0f GB/s %.0f %%  backward %.3f ms "
      "%.0f GB/s %.0f %%  among products %.3f and %.3f ms\n",
      static_cast<long>(batch), static_cast<long>(time), static_cast<long>(channels), copy * 1e-6,
      forward, f * 1e-6, 100 * f / copy, backward, b * 1e-6, 100 * b / copy, hot_forward,
      hot_backward);
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  std::string reason;
  if (!cuda::Available(&reason)) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 1;
  }
  if (argc > 3) {
    Bench(std::atol(argv[1]), std::atol(argv[2]), std::atol(argv[3]));
    return 0;
  }
  Bench(2, 4096, 4096), Bench(4, 4096, 4096), Bench(4, 4096, 8192), Bench(1, 4096, 4096);
  if (argc == 1) Bench(1, 65536, 8192);
  return 0;
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) { return krait::Main(argc, argv); }
