#include "kernels/gemm.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/gemm.h"

namespace krait {
namespace {

using cpu::Matrix;
using cpu::Rows;
using cpu::RowsOf;

// c = op(a) op(b) (+ c) on the CPU.
void Product(const char* op, Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b,
             bool accumulate) {
  cpu::DispatchFloat(c, op, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows_a = RowsOf<T>(a), rows_b = RowsOf<T>(b), rows_c = RowsOf<T>(c);
    const int64_t k = transpose_a ? rows_a.rows : rows_a.columns;
    KRAIT_CHECK((transpose_a ? rows_a.columns : rows_a.rows) == rows_c.rows);
    KRAIT_CHECK((transpose_b ? rows_b.columns : rows_b.rows) == k);
    KRAIT_CHECK((transpose_b ? rows_b.rows : rows_b.columns) == rows_c.columns);
    cpu::Gemm<T>(
        rows_c.rows, rows_c.columns, k, T{1}, Matrix<T>{rows_a.data, rows_a.stride, transpose_a},
        Matrix<T>{rows_b.data, rows_b.stride, transpose_b}, accumulate, rows_c.data, rows_c.stride);
  });
}

// The matrix [rows, columns] of expert e in w[E, rows, columns].
Tensor Expert(Tensor w, int64_t e) {
  KRAIT_CHECK(w.rank() == 3 && w.contiguous());
  return w.Slice(0, e, 1).View({w.dim(1), w.dim(2)});
}

// Rows [offsets[e], offsets[e+1]) of x.
Tensor ExpertRows(Tensor x, const int64_t* offsets, int64_t e) {
  KRAIT_CHECK(x.rank() == 2);
  return x.Slice(0, offsets[e], offsets[e + 1] - offsets[e]);
}

}  // namespace

void MatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, bool accumulate,
            const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  Product("MatMul", c, a, transpose_a, b, transpose_b, accumulate);
}

void LinearForward(Tensor y, Tensor x, Tensor w, Tensor bias, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  if (bias.defined()) {
    cpu::DispatchFloat(y, "LinearForward", [&](auto zero) {
      using T = decltype(zero);
      const Rows<T> rows = RowsOf<T>(y);
      KRAIT_CHECK(bias.numel() == rows.columns);
      cpu::BroadcastRow<T>(rows.rows, rows.columns, cpu::DenseData<T>(bias), rows.data,
                           rows.stride);
    });
  }
  Product("LinearForward", y, x, false, w, true, bias.defined());
}

void LinearBackwardInput(Tensor dx, Tensor dy, Tensor w, bool accumulate, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  Product("LinearBackwardInput", dx, dy, false, w, false, accumulate);
}

void LinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  Product("LinearBackwardWeight", dw, dy, true, x, false, true);
}

void LinearBackwardBias(Tensor db, Tensor dy, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  cpu::DispatchFloat(db, "LinearBackwardBias", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows = RowsOf<T>(dy);
    KRAIT_CHECK(db.numel() == rows.columns);
    cpu::SumRows<T>(rows.rows, rows.columns, rows.data, rows.stride, cpu::DenseData<T>(db));
  });
}

void GroupedLinearForward(Tensor y, Tensor x, Tensor w, const int64_t* offsets,
                          const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  for (int64_t e = 0; e < w.dim(0); ++e) {
    Product("GroupedLinearForward", ExpertRows(y, offsets, e), ExpertRows(x, offsets, e), false,
            Expert(w, e), true, false);
  }
}

void GroupedLinearBackwardInput(Tensor dx, Tensor dy, Tensor w, const int64_t* offsets,
                                const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  for (int64_t e = 0; e < w.dim(0); ++e) {
    Product("GroupedLinearBackwardInput", ExpertRows(dx, offsets, e), ExpertRows(dy, offsets, e),
            false, Expert(w, e), false, false);
  }
}

void GroupedLinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, const int64_t* offsets,
                                 const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm);
  if (op.planning()) return;
  for (int64_t e = 0; e < dw.dim(0); ++e) {
    Product("GroupedLinearBackwardWeight", Expert(dw, e), ExpertRows(dy, offsets, e), true,
            ExpertRows(x, offsets, e), false, true);
  }
}

}  // namespace krait
