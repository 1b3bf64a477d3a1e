#include "kernels/context.h"

#include <string>

#include "kernels/base/check.h"
#include "kernels/cuda/runtime.h"

namespace krait {

const char* Name(OpFamily family) {
  switch (family) {
    case OpFamily::kGemm:
      return "gemm";
    case OpFamily::kAttention:
      return "attention";
    case OpFamily::kScan:
      return "scan";
    case OpFamily::kConv:
      return "conv";
    case OpFamily::kNorm:
      return "norm";
    case OpFamily::kActivation:
      return "activation";
    case OpFamily::kMoe:
      return "moe";
    case OpFamily::kEmbedding:
      return "embedding";
    case OpFamily::kLoss:
      return "loss";
    case OpFamily::kOptimizer:
      return "optimizer";
    case OpFamily::kCommunication:
      return "communication";
    case OpFamily::kOther:
      return "other";
  }
  return "?";
}

OpScope::OpScope(const Context& ctx, OpFamily family, const char* name,
                 std::initializer_list<Operand> operands)
    : ctx_(ctx), name_(name) {
  for (const Operand& operand : operands) {
    if (!operand.tensor.defined() || operand.tensor.device() == ctx.device) continue;
    KRAIT_FATAL(std::string(name) + " on " + Name(ctx.device) + ": operand " + operand.name +
                " is on " + Name(operand.tensor.device()));
  }
  if (ctx.planning) return;
  if (ctx.order != nullptr && ctx.side == 0 && family != OpFamily::kCommunication) {
    ctx.order->AddOp(name, family == OpFamily::kOther, operands.begin(), operands.size());
  }
  const bool cuda = ctx.device == Device::kCuda;
  if (cuda) cuda::PushRange(name);
  if (ctx.profile == nullptr || ctx.profile->depth_++ > 0) return;
  timed_ = &ctx.profile->ops_[name];
  timed_->family = family;
  ++timed_->calls;
  for (const Operand& operand : operands) {
    if (operand.tensor.defined()) timed_->bytes += operand.tensor.bytes();
  }
  if (cuda) {
    begin_ = ctx.profile->Record(ctx.stream);
  } else {
    start_ = std::chrono::steady_clock::now();
    if (ctx.profile->keeps_calls_ && ctx.profile->calls_.empty()) ctx.profile->origin_ = start_;
  }
}

OpScope::~OpScope() {
  if (ctx_.planning) return;
  const bool cuda = ctx_.device == Device::kCuda;
  Profile* const profile = ctx_.profile;
  if (profile != nullptr) --profile->depth_;
  if (timed_ != nullptr) {
    if (cuda) {
      profile->spans_.push_back({timed_, begin_, profile->Record(ctx_.stream), name_, ctx_.side});
    } else {
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
      timed_->seconds += elapsed.count();
      if (profile->keeps_calls_) {
        const std::chrono::duration<double> begin = start_ - profile->origin_;
        profile->calls_.push_back(
            {name_, timed_->family, ctx_.side, begin.count(), elapsed.count()});
      }
    }
  }
  if (cuda) cuda::PopRange();
}

Profile::~Profile() {
  for (const Span& span : spans_) {
    cuda::DestroyEvent(span.begin);
    cuda::DestroyEvent(span.end);
  }
  for (void* event : free_events_) cuda::DestroyEvent(event);
}

void* Profile::Record(void* stream) {
  if (free_events_.empty()) free_events_.push_back(cuda::CreateEvent(/*timed=*/true));
  void* event = free_events_.back();
  free_events_.pop_back();
  cuda::RecordEvent(event, stream);
  return event;
}

void Profile::Collect() {
  if (spans_.empty()) return;
  cuda::Synchronize();
  for (const Span& span : spans_) {
    const double seconds = cuda::SecondsBetween(span.begin, span.end);
    span.op->seconds += seconds;
    if (!keeps_calls_) continue;
    calls_.push_back({span.name, span.op->family, span.side,
                      cuda::SecondsBetween(spans_.front().begin, span.begin), seconds});
  }
  for (const Span& span : spans_) {
    free_events_.push_back(span.begin);
    free_events_.push_back(span.end);
  }
  spans_.clear();
}

Profile::Op Profile::Total(OpFamily family) const {
  Op total;
  total.family = family;
  for (const auto& [name, op] : ops_) {
    if (op.family != family) continue;
    total.calls += op.calls;
    total.seconds += op.seconds;
    total.flops += op.flops;
    total.bytes += op.bytes;
  }
  return total;
}

}  // namespace krait
