#include "kernels/embedding.h"

#include <algorithm>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/activation.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/embedding.h"

namespace krait {
namespace {

// Columns per piece of the backward: each piece walks all tokens in order for its own columns, so
// the sums of a row need neither atomics nor sorting.
constexpr int64_t kColumns = 64;
constexpr int64_t kRows = 64;

template <typename T>
void CheckShapes(const cpu::Rows<T>& rows, const cpu::Rows<T>& table, const int32_t* token,
                 int64_t tokens, VocabularySlice slice) {
  KRAIT_CHECK(rows.rows == tokens && rows.columns == table.columns && slice.used <= table.rows);
  for (int64_t i = 0; i < tokens; ++i) KRAIT_CHECK(token[i] >= 0 && token[i] < slice.total);
}

}  // namespace

void EmbeddingForward(Tensor y, Tensor tokens, Tensor table, VocabularySlice slice,
                      const Context& ctx) {
  OpScope op(ctx, OpFamily::kEmbedding, "EmbeddingForward",
             {{"y", y}, {"tokens", tokens}, {"table", table}});
  op.CountBytes(y.bytes() - table.bytes());  // of the table the rows that are looked up
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(EmbeddingForward(y, tokens, table, slice, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.Out(y), table = wide.In(table);
  if (op.planning()) return;
  cpu::DispatchFloat(y, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(y), weight = cpu::RowsOf<T>(table);
    const int32_t* token = cpu::DenseData<int32_t>(tokens);
    CheckShapes(out, weight, token, tokens.numel(), slice);
    ParallelFor(out.rows, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = token[i] - slice.first;
        if (row >= 0 && row < slice.used) {
          std::copy_n(weight[row], out.columns, out[i]);
        } else {
          std::fill_n(out[i], out.columns, T{0});
        }
      }
    });
  });
}

void EmbeddingBackward(Tensor dtable, Tensor dy, Tensor tokens, VocabularySlice slice,
                       int64_t pad_token, const Context& ctx) {
  OpScope op(ctx, OpFamily::kEmbedding, "EmbeddingBackward",
             {{"dtable", dtable}, {"dy", dy}, {"tokens", tokens}});
  op.CountBytes(2 * dy.bytes() - dtable.bytes());
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor scratch =
        ctx.scratch->Alloc(DType::kI32, {cuda::EmbeddingScratchWords(tokens.numel())});
    if (op.planning()) return;
    KRAIT_CUDA(EmbeddingBackward(dtable, dy, tokens, slice, pad_token, scratch, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  dy = wide.In(dy);
  if (op.planning()) return;
  cpu::DispatchFloat(dy, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> grad = cpu::RowsOf<T>(dy), weight = cpu::RowsOf<T>(dtable);
    const int32_t* token = cpu::DenseData<int32_t>(tokens);
    CheckShapes(grad, weight, token, tokens.numel(), slice);
    ParallelFor(grad.columns, kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < grad.rows; ++i) {
        const int64_t row = token[i] - slice.first;
        if (row < 0 || row >= slice.used || token[i] == pad_token) continue;
        cpu::Add(end - begin, grad[i] + begin, weight[row] + begin);
      }
    });
  });
}

}  // namespace krait
