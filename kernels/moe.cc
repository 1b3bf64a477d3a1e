#include "kernels/moe.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/base/parallel_for.h"
#include "kernels/check_shape.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/moe.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/bucket_sort.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/moe.h"
#include "kernels/gemm.h"

namespace krait {
namespace {

// Elements per piece of work, and tokens per partial sum of the statistics.
constexpr int64_t kPieceElements = 16384, kStatisticsTokens = 128;

int64_t Grain(int64_t columns) { return std::max<int64_t>(1, kPieceElements / columns); }

template <typename T>
void RouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize) {
  const cpu::Rows<T> p = cpu::RowsOf<T>(probs), w = cpu::RowsOf<T>(weight),
                     in = cpu::RowsOf<T>(logits);
  const cpu::Rows<int32_t> chosen = cpu::RowsOf<int32_t>(choice);
  const int64_t experts = in.columns, top_k = chosen.columns;
  KRAIT_CHECK(top_k >= 1 && top_k <= experts);
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

// With q = dL/dp: q_e = d_prob_e, plus for the chosen d_weight_j, or where the weights are
// w_j = p_j / S, S = sum_j p_j:  (d_weight_j - sum_i d_weight_i w_i) / S. Through the softmax
// dL/dlogit_e = p_e (q_e - sum_f p_f q_f), to which the z-loss adds its share.
template <typename T>
void RouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob, double z_scale, Tensor probs,
                   Tensor choice, Tensor weight, Tensor logits, bool renormalize) {
  const cpu::Rows<T> out = cpu::RowsOf<T>(d_logits), dw = cpu::RowsOf<T>(d_weight),
                     p = cpu::RowsOf<T>(probs), w = cpu::RowsOf<T>(weight),
                     in = cpu::RowsOf<T>(logits);
  const cpu::Rows<int32_t> chosen = cpu::RowsOf<int32_t>(choice);
  const int64_t experts = p.columns, top_k = chosen.columns;
  const T* pooled = d_prob.defined() ? cpu::DenseData<T>(d_prob) : nullptr;
  const int64_t group_rows = pooled != nullptr ? std::max<int64_t>(1, p.rows / d_prob.dim(0)) : 1;
  ParallelFor(p.rows, Grain(experts * 16), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* q = out[t];
      const T* mean = pooled != nullptr ? pooled + t / group_rows * experts : nullptr;
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

// Pieces of a group's tokens over which the statistics are summed first.
int64_t GroupPieces(int64_t group_rows, Device device) {
  return device == Device::kCuda ? cuda::StatisticsPieces(group_rows)
                                 : (group_rows + kStatisticsTokens - 1) / kStatisticsTokens;
}

// Partial sums in double over fixed pieces of a group's tokens, added in order.
template <typename T>
void Statistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                Tensor logits, Tensor partial) {
  const cpu::Rows<T> p = cpu::RowsOf<T>(probs), in = cpu::RowsOf<T>(logits);
  const cpu::Rows<int32_t> chosen = cpu::RowsOf<int32_t>(choice);
  const int64_t experts = p.columns, groups = prob_sum.dim(0), group_rows = p.rows / groups;
  if (p.rows == 0) return;
  const cpu::Rows<double> sums = cpu::RowsOf<double>(partial);
  const int64_t pieces = sums.rows / groups;
  ParallelFor(sums.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double* sum = sums[k];
      std::fill_n(sum, experts + 1, 0.0);
      const int64_t first = k / pieces * group_rows, piece = k % pieces * kStatisticsTokens;
      const int64_t last = first + std::min(group_rows, piece + kStatisticsTokens);
      for (int64_t t = first + piece; t < last; ++t) {
        for (int64_t e = 0; e < experts; ++e) sum[e] += static_cast<double>(p[t][e]);
        const double z = cpu::LogSumExp(experts, in[t]);
        sum[experts] += z * z;
      }
    }
  });
  double z = 0;
  for (int64_t g = 0; g < groups; ++g) {
    double* total = sums[g * pieces];
    for (int64_t k = 1; k < pieces; ++k) {
      for (int64_t e = 0; e <= experts; ++e) total[e] += sums[g * pieces + k][e];
    }
    T* sum = cpu::DenseData<T>(prob_sum) + g * experts;
    for (int64_t e = 0; e < experts; ++e) sum[e] += static_cast<T>(total[e]);
    z += total[experts];
  }
  z_sum.data<T>()[0] += static_cast<T>(z);
  auto* counts = cpu::DenseData<int64_t>(choice_count);
  for (int64_t t = 0; t < chosen.rows; ++t) {
    int64_t* count = counts + t / group_rows * experts;
    for (int64_t j = 0; j < chosen.columns; ++j) ++count[chosen[t][j]];
  }
}

