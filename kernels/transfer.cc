#include "kernels/transfer.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/parallel_for.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cuda/runtime.h"

namespace krait {
namespace {

// Calls fn(address in the tensor, bytes from the start in the packed order, bytes) for contiguous
// spans that cover the tensor.
template <typename Fn>
void ForEachSpan(Tensor t, const Fn& fn) {
  if (t.numel() == 0) return;
  char* const base = static_cast<char*>(t.raw());
  if (t.contiguous()) return fn(base, 0, t.bytes());
  KRAIT_CHECK(t.stride(-1) == 1);
  const int64_t size = SizeOf(t.dtype()), row_bytes = t.dim(-1) * size;
  for (int64_t row = 0; row < t.rows(); ++row) {
    fn(base + cpu::RowOffset(t, row) * size, row * row_bytes, row_bytes);
  }
}

// Within the host, by several threads.
void CopyHost(void* to, const void* from, int64_t bytes) {
  ParallelFor(bytes, int64_t{1} << 20, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<size_t>(end - begin));
  });
}

}  // namespace

void Download(void* to, Tensor from, const Context& ctx) {
  if (ctx.planning) return;
  const bool cuda = from.device() == Device::kCuda;
  ForEachSpan(from, [&](char* span, int64_t at, int64_t bytes) {
    char* const out = static_cast<char*>(to) + at;
    if (cuda) {
      cuda::CopyToHost(out, span, bytes, ctx.stream);
    } else {
      CopyHost(out, span, bytes);
    }
  });
}

void Upload(Tensor to, const void* from, const Context& ctx) {
  if (ctx.planning) return;
  const bool cuda = to.device() == Device::kCuda;
  ForEachSpan(to, [&](char* span, int64_t at, int64_t bytes) {
    const char* const in = static_cast<const char*>(from) + at;
    if (cuda) {
      cuda::CopyToDevice(span, in, bytes, ctx.stream);
    } else {
      CopyHost(span, in, bytes);
    }
  });
}

void UploadNumbers(Tensor to, const std::vector<int64_t>& from, const Context& ctx) {
  KRAIT_CHECK(to.dtype() == DType::kI64 && to.contiguous() &&
              to.numel() == static_cast<int64_t>(from.size()));
  if (ctx.planning) return;
  if (to.device() == Device::kCuda) {
    cuda::StoreNumbers(static_cast<int64_t*>(to.raw()), from.data(), to.numel(), ctx.stream);
  } else {
    std::copy(from.begin(), from.end(), to.data<int64_t>());
  }
}

std::vector<float> DownloadFloats(Tensor from, const Context& ctx) {
  const auto n = static_cast<size_t>(from.numel());
  std::vector<float> values(n);
  switch (from.dtype()) {
    case DType::kF32:
      Download(values.data(), from, ctx);
      break;
    case DType::kBF16: {
      std::vector<BF16> narrow(n);
      Download(narrow.data(), from, ctx);
      std::transform(narrow.begin(), narrow.end(), values.begin(),
                     [](BF16 x) { return cpu::Load(x); });
      break;
    }
    case DType::kF64: {
      const std::vector<double> wide = DownloadDoubles(from, ctx);
      std::transform(wide.begin(), wide.end(), values.begin(),
                     [](double x) { return static_cast<float>(x); });
      break;
    }
    default:
      KRAIT_FATAL(std::string("no floats in a tensor of ") + Name(from.dtype()));
  }
  return values;
}

std::vector<double> DownloadDoubles(Tensor from, const Context& ctx) {
  KRAIT_CHECK(from.dtype() == DType::kF64);
  std::vector<double> values(static_cast<size_t>(from.numel()));
  Download(values.data(), from, ctx);
  return values;
}

}  // namespace krait
