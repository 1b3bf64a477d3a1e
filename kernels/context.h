// What every op takes last: where it runs, its scratch memory, and who is watching.
// Plain C++: also included by .cu files.
#ifndef KRAIT_KERNELS_CONTEXT_H_
#define KRAIT_KERNELS_CONTEXT_H_

#include <array>
#include <chrono>
#include <cstdint>

#include "kernels/arena.h"

namespace krait {

// The families of `krait bench step`'s breakdown.
enum class OpFamily : uint8_t {
  kGemm,
  kAttention,
  kScan,
  kConv,
  kNorm,
  kActivation,
  kMoe,
  kEmbedding,
  kLoss,
  kOptimizer,
  kOther
};
inline constexpr int kOpFamilies = 11;
const char* Name(OpFamily family);  // "gemm", "attention", ...

// Seconds spent per op family, summed while attached to a Context (CPU; on CUDA the caller
// synchronises around what it times).
struct Profile {
  std::array<double, kOpFamilies> seconds{};
  std::array<int64_t, kOpFamilies> calls{};
};

struct Context {
  Device device = Device::kCpu;
  void* stream = nullptr;    // cudaStream_t on CUDA; ops are enqueued, not waited for
  Arena* scratch = nullptr;  // temporaries of ops and sublayers; stack order
  bool planning = false;     // measure memory only: ops take their scratch and return
  bool deterministic = true;
  Profile* profile = nullptr;  // optional
};

// The first line of every op's public function:
//   OpScope op(ctx, OpFamily::kNorm);  if (op.planning()) return;
// Ops that use scratch memory take it between the two.
class OpScope {
 public:
  OpScope(const Context& ctx, OpFamily family) : ctx_(ctx), family_(family) {
    if (ctx_.profile != nullptr) start_ = std::chrono::steady_clock::now();
  }
  ~OpScope() {
    if (ctx_.profile == nullptr) return;
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    ctx_.profile->seconds[static_cast<int>(family_)] += elapsed.count();
    ctx_.profile->calls[static_cast<int>(family_)] += 1;
  }
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;
  bool planning() const { return ctx_.planning; }

 private:
  const Context& ctx_;
  OpFamily family_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_CONTEXT_H_
