#include "parallel/collectives.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/transfer.h"

namespace krait {
namespace {

// Elements [begin, end) of a contiguous tensor.
Tensor Elements(Tensor t, int64_t begin, int64_t end) {
  return t.View({t.numel()}).Slice(0, begin, end - begin);
}

char* RowAddress(Tensor t, int64_t row) {
  return static_cast<char*>(t.raw()) + row * t.stride(0) * SizeOf(t.dtype());
}

// out [n] = `join` of parts [size*n], one part after the other.
template <typename T, typename Join>
void JoinParts(Tensor out, Tensor parts, const Join& join, const Context& ctx) {
  std::vector<T> values(static_cast<size_t>(parts.numel()));
  Download(values.data(), parts, ctx);
  const auto n = static_cast<size_t>(out.numel());
  for (size_t i = n; i < values.size(); ++i) values[i % n] = join(values[i % n], values[i]);
  Upload(out, values.data(), ctx);
}

// A NaN stays, whoever has it.
template <typename T>
T Maximum(T a, T b) {
  return std::isnan(a) || a > b ? a : b;
}

}  // namespace

void AddInRankOrder(Tensor out, Tensor parts, const Context& ctx) {
  const int64_t n = out.numel(), size = parts.numel() / n;
  if (out.dtype() == DType::kI64) {
    JoinParts<int64_t>(out, parts, std::plus<>(), ctx);
    return;
  }
  const ArenaScope scope(ctx.scratch);
  const DType wide = Wide(out.dtype());
  const Tensor sum = wide == out.dtype() ? out : ctx.scratch->Alloc(wide, {n});
  Copy(sum, Elements(parts, 0, n), ctx);
  for (int64_t r = 1; r < size; ++r) AddInPlace(sum, Elements(parts, r * n, r * n + n), ctx);
  if (sum.raw() != out.raw()) Copy(out, sum, ctx);
}

Communicator::Communicator(World* world, std::vector<int> ranks, int self, int64_t* planned)
    : world_(world), ranks_(std::move(ranks)), planned_(planned) {
  const auto at = std::lower_bound(ranks_.begin(), ranks_.end(), self);
  KRAIT_CHECK(at != ranks_.end() && *at == self);
  rank_ = static_cast<int>(at - ranks_.begin());
}

void Communicator::AllGather(const char* what, Tensor out, Tensor in, const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype() &&
              out.numel() == in.numel() * size());
  if (op.planning()) return Plan(in.bytes() * (size() - 1));
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
  AddInRankOrder(x.View({x.numel()}), parts, ctx);
}

void Communicator::AllReduceMax(const char* what, Tensor x, const Context& ctx) const {
  const ArenaScope scope(ctx.scratch);
  const Tensor parts = ctx.scratch->Alloc(x.dtype(), {size() * x.numel()});
  AllGather(what, parts, x, ctx);
  const Tensor out = x.View({x.numel()});
  x.dtype() == DType::kF64 ? JoinParts<double>(out, parts, Maximum<double>, ctx)
                           : JoinParts<float>(out, parts, Maximum<float>, ctx);
}

void Communicator::ReduceScatterSum(const char* what, Tensor out, Tensor in,
                                    const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  const int64_t n = out.numel();
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype() &&
              in.numel() == n * size());
  const ArenaScope scope(ctx.scratch);
  const Tensor parts = ctx.scratch->Alloc(in.dtype(), {size() * n});
  if (op.planning()) {
    Plan(out.bytes() * (size() - 1));
  } else {
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
  AddInRankOrder(out.View({n}), parts, ctx);
}

void Communicator::ExchangeRows(const char* what, Tensor out,
                                const std::vector<RowMessage>& receives, Tensor in,
                                const std::vector<RowMessage>& sends, const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype());
  const int64_t row_bytes = in.stride(0) * SizeOf(in.dtype());
  if (op.planning()) {
    int64_t bytes = 0;
    for (const RowMessage& send : sends) bytes += send.rank == rank_ ? 0 : send.rows * row_bytes;
    // Messages that depend on data: all rows, evenly over the ranks.
    if (sends.empty()) bytes = std::min(in.bytes(), out.bytes()) / size() * (size() - 1);
    return Plan(bytes);
  }
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
