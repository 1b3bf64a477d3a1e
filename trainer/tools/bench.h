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
void FillNormal(Tensor x, uint64_t stream);

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

// Bytes per second of a large copy by all threads, read and written bytes both counted.
double CopyBytesPerSecond();

struct StepBench {
  std::string config;
  std::string device;  // "cpu", or the GPU's name
  int64_t steps = 0;
  double tokens_per_s = 0, step_ms = 0, flops_per_token = 0, tflops = 0;
  double peak_tflops = 0, mfu = 0;
  int64_t peak_memory_bytes = 0, params_total = 0, params_active = 0;
  std::array<double, kOpFamilies> breakdown_ms{};  // per step; kOther: what no op accounts for
};
// Synthetic tokens, a few steps to warm up, then the median of `steps` (at least 1).
absl::StatusOr<StepBench> RunStepBench(const RunConfig& config, int64_t steps);
std::string StepBenchJson(const StepBench& bench);
std::string StepBenchText(const StepBench& bench);

struct KernelBench {
  std::string name;  // "selective_scan"
  OpFamily family;
  std::string direction;  // "forward", "backward"
  std::string shape;      // "B4 T512 I640 N16"
  double ms = 0;
  double tflops = 0, gbytes_per_s = 0;  // one of the two; each operand counted once
  double of_limit = 0;                  // of the SGEMM or the copy rate
};
struct KernelBenches {
  double sgemm_tflops = 0, copy_gbytes_per_s = 0;
  std::vector<KernelBench> kernels;
};
// Every op family forward and backward; `only` keeps the names that begin with it. kConfig when
// none does.
absl::StatusOr<KernelBenches> RunKernelBench(const std::string& only);
std::string KernelBenchJson(const KernelBenches& benches);
std::string KernelBenchText(const KernelBenches& benches);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_BENCH_H_
