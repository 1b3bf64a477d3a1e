#include "trainer/train/pass_batch.h"

#include <algorithm>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/transfer.h"

namespace krait {

PassBatch::PassBatch(Device device, int64_t rows, int64_t seq_len, Arena* arena, int ranks)
    : ranks_(ranks) {
  if (device == Device::kCpu) return;
  for (Tensor* t : {&tokens_, &targets_, &doc_start_}) {
    *t = arena->Alloc(DType::kI32, {rows, seq_len});
  }
}

Batch PassBatch::Of(const TokenBatch& batch, int64_t first, int64_t count,
                    const Context& ctx) const {
  const int64_t seq_len = batch.seq_len, begin = first * seq_len, n = count * seq_len;
  const auto rows = [&](const std::vector<int32_t>& values, Tensor memory) {
    KRAIT_CHECK(begin + n <= static_cast<int64_t>(values.size()));
    // A view is not const; ops do not write to tokens.
    int32_t* data = const_cast<int32_t*>(values.data()) + begin;
    if (!memory.defined()) return Tensor(data, DType::kI32, Device::kCpu, {count, seq_len});
    const Tensor part = memory.View({memory.numel()}).Slice(0, 0, n).View({count, seq_len});
    Upload(part, data, ctx);
    return part;
  };
  Batch pass;
  pass.shape = {.batch = count, .seq_len = seq_len, .ranks = ranks_};
  pass.tokens = rows(batch.tokens, tokens_);
  pass.targets = rows(batch.targets, targets_);
  const auto starts = batch.doc_start.begin() + begin;
  if (std::any_of(starts, starts + n, [](int32_t start) { return start > 0; })) {
    pass.documents.doc_start = rows(batch.doc_start, doc_start_);
  }
  return pass;
}

Batch PassBatch::Planned(int64_t rows, int64_t seq_len, Arena* arena, int ranks) {
  const auto ids = [&] { return arena->Alloc(DType::kI32, {rows, seq_len}); };
  Batch pass;
  pass.shape = {.batch = rows, .seq_len = seq_len, .ranks = ranks};
  pass.tokens = ids();
  pass.targets = ids();
  pass.documents.doc_start = ids();
  return pass;
}

}  // namespace krait
