#include "kernels/attention.h"

#include <cmath>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/widened.h"

namespace krait {
namespace {

using cpu::AttentionShape;

void CheckDims(Tensor x, int64_t batch, int64_t time, int64_t heads, int64_t head_dim) {
  KRAIT_CHECK(x.rank() == 4 && x.stride(3) == 1);
  KRAIT_CHECK(x.dim(0) == batch && x.dim(1) == time && x.dim(2) == heads && x.dim(3) == head_dim);
}

const int32_t* DocStart(Tensor doc_start, int64_t batch, int64_t queries) {
  if (!doc_start.defined()) return nullptr;
  KRAIT_CHECK(doc_start.numel() == batch * queries);
  return cpu::DenseData<int32_t>(doc_start);
}

AttentionShape ShapeOf(Tensor q, Tensor k, Tensor v, const Documents& documents) {
  KRAIT_CHECK(q.rank() == 4 && k.rank() == 4);
  const AttentionShape shape{q.dim(0),
                             q.dim(1),
                             k.dim(1),
                             q.dim(2),
                             k.dim(2),
                             q.dim(3),
                             DocStart(documents.doc_start, q.dim(0), q.dim(1)),
                             documents.first_position};
  KRAIT_CHECK(shape.keys >= shape.queries && shape.heads % shape.kv_heads == 0);
  CheckDims(q, shape.batch, shape.queries, shape.heads, shape.head_dim);
  CheckDims(k, shape.batch, shape.keys, shape.kv_heads, shape.head_dim);
  CheckDims(v, shape.batch, shape.keys, shape.kv_heads, shape.head_dim);
  return shape;
}

template <typename T>
cpu::Heads<T> HeadsOf(Tensor x) {
  return {x.data<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace

void AttentionForward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                      const Documents& documents, const Context& ctx) {
  OpScope op(
      ctx, OpFamily::kAttention, "AttentionForward",
      {{"y", y}, {"lse", lse}, {"q", q}, {"k", k}, {"v", v}, {"doc_start", documents.doc_start}});
  cpu::Widened wide(ctx);
  y = wide.Out(y), q = wide.In(q), k = wide.In(k), v = wide.In(v);
  const ArenaScope scope(ctx.scratch);
  const Tensor scratch =
      ctx.scratch->Alloc(q.dtype(), {MaxThreads(), cpu::AttentionTileElements()});
  if (op.planning()) return;
  cpu::DispatchFloat(q, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const AttentionShape shape = ShapeOf(q, k, v, documents);
    CheckDims(y, shape.batch, shape.queries, shape.heads, shape.head_dim);
    KRAIT_CHECK(lse.numel() == shape.batch * shape.heads * shape.queries);
    cpu::AttentionForward(shape, HeadsOf<T>(y), cpu::DenseData<T>(lse), HeadsOf<T>(q),
                          HeadsOf<T>(k), HeadsOf<T>(v), scratch.data<T>());
  });
}

void AttentionBackward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y, Tensor lse, Tensor q,
                       Tensor k, Tensor v, const Documents& documents, const Context& ctx) {
  OpScope op(ctx, OpFamily::kAttention, "AttentionBackward",
             {{"dq", dq},
              {"dk", dk},
              {"dv", dv},
              {"dy", dy},
              {"y", y},
              {"lse", lse},
              {"q", q},
              {"k", k},
              {"v", v},
              {"doc_start", documents.doc_start}});
  cpu::Widened wide(ctx);
  dq = wide.Out(dq), dk = wide.Out(dk), dv = wide.Out(dv);
  dy = wide.In(dy), y = wide.In(y), q = wide.In(q), k = wide.In(k), v = wide.In(v);
  const ArenaScope scope(ctx.scratch);
  const Tensor delta = ctx.scratch->Alloc(q.dtype(), {lse.numel()});
  const Tensor scratch =
      ctx.scratch->Alloc(q.dtype(), {MaxThreads(), 2, cpu::AttentionTileElements()});
  if (op.planning()) return;
  cpu::DispatchFloat(q, op.name(), [&](auto zero) {
    using T = decltype(zero);
    const AttentionShape shape = ShapeOf(q, k, v, documents);
    CheckDims(y, shape.batch, shape.queries, shape.heads, shape.head_dim);
    CheckDims(dy, shape.batch, shape.queries, shape.heads, shape.head_dim);
    CheckDims(dq, shape.batch, shape.queries, shape.heads, shape.head_dim);
    CheckDims(dk, shape.batch, shape.keys, shape.kv_heads, shape.head_dim);
    CheckDims(dv, shape.batch, shape.keys, shape.kv_heads, shape.head_dim);
    KRAIT_CHECK(lse.numel() == shape.batch * shape.heads * shape.queries);
    cpu::AttentionBackward(shape, {HeadsOf<T>(dq), HeadsOf<T>(dk), HeadsOf<T>(dv), HeadsOf<T>(dy)},
                           HeadsOf<T>(y), cpu::DenseData<T>(lse), HeadsOf<T>(q), HeadsOf<T>(k),
                           HeadsOf<T>(v), delta.data<T>(), scratch.data<T>());
  });
}

void Rope(Tensor x, const Documents& documents, double theta, bool inverse, const Context& ctx) {
  OpScope op(ctx, OpFamily::kAttention, "Rope", {{"x", x}, {"doc_start", documents.doc_start}});
  cpu::Widened wide(ctx);
  x = wide.InOut(x);
  const ArenaScope scope(ctx.scratch);
  const int64_t head_dim = x.dim(3);
  const Tensor frequency = ctx.scratch->Alloc(DType::kF64, {head_dim / 2});
  if (op.planning()) return;
  cpu::DispatchFloat(x, op.name(), [&](auto zero) {
    using T = decltype(zero);
    KRAIT_CHECK(x.rank() == 4 && x.stride(3) == 1 && head_dim % 2 == 0);
    const AttentionShape shape{x.dim(0),
                               x.dim(1),
                               x.dim(1),
                               x.dim(2),
                               x.dim(2),
                               head_dim,
                               DocStart(documents.doc_start, x.dim(0), x.dim(1)),
                               documents.first_position};
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      frequency.data<double>()[i] =
          std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    }
    cpu::Rope(shape, HeadsOf<T>(x), frequency.data<double>(), inverse);
  });
}

}  // namespace krait
