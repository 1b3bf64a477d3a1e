#include "kernels/embedding.h"

#include <algorithm>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/activation.h"
#include "kernels/cpu/dispatch.h"

namespace krait {
namespace {

// Columns per piece of the backward: each piece walks all tokens in order for its own columns, so
// the sums of a row need neither atomics nor sorting.
constexpr int64_t kColumns = 64;
constexpr int64_t kRows = 64;

template <typename T>
void CheckShapes(const cpu::Rows<T>& rows, const cpu::Rows<T>& table, const int32_t* token,
                 int64_t tokens) {
  KRAIT_CHECK(rows.rows == tokens && rows.columns == table.columns);
  for (int64_t i = 0; i < tokens; ++i) KRAIT_CHECK(token[i] >= 0 && token[i] < table.rows);
}

}  // namespace

void EmbeddingForward(Tensor y, Tensor tokens, Tensor table, const Context& ctx) {
  OpScope op(ctx, OpFamily::kEmbedding);
  if (op.planning()) return;
  cpu::DispatchFloat(y, "EmbeddingForward", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(y), weight = cpu::RowsOf<T>(table);
    const int32_t* token = cpu::DenseData<int32_t>(tokens);
    CheckShapes(out, weight, token, tokens.numel());
    ParallelFor(out.rows, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::copy_n(weight[token[i]], out.columns, out[i]);
    });
  });
}

void EmbeddingBackward(Tensor dtable, Tensor dy, Tensor tokens, const Context& ctx) {
  OpScope op(ctx, OpFamily::kEmbedding);
  if (op.planning()) return;
  cpu::DispatchFloat(dy, "EmbeddingBackward", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> grad = cpu::RowsOf<T>(dy), weight = cpu::RowsOf<T>(dtable);
    const int32_t* token = cpu::DenseData<int32_t>(tokens);
    CheckShapes(grad, weight, token, tokens.numel());
    ParallelFor(grad.columns, kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < grad.rows; ++i) {
        cpu::Add(end - begin, grad[i] + begin, weight[token[i]] + begin);
      }
    });
  });
}

}  // namespace krait
