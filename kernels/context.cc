#include "kernels/context.h"

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

}  // namespace krait
