#include "trainer/tools/bench.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/number.h"
#include "kernels/base/parallel_for.h"
#include "kernels/base/random.h"
#include "kernels/cuda/runtime.h"
#include "kernels/gemm.h"
#include "kernels/random_fill.h"
#include "nlohmann/json.hpp"
#include "trainer/report/environment.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

constexpr uint64_t kWarmUpSteps = 2;
constexpr int64_t kSgemmSize = 2048;
constexpr uint64_t kProfiledSteps = 3;  // on CUDA
constexpr const char* kCpuPeak = "fp32 matrix product 2048^3, same run and threads";
constexpr const char* kCudaPeak = "dense bf16 products by the datasheet";

// Uniform random tokens without documents; every token but a row's last has a target.
TokenBatch SyntheticBatch(const RunConfig& config, uint64_t step) {
  TokenBatch batch;
  batch.sequences = config.accumulation(1) * config.train.micro_batch;
  batch.seq_len = config.data.seq_len;
  const int64_t n = batch.sequences * batch.seq_len;
  const RandomStream random(config.train.seed, RandomPurpose::kSynthetic, step);
  batch.tokens.resize(static_cast<size_t>(n));
  batch.targets.assign(batch.tokens.size(), -1);
  batch.doc_start.assign(batch.tokens.size(), 0);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random.Bits(static_cast<uint64_t>(i))[0];
    const auto id = static_cast<int32_t>(bits % static_cast<uint32_t>(config.model.vocab_size));
    batch.tokens[static_cast<size_t>(i)] = id;
    if (i % batch.seq_len > 0) batch.targets[static_cast<size_t>(i - 1)] = id;
  }
  batch.target_count = batch.sequences * (batch.seq_len - 1);
  return batch;
}

}  // namespace

void FillNormal(Tensor x, uint64_t stream) {
  const int64_t n = x.numel();
  FillNormal(x.View({1, n}), RandomStream(1, RandomPurpose::kSynthetic, stream), /*first=*/0,
             /*row_step=*/n, /*scale=*/1, Context());
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

std::vector<double> TimeCalls(int repeats, const std::function<void(int call)>& fn) {
  fn(0);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const double start = MonotonicSeconds();
    fn(i + 1);
    seconds.push_back(MonotonicSeconds() - start);
  }
  return seconds;
}

SgemmMeter::SgemmMeter()
    : arena_("matrix product", Device::kCpu, 3 * kSgemmSize * kSgemmSize * 4),
      a_(arena_.Alloc(DType::kF32, {kSgemmSize, kSgemmSize})),
      b_(arena_.Alloc(DType::kF32, {kSgemmSize, kSgemmSize})),
      c_(arena_.Alloc(DType::kF32, {kSgemmSize, kSgemmSize})) {
  FillNormal(a_, 0);
  FillNormal(b_, 1);
  Measure(1);
  seconds_.clear();
}

void SgemmMeter::Measure(int repeats) {
  for (int i = 0; i < repeats; ++i) {
    const double start = MonotonicSeconds();
    MatMul(c_, a_, /*transpose_a=*/false, b_, /*transpose_b=*/false, /*accumulate=*/false,
           Context());
    seconds_.push_back(MonotonicSeconds() - start);
  }
}

double SgemmMeter::FlopsPerSecond() const {
  constexpr double kWork = 2.0 * kSgemmSize * kSgemmSize * kSgemmSize;
  return kWork / Median(seconds_);
}

double CopyBytesPerSecond() {
  constexpr int64_t kBytes = int64_t{256} << 20;
  Arena arena("copy", Device::kCpu, 2 * kBytes + 4096);
  char* from = static_cast<char*>(arena.Alloc(DType::kU8, {kBytes}).raw());
  char* to = static_cast<char*>(arena.Alloc(DType::kU8, {kBytes}).raw());
  std::memset(from, 1, static_cast<size_t>(kBytes));
  const auto seconds = TimeCalls(7, [&](int) {
    ParallelFor(kBytes, 1 << 20, [&](int64_t begin, int64_t end) {
      std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
    });
  });
  return 2.0 * static_cast<double>(kBytes) / Median(seconds);
}

namespace {

// What is not this process's: on CUDA the memory taken before its first allocation.
int64_t MemoryBefore(Device device) { return device == Device::kCuda ? MemoryOf(device).used : 0; }

}  // namespace

