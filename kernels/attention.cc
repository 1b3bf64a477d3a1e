#include "kernels/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/parallel_for.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/widened.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/call.h"

namespace krait {
namespace {

using cpu::AttentionShape;

void CheckDims(Tensor x, int64_t batch, int64_t time, int64_t heads, int64_t head_dim) {
  KRAIT_CHECK(x.rank() == 4 && x.stride(3) == 1);
  KRAIT_CHECK(x.dim(0) == batch && x.dim(1) == time && x.dim(2) == heads && x.dim(3) == head_dim);
}

void CheckDocuments(Tensor doc_start, int64_t batch, int64_t queries) {
  if (!doc_start.defined()) return;
  KRAIT_CHECK(doc_start.numel() == batch * queries && doc_start.contiguous());
  KRAIT_CHECK(doc_start.dtype() == DType::kI32);
}

// `queries`: all that have the shape of q; `keys`: of k.
void CheckShapes(std::initializer_list<Tensor> queries, std::initializer_list<Tensor> keys,
                 Tensor lse, const Documents& documents) {
  const Tensor q = *queries.begin(), k = *keys.begin();
  KRAIT_CHECK(q.rank() == 4 && k.rank() == 4);
  KRAIT_CHECK(k.dim(1) >= q.dim(1) && k.dim(2) > 0 && q.dim(2) % k.dim(2) == 0);
  for (const Tensor& x : queries) CheckDims(x, q.dim(0), q.dim(1), q.dim(2), q.dim(3));
  for (const Tensor& x : keys) CheckDims(x, q.dim(0), k.dim(1), k.dim(2), q.dim(3));
  KRAIT_CHECK(lse.numel() == q.dim(0) * q.dim(2) * q.dim(1) && lse.contiguous());
  KRAIT_CHECK(lse.dtype() == Wide(q.dtype()));
  CheckDocuments(documents.doc_start, q.dim(0), q.dim(1));
}

const int32_t* DocStart(Tensor doc_start) {
  return doc_start.defined() ? doc_start.data<int32_t>() : nullptr;
}

AttentionShape ShapeOf(Tensor q, Tensor k, const Documents& documents) {
  return {q.dim(0),
          q.dim(1),
          k.dim(1),
          q.dim(2),
          k.dim(2),
          q.dim(3),
          DocStart(documents.doc_start),
          documents.first_position};
}

void CheckOnCuda(std::initializer_list<Tensor> operands, const char* op) {
  const DType dtype = operands.begin()->dtype();
  if (dtype != DType::kF32 && dtype != DType::kBF16) {
    KRAIT_FATAL(std::string(op) + " does not take " + Name(dtype) + " on CUDA");
  }
  for (const Tensor& x : operands) KRAIT_CHECK(x.dtype() == dtype);
  if (operands.begin()->dim(3) > cuda::kMaxHeadDim) {
    KRAIT_FATAL(std::string(op) + " on CUDA takes a head_dim of at most 256");
  }
}

// What cuDNN's calls take of scratch: the same whether or not the build has it, and at least as
// much with documents as without, so that a plan made with documents holds for any run.
cuda::AttentionScratch TakeScratch(const cuda::CudnnCalls& calls, const cuda::CudnnCalls& plain,
                                   Tensor q, Tensor k, const Documents& documents,
                                   const Context& ctx) {
  cuda::AttentionScratch scratch;
  const int64_t time = q.dim(1), keys = k.dim(1), head_dim = q.dim(3);
  if (const int64_t bytes = std::max(calls.workspace, plain.workspace); bytes > 0) {
    scratch.workspace = ctx.scratch->Alloc(DType::kF32, {bytes / 4});
  }
  if (calls.sequences > 0 && documents.doc_start.defined()) {
    scratch.mask =
        ctx.scratch->Alloc(DType::kBF16, {calls.sequences, time, cuda::CudnnMaskStride(time)});
  }
  if (plain.sequences > 0 && plain.queries < time) {
    const int64_t g = plain.kv_heads, heads = g * (q.dim(2) / k.dim(2));
    scratch.block_lse = ctx.scratch->Alloc(DType::kF32, {heads, plain.queries});
    scratch.block_sums = ctx.scratch->Alloc(DType::kF32, {2, keys, g, head_dim});
    scratch.block_part = ctx.scratch->Alloc(DType::kBF16, {2, keys, g, head_dim});
  }
  return scratch;
}

// Of `products` products over the triangle of queries and keys.
double Flops(Tensor q, Tensor k, double products) {
  const auto t = static_cast<double>(q.dim(1)), s = static_cast<double>(k.dim(1));
  const double pairs = t * (s - t) + t * (t + 1) / 2;
  return products * 2 * pairs * static_cast<double>(q.dim(0) * q.dim(2) * q.dim(3));
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
  CheckShapes({q, y}, {k, v}, lse, documents);
  op.CountFlops(Flops(q, k, /*products=*/2));
  if (ctx.device == Device::kCuda) {
    CheckOnCuda({q, k, v, y}, op.name());
    const ArenaScope scope(ctx.scratch);
    const auto calls_of = [&](bool with_documents) {
      return cuda::CudnnCallsOf({q, k, v, y}, with_documents, /*backward=*/false, ctx);
    };
    const cuda::CudnnCalls calls = calls_of(documents.doc_start.defined());
    cuda::AttentionScratch scratch = TakeScratch(calls, calls_of(false), q, k, documents, ctx);
    if (const int64_t splits = cuda::AttentionSplits(q, k); splits > 1) {
      scratch.partial_y = ctx.scratch->Alloc(DType::kF32, {splits, lse.numel(), q.dim(3)});
      scratch.partial_lse = ctx.scratch->Alloc(DType::kF32, {splits, lse.numel()});
    }
    if (op.planning()) return;
    KRAIT_CUDA(AttentionForward(y, lse, q, k, v, documents, calls, scratch, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  y = wide.Out(y), q = wide.In(q), k = wide.In(k), v = wide.In(v);
  const ArenaScope scope(ctx.scratch);
  const Tensor scratch =
      ctx.scratch->Alloc(q.dtype(), {MaxThreads(), cpu::AttentionTileElements()});
  if (op.planning()) return;
  cpu::DispatchFloat(q, op.name(), [&](auto zero) {
    using T = decltype(zero);
    cpu::AttentionForward(ShapeOf(q, k, documents), HeadsOf<T>(y), cpu::DenseData<T>(lse),
                          HeadsOf<T>(q), HeadsOf<T>(k), HeadsOf<T>(v), scratch.data<T>());
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
  CheckShapes({q, y, dq, dy}, {k, v, dk, dv}, lse, documents);
  op.CountFlops(Flops(q, k, /*products=*/5));
  if (ctx.device == Device::kCuda) {
    CheckOnCuda({q, k, v, y, dq, dk, dv, dy}, op.name());
    const ArenaScope scope(ctx.scratch);
    const auto calls_of = [&](bool with_documents) {
      return cuda::CudnnCallsOf({q, k, v, y, dq, dk, dv, dy}, with_documents, /*backward=*/true,
                                ctx);
    };
    const cuda::CudnnCalls calls = calls_of(documents.doc_start.defined());
    cuda::AttentionScratch scratch = TakeScratch(calls, calls_of(false), q, k, documents, ctx);
    scratch.delta = ctx.scratch->Alloc(DType::kF32, {lse.numel()});
    if (op.planning()) return;
    KRAIT_CUDA(AttentionBackward(dq, dk, dv, dy, y, lse, q, k, v, documents, calls, scratch, ctx));
    return;
  }
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
    cpu::AttentionBackward(ShapeOf(q, k, documents),
                           {HeadsOf<T>(dq), HeadsOf<T>(dk), HeadsOf<T>(dv), HeadsOf<T>(dy)},
                           HeadsOf<T>(y), cpu::DenseData<T>(lse), HeadsOf<T>(q), HeadsOf<T>(k),
                           HeadsOf<T>(v), delta.data<T>(), scratch.data<T>());
  });
}

void Rope(Tensor x, const Documents& documents, double theta, bool inverse, const Context& ctx) {
  OpScope op(ctx, OpFamily::kAttention, "Rope", {{"x", x}, {"doc_start", documents.doc_start}});
  KRAIT_CHECK(x.rank() == 4 && x.stride(3) == 1 && x.dim(3) % 2 == 0);
  CheckDocuments(documents.doc_start, x.dim(0), x.dim(1));
  if (ctx.device == Device::kCuda) {
    CheckOnCuda({x}, op.name());
    if (op.planning()) return;
    KRAIT_CUDA(Rope(x, documents, theta, inverse, ctx));
    return;
  }
  cpu::Widened wide(ctx);
  x = wide.InOut(x);
  const ArenaScope scope(ctx.scratch);
  const int64_t head_dim = x.dim(3);
  const Tensor frequency = ctx.scratch->Alloc(DType::kF64, {head_dim / 2});
  if (op.planning()) return;
  cpu::DispatchFloat(x, op.name(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      frequency.data<double>()[i] =
          std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    }
    cpu::Rope(ShapeOf(x, x, documents), HeadsOf<T>(x), frequency.data<double>(), inverse);
  });
}

}  // namespace krait
