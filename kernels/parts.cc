#include "kernels/parts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <type_traits>

#include "kernels/base/check.h"
#include "kernels/base/parallel_for.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/parts.h"

namespace krait {
namespace {

// Of a thread's piece of work, and of what is joined at a time, on the stack.
constexpr int64_t kPieceElements = 16384, kBlock = 1024;

struct Sum {
  template <typename T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return std::isnan(a) || a > b ? a : b;
  }
};

template <typename To, typename From, typename Join>
void JoinOnCpu(Tensor out, const std::vector<Tensor>& parts, const Join& join) {
  // bf16 is computed in f32, i64 in itself.
  using W = std::conditional_t<std::is_same_v<To, BF16>, float, To>;
  const auto load = [](const From& x) {
    if constexpr (std::is_same_v<From, int64_t>) {
      return x;
    } else {
      return static_cast<W>(cpu::Load(x));
    }
  };
  To* const to = out.data<To>();
  ParallelFor(out.numel(), kPieceElements, [&](int64_t first, int64_t last) {
    std::array<W, kBlock> joined;
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const auto n = static_cast<size_t>(std::min(kBlock, last - begin));
      for (size_t p = 0; p < parts.size(); ++p) {
        const From* const from = parts[p].data<From>() + begin;
        for (size_t i = 0; i < n; ++i) {
          joined[i] = p == 0 ? load(from[i]) : join(joined[i], load(from[i]));
        }
      }
      for (size_t i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<To, int64_t>) {
          to[begin + static_cast<int64_t>(i)] = joined[i];
        } else {
          cpu::Store(joined[i], &to[begin + static_cast<int64_t>(i)]);
        }
      }
    }
  });
}

void CheckParts(const Tensor& out, const std::vector<Tensor>& parts) {
  KRAIT_CHECK(!parts.empty() && out.contiguous());
  for (const Tensor& part : parts) {
    KRAIT_CHECK(part.contiguous() && part.numel() == out.numel() &&
                part.dtype() == parts.front().dtype() && part.device() == out.device());
  }
}

}  // namespace

void SumParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx) {
  const OpScope op(ctx, OpFamily::kCommunication, "SumParts", {{"out", out}});
  CheckParts(out, parts);
  for (const Tensor& part : parts) op.CountBytes(part.bytes());
  if (op.planning() || out.numel() == 0) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(SumParts(out, parts, ctx));
    return;
  }
  const DType from = parts.front().dtype();
  const bool narrow = from == DType::kBF16 && out.dtype() != DType::kBF16;
  switch (out.dtype()) {
    case DType::kF32:
      return narrow ? JoinOnCpu<float, BF16>(out, parts, Sum())
                    : JoinOnCpu<float, float>(out, parts, Sum());
    case DType::kF64:
      return narrow ? JoinOnCpu<double, BF16>(out, parts, Sum())
                    : JoinOnCpu<double, double>(out, parts, Sum());
    case DType::kBF16:
      return JoinOnCpu<BF16, BF16>(out, parts, Sum());
    case DType::kI64:
      return JoinOnCpu<int64_t, int64_t>(out, parts, Sum());
    default:
      KRAIT_FATAL(std::string("SumParts does not take ") + Name(out.dtype()));
  }
}

void MaxParts(Tensor out, const std::vector<Tensor>& parts, const Context& ctx) {
  const OpScope op(ctx, OpFamily::kCommunication, "MaxParts", {{"out", out}});
  CheckParts(out, parts);
  for (const Tensor& part : parts) op.CountBytes(part.bytes());
  if (op.planning() || out.numel() == 0) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MaxParts(out, parts, ctx));
    return;
  }
  switch (out.dtype()) {
    case DType::kF32:
      return JoinOnCpu<float, float>(out, parts, Max());
    case DType::kF64:
      return JoinOnCpu<double, double>(out, parts, Max());
    default:
      KRAIT_FATAL(std::string("MaxParts does not take ") + Name(out.dtype()));
  }
}

std::vector<Tensor> EqualParts(Tensor t, int count) {
  const int64_t n = t.numel() / count;
  KRAIT_CHECK(n * count == t.numel());
  const Tensor all = t.View({t.numel()});
  std::vector<Tensor> parts;
  for (int p = 0; p < count; ++p) parts.push_back(all.Slice(0, p * n, n));
  return parts;
}

}  // namespace krait