// probs and logits [M,E], choice [M,k].
void CheckRouting(const char* op, const Tensor& logits, const Tensor& probs, const Tensor& choice) {
  CheckShape(op, {"probs", probs}, {-1, -1});
  CheckShape(op, {"logits", logits}, {probs.dim(0), probs.dim(1)});
  CheckShape(op, {"choice", choice}, {probs.dim(0), -1});
}

// Rows of the experts [R,D] and the tokens' own [M,D], with row_of [M,k].
void CheckExpertRows(const char* op, const Operand& rows, const Operand& own,
                     const Tensor& row_of) {
  CheckShape(op, {"row_of", row_of}, {-1, -1});
  CheckShape(op, own, {row_of.dim(0), -1});
  CheckShape(op, rows, {-1, own.tensor.dim(1)});
  KRAIT_CHECK(rows.tensor.dim(0) >= row_of.numel());
}

// Choices of expert e in every `stride`-th row of [begin, end).
int64_t CountOf(const cpu::Rows<int64_t>& counts, int64_t begin, int64_t end, int64_t stride,
                int64_t e) {
  int64_t count = 0;
  for (int64_t row = begin; row < end; row += stride) count += counts[row][e];
  return count;
}

// A group of a pool: the rows begin, begin + groups, ... before end.
struct PooledRows {
  int64_t begin, end;
};
PooledRows RowsOfPool(const MoeLossShape& shape, int64_t sublayers, int64_t pool, int64_t group) {
  const int64_t per_pool = sublayers / shape.pools;
  return {pool * per_pool * shape.groups + group, (pool + 1) * per_pool * shape.groups};
}

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void RouterForward(Tensor logits, Tensor x, Tensor w, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "RouterForward", {{"logits", logits}, {"x", x}, {"w", w}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(RouterForward(logits, x, w, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  MatMul(logits, wide.In(x), false, w, true, /*accumulate=*/false, ctx);
}

void RouterBackwardInput(Tensor dx, Tensor d_logits, Tensor w, bool accumulate,
                         const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "RouterBackwardInput",
             {{"dx", dx}, {"d_logits", d_logits}, {"w", w}});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(RouterBackwardInput(dx, d_logits, w, accumulate, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  MatMul(accumulate ? wide.InOut(dx) : wide.Out(dx), d_logits, false, w, false, accumulate, ctx);
}

void RouterBackwardWeight(Tensor dw, Tensor d_logits, Tensor x, bool accumulate,
                          const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "RouterBackwardWeight",
             {{"dw", dw}, {"d_logits", d_logits}, {"x", x}});
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor partial =
        ctx.scratch->Alloc(DType::kF32, {cuda::RouterPieces(x.dim(0)), dw.dim(0), dw.dim(1)});
    if (op.planning()) return;
    KRAIT_CUDA(RouterBackwardWeight(dw, d_logits, x, accumulate, partial, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  MatMul(dw, d_logits, true, wide.In(x), false, accumulate, ctx);
}

void MoeRouteForward(Tensor probs, Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                     const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeRouteForward",
             {{"probs", probs}, {"choice", choice}, {"weight", weight}, {"logits", logits}});
  CheckRouting(op.name(), logits, probs, choice);
  CheckShape(op.name(), {"weight", weight}, {choice.dim(0), choice.dim(1)});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MoeRouteForward(probs, choice, weight, logits, renormalize, ctx));
    return;
  }
  cpu::DispatchFloat(logits, op.name(), [&](auto zero) {
    RouteForward<decltype(zero)>(probs, choice, weight, logits, renormalize);
  });
}

void MoeRouteBackward(Tensor d_logits, Tensor d_weight, Tensor d_prob, double z_scale, Tensor probs,
                      Tensor choice, Tensor weight, Tensor logits, bool renormalize,
                      const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeRouteBackward",
             {{"d_logits", d_logits},
              {"d_weight", d_weight},
              {"d_prob", d_prob},
              {"probs", probs},
              {"choice", choice},
              {"weight", weight},
              {"logits", logits}});
  CheckRouting(op.name(), logits, probs, choice);
  const int64_t tokens = probs.dim(0), experts = probs.dim(1), top_k = choice.dim(1);
  CheckShape(op.name(), {"d_logits", d_logits}, {tokens, experts});
  CheckShape(op.name(), {"d_weight", d_weight}, {tokens, top_k});
  CheckShape(op.name(), {"weight", weight}, {tokens, top_k});
  if (d_prob.defined()) {
    CheckDense(op.name(), {"d_prob", d_prob}, {-1, experts});
    KRAIT_CHECK(tokens % d_prob.dim(0) == 0);
  }
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MoeRouteBackward(d_logits, d_weight, d_prob, z_scale, probs, choice, weight, logits,
                                renormalize, ctx));
    return;
  }
  cpu::DispatchFloat(logits, op.name(), [&](auto zero) {
    RouteBackward<decltype(zero)>(d_logits, d_weight, d_prob, z_scale, probs, choice, weight,
                                  logits, renormalize);
  });
}

