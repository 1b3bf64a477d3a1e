#include "kernels/moe.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/moe.h"

namespace krait {
namespace {

// Elements per piece of work, and tokens per partial sum of the statistics.
constexpr int64_t kPieceElements = 16384, kStatisticsTokens = 128;

int64_t Grain(int64_t columns) { return std::max<int64_t>(1, kPieceElements / columns); }

void CheckShape(Tensor t, int64_t rows, int64_t columns) {
  KRAIT_CHECK(t.rank() == 2 && t.dim(0) == rows && t.dim(1) == columns);
}

template <typename T>
void RouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize) {
  const cpu::Rows<T> p = cpu::RowsOf<T>(probs), w = cpu::RowsOf<T>(weight),
                     in = cpu::RowsOf<T>(logits);
  const cpu::Rows<int32_t> chosen = cpu::RowsOf<int32_t>(choice);
  const int64_t experts = in.columns, top_k = chosen.columns;
  KRAIT_CHECK(top_k >= 1 && top_k <= experts);
  CheckShape(probs, in.rows, experts);
  CheckShape(choice, in.rows, top_k);
  CheckShape(weight, in.rows, top_k);
  ParallelFor(in.rows, Grain(experts * 16), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      cpu::Softmax(experts, in[t], p[t]);
      cpu::TopK(experts, p[t], top_k, chosen[t]);
      T sum = 0;
      for (int64_t j = 0; j < top_k; ++j) sum += p[t][chosen[t][j]];
      for (int64_t j = 0; j < top_k; ++j) {
        w[t][j] = renormalize ? p[t][chosen[t][j]] / sum : p[t][chosen[t][j]];
      }
    }
  });
}

// With q = dL/dp: q_e = d_prob_mean_e, plus for the chosen d_weight_j, or where the weights are
// w_j = p_j / S, S = sum_j p_j:  (d_weight_j - sum_i d_weight_i w_i) / S. Through the softmax
// dL/dlogit_e = p_e (q_e - sum_f p_f q_f), to which the z-loss adds its share.
template <typename T>
void RouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob_mean, double z_scale,
                   Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize) {
  const cpu::Rows<T> out = cpu::RowsOf<T>(d_logits), dw = cpu::RowsOf<T>(d_weight),
                     p = cpu::RowsOf<T>(probs), w = cpu::RowsOf<T>(weight),
                     in = cpu::RowsOf<T>(logits);
  const cpu::Rows<int32_t> chosen = cpu::RowsOf<int32_t>(choice);
  const int64_t experts = p.columns, top_k = chosen.columns;
  for (Tensor t : {d_logits, logits}) CheckShape(t, p.rows, experts);
  for (Tensor t : {d_weight, weight, choice}) CheckShape(t, p.rows, top_k);
  const T* mean = nullptr;
  if (d_prob_mean.defined()) {
    KRAIT_CHECK(d_prob_mean.numel() == experts);
    mean = cpu::DenseData<T>(d_prob_mean);
  }
  ParallelFor(p.rows, Grain(experts * 16), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* q = out[t];
      for (int64_t e = 0; e < experts; ++e) q[e] = mean != nullptr ? mean[e] : T(0);
      T total = 1, shift = 0;
      if (renormalize) {
        total = 0;
        for (int64_t j = 0; j < top_k; ++j) {
          total += p[t][chosen[t][j]];
          shift += dw[t][j] * w[t][j];
        }
      }
      for (int64_t j = 0; j < top_k; ++j) q[chosen[t][j]] += (dw[t][j] - shift) / total;
      T inner = 0;
      for (int64_t e = 0; e < experts; ++e) inner += p[t][e] * q[e];
      // z_scale * lse^2 has the derivative z_scale * 2 * lse * p.
      const T z =
          z_scale == 0 ? T(0) : static_cast<T>(2 * z_scale * cpu::LogSumExp(experts, in[t]));
      for (int64_t e = 0; e < experts; ++e) q[e] = p[t][e] * (q[e] - inner + z);
    }
  });
}

// Partial sums in double over fixed pieces of tokens, added in order.
template <typename T>
void Statistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                Tensor logits, Tensor partial) {
  const cpu::Rows<T> p = cpu::RowsOf<T>(probs), in = cpu::RowsOf<T>(logits);
  const cpu::Rows<int32_t> chosen = cpu::RowsOf<int32_t>(choice);
  const int64_t experts = p.columns;
  CheckShape(logits, p.rows, experts);
  CheckShape(choice, p.rows, chosen.columns);
  KRAIT_CHECK(prob_sum.numel() == experts && choice_count.numel() == experts && z_sum.numel() == 1);
  const cpu::Rows<double> sums = cpu::RowsOf<double>(partial);
  ParallelFor(p.rows, kStatisticsTokens, [&](int64_t begin, int64_t end) {
    double* sum = sums[begin / kStatisticsTokens];
    std::fill_n(sum, experts + 1, 0.0);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t e = 0; e < experts; ++e) sum[e] += static_cast<double>(p[t][e]);
      const double z = cpu::LogSumExp(experts, in[t]);
      sum[experts] += z * z;
    }
  });
  for (int64_t k = 1; k < sums.rows; ++k) {
    for (int64_t e = 0; e <= experts; ++e) sums[0][e] += sums[k][e];
  }
  auto* count = cpu::DenseData<int64_t>(choice_count);
  for (int64_t t = 0; t < chosen.rows; ++t) {
    for (int64_t j = 0; j < chosen.columns; ++j) ++count[chosen[t][j]];
  }
  if (p.rows == 0) return;
  for (int64_t e = 0; e < experts; ++e) {
    cpu::DenseData<T>(prob_sum)[e] += static_cast<T>(sums[0][e]);
  }
  z_sum.data<T>()[0] += static_cast<T>(sums[0][experts]);
}

}  // namespace

void MoeRouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                     const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  cpu::DispatchFloat(logits, "MoeRouteForward", [&](auto zero) {
    RouteForward<decltype(zero)>(probs, choice, weight, logits, renormalize);
  });
}

void MoeRouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob_mean, double z_scale,
                      Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                      const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  cpu::DispatchFloat(logits, "MoeRouteBackward", [&](auto zero) {
    RouteBackward<decltype(zero)>(d_logits, d_weight, d_prob_mean, z_scale, probs, choice, weight,
                                  logits, renormalize);
  });
}

void MoeStatistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                   Tensor logits, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  const ArenaScope scope(ctx.scratch);
  const int64_t pieces = (probs.dim(0) + kStatisticsTokens - 1) / kStatisticsTokens;
  const Tensor partial = ctx.scratch->Alloc(DType::kF64, {pieces, probs.dim(1) + 1});
  if (op.planning()) return;
  cpu::DispatchFloat(logits, "MoeStatistics", [&](auto zero) {
    Statistics<decltype(zero)>(prob_sum, choice_count, z_sum, probs, choice, logits, partial);
  });
}

void MoeSort(Tensor row_of, Tensor source, int64_t* offsets, Tensor choice, int64_t experts,
             const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  if (choice.device() == Device::kCuda) KRAIT_FATAL("MoeSort has no CUDA version yet");
  const int64_t n = choice.numel();
  KRAIT_CHECK(row_of.numel() == n && source.numel() == n);
  KRAIT_CHECK(n <= std::numeric_limits<int32_t>::max());
  const int32_t* expert = cpu::DenseData<int32_t>(choice);
  auto* row = cpu::DenseData<int32_t>(row_of);
  auto* from = cpu::DenseData<int32_t>(source);
  // A counting sort: offsets[e+1] first counts expert e, then becomes the end of the experts up to
  // e; row_of first holds the rank of a choice among its expert's, so that no second counter is
  // needed.
  std::fill_n(offsets, experts + 1, int64_t{0});
  for (int64_t i = 0; i < n; ++i) {
    KRAIT_CHECK(expert[i] >= 0 && expert[i] < experts);
    row[i] = static_cast<int32_t>(offsets[expert[i] + 1]++);
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  for (int64_t i = 0; i < n; ++i) {
    row[i] += static_cast<int32_t>(offsets[expert[i]]);
    from[row[i]] = static_cast<int32_t>(i);
  }
}

void MoePermute(Tensor rows, Tensor x, Tensor source, int64_t top_k, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  cpu::DispatchFloat(x, "MoePermute", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(rows), in = cpu::RowsOf<T>(x);
    CheckShape(rows, in.rows * top_k, in.columns);
    KRAIT_CHECK(source.numel() == out.rows);
    const int32_t* from = cpu::DenseData<int32_t>(source);
    ParallelFor(out.rows, Grain(out.columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::memcpy(out[r], in[from[r] / top_k], static_cast<size_t>(out.columns) * sizeof(T));
      }
    });
  });
}

void MoePermuteBackward(Tensor dx, Tensor d_rows, Tensor row_of, bool accumulate,
                        const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  cpu::DispatchFloat(dx, "MoePermuteBackward", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(dx), in = cpu::RowsOf<T>(d_rows);
    const cpu::Rows<int32_t> row = cpu::RowsOf<int32_t>(row_of);
    CheckShape(row_of, out.rows, row.columns);
    CheckShape(d_rows, out.rows * row.columns, out.columns);
    ParallelFor(out.rows, Grain(out.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < row.columns; ++j) {
          cpu::ScaleRow(out.columns, T(1), in[row[t][j]], out[t], accumulate || j > 0);
        }
      }
    });
  });
}

void MoeCombine(Tensor y, Tensor rows, Tensor weight, Tensor row_of, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  cpu::DispatchFloat(y, "MoeCombine", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(y), in = cpu::RowsOf<T>(rows),
                       w = cpu::RowsOf<T>(weight);
    const cpu::Rows<int32_t> row = cpu::RowsOf<int32_t>(row_of);
    for (Tensor t : {weight, row_of}) CheckShape(t, out.rows, row.columns);
    CheckShape(rows, out.rows * row.columns, out.columns);
    ParallelFor(out.rows, Grain(out.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < row.columns; ++j) {
          cpu::ScaleRow(out.columns, w[t][j], in[row[t][j]], out[t], j > 0);
        }
      }
    });
  });
}

void MoeCombineBackward(Tensor d_rows, Tensor d_weight, Tensor dy, Tensor rows, Tensor weight,
                        Tensor row_of, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe);
  if (op.planning()) return;
  cpu::DispatchFloat(dy, "MoeCombineBackward", [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(d_rows), dw = cpu::RowsOf<T>(d_weight),
                       grad = cpu::RowsOf<T>(dy), in = cpu::RowsOf<T>(rows),
                       w = cpu::RowsOf<T>(weight);
    const cpu::Rows<int32_t> row = cpu::RowsOf<int32_t>(row_of);
    for (Tensor t : {d_weight, weight, row_of}) CheckShape(t, grad.rows, row.columns);
    for (Tensor t : {d_rows, rows}) CheckShape(t, grad.rows * row.columns, grad.columns);
    ParallelFor(grad.rows, Grain(grad.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < row.columns; ++j) {
          const int64_t r = row[t][j];
          dw[t][j] = cpu::DotAndScaleRow(grad.columns, w[t][j], grad[t], in[r], out[r]);
        }
      }
    });
  });
}

}  // namespace krait
