#include "trainer/tools/bench.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <thread>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/number.h"
#include "kernels/base/parallel_for.h"
#include "kernels/base/random.h"
#include "kernels/cuda/runtime.h"
#include "kernels/gemm.h"
#include "kernels/random_fill.h"
#include "nlohmann/json.hpp"
#include "trainer/checkpoint/checkpoint_ranks.h"
#include "trainer/report/environment.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

constexpr uint64_t kWarmUpSteps = 2;
constexpr double kWarmUpSeconds = 3;  // on CUDA
constexpr int64_t kSgemmSize = 2048;
constexpr double kShownShare = 0.002;   // of a step, from which on an op has a line of its own
constexpr uint64_t kProfiledSteps = 3;  // on CUDA
constexpr const char* kCpuPeak = "fp32 matrix product 2048^3, same run and threads";
constexpr const char* kCudaPeak = "dense bf16 products by the datasheet";

// Uniform random tokens in documents of `document` tokens (0: of a row); every token that another
// one of its document follows has a target. The rows of the mesh's rank.
TokenBatch SyntheticBatch(const RunConfig& config, const Mesh& mesh, uint64_t step,
                          int64_t document) {
  TokenBatch batch;
  batch.sequences = config.accumulation(mesh.data) * config.train.micro_batch;
  batch.seq_len = config.data.seq_len;
  const int64_t n = batch.sequences * batch.seq_len;
  const RandomStream random(
      config.train.seed, RandomPurpose::kSynthetic,
      step * static_cast<uint64_t>(mesh.data) + static_cast<uint64_t>(mesh.data_index()));
  batch.tokens.resize(static_cast<size_t>(n));
  batch.targets.assign(batch.tokens.size(), -1);
  batch.doc_start.assign(batch.tokens.size(), 0);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random.Bits(static_cast<uint64_t>(i))[0];
    const auto id = static_cast<int32_t>(bits % static_cast<uint32_t>(config.model.vocab_size));
    batch.tokens[static_cast<size_t>(i)] = id;
    const int64_t position = i % batch.seq_len;
    const int64_t start = document > 0 ? position / document * document : 0;
    batch.doc_start[static_cast<size_t>(i)] = static_cast<int32_t>(start);
    if (position == start) continue;
    batch.targets[static_cast<size_t>(i - 1)] = id;
    ++batch.target_count;
  }
  return batch;
}

}  // namespace

void FillNormal(Tensor x, uint64_t stream, const Context& ctx) {
  const int64_t n = x.numel();
  FillNormal(x.View({1, n}), RandomStream(1, RandomPurpose::kSynthetic, stream), /*first=*/0,
             /*row_step=*/n, /*scale=*/1, ctx);
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

double CopyBytesPerSecond(Device device) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  Arena arena("copy", device, 2 * kBytes + 4096);
  const Tensor from = arena.Alloc(DType::kU8, {kBytes}), to = arena.Alloc(DType::kU8, {kBytes});
  std::vector<double> seconds;
  if (device == Device::kCuda) {
    constexpr int kCopies = 10;
    seconds = TimeCalls(7, [&](int) {
      for (int i = 0; i < kCopies; ++i) {
        cuda::CopyOnDevice(to.raw(), from.raw(), kBytes, /*stream=*/nullptr);
      }
      cuda::Synchronize();
    });
    for (double& s : seconds) s /= kCopies;
  } else {
    char* const source = static_cast<char*>(from.raw());
    char* const target = static_cast<char*>(to.raw());
    std::memset(source, 1, static_cast<size_t>(kBytes));
    seconds = TimeCalls(7, [&](int) {
      ParallelFor(kBytes, 1 << 20, [&](int64_t begin, int64_t end) {
        std::memcpy(target + begin, source + begin, static_cast<size_t>(end - begin));
      });
    });
  }
  return 2.0 * static_cast<double>(kBytes) / Median(seconds);
}

