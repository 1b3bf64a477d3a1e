#include "kernels/gemm.h"

#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/gemm.h"

namespace krait {
namespace {

using cpu::Matrix;
using cpu::Rows;
using cpu::RowsOf;

double Flops(int64_t m, int64_t n, int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}
// Of the experts' rows in use: what is left of the buffer may be padding.
void CountGrouped(const OpScope& op, Tensor x, Tensor w, const Context& ctx) {
  const int64_t padding = w.dim(0) * (ExpertRowAlignment(ctx.device) - 1);
  op.CountFlops(Flops(std::max<int64_t>(0, x.dim(0) - padding), w.dim(1), w.dim(2)));
}

// The operands of a product fit together.
void CheckProduct(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b) {
  const int64_t k = transpose_a ? a.rows() : a.dim(-1);
  KRAIT_CHECK((transpose_a ? a.dim(-1) : a.rows()) == c.rows());
  KRAIT_CHECK((transpose_b ? b.dim(-1) : b.rows()) == k);
  KRAIT_CHECK((transpose_b ? b.rows() : b.dim(-1)) == c.dim(-1));
}
void CheckGrouped(Tensor x, Tensor y, Tensor w, Tensor offsets) {
  KRAIT_CHECK(x.rank() == 2 && y.rank() == 2 && w.rank() == 3 && w.contiguous());
  KRAIT_CHECK(x.dim(1) == w.dim(2) && y.dim(1) == w.dim(1));
  KRAIT_CHECK(offsets.numel() == w.dim(0) + 1 && offsets.contiguous());
}

// c = op(a) op(b) (+ c) on the CPU, operands of one dtype.
void Product(const OpScope& op, Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b,
             bool accumulate) {
  CheckProduct(c, a, transpose_a, b, transpose_b);
  op.CountFlops(Flops(c.rows(), c.dim(-1), transpose_a ? a.rows() : a.dim(-1)));
  cpu::DispatchFloat(c, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows_a = RowsOf<T>(a), rows_b = RowsOf<T>(b), rows_c = RowsOf<T>(c);
    const int64_t k = transpose_a ? rows_a.rows : rows_a.columns;
    cpu::Gemm<T>(
        rows_c.rows, rows_c.columns, k, T{1}, Matrix<T>{rows_a.data, rows_a.stride, transpose_a},
        Matrix<T>{rows_b.data, rows_b.stride, transpose_b}, accumulate, rows_c.data, rows_c.stride);
  });
}

// c = op(a) op(b) (+ bias) (+ c) on CUDA.
void ProductOnCuda(const OpScope& op, Tensor c, Tensor a, bool transpose_a, Tensor b,
                   bool transpose_b, Tensor bias, bool accumulate, const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const Tensor workspace = ctx.scratch->Alloc(DType::kU8, {cuda::kMatMulWorkspace});
  if (op.planning()) return;
  CheckProduct(c, a, transpose_a, b, transpose_b);
  op.CountFlops(Flops(c.rows(), c.dim(-1), transpose_a ? a.rows() : a.dim(-1)));
  KRAIT_CUDA(MatMul(c, a, transpose_a, b, transpose_b, bias, accumulate, workspace, ctx));
}

// An output that the product overwrites or adds to.
Tensor Output(cpu::Widened* wide, Tensor c, bool accumulate) {
  return accumulate ? wide->InOut(c) : wide->Out(c);
}

// The matrix [rows, columns] of expert e in w[E, rows, columns].
Tensor Expert(Tensor w, int64_t e) {
  KRAIT_CHECK(w.rank() == 3 && w.contiguous());
  return w.Slice(0, e, 1).View({w.dim(1), w.dim(2)});
}

// Calls fn(e, rows of x, rows of y) for each expert.
template <typename Fn>
void ForEachExpert(Tensor x, Tensor y, Tensor offsets, const Fn& fn) {
  KRAIT_CHECK(x.rank() == 2 && y.rank() == 2);
  const int64_t* begin = cpu::DenseData<int64_t>(offsets);
  for (int64_t e = 0; e + 1 < offsets.numel(); ++e) {
    const int64_t rows = begin[e + 1] - begin[e];
    fn(e, x.Slice(0, begin[e], rows), y.Slice(0, begin[e], rows));
  }
}

}  // namespace

void MatMul(Tensor c, Tensor a, bool transpose_a, Tensor b, bool transpose_b, bool accumulate,
            const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "MatMul", {{"c", c}, {"a", a}, {"b", b}});
  if (ctx.device == Device::kCuda) {
    return ProductOnCuda(op, c, a, transpose_a, b, transpose_b, Tensor(), accumulate, ctx);
  }
  cpu::Widened wide(ctx);
  c = Output(&wide, c, accumulate), a = wide.In(a), b = wide.In(b);
  if (op.planning()) return;
  Product(op, c, a, transpose_a, b, transpose_b, accumulate);
}

