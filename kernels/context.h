// What every op takes last: where it runs, its scratch memory, and who is watching.
// Plain C++: also included by .cu files.
#ifndef KRAIT_KERNELS_CONTEXT_H_
#define KRAIT_KERNELS_CONTEXT_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <initializer_list>

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
  int depth = 0;  // open scopes: an op that calls others counts as one
};

struct Context {
  Device device = Device::kCpu;
  void* stream = nullptr;  // cudaStream_t on CUDA; ops are enqueued, not waited for
  // Temporaries of ops and sublayers, in stack order. They belong to `stream`: memory that is given
  // back is reused by later work of the same stream without waiting. What another stream reads or
  // writes comes from an arena of its own, and an Event (kernels/event.h) orders the two.
  Arena* scratch = nullptr;
  bool planning = false;  // measure memory only: ops take their scratch and return
  bool deterministic = true;
  Profile* profile = nullptr;  // optional
};

// A named operand of an op. Undefined tensors are optional ones that were left out.
struct Operand {
  const char* name;
  const Tensor& tensor;
};

// The first lines of every op's public function:
//   OpScope op(ctx, OpFamily::kNorm, "RmsNormForward", {{"y", y}, {"x", x}});
//   if (op.planning()) return;
// Ops that use scratch memory take it between the two. Fatal, naming op and operand, when an
// operand is not on the context's device.
class OpScope {
 public:
  OpScope(const Context& ctx, OpFamily family, const char* name,
          std::initializer_list<Operand> operands);
  ~OpScope();
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;
  bool planning() const { return ctx_.planning; }
  const char* name() const { return name_; }

 private:
  const Context& ctx_;
  OpFamily family_;
  const char* name_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_CONTEXT_H_
