#include "parallel/collectives.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"

namespace krait {
namespace {

// Elements [begin, end) of a contiguous tensor.
Tensor Elements(Tensor t, int64_t begin, int64_t end) {
  return t.View({t.numel()}).Slice(0, begin, end - begin);
}

char* RowAddress(Tensor t, int64_t row) {
  return static_cast<char*>(t.raw()) + row * t.stride(0) * SizeOf(t.dtype());
}

// out [n] = the parts [size*n] of all ranks, added in rank order.
void AddParts(Tensor out, Tensor parts, const Context& ctx) {
  const int64_t n = out.numel(), size = parts.numel() / n;
  if (out.dtype() == DType::kI64) {
    if (ctx.planning) return;
    for (int64_t i = 0; i < n; ++i) {
      int64_t sum = 0;
      for (int64_t r = 0; r < size; ++r) sum += parts.data<int64_t>()[r * n + i];
      out.data<int64_t>()[i] = sum;
    }
    return;
  }
  const ArenaScope scope(ctx.scratch);
  const DType wide = Wide(out.dtype());
  const Tensor sum = wide == out.dtype() ? out : ctx.scratch->Alloc(wide, {n});
  Copy(sum, Elements(parts, 0, n), ctx);
  for (int64_t r = 1; r < size; ++r) AddInPlace(sum, Elements(parts, r * n, r * n + n), ctx);
  if (sum.raw() != out.raw()) Copy(out, sum, ctx);
}

template <typename T>
void MaxParts(Tensor out, Tensor parts) {
  const int64_t n = out.numel();
  for (int64_t i = 0; i < parts.numel(); ++i) {
    T& most = out.data<T>()[i % n];
    const T value = parts.data<T>()[i];
    // A NaN stays, whoever has it.
    if (i < n || value > most || value != value) most = i >= n && most != most ? most : value;
  }
}

}  // namespace

Communicator::Communicator(World* world, std::vector<int> ranks, int self)
    : world_(world), ranks_(std::move(ranks)) {
  const auto at = std::lower_bound(ranks_.begin(), ranks_.end(), self);
  KRAIT_CHECK(at != ranks_.end() && *at == self);
  rank_ = static_cast<int>(at - ranks_.begin());
}

void Communicator::AllGather(const char* what, Tensor out, Tensor in, const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype() &&
              out.numel() == in.numel() * size());
  if (op.planning()) return;
  const int64_t n = in.numel();
  std::vector<Message> sends, receives;
  for (int r = 0; r < size(); ++r) {
    const Tensor part = Elements(out, r * n, r * n + n);
    if (r == rank_) {
      if (part.raw() != in.raw()) Copy(part, in.View({n}), ctx);
      continue;
    }
    sends.push_back({ranks_[static_cast<size_t>(r)], in.raw(), in.bytes()});
    receives.push_back({ranks_[static_cast<size_t>(r)], part.raw(), part.bytes()});
  }
  world_->Exchange(sends, receives, what);
}

void Communicator::AllReduceSum(const char* what, Tensor x, const Context& ctx) const {
  const ArenaScope scope(ctx.scratch);
  const Tensor parts = ctx.scratch->Alloc(x.dtype(), {size() * x.numel()});
  AllGather(what, parts, x, ctx);
  AddParts(x.View({x.numel()}), parts, ctx);
}

void Communicator::AllReduceMax(const char* what, Tensor x, const Context& ctx) const {
  const ArenaScope scope(ctx.scratch);
  const Tensor parts = ctx.scratch->Alloc(x.dtype(), {size() * x.numel()});
  AllGather(what, parts, x, ctx);
  if (ctx.planning) return;
  x.dtype() == DType::kF64 ? MaxParts<double>(x, parts) : MaxParts<float>(x, parts);
}

void Communicator::ReduceScatterSum(const char* what, Tensor out, Tensor in,
                                    const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  const int64_t n = out.numel();
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype() &&
              in.numel() == n * size());
  const ArenaScope scope(ctx.scratch);
  const Tensor parts = ctx.scratch->Alloc(in.dtype(), {size() * n});
  if (!op.planning()) {
    std::vector<Message> sends, receives;
    for (int r = 0; r < size(); ++r) {
      const Tensor from = Elements(in, r * n, r * n + n), to = Elements(parts, r * n, r * n + n);
      if (r == rank_) {
        Copy(to, from, ctx);
        continue;
      }
      sends.push_back({ranks_[static_cast<size_t>(r)], from.raw(), from.bytes()});
      receives.push_back({ranks_[static_cast<size_t>(r)], to.raw(), to.bytes()});
    }
    world_->Exchange(sends, receives, what);
  }
  AddParts(out.View({n}), parts, ctx);
}

void Communicator::ExchangeRows(const char* what, Tensor out,
                                const std::vector<RowMessage>& receives, Tensor in,
                                const std::vector<RowMessage>& sends, const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  if (op.planning()) return;
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype());
  const int64_t row_bytes = in.stride(0) * SizeOf(in.dtype());
  KRAIT_CHECK(out.stride(0) * SizeOf(out.dtype()) == row_bytes);
  std::vector<Message> to, from;
  std::vector<RowMessage> own;
  for (const RowMessage& send : sends) {
    if (send.rows == 0) continue;
    KRAIT_CHECK(send.row >= 0 && send.row + send.rows <= in.dim(0));
    if (send.rank == rank_) {
      own.push_back(send);
    } else {
      to.push_back({ranks_[static_cast<size_t>(send.rank)], RowAddress(in, send.row),
                    send.rows * row_bytes});
    }
  }
  size_t next = 0;
  for (const RowMessage& receive : receives) {
    if (receive.rows == 0) continue;
    KRAIT_CHECK(receive.row >= 0 && receive.row + receive.rows <= out.dim(0));
    if (receive.rank == rank_) {
      KRAIT_CHECK(next < own.size() && own[next].rows == receive.rows);
      std::memmove(RowAddress(out, receive.row), RowAddress(in, own[next++].row),
                   static_cast<size_t>(receive.rows * row_bytes));
    } else {
      from.push_back({ranks_[static_cast<size_t>(receive.rank)], RowAddress(out, receive.row),
                      receive.rows * row_bytes});
    }
  }
  KRAIT_CHECK(next == own.size());
  world_->Exchange(to, from, what);
}

}  // namespace krait
