#include "kernels/linear_cross_entropy.h"

#include <algorithm>

#include "kernels/cross_entropy.h"
#include "kernels/gemm.h"

namespace krait {

int64_t LogitRows(Device device, DType compute, int64_t rows, int64_t vocabulary) {
  constexpr int64_t kCpuBytes = int64_t{32} << 20, kCudaRows = 4096;
  // The CPU computes bf16 logits in f32.
  const int64_t width = std::max<int64_t>(1, vocabulary) * SizeOf(Wide(compute));
  const int64_t most = device == Device::kCuda ? kCudaRows : kCpuBytes / width;
  return std::clamp<int64_t>(most, 1, std::max<int64_t>(1, rows));
}

void LinearCrossEntropy(Tensor losses, Tensor x, Tensor dw, bool accumulate, Tensor w,
                        Tensor targets, VocabularySlice slice, Tensor scale, const LogitsSink* sink,
                        const Context& ctx, const VocabularyReductions* ranks,
                        const ChoiceSink* choices) {
  const ArenaScope scope(ctx.scratch);
  const DType compute = x.dtype(), wide = Wide(compute);
  // Products on the CPU leave the padding out: nothing is gained there by even sizes.
  const int64_t columns = ctx.device == Device::kCuda ? w.dim(0) : std::max<int64_t>(1, slice.used);
  const Tensor w_used = w.Slice(0, 0, columns);
  const Tensor dw_used = dw.defined() ? dw.Slice(0, 0, columns) : dw;
  const int64_t m = x.dim(0), chunk = LogitRows(ctx.device, compute, m, columns);
  const Tensor logits_memory = ctx.scratch->Alloc(compute, {chunk, columns});
  const Tensor sink_memory = sink != nullptr && compute != wide
                                 ? ctx.scratch->Alloc(wide, {chunk, columns})
                                 : logits_memory;
  const Tensor max = ctx.scratch->Alloc(wide, {chunk}), picked = ctx.scratch->Alloc(wide, {chunk});
  const Tensor sum = ctx.scratch->Alloc(DType::kF64, {chunk});
  for (int64_t begin = 0; begin < m; begin += chunk) {
    const int64_t rows = std::min(chunk, m - begin);
    const auto part = [&](Tensor t) { return t.Slice(0, 0, rows); };
    const auto slice_of = [&](Tensor t) { return t.Slice(0, begin, rows); };
    const Tensor logits = part(logits_memory), x_rows = slice_of(x), target = slice_of(targets);
    if (sink != nullptr) {
      LinearForward(part(sink_memory), x_rows, w_used, Tensor(), ctx);
      (*sink)(part(sink_memory).Slice(1, 0, slice.used));
    }
    if (sink == nullptr || compute != wide) LinearForward(logits, x_rows, w_used, Tensor(), ctx);
    CrossEntropyMax(part(max), logits, slice, ctx);
    if (ranks != nullptr) ranks->max(part(max));
    CrossEntropySum(part(sum), part(picked), part(max), logits, target, slice, ctx);
    if (ranks != nullptr) {
      ranks->sum(part(sum));
      ranks->sum(part(picked));
    }
    if (choices != nullptr) (*choices)(part(max), part(picked));
    const Tensor d_logits = dw.defined() ? logits : Tensor();
    CrossEntropyFinish(slice_of(losses), d_logits, part(max), part(sum), part(picked), logits,
                       target, slice, scale, ctx);
    if (!dw.defined()) continue;
    LinearBackwardWeight(dw_used, d_logits, x_rows, accumulate || begin > 0, ctx);
    LinearBackwardInput(x_rows, d_logits, w_used, /*accumulate=*/false, ctx);
  }
}

}  // namespace krait