void MoeStatistics(Tensor prob_sum, Tensor choice_count, Tensor z_sum, Tensor probs, Tensor choice,
                   Tensor logits, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeStatistics",
             {{"prob_sum", prob_sum},
              {"choice_count", choice_count},
              {"z_sum", z_sum},
              {"probs", probs},
              {"choice", choice},
              {"logits", logits}});
  CheckRouting(op.name(), logits, probs, choice);
  CheckDense(op.name(), {"prob_sum", prob_sum}, {-1, probs.dim(1)});
  const int64_t groups = prob_sum.dim(0);
  CheckDense(op.name(), {"choice_count", choice_count}, {groups, probs.dim(1)});
  KRAIT_CHECK(probs.dim(0) % groups == 0);
  CheckShape(op.name(), {"z_sum", z_sum}, {1});
  const ArenaScope scope(ctx.scratch);
  const int64_t pieces = groups * GroupPieces(probs.dim(0) / groups, ctx.device);
  const Tensor partial = ctx.scratch->Alloc(DType::kF64, {pieces, probs.dim(1) + 1});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MoeStatistics(prob_sum, choice_count, z_sum, probs, choice, logits, partial, ctx));
    return;
  }
  cpu::DispatchFloat(logits, op.name(), [&](auto zero) {
    Statistics<decltype(zero)>(prob_sum, choice_count, z_sum, probs, choice, logits, partial);
  });
}

void MoeLossesForward(Tensor aux, Tensor z, Tensor imbalance, Tensor prob_sum, Tensor choice_count,
                      Tensor z_sum, const MoeLossShape& shape, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeLossesForward",
             {{"aux", aux},
              {"z", z},
              {"imbalance", imbalance},
              {"prob_sum", prob_sum},
              {"choice_count", choice_count},
              {"z_sum", z_sum}});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MoeLossesForward(aux, z, imbalance, prob_sum, choice_count, z_sum, shape, ctx));
    return;
  }
  cpu::DispatchFloat(prob_sum, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> probs = cpu::RowsOf<T>(prob_sum);
    const auto counts = cpu::RowsOf<int64_t>(choice_count);
    const int64_t groups = shape.groups, sublayers = probs.rows / groups, experts = probs.columns;
    KRAIT_CHECK(probs.rows % groups == 0 && shape.tokens % groups == 0);
    KRAIT_CHECK(shape.pools == 1 || shape.pools == sublayers);
    KRAIT_CHECK(z_sum.numel() == sublayers && imbalance.numel() == sublayers);
    const auto n = static_cast<double>(shape.tokens / groups * (sublayers / shape.pools));
    double aux_loss = 0;
    for (int64_t i = 0; i < shape.pools * groups; ++i) {
      const PooledRows rows = RowsOfPool(shape, sublayers, i / groups, i % groups);
      double sum = 0;
      for (int64_t e = 0; e < experts; ++e) {
        double prob = 0;
        for (int64_t row = rows.begin; row < rows.end; row += groups) {
          prob += static_cast<double>(probs[row][e]);
        }
        sum +=
            prob / n * (static_cast<double>(CountOf(counts, rows.begin, rows.end, groups, e)) / n);
      }
      aux_loss += static_cast<double>(experts) * sum / static_cast<double>(shape.pools * groups);
    }
    aux.data<double>()[0] += aux_loss;
    double z_loss = 0;
    for (int64_t j = 0; j < sublayers; ++j) {
      z_loss += static_cast<double>(cpu::DenseData<T>(z_sum)[j]) /
                static_cast<double>(shape.tokens * sublayers);
      int64_t most = 0;
      for (int64_t e = 0; e < experts; ++e) {
        most = std::max(most, CountOf(counts, j * groups, (j + 1) * groups, 1, e));
      }
      cpu::DenseData<double>(imbalance)[j] +=
          static_cast<double>(most * experts) / static_cast<double>(shape.tokens * shape.top_k);
    }
    z.data<double>()[0] += z_loss;
  });
}