absl::StatusOr<StepBench> RunStepBench(const RunConfig& config, int64_t steps) {
  KRAIT_RETURN_IF_ERROR(CheckDevice(config));
  StepBench bench;
  bench.config = config.path;
  bench.steps = steps;
  const int64_t taken = MemoryBefore(PlacementOf(config).device);
  Trainer trainer(config);
  trainer.Init();
  for (uint64_t s = 0; s < kWarmUpSteps; ++s) trainer.Step(SyntheticBatch(config, s));
  bench.params_total = trainer.weights().table().total();
  bench.params_active = trainer.weights().table().active(config.model);
  const Device device = trainer.ctx().device;
  bench.device = device == Device::kCuda ? cuda::Info().name : "cpu";
  // Before the matrices of the peak measurement.
  bench.peak_memory_bytes = MemoryOf(device).used - taken;

  std::optional<SgemmMeter> sgemm;
  if (device == Device::kCpu) sgemm.emplace();
  Profile profile;
  std::vector<double> step_seconds;
  for (int64_t s = 0; s < steps; ++s) {
    const TokenBatch batch = SyntheticBatch(config, kWarmUpSteps + static_cast<uint64_t>(s));
    // The peak is taken between the steps, so that both see the same machine.
    if (sgemm.has_value()) {
      sgemm->Measure(1);
      trainer.ctx().profile = &profile;
    }
    const double start = MonotonicSeconds();
    trainer.Step(batch);
    step_seconds.push_back(MonotonicSeconds() - start);
  }
  // On CUDA the breakdown comes from steps of its own: its events are not free.
  double profiled_seconds = 0, profiled_steps = 0;
  for (double seconds : step_seconds) profiled_seconds += seconds, ++profiled_steps;
  if (device == Device::kCuda) {
    trainer.ctx().profile = &profile;
    profiled_seconds = profiled_steps = 0;
    for (uint64_t s = 0; s < kProfiledSteps; ++s) {
      const TokenBatch batch = SyntheticBatch(config, kWarmUpSteps + s);
      const double start = MonotonicSeconds();
      trainer.Step(batch);
      profiled_seconds += MonotonicSeconds() - start;
      ++profiled_steps;
      profile.Collect();
    }
  }
  const double step = Median(step_seconds);
  bench.step_ms = step * 1000;
  bench.tokens_per_s = static_cast<double>(config.train.batch_tokens) / step;
  bench.flops_per_token = FlopsPerToken(config.model, config.data.seq_len);
  bench.tflops = bench.flops_per_token * bench.tokens_per_s / 1e12;
  bench.peak_tflops = (sgemm.has_value() ? sgemm->FlopsPerSecond() : trainer.peak_flops()) / 1e12;
  bench.mfu = bench.peak_tflops > 0 ? bench.tflops / bench.peak_tflops : 0;
  const double mean = profiled_seconds / profiled_steps;
  profile.Collect();
  double accounted = 0;
  for (int f = 0; f < kOpFamilies; ++f) {
    bench.breakdown_ms[f] = profile.seconds[f] * 1000 / profiled_steps;
    accounted += bench.breakdown_ms[f];
  }
  bench.breakdown_ms[static_cast<int>(OpFamily::kOther)] += std::max(0.0, mean * 1000 - accounted);
  return bench;
}

std::string StepBenchJson(const StepBench& b) {
  nlohmann::ordered_json breakdown = nlohmann::ordered_json::object();
  for (int f = 0; f < kOpFamilies; ++f) {
    breakdown[Name(static_cast<OpFamily>(f))] = b.breakdown_ms[f];
  }
  const nlohmann::ordered_json json = {{"config", b.config},
                                       {"device", b.device},
                                       {"threads", MaxThreads()},
                                       {"steps", b.steps},
                                       {"tokens_per_s", b.tokens_per_s},
                                       {"tokens_per_s_per_rank", b.tokens_per_s},
                                       {"step_ms", b.step_ms},
                                       {"flops_per_token", b.flops_per_token},
                                       {"tflops_per_rank", b.tflops},
                                       {"mfu", b.mfu},
                                       {"peak_tflops", b.peak_tflops},
                                       {"peak", b.device == "cpu" ? kCpuPeak : kCudaPeak},
                                       {"peak_memory_bytes", b.peak_memory_bytes},
                                       {"params_total", b.params_total},
                                       {"params_active", b.params_active},
                                       {"routing", "natural"},
                                       {"breakdown_ms", breakdown},
                                       {"exposed_comm_ms", 0}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string StepBenchText(const StepBench& b) {
  std::string text = absl::StrFormat(
      "%s: %s parameters (%s active), %s\n"
      "  step          %.1f ms (median of %d)\n"
      "  tokens/s      %s\n"
      "  TFLOP/s       %.4f of %.4f (%s): MFU %.1f%%\n"
      "  peak memory   %s\n",
      b.config, PrintShort(static_cast<double>(b.params_total)),
      PrintShort(static_cast<double>(b.params_active)),
      b.device == "cpu" ? absl::StrFormat("%d threads", MaxThreads()) : b.device, b.step_ms,
      b.steps, PrintShort(b.tokens_per_s), b.tflops, b.peak_tflops,
      b.device == "cpu" ? kCpuPeak : kCudaPeak, b.mfu * 100, PrintBytes(b.peak_memory_bytes));
  double sum = 0;
  for (double ms : b.breakdown_ms) sum += ms;
  for (int f = 0; f < kOpFamilies; ++f) {
    text += absl::StrFormat("  %-12s %8.2f ms %5.1f%%\n", Name(static_cast<OpFamily>(f)),
                            b.breakdown_ms[f], b.breakdown_ms[f] / sum * 100);
  }
  return text;
}

}  // namespace krait
