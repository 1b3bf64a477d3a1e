// What every op takes last: where it runs, its scratch memory, and who is watching.
// Plain C++: also included by .cu files.
#ifndef KRAIT_KERNELS_CONTEXT_H_
#define KRAIT_KERNELS_CONTEXT_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <vector>

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

// Seconds spent per op family, summed while attached to a Context. On CUDA they are times on the
// stream, taken by events: an op costs two records and no waiting, and Collect() adds up what has
// been recorded.
class Profile {
 public:
  Profile() = default;
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  // Waits for the ops timed on CUDA so far and adds their times to `seconds`; to be called before
  // these are read, and now and then (each op holds two events until then).
  void Collect();

  std::array<double, kOpFamilies> seconds{};
  std::array<int64_t, kOpFamilies> calls{};

 private:
  friend class OpScope;
  struct Span {
    OpFamily family;
    void *begin, *end;
  };
  void* Record(void* stream);  // an event, recorded on the stream

  int depth_ = 0;  // open scopes: an op that calls others counts as one
  std::vector<Span> spans_;
  std::vector<void*> free_events_;
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
// operand is not on the context's device. On CUDA the op is an NVTX range of its name.
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
  bool timed_ = false;
  void* begin_ = nullptr;  // on CUDA, when timed
  std::chrono::steady_clock::time_point start_;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_CONTEXT_H_
