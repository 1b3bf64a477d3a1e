#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/cross_entropy.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/cross_entropy.h"

namespace krait {
namespace {

int64_t Grain(int64_t columns) { return std::max<int64_t>(1, 16384 / columns); }

// A vector of M elements.
template <typename T>
T* Vector(Tensor t, int64_t rows) {
  KRAIT_CHECK(t.numel() == rows);
  return cpu::DenseData<T>(t);
}

// Calls fn(row) for all rows, several at a time.
template <typename T, typename Fn>
void ForEachRow(const cpu::Rows<T>& rows, const Fn& fn) {
  ParallelFor(rows.rows, Grain(rows.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(i);
  });
}

}  // namespace

void CrossEntropyMax(Tensor max, Tensor logits, VocabularySlice slice, const Context& ctx) {
  OpScope op(ctx, OpFamily::kLoss, "CrossEntropyMax", {{"max", max}, {"logits", logits}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(CrossEntropyMax(max, logits, slice, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  logits = wide.In(logits);
  if (op.planning()) return;
  cpu::DispatchFloat(logits, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> in = cpu::RowsOf<T>(logits);
    KRAIT_CHECK(slice.used <= in.columns);
    T* out = Vector<T>(max, in.rows);
    ForEachRow(in, [&](int64_t i) { out[i] = cpu::Maximum(slice.used, in[i]); });
  });
}

void CrossEntropySum(Tensor sum, Tensor picked, Tensor max, Tensor logits, Tensor targets,
                     VocabularySlice slice, const Context& ctx) {
  OpScope op(
      ctx, OpFamily::kLoss, "CrossEntropySum",
      {{"sum", sum}, {"picked", picked}, {"max", max}, {"logits", logits}, {"targets", targets}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(CrossEntropySum(sum, picked, max, logits, targets, slice, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  logits = wide.In(logits);
  if (op.planning()) return;
  cpu::DispatchFloat(logits, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> in = cpu::RowsOf<T>(logits);
    double* sums = Vector<double>(sum, in.rows);
    T* pick = Vector<T>(picked, in.rows);
    const T* most = Vector<T>(max, in.rows);
    const int32_t* target = Vector<int32_t>(targets, in.rows);
    ForEachRow(in, [&](int64_t i) {
      KRAIT_CHECK(target[i] < slice.total);
      const int64_t column = target[i] - slice.first;
      pick[i] = column >= 0 && column < slice.used ? in[i][column] : T{0};
      sums[i] = target[i] < 0 ? 0 : cpu::SumExp(slice.used, in[i], most[i]);
    });
  });
}

void CrossEntropyFinish(Tensor losses, Tensor d_logits, Tensor max, Tensor sum, Tensor picked,
                        Tensor logits, Tensor targets, VocabularySlice slice, Tensor scale,
                        const Context& ctx) {
  OpScope op(ctx, OpFamily::kLoss, "CrossEntropyFinish",
             {{"losses", losses},
              {"d_logits", d_logits},
              {"max", max},
              {"sum", sum},
              {"picked", picked},
              {"logits", logits},
              {"targets", targets},
              {"scale", scale}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(
        CrossEntropyFinish(losses, d_logits, max, sum, picked, logits, targets, slice, scale, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  d_logits = wide.Out(d_logits), logits = wide.In(logits);
  if (op.planning()) return;
  cpu::DispatchFloat(logits, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> in = cpu::RowsOf<T>(logits);
    const cpu::Rows<T> out = d_logits.defined() ? cpu::RowsOf<T>(d_logits) : cpu::Rows<T>{};
    KRAIT_CHECK(!d_logits.defined() || (out.rows == in.rows && out.columns == in.columns));
    T* loss = Vector<T>(losses, in.rows);
    const T* most = Vector<T>(max, in.rows);
    const double* sums = Vector<double>(sum, in.rows);
    const T* pick = Vector<T>(picked, in.rows);
    const int32_t* target = Vector<int32_t>(targets, in.rows);
    const T step = d_logits.defined() ? static_cast<T>(Vector<double>(scale, 1)[0]) : T{0};
    ForEachRow(in, [&](int64_t i) {
      loss[i] = target[i] < 0
                    ? T{0}
                    : static_cast<T>(std::log(sums[i]) + static_cast<double>(most[i] - pick[i]));
      if (!d_logits.defined()) return;
      if (target[i] < 0) {
        std::fill_n(out[i], in.columns, T{0});
        return;
      }
      const T factor = static_cast<T>(static_cast<double>(step) / sums[i]);
      cpu::ScaledExp(slice.used, in[i], most[i], factor, out[i]);
      std::fill(out[i] + slice.used, out[i] + in.columns, T{0});
      const int64_t column = target[i] - slice.first;
      if (column >= 0 && column < slice.used) out[i][column] -= step;
    });
  });
}

}  // namespace krait