void LinearForward(Tensor y, Tensor x, Tensor w, Tensor bias, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "LinearForward", {{"y", y}, {"x", x}, {"w", w}, {"bias", bias}});
  if (ctx.device == Device::kCuda) {
    // A bias of another dtype than y's is added to the product.
    const bool fused = bias.defined() && bias.dtype() == y.dtype();
    ProductOnCuda(op, y, x, false, w, true, fused ? bias : Tensor(), false, ctx);
    if (bias.defined() && !fused && !op.planning()) KRAIT_CUDA(AddBias(y, bias, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.Out(y), x = wide.In(x), w = wide.In(w), bias = wide.In(bias);
  if (op.planning()) return;
  if (bias.defined()) {
    cpu::DispatchFloat(y, op.name(), [&](auto zero) {
      using T = decltype(zero);
      const Rows<T> rows = RowsOf<T>(y);
      KRAIT_CHECK(bias.numel() == rows.columns);
      cpu::BroadcastRow<T>(rows.rows, rows.columns, cpu::DenseData<T>(bias), rows.data,
                           rows.stride);
    });
  }
  Product(op, y, x, false, w, true, bias.defined());
}

void LinearBackwardInput(Tensor dx, Tensor dy, Tensor w, bool accumulate, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "LinearBackwardInput", {{"dx", dx}, {"dy", dy}, {"w", w}});
  if (ctx.device == Device::kCuda) {
    return ProductOnCuda(op, dx, dy, false, w, false, Tensor(), accumulate, ctx);
  }
  cpu::Widened wide(ctx);
  dx = Output(&wide, dx, accumulate), dy = wide.In(dy), w = wide.In(w);
  if (op.planning()) return;
  Product(op, dx, dy, false, w, false, accumulate);
}

void LinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, bool accumulate, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "LinearBackwardWeight", {{"dw", dw}, {"dy", dy}, {"x", x}});
  if (ctx.device == Device::kCuda) {
    return ProductOnCuda(op, dw, dy, true, x, false, Tensor(), accumulate, ctx);
  }
  cpu::Widened wide(ctx);
  dy = wide.In(dy), x = wide.In(x);
  if (op.planning()) return;
  Product(op, dw, dy, true, x, false, accumulate);
}

void AddBias(Tensor y, Tensor bias, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "AddBias", {{"y", y}, {"bias", bias}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CHECK(bias.contiguous() && bias.numel() == y.dim(-1));
    KRAIT_CUDA(AddBias(y, bias, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.InOut(y), bias = wide.In(bias);
  if (op.planning()) return;
  cpu::DispatchFloat(y, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows = RowsOf<T>(y);
    KRAIT_CHECK(bias.numel() == rows.columns);
    cpu::AddRow<T>(rows.rows, rows.columns, cpu::DenseData<T>(bias), rows.data, rows.stride);
  });
}

void LinearBackwardBias(Tensor db, Tensor dy, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "LinearBackwardBias", {{"db", db}, {"dy", dy}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CHECK(db.contiguous() && db.numel() == dy.dim(-1));
    KRAIT_CUDA(LinearBackwardBias(db, dy, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  dy = wide.In(dy);
  if (op.planning()) return;
  cpu::DispatchFloat(db, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows = RowsOf<T>(dy);
    KRAIT_CHECK(db.numel() == rows.columns);
    cpu::SumRows<T>(rows.rows, rows.columns, rows.data, rows.stride, cpu::DenseData<T>(db));
  });
}

void GroupedLinearForward(Tensor y, Tensor x, Tensor w, Tensor offsets, const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "GroupedLinearForward",
             {{"y", y}, {"x", x}, {"w", w}, {"offsets", offsets}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    CheckGrouped(x, y, w, offsets);
    CountGrouped(op, x, w, ctx);
    KRAIT_CUDA(GroupedLinearForward(y, x, w, offsets, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.InOut(y), x = wide.In(x), w = wide.In(w);
  if (op.planning()) return;
  ForEachExpert(x, y, offsets, [&](int64_t e, Tensor x_rows, Tensor y_rows) {
    Product(op, y_rows, x_rows, false, Expert(w, e), true, false);
  });
}

void GroupedLinearBackwardInput(Tensor dx, Tensor dy, Tensor w, Tensor offsets,
                                const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "GroupedLinearBackwardInput",
             {{"dx", dx}, {"dy", dy}, {"w", w}, {"offsets", offsets}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    CheckGrouped(dx, dy, w, offsets);
    CountGrouped(op, dx, w, ctx);
    KRAIT_CUDA(GroupedLinearBackwardInput(dx, dy, w, offsets, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  dx = wide.InOut(dx), dy = wide.In(dy), w = wide.In(w);
  if (op.planning()) return;
  ForEachExpert(dx, dy, offsets, [&](int64_t e, Tensor dx_rows, Tensor dy_rows) {
    Product(op, dx_rows, dy_rows, false, Expert(w, e), false, false);
  });
}

void GroupedLinearBackwardWeight(Tensor dw, Tensor dy, Tensor x, Tensor offsets, bool accumulate,
                                 const Context& ctx) {
  OpScope op(ctx, OpFamily::kGemm, "GroupedLinearBackwardWeight",
             {{"dw", dw}, {"dy", dy}, {"x", x}, {"offsets", offsets}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    CheckGrouped(x, dy, dw, offsets);
    CountGrouped(op, x, dw, ctx);
    KRAIT_CUDA(GroupedLinearBackwardWeight(dw, dy, x, offsets, accumulate, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  dy = wide.In(dy), x = wide.In(x);
  if (op.planning()) return;
  ForEachExpert(x, dy, offsets, [&](int64_t e, Tensor x_rows, Tensor dy_rows) {
    Product(op, Expert(dw, e), dy_rows, true, x_rows, false, accumulate);
  });
}

}  // namespace krait
