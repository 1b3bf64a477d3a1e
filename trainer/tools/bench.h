// `krait bench step` and `krait bench kernels`.
#ifndef KRAIT_TRAINER_TOOLS_BENCH_H_
#define KRAIT_TRAINER_TOOLS_BENCH_H_

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/context.h"
#include "trainer/config/config.h"

namespace krait {

// Standard normal values, a function of `stream`.
void FillNormal(Tensor x, uint64_t stream, const Context& ctx = Context());

double Median(std::vector<double> values);  // of a non-empty list

// Seconds of each of `repeats` calls of fn, after one that is not counted.
std::vector<double> TimeCalls(int repeats, const std::function<void(int call)>& fn);

// The fp32 matrix product 2048 x 2048 x 2048 with the run's threads: the peak that CPU figures are
// held against.
class SgemmMeter {
 public:
  SgemmMeter();  // fills the operands and runs once without counting
  void Measure(int repeats);
  double FlopsPerSecond() const;  // median of all measurements

 private:
  Arena arena_;
  Tensor a_, b_, c_;
  std::vector<double> seconds_;
};

// Bytes per second of a large copy within the device's memory, by all threads on the CPU; read and
// written bytes both counted.
double CopyBytesPerSecond(Device device);

// What an op, or a family of them, takes of a step, and how near that is to what the machine
// allows: the time of its operations at the peak or of its bytes at the copy rate, whichever is
// longer.
struct StepPart {
  std::string name;
  OpFamily family = OpFamily::kOther;
  double ms = 0, calls = 0;  // per step
  // By what limits it; the other one is 0.
  double tflops = 0, gbytes_per_s = 0;
  double of_limit = 0;  // 0: unknown
};
// An exchange between ranks, in the order of work of one rank (kernels/enqueue_order.h).
struct StepTraffic {
  std::string name;
  int64_t bytes = 0;  // that it receives
  // Ops by name and number in the step, "" where there is none: the last one that had what is sent
  // as an operand; those behind which the exchange is issued and the pass waits for it.
  std::string final_op, issued_behind, waited_behind;
  int64_t ops_beside = 0;  // between the two, without fills and copies
};
struct StepBench {
  std::string config;
  std::string device;  // "cpu", or the GPU's name
  int64_t steps = 0;
  int ranks = 1;
  double tokens_per_s = 0, step_ms = 0, step_ms_mean = 0, flops_per_token = 0, tflops = 0;
  double peak_tflops = 0, copy_gbytes_per_s = 0, mfu = 0;
  double clock_mhz = 0, watts = 0;  // of the GPU, means over the measured steps
  int64_t peak_memory_bytes = 0, params_total = 0, params_active = 0;
  std::array<StepPart, kOpFamilies> families{};  // kOther: with what no op accounts for
  std::vector<StepPart> ops;                     // the longest first
  // What a step is longer by than one in which the ranks exchange nothing and copy as many rows of
  // their own (Groups::SetAlone): measured on GPUs. On the CPU nothing is computed while ranks
  // exchange something, so all of it, the waiting for slower ranks included, is exposed.
  double exposed_comm_ms = 0;
  std::vector<StepTraffic> traffic;  // of the first rank
  std::vector<Profile::Call> calls;  // of one more step, where a trace is asked for
};
// Synthetic tokens in documents of `document` tokens (0: of a whole sequence); steps to warm up, on
// CUDA for 3 seconds, so that the card is as hot as in a run; then `steps` (at least 1), of which
// the figures are medians. On several ranks all of them call it, and the first one's figures count;
// tflops and peak are those of a rank.
// `trace`: the calls of one more step are kept, this rank's.
absl::StatusOr<StepBench> RunStepBench(const RunConfig& config, int64_t steps, int64_t document = 0,
                                       World* world = nullptr, bool trace = false);
std::string StepBenchJson(const StepBench& bench);
std::string StepBenchText(const StepBench& bench);
// Its calls in the Trace Event Format, complete events in microseconds: what chrome://tracing and
// ui.perfetto.dev open. A stream has a row.
std::string StepTraceJson(const StepBench& bench);

struct KernelBench {
  std::string name;  // "selective_scan"
  OpFamily family;
  std::string direction;  // "forward", "backward", "weight", "weight+" (added to)
  std::string shape;      // "B4 T512 I640 N16"
  double ms = 0;
  double tflops = 0, gbytes_per_s = 0;  // one of the two; each operand counted once
  double of_limit = 0;                  // of the product's or the copy's rate
};
struct KernelBenches {
  std::string device;  // "cpu", or the GPU's name
  std::string shapes, dtype;
  // Of a large product (CPU: fp32 2048^3; CUDA: bf16 8192^3, after seconds of load) and of a copy.
  double product_tflops = 0, copy_gbytes_per_s = 0;
  std::vector<KernelBench> kernels;
};
// Every op family forward and backward, on the CPU in fp32 at the shapes of bench-20m, on CUDA in
// bf16 at those of jamba-3b; `only` keeps the names that begin with it. kConfig when none does.
absl::StatusOr<KernelBenches> RunKernelBench(const std::string& only, Device device);
std::string KernelBenchJson(const KernelBenches& benches);
std::string KernelBenchText(const KernelBenches& benches);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_BENCH_H_