namespace {

// What is not this process's: on CUDA the memory taken before its first allocation.
int64_t MemoryBefore(Device device) { return device == Device::kCuda ? MemoryOf(device).used : 0; }

// Clock and power of the GPU, read ten times a second by a thread of its own.
class LoadMeter {
 public:
  LoadMeter() : thread_([this](const std::stop_token& stop) { Run(stop); }) {}
  cuda::DeviceLoad Mean() {
    thread_.request_stop();
    if (thread_.joinable()) thread_.join();
    const double n = std::max(1, readings_);
    return {sum_.clock_mhz / n, sum_.watts / n};
  }

 private:
  void Run(const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      const cuda::DeviceLoad load = cuda::Load();
      sum_.clock_mhz += load.clock_mhz;
      sum_.watts += load.watts;
      ++readings_;
    }
  }
  cuda::DeviceLoad sum_;
  int readings_ = 0;
  std::jthread thread_;
};

// The part of a step that `op`, profiled over `steps` steps, is.
StepPart PartOf(std::string name, const Profile::Op& op, double steps, const StepBench& bench) {
  StepPart part{.name = std::move(name),
                .family = op.family,
                .ms = op.seconds * 1000 / steps,
                .calls = static_cast<double>(op.calls) / steps};
  if (op.seconds == 0) return part;
  const double tflops = op.flops / op.seconds / 1e12;
  const double gbytes = static_cast<double>(op.bytes) / op.seconds / 1e9;
  const double of_peak = bench.peak_tflops > 0 ? tflops / bench.peak_tflops : 0;
  const double of_copy = gbytes / bench.copy_gbytes_per_s;
  part.of_limit = std::max(of_peak, of_copy);
  (of_peak > of_copy ? part.tflops : part.gbytes_per_s) = of_peak > of_copy ? tflops : gbytes;
  return part;
}

// What ranks exchange in a step, from its order of work and that of the one behind it, whose
// forward pass waits for the weights. `count`: of the first.
std::vector<StepTraffic> TrafficOf(const EnqueueOrder& order, size_t count) {
  const auto op = [&](int64_t number) {
    return number > 0 ? absl::StrFormat("%s #%d", order.op(number), number) : std::string();
  };
  std::vector<StepTraffic> traffic;
  for (size_t i = 0; i < count; ++i) {
    const EnqueueOrder::Traffic& t = order.traffic()[i];
    traffic.push_back({.name = t.name,
                       .bytes = t.bytes,
                       .final_op = op(t.final_op),
                       .issued_behind = op(t.issued),
                       .waited_behind = op(std::max<int64_t>(0, t.waited)),
                       .ops_beside = t.work_beside});
  }
  return traffic;
}

// The parts of steps of `seconds` in all.
void SetParts(const Profile& profile, double seconds, double steps, StepBench* bench) {
  double accounted = 0;
  for (int f = 0; f < kOpFamilies; ++f) {
    const auto family = static_cast<OpFamily>(f);
    bench->families[f] = PartOf(Name(family), profile.Total(family), steps, *bench);
    accounted += bench->families[f].ms;
  }
  StepPart& other = bench->families[static_cast<int>(OpFamily::kOther)];
  other.ms += std::max(0.0, seconds * 1000 / steps - accounted);
  other.tflops = other.gbytes_per_s = other.of_limit = 0;
  for (const auto& [name, op] : profile.ops()) {
    bench->ops.push_back(PartOf(std::string(name), op, steps, *bench));
  }
  std::sort(bench->ops.begin(), bench->ops.end(),
            [](const StepPart& a, const StepPart& b) { return a.ms > b.ms; });
}

}  // namespace

