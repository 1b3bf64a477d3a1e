#include "kernels/enqueue_order.h"

#include <algorithm>
#include <utility>

#include "kernels/context.h"

namespace krait {

EnqueueOrder::Range EnqueueOrder::RangeOf(const Tensor& t) {
  if (!t.defined() || t.numel() == 0) return {nullptr, nullptr};
  int64_t last = 0;
  for (int d = 0; d < t.rank(); ++d) last += (t.dim(d) - 1) * t.stride(d);
  const auto* begin = static_cast<const char*>(t.raw());
  return {begin, begin + (last + 1) * SizeOf(t.dtype())};
}

void EnqueueOrder::AddOp(const char* name, bool small, const Operand* operands, size_t count) {
  Op op{.name = name, .small = small, .operands = {}};
  for (size_t i = 0; i < count; ++i) op.operands.push_back(RangeOf(operands[i].tensor));
  ops_.push_back(std::move(op));
}

void EnqueueOrder::AddTraffic(const char* name, int side, const Tensor& sent, int64_t bytes) {
  Traffic traffic{.name = name, .bytes = bytes, .issued = ops(), .waited = side == 0 ? ops() : -1};
  const Range range = RangeOf(sent);
  for (int64_t i = ops(); i > 0 && traffic.final_op == 0; --i) {
    for (const Range& operand : ops_[static_cast<size_t>(i - 1)].operands) {
      if (operand.begin < range.end && range.begin < operand.end) traffic.final_op = i;
    }
  }
  traffic_.push_back(std::move(traffic));
  side_.push_back(side);
}

void EnqueueOrder::WaitFor(int side, int64_t mark) {
  for (size_t i = 0; i < std::min(static_cast<size_t>(mark), traffic_.size()); ++i) {
    Traffic& traffic = traffic_[i];
    if (side_[i] != side || traffic.waited >= 0) continue;
    traffic.waited = ops();
    for (int64_t k = traffic.issued; k < traffic.waited; ++k) {
      traffic.work_beside += ops_[static_cast<size_t>(k)].small ? 0 : 1;
    }
  }
}

}  // namespace krait
