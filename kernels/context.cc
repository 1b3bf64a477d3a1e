#include "kernels/context.h"

#include <string>

#include "kernels/base/check.h"

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
    case OpFamily::kOther:
      return "other";
  }
  return "?";
}

OpScope::OpScope(const Context& ctx, OpFamily family, const char* name,
                 std::initializer_list<Operand> operands)
    : ctx_(ctx), family_(family), name_(name) {
  for (const Operand& operand : operands) {
    if (!operand.tensor.defined() || operand.tensor.device() == ctx.device) continue;
    KRAIT_FATAL(std::string(name) + " on " + Name(ctx.device) + ": operand " + operand.name +
                " is on " + Name(operand.tensor.device()));
  }
  if (ctx_.profile != nullptr && ctx_.profile->depth++ == 0)
    start_ = std::chrono::steady_clock::now();
}

OpScope::~OpScope() {
  if (ctx_.profile == nullptr || --ctx_.profile->depth > 0) return;
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  ctx_.profile->seconds[static_cast<int>(family_)] += elapsed.count();
  ctx_.profile->calls[static_cast<int>(family_)] += 1;
}

}  // namespace krait