absl::StatusOr<StepBench> RunStepBench(const RunConfig& config, int64_t steps, int64_t document,
                                       World* given, bool trace) {
  World* const world = OrAlone(given);
  KRAIT_RETURN_IF_ERROR(CheckDevice(config, world));
  StepBench bench;
  bench.ranks = world->size();
  bench.config = config.path;
  bench.steps = steps;
  const Device device = PlacementOf(config).device;
  const bool on_cuda = device == Device::kCuda;
  bench.device = on_cuda ? cuda::Info().name : "cpu";
  bench.copy_gbytes_per_s = CopyBytesPerSecond(device) / 1e9;
  const int64_t taken = MemoryBefore(device);
  Trainer trainer(config, world);
  const Mesh& mesh = trainer.mesh();
  trainer.Init();
  uint64_t step = 0;
  const double warm = MonotonicSeconds() + (on_cuda ? kWarmUpSeconds : 0);
  // The first rank's clock says how many: all ranks take the same steps.
  while (step < kWarmUpSteps || world->AllGather(int64_t{MonotonicSeconds() < warm}).front() != 0) {
    trainer.Step(SyntheticBatch(config, mesh, step++, document));
  }
  bench.params_total = trainer.weights().table().total();
  bench.params_active = trainer.weights().table().active(config.model);
  // Before the matrices of the peak measurement.
  bench.peak_memory_bytes = MemoryOf(device).used - taken;

  std::optional<SgemmMeter> sgemm;
  std::optional<LoadMeter> load;
  if (on_cuda) {
    load.emplace();
  } else {
    sgemm.emplace();
  }
  Profile profile;
  double profiled_seconds = 0, profiled_steps = 0;
  const auto run = [&] {
    const TokenBatch batch = SyntheticBatch(config, mesh, step++, document);
    const double start = MonotonicSeconds();
    trainer.Step(batch);
    const double seconds = MonotonicSeconds() - start;
    if (trainer.ctx().profile != nullptr) profiled_seconds += seconds, ++profiled_steps;
    return seconds;
  };
  std::vector<double> step_seconds;
  for (int64_t s = 0; s < steps; ++s) {
    // The peak is taken between the steps, so that both see the same machine.
    if (sgemm.has_value()) {
      sgemm->Measure(1);
      trainer.ctx().profile = &profile;
    }
    step_seconds.push_back(run());
  }
  // On CUDA the breakdown comes from steps of its own: its events are not free.
  if (on_cuda) {
    const cuda::DeviceLoad mean = load->Mean();
    bench.clock_mhz = mean.clock_mhz;
    bench.watts = mean.watts;
    trainer.ctx().profile = &profile;
    for (uint64_t s = 0; s < kProfiledSteps; ++s) {
      run();
      profile.Collect();
    }
  }
  trainer.ctx().profile = nullptr;
  if (bench.ranks > 1) {
    EnqueueOrder order;
    trainer.ctx().order = &order;
    run();
    const size_t count = order.traffic().size();
    run();
    trainer.ctx().order = nullptr;
    bench.traffic = TrafficOf(order, count);
  }
  if (trace) {
    Profile traced(/*keeps_calls=*/true);
    const TokenBatch batch = SyntheticBatch(config, mesh, step++, document);
    trainer.ctx().profile = &traced;
    trainer.Step(batch);
    trainer.ctx().profile = nullptr;
    if (on_cuda) traced.Collect();
    bench.calls = traced.calls();
  }
  // The same steps without communication, on GPUs: ranks of a CPU share its cores.
  if (on_cuda && bench.ranks > 1) {
    trainer.SetAlone(true);
    std::vector<double> alone;
    run();
    for (int64_t s = 0; s < steps; ++s) alone.push_back(run());
    world->Barrier();
    trainer.SetAlone(false);
    bench.exposed_comm_ms = (Median(step_seconds) - Median(alone)) * 1000;
  }
  const double median = Median(step_seconds);
  bench.step_ms = median * 1000;
  for (double seconds : step_seconds) {
    bench.step_ms_mean += seconds * 1000 / static_cast<double>(steps);
  }
  bench.tokens_per_s = static_cast<double>(config.train.batch_tokens.largest()) / median;
  bench.flops_per_token = FlopsPerToken(config.model, config.data.seq_len);
  bench.tflops = bench.flops_per_token * bench.tokens_per_s / bench.ranks / 1e12;
  bench.peak_tflops = (sgemm.has_value() ? sgemm->FlopsPerSecond() : trainer.peak_flops()) / 1e12;
  bench.mfu = bench.peak_tflops > 0 ? bench.tflops / bench.peak_tflops : 0;
  SetParts(profile, profiled_seconds, profiled_steps, &bench);
  if (!on_cuda) {
    bench.exposed_comm_ms = bench.families[static_cast<size_t>(OpFamily::kCommunication)].ms;
  }
  return bench;
}

