#include "kernels/cross_entropy.h"

#include <algorithm>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/cross_entropy.h"
#include "kernels/cpu/dispatch.h"

namespace krait {

void CrossEntropy(Tensor losses, Tensor d_logits, Tensor logits, Tensor targets, double scale,
                  const Context& ctx) {
  OpScope op(ctx, OpFamily::kLoss);
  if (op.planning()) return;
  cpu::DispatchFloat(logits, "CrossEntropy", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> in = cpu::RowsOf<T>(logits);
    const cpu::Rows<T> out = d_logits.defined() ? cpu::RowsOf<T>(d_logits) : cpu::Rows<T>{};
    KRAIT_CHECK(losses.numel() == in.rows && targets.numel() == in.rows);
    KRAIT_CHECK(!d_logits.defined() || (out.rows == in.rows && out.columns == in.columns));
    T* loss = cpu::DenseData<T>(losses);
    const int32_t* target = cpu::DenseData<int32_t>(targets);
    ParallelFor(in.rows, std::max<int64_t>(1, 16384 / in.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* gradient = d_logits.defined() ? out[i] : nullptr;
        if (target[i] < 0) {
          loss[i] = 0;
          if (gradient != nullptr) std::fill_n(gradient, in.columns, T{0});
          continue;
        }
        KRAIT_CHECK(target[i] < in.columns);
        loss[i] =
            cpu::CrossEntropyRow(in.columns, in[i], target[i], static_cast<T>(scale), gradient);
      }
    });
  });
}

}  // namespace krait
