// In which order ops and traffic between ranks were enqueued: what a collective has to hide behind.
// Ranks of a CPU, where nothing runs beside anything, enqueue in the order in which GPUs would.
#ifndef KRAIT_KERNELS_ENQUEUE_ORDER_H_
#define KRAIT_KERNELS_ENQUEUE_ORDER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace krait {

struct Operand;

// Records while attached to a Context (Context::order). Ops are numbered from 1 on in the order of
// the pass; traffic has no numbers, but places among them.
class EnqueueOrder {
 public:
  struct Traffic {
    std::string name;
    int64_t bytes = 0;     // that this rank receives
    int64_t final_op = 0;  // the last op that had a part of what is sent as an operand; 0: none
    int64_t issued = 0;    // ops before it
    // Ops before the first one that waits for it; as `issued` where the pass itself carries it. -1:
    // nothing has waited yet.
    int64_t waited = -1;
    int64_t work_beside = 0;  // ops between the two, without small ones (fills, copies)
  };

  const std::vector<Traffic>& traffic() const { return traffic_; }
  int64_t ops() const { return static_cast<int64_t>(ops_.size()); }
  const std::string& op(int64_t number) const { return ops_[static_cast<size_t>(number - 1)].name; }

  // An op of the pass; `small`: not worth hiding anything behind.
  void AddOp(const char* name, bool small, const Operand* operands, size_t count);
  // A collective on the pass's stream (side 0) or a side stream; `sent`: what others get.
  void AddTraffic(const char* name, int side, const Tensor& sent, int64_t bytes);
  // A mark behind all traffic of a side stream so far, and a wait of the pass for it. A mark of
  // another order, from before this one was attached, waits for at most what this one has.
  int64_t Mark() const { return static_cast<int64_t>(traffic_.size()); }
  void WaitFor(int side, int64_t mark);

 private:
  // Bytes in memory.
  struct Range {
    const char *begin, *end;
  };
  static Range RangeOf(const Tensor& t);
  struct Op {
    std::string name;
    bool small;
    std::vector<Range> operands;
  };
  std::vector<Op> ops_;
  std::vector<Traffic> traffic_;
  std::vector<int> side_;  // of each traffic
};

}  // namespace krait

#endif  // KRAIT_KERNELS_ENQUEUE_ORDER_H_