void MoeLossesBackward(Tensor d_prob, Tensor choice_count, double scale, const MoeLossShape& shape,
                       const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeLossesBackward",
             {{"d_prob", d_prob}, {"choice_count", choice_count}});
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MoeLossesBackward(d_prob, choice_count, scale, shape, ctx));
    return;
  }
  cpu::DispatchFloat(d_prob, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(d_prob);
    const auto counts = cpu::RowsOf<int64_t>(choice_count);
    const int64_t groups = shape.groups, sublayers = out.rows / groups, experts = out.columns;
    KRAIT_CHECK(out.rows % groups == 0 && shape.tokens % groups == 0);
    KRAIT_CHECK(shape.pools == 1 || shape.pools == sublayers);
    const auto n = static_cast<double>(shape.tokens / groups * (sublayers / shape.pools));
    for (int64_t i = 0; i < shape.pools * groups; ++i) {
      const PooledRows rows = RowsOfPool(shape, sublayers, i / groups, i % groups);
      for (int64_t e = 0; e < experts; ++e) {
        const auto count = static_cast<double>(CountOf(counts, rows.begin, rows.end, groups, e));
        const double value = scale * static_cast<double>(experts) * (count / n) /
                             (n * static_cast<double>(shape.pools * groups));
        for (int64_t row = rows.begin; row < rows.end; row += groups) {
          out[row][e] = static_cast<T>(value);
        }
      }
    }
  });
}

int64_t ExpertRows(int64_t tokens, int64_t top_k, int64_t experts, Device device) {
  return tokens * top_k + (ExpertRowAlignment(device) - 1) * experts;
}

void MoeSort(Tensor row_of, Tensor source, Tensor offsets, Tensor choice, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeSort",
             {{"row_of", row_of}, {"source", source}, {"offsets", offsets}, {"choice", choice}});
  if (ctx.device == Device::kCuda) {
    const ArenaScope scope(ctx.scratch);
    const Tensor counts =
        ctx.scratch->Alloc(DType::kI32, {cuda::BucketBlocks(choice.numel()), offsets.numel() - 1});
    if (op.planning()) return;
    KRAIT_CUDA(MoeSort(row_of, source, offsets, choice, counts, ctx));
    return;
  }
  if (op.planning()) return;
  const int64_t n = choice.numel(), experts = offsets.numel() - 1;
  KRAIT_CHECK(row_of.numel() == n && source.numel() >= n);
  KRAIT_CHECK(source.numel() <= std::numeric_limits<int32_t>::max());
  const int32_t* expert = cpu::DenseData<int32_t>(choice);
  auto* row = cpu::DenseData<int32_t>(row_of);
  auto* from = cpu::DenseData<int32_t>(source);
  auto* begin = cpu::DenseData<int64_t>(offsets);
  // A counting sort: begin[e+1] first counts expert e, then becomes the end of the experts up to e;
  // row first holds the rank of a choice among its expert's, so that no second counter is needed.
  std::fill_n(begin, experts + 1, int64_t{0});
  for (int64_t i = 0; i < n; ++i) {
    KRAIT_CHECK(expert[i] >= 0 && expert[i] < experts);
    row[i] = static_cast<int32_t>(begin[expert[i] + 1]++);
  }
  for (int64_t e = 0; e < experts; ++e) {
    begin[e + 1] = RoundUp(begin[e] + begin[e + 1], ExpertRowAlignment(ctx.device));
  }
  std::fill_n(from, source.numel(), -1);
  for (int64_t i = 0; i < n; ++i) {
    row[i] += static_cast<int32_t>(begin[expert[i]]);
    from[row[i]] = static_cast<int32_t>(i);
  }
}

