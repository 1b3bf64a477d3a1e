#include "kernels/swiglu.h"

#include <algorithm>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/activation.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/moe.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/swiglu.h"
#include "kernels/gemm.h"

namespace krait {
namespace {

// Rows per piece of work: enough elements to outweigh handing a piece to a thread.
int64_t Grain(int64_t columns) { return std::max<int64_t>(1, 16384 / columns); }

template <typename T>
void CheckWidths(const cpu::Rows<T>& narrow, const cpu::Rows<T>& wide) {
  KRAIT_CHECK(wide.columns == 2 * narrow.columns && wide.rows == narrow.rows);
}

// A scratch tensor for d_product.
Tensor ProductGradient(Tensor gate_up, const Context& ctx) {
  return ctx.scratch->Alloc(gate_up.dtype(), {gate_up.dim(0), gate_up.dim(1) / 2});
}

}  // namespace

void SwiGluForward(Tensor product, Tensor gate_up, const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation, "SwiGluForward",
             {{"product", product}, {"gate_up", gate_up}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(SwiGluForward(product, gate_up, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  product = wide.Out(product), gate_up = wide.In(gate_up);
  if (op.planning()) return;
  cpu::DispatchFloat(product, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(product), in = cpu::RowsOf<T>(gate_up);
    CheckWidths(out, in);
    const int64_t f = out.columns;
    ParallelFor(out.rows, Grain(f), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) cpu::SwiGlu(f, in[i], in[i] + f, out[i]);
    });
  });
}

void SwiGluBackward(Tensor d_gate_up, Tensor product, Tensor d_product, Tensor gate_up,
                    const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation, "SwiGluBackward",
             {{"d_gate_up", d_gate_up},
              {"product", product},
              {"d_product", d_product},
              {"gate_up", gate_up}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(SwiGluBackward(d_gate_up, product, d_product, gate_up, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  d_gate_up = wide.Out(d_gate_up), product = wide.Out(product);
  d_product = wide.In(d_product), gate_up = wide.In(gate_up);
  if (op.planning()) return;
  cpu::DispatchFloat(d_product, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> grad = cpu::RowsOf<T>(d_product), in = cpu::RowsOf<T>(gate_up),
                       out = cpu::RowsOf<T>(d_gate_up);
    const cpu::Rows<T> value = product.defined() ? cpu::RowsOf<T>(product) : cpu::Rows<T>{};
    CheckWidths(grad, in), CheckWidths(grad, out);
    if (product.defined()) CheckWidths(value, in);
    const int64_t f = grad.columns;
    ParallelFor(grad.rows, Grain(f), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        cpu::SwiGluGradient(f, grad[i], in[i], in[i] + f, out[i], out[i] + f,
                            product.defined() ? value[i] : nullptr);
      }
    });
  });
}

void WeightedSwiGluBackward(Tensor d_gate_up, Tensor product, const RowWeights& rows,
                            Tensor d_product, Tensor gate_up, const Context& ctx) {
  OpScope op(ctx, OpFamily::kActivation, "WeightedSwiGluBackward",
             {{"d_gate_up", d_gate_up},
              {"product", product},
              {"weight", rows.weight},
              {"d_weight", rows.d_weight},
              {"source", rows.source},
              {"d_product", d_product},
              {"gate_up", gate_up}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(WeightedSwiGluBackward(d_gate_up, product, rows, d_product, gate_up, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  d_gate_up = wide.Out(d_gate_up), product = wide.Out(product);
  d_product = wide.In(d_product), gate_up = wide.In(gate_up);
  if (op.planning()) return;
  cpu::DispatchFloat(d_product, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> grad = cpu::RowsOf<T>(d_product), in = cpu::RowsOf<T>(gate_up),
                       out = cpu::RowsOf<T>(d_gate_up), value = cpu::RowsOf<T>(product);
    CheckWidths(grad, in), CheckWidths(grad, out), CheckWidths(value, in);
    KRAIT_CHECK(rows.source.numel() >= grad.rows);
    KRAIT_CHECK(rows.d_weight.numel() == rows.weight.numel());
    const int64_t f = grad.columns;
    const int32_t* source = cpu::DenseData<int32_t>(rows.source);
    const T* weight = cpu::DenseData<T>(rows.weight);
    T* d_weight = cpu::DenseData<T>(rows.d_weight);
    ParallelFor(grad.rows, Grain(f), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (source[i] < 0) {
          std::fill_n(out[i], 2 * f, T{0});
          std::fill_n(value[i], f, T{0});
          continue;
        }
        const T p = weight[source[i]];
        cpu::SwiGluGradient(f, grad[i], in[i], in[i] + f, out[i], out[i] + f, value[i]);
        d_weight[source[i]] = cpu::DotAndScaleRow(f, p, value[i], grad[i], value[i]);
        cpu::ScaleInPlace(2 * f, p, out[i]);
      }
    });
  });
}

void LinearSwiGluForward(Tensor product, Tensor gate_up, Tensor x, Tensor w, const Context& ctx) {
  LinearForward(gate_up, x, w, Tensor(), ctx);
  if (product.defined()) SwiGluForward(product, gate_up, ctx);
}

void SwiGluLinearBackward(Tensor d_gate_up, Tensor product, Tensor dy, Tensor w_down,
                          Tensor gate_up, const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const Tensor d_product = ProductGradient(gate_up, ctx);
  LinearBackwardInput(d_product, dy, w_down, /*accumulate=*/false, ctx);
  SwiGluBackward(d_gate_up, product, d_product, gate_up, ctx);
}

void GroupedLinearSwiGluForward(Tensor product, Tensor gate_up, Tensor x, Tensor w, Tensor offsets,
                                const Context& ctx) {
  GroupedLinearForward(gate_up, x, w, offsets, ctx);
  if (product.defined()) SwiGluForward(product, gate_up, ctx);
}

void GroupedSwiGluLinearBackward(Tensor d_gate_up, Tensor product, const RowWeights& rows,
                                 Tensor dy, Tensor w_down, Tensor gate_up, Tensor offsets,
                                 const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  const Tensor d_product = ProductGradient(gate_up, ctx);
  GroupedLinearBackwardInput(d_product, dy, w_down, offsets, ctx);
  WeightedSwiGluBackward(d_gate_up, product, rows, d_product, gate_up, ctx);
}

}  // namespace krait