std::string StepBenchJson(const StepBench& b) {
  nlohmann::ordered_json breakdown = nlohmann::ordered_json::object();
  for (const StepPart& part : b.families) breakdown[part.name] = part.ms;
  nlohmann::ordered_json ops = nlohmann::ordered_json::array();
  for (const StepPart& part : b.ops) {
    nlohmann::ordered_json op = {
        {"name", part.name}, {"family", Name(part.family)}, {"ms", part.ms}, {"calls", part.calls}};
    if (part.of_limit > 0) {
      op[part.tflops > 0 ? "tflops" : "gbytes_per_s"] =
          part.tflops > 0 ? part.tflops : part.gbytes_per_s;
      op["of_limit"] = part.of_limit;
    }
    ops.push_back(op);
  }
  nlohmann::ordered_json traffic = nlohmann::ordered_json::array();
  for (const StepTraffic& t : b.traffic) {
    traffic.push_back({{"name", t.name},
                       {"bytes", t.bytes},
                       {"final_op", t.final_op},
                       {"issued_behind", t.issued_behind},
                       {"waited_behind", t.waited_behind},
                       {"ops_beside", t.ops_beside}});
  }
  const nlohmann::ordered_json json = {{"config", b.config},
                                       {"device", b.device},
                                       {"threads", MaxThreads()},
                                       {"steps", b.steps},
                                       {"tokens_per_s", b.tokens_per_s},
                                       {"ranks", b.ranks},
                                       {"tokens_per_s_per_rank", b.tokens_per_s / b.ranks},
                                       {"step_ms", b.step_ms},
                                       {"step_ms_mean", b.step_ms_mean},
                                       {"flops_per_token", b.flops_per_token},
                                       {"tflops_per_rank", b.tflops},
                                       {"mfu", b.mfu},
                                       {"peak_tflops", b.peak_tflops},
                                       {"peak", b.device == "cpu" ? kCpuPeak : kCudaPeak},
                                       {"copy_gbytes_per_s", b.copy_gbytes_per_s},
                                       {"clock_mhz", b.clock_mhz},
                                       {"watts", b.watts},
                                       {"peak_memory_bytes", b.peak_memory_bytes},
                                       {"params_total", b.params_total},
                                       {"params_active", b.params_active},
                                       {"routing", "natural"},
                                       {"breakdown_ms", breakdown},
                                       {"ops", ops},
                                       {"exposed_comm_ms", b.exposed_comm_ms},
                                       {"traffic", traffic}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string StepTraceJson(const StepBench& b) {
  nlohmann::ordered_json events = nlohmann::ordered_json::array();
  int sides = 0;
  for (const Profile::Call& call : b.calls) {
    events.push_back({{"name", call.name},
                      {"cat", Name(call.family)},
                      {"ph", "X"},
                      {"ts", call.begin * 1e6},
                      {"dur", call.seconds * 1e6},
                      {"pid", 0},
                      {"tid", call.side}});
    sides = std::max(sides, call.side + 1);
  }
  const auto name = [&events](const char* what, int tid, const std::string& text) {
    events.push_back(
        {{"name", what}, {"ph", "M"}, {"pid", 0}, {"tid", tid}, {"args", {{"name", text}}}});
  };
  name("process_name", 0, b.config + ", one step on " + b.device);
  for (int side = 0; side < sides; ++side) {
    name("thread_name", side, b.device == "cpu" ? "ops" : "stream " + std::to_string(side));
  }
  const nlohmann::ordered_json json = {{"traceEvents", events}, {"displayTimeUnit", "ms"}};
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string StepBenchText(const StepBench& b) {
  const bool cpu = b.device == "cpu";
  std::string text = absl::StrFormat(
      "%s: %s parameters (%s active), %s\n"
      "  step          %.1f ms (median of %d; mean %.1f)\n"
      "  tokens/s      %s%s\n"
      "  TFLOP/s       %.4f of %.4f (%s): MFU %.1f%%\n"
      "  peak memory   %s\n",
      b.config, PrintShort(static_cast<double>(b.params_total)),
      PrintShort(static_cast<double>(b.params_active)),
      cpu ? absl::StrFormat("%d threads", MaxThreads()) : b.device, b.step_ms, b.steps,
      b.step_ms_mean, PrintShort(b.tokens_per_s),
      b.ranks > 1 ? absl::StrFormat(" on %d ranks", b.ranks) : "", b.tflops, b.peak_tflops,
      cpu ? kCpuPeak : kCudaPeak, b.mfu * 100, PrintBytes(b.peak_memory_bytes));
  if (b.watts > 0) {
    text += absl::StrFormat("  mean load     %.0f MHz, %.0f W\n", b.clock_mhz, b.watts);
  }
  if (b.ranks > 1) {
    text += absl::StrFormat("  communication %.1f ms of the step, not hidden by computing\n",
                            b.exposed_comm_ms);
    struct Sum {
      int64_t calls = 0, bytes = 0, beside = 0;
    };
    std::map<std::string, Sum> sums;
    for (const StepTraffic& t : b.traffic) {
      for (Sum* sum : {&sums[t.name], &sums["in all"]}) {
        ++sum->calls;
        sum->bytes += t.bytes;
        sum->beside += t.ops_beside > 0 ? t.bytes : 0;
      }
    }
    const Sum all = sums["in all"];
    sums.erase("in all");
    const auto add = [&](const char* indent, const std::string& name, const Sum& sum) {
      text +=
          absl::StrFormat("%s%s: %s in %d, %s of it with ops enqueued before it is waited for\n",
                          indent, name, PrintBytes(sum.bytes), sum.calls, PrintBytes(sum.beside));
    };
    add("  ", "a rank receives in a step", all);
    for (const auto& [name, sum] : sums) add("    ", name, sum);
  }
  text += absl::StrFormat(
      "  limits        %.4g TFLOP/s for products and attention, else %.4g GB/s, the rate of a "
      "copy\n",
      b.peak_tflops, b.copy_gbytes_per_s);
  double sum = 0;
  for (const StepPart& part : b.families) sum += part.ms;
  const auto line = [&](const StepPart& part, const char* indent, int width) {
    text += absl::StrFormat("%s%-*s %8.2f ms %5.1f%%", indent, width, part.name, part.ms,
                            part.ms / sum * 100);
    if (part.of_limit > 0) {
      const bool products = part.tflops > 0;
      text += absl::StrFormat("  %6.4g %-7s  %5.1f%% of the limit",
                              products ? part.tflops : part.gbytes_per_s,
                              products ? "TFLOP/s" : "GB/s", part.of_limit * 100);
    }
    text += "\n";
  };
  for (const StepPart& family : b.families) {
    line(family, "  ", 30);
    for (const StepPart& op : b.ops) {
      if (op.family == family.family && op.ms > kShownShare * sum) line(op, "    ", 28);
    }
  }
  return text;
}

}  // namespace krait