void MoePermute(Tensor rows, Tensor x, Tensor source, int64_t top_k, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoePermute", {{"rows", rows}, {"x", x}, {"source", source}});
  CheckShape(op.name(), {"x", x}, {-1, -1});
  CheckDense(op.name(), {"source", source}, {-1});
  CheckShape(op.name(), {"rows", rows}, {source.dim(0), x.dim(1)});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(MoePermute(rows, x, source, top_k, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  rows = wide.Out(rows), x = wide.In(x);
  if (op.planning()) return;
  cpu::DispatchFloat(x, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(rows), in = cpu::RowsOf<T>(x);
    const int32_t* from = cpu::DenseData<int32_t>(source);
    ParallelFor(out.rows, Grain(out.columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (from[r] < 0) {
          std::fill_n(out[r], out.columns, T{0});
        } else {
          std::copy_n(in[from[r] / top_k], out.columns, out[r]);
        }
      }
    });
  });
}

void MoePermuteBackward(Tensor dx, Tensor d_rows, Tensor row_of, bool accumulate,
                        const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoePermuteBackward",
             {{"dx", dx}, {"d_rows", d_rows}, {"row_of", row_of}});
  CheckExpertRows(op.name(), {"d_rows", d_rows}, {"dx", dx}, row_of);
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(MoePermuteBackward(dx, d_rows, row_of, accumulate, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  dx = accumulate ? wide.InOut(dx) : wide.Out(dx), d_rows = wide.In(d_rows);
  if (op.planning()) return;
  cpu::DispatchFloat(dx, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(dx), in = cpu::RowsOf<T>(d_rows);
    const cpu::Rows<int32_t> row = cpu::RowsOf<int32_t>(row_of);
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
  OpScope op(ctx, OpFamily::kMoe, "MoeCombine",
             {{"y", y}, {"rows", rows}, {"weight", weight}, {"row_of", row_of}});
  CheckExpertRows(op.name(), {"rows", rows}, {"y", y}, row_of);
  CheckShape(op.name(), {"weight", weight}, {row_of.dim(0), row_of.dim(1)});
  if (ctx.device == Device::kCuda) {
    if (op.planning()) return;
    KRAIT_CUDA(MoeCombine(y, rows, weight, row_of, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.Out(y), rows = wide.In(rows);
  if (op.planning()) return;
  cpu::DispatchFloat(y, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const cpu::Rows<T> out = cpu::RowsOf<T>(y), in = cpu::RowsOf<T>(rows),
                       w = cpu::RowsOf<T>(weight);
    const cpu::Rows<int32_t> row = cpu::RowsOf<int32_t>(row_of);
    ParallelFor(out.rows, Grain(out.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < row.columns; ++j) {
          cpu::ScaleRow(out.columns, w[t][j], in[row[t][j]], out[t], j > 0);
        }
      }
    });
  });
}

void MoeRowNumbers(Tensor numbers, int64_t used, const Context& ctx) {
  OpScope op(ctx, OpFamily::kMoe, "MoeRowNumbers", {{"numbers", numbers}});
  CheckDense(op.name(), {"numbers", numbers}, {-1});
  KRAIT_CHECK(used >= 0 && used <= numbers.numel());
  if (op.planning()) return;
  if (ctx.device == Device::kCuda) {
    KRAIT_CUDA(MoeRowNumbers(numbers, used, ctx));
    return;
  }
  int32_t* const to = cpu::DenseData<int32_t>(numbers);
  std::iota(to, to + used, 0);
  std::fill(to + used, to + numbers.numel(), -1);
}

}  // namespace krait
