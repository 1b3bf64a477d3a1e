// What every op takes last: where it runs, its scratch memory, and who is watching.
// Plain C++: also included by .cu files.
#ifndef KRAIT_KERNELS_CONTEXT_H_
#define KRAIT_KERNELS_CONTEXT_H_

#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string_view>
#include <vector>

#include "kernels/arena.h"
#include "kernels/enqueue_order.h"

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
  kCommunication,
  kOther
};
inline constexpr int kOpFamilies = 12;
const char* Name(OpFamily family);  // "gemm", "attention", ...

// What was spent on each op, summed while attached to a Context. On CUDA the seconds are times on
// the stream, taken by events: an op costs two records and no waiting, and Collect() adds up what
// has been recorded.
class Profile {
 public:
  struct Op {
    OpFamily family = OpFamily::kOther;
    int64_t calls = 0;
    double seconds = 0;
    // Of matrix products and attention, two operations per multiplication; attention's whole
    // triangle whatever the documents, experts' rows without padding.
    double flops = 0;
    // Of the operands, each once per call, twice what is read and written.
    int64_t bytes = 0;
  };

  // One call of an op: when it began, from the first call on, and how long it took.
  struct Call {
    std::string_view name;
    OpFamily family = OpFamily::kOther;
    int side = 0;  // Context::side
    double begin = 0, seconds = 0;
  };

  // `keeps_calls`: calls() has them one by one, for a trace. On CUDA they are all of one Collect().
  explicit Profile(bool keeps_calls = false) : keeps_calls_(keeps_calls) {}
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  // Waits for the ops timed on CUDA so far and adds up their times; to be called before these are
  // read, and now and then (each op holds two events until then).
  void Collect();

  const std::map<std::string_view, Op>& ops() const { return ops_; }  // by name
  Op Total(OpFamily family) const;
  const std::vector<Call>& calls() const { return calls_; }

 private:
  friend class OpScope;
  struct Span {
    Op* op;
    void *begin, *end;
    std::string_view name;
    int side;
  };
  void* Record(void* stream);  // an event, recorded on the stream

  std::map<std::string_view, Op> ops_;
  const bool keeps_calls_;
  std::vector<Call> calls_;
  std::chrono::steady_clock::time_point origin_;  // on the CPU: of the first call
  int depth_ = 0;  // open scopes: an op that calls others counts as one
  std::vector<Span> spans_;
  std::vector<void*> free_events_;
};

struct Context {
  Device device = Device::kCpu;
  void* stream = nullptr;  // cudaStream_t on CUDA; ops are enqueued, not waited for
  int side = 0;            // which of a rank's streams that is: see SideStream (kernels/event.h)
  // Temporaries of ops and sublayers, in stack order. They belong to `stream`: memory that is given
  // back is reused by later work of the same stream without waiting. What another stream reads or
  // writes comes from an arena of its own, and an Event (kernels/event.h) orders the two.
  Arena* scratch = nullptr;
  bool planning = false;  // measure memory only: ops take their scratch and return
  bool deterministic = true;
  Profile* profile = nullptr;     // optional
  EnqueueOrder* order = nullptr;  // optional
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
  void CountFlops(double flops) const {
    if (timed_ != nullptr) timed_->flops += flops;
  }
  // On top of one time each operand.
  void CountBytes(int64_t bytes) const {
    if (timed_ != nullptr) timed_->bytes += bytes;
  }

 private:
  const Context& ctx_;
  const char* name_;
  Profile::Op* timed_ = nullptr;
  void* begin_ = nullptr;  // on CUDA, when timed
  std::chrono::steady_clock::time_point start_;
};

}  // namespace krait

#endif  // KRAIT_KERNELS_CONTEXT_H_
