#include "parallel/collectives.h"

#include <algorithm>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/parts.h"

namespace krait {
namespace {

char* RowAddress(Tensor t, int64_t row) {
  return static_cast<char*>(t.raw()) + row * t.stride(0) * SizeOf(t.dtype());
}

// Rows of a contiguous tensor, which may lie beyond its own: other ranks have more or fewer there.
Tensor FlatRows(Tensor t, int64_t row, int64_t rows) {
  return Tensor(RowAddress(t, row), t.dtype(), t.device(), {rows * t.stride(0)});
}

void CopyRows(Tensor out, int64_t out_row, Tensor in, int64_t in_row, int64_t rows,
              const Context& ctx) {
  if (rows > 0) Copy(out.Slice(0, out_row, rows), in.Slice(0, in_row, rows), ctx);
}

}  // namespace

Communicator::Communicator(Links links, std::vector<int> ranks, int self)
    : links_(std::move(links)), ranks_(std::move(ranks)) {
  const auto at = std::lower_bound(ranks_.begin(), ranks_.end(), self);
  KRAIT_CHECK(at != ranks_.end() && *at == self);
  rank_ = static_cast<int>(at - ranks_.begin());
}

CollectiveShape Communicator::ShapeOf(int64_t sent, int64_t received) const {
  return {.first_rank = ranks_.front(),
          .last_rank = ranks_.back(),
          .ranks = size(),
          .bytes_sent = sent,
          .bytes_received = received};
}

void Communicator::Tell(const char* what, const Tensor& in, int64_t received,
                        const Context& ctx) const {
  if (ctx.order != nullptr && size() > 1) ctx.order->AddTraffic(what, ctx.side, in, received);
}

bool Communicator::Reads(const Tensor& t, const Context& ctx) const {
  return ctx.device == Device::kCuda && size() > 1 && links_.peers != nullptr &&
         *links_.peers != nullptr && peers().Mirrors(ranks_) && peers().Holds(t.raw());
}

template <typename Read>
void Communicator::BetweenMeetings(const char* what, CollectiveShape shape, const Read& read,
                                   const Context& ctx) const {
  CollectiveScope scope(what, shape);
  peers().Meet(ranks_, ctx);
  read();
  peers().Meet(ranks_, ctx);
  scope.Enqueued(ctx.stream);
}

void Communicator::Exchange(const char* what, const std::vector<Message>& sends,
                            const std::vector<Message>& receives, const Context& ctx) const {
  if (ctx.device == Device::kCpu) {
    const auto of_world = [this](std::vector<Message> messages) {
      for (Message& message : messages) message.rank = ranks_[static_cast<size_t>(message.rank)];
      return messages;
    };
    links_.world->Exchange(of_world(sends), of_world(receives), what);
    return;
  }
  if (sends.empty() && receives.empty()) return;
  int64_t sent = 0, received = 0;
  for (const Message& message : sends) sent += message.bytes;
  for (const Message& message : receives) received += message.bytes;
  CollectiveScope scope(what, ShapeOf(sent, received));
  links_.nccl->Exchange(sends, receives, ctx.stream);
  scope.Enqueued(ctx.stream);
}

void Communicator::AllGather(const char* what, Tensor out, Tensor in, const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype() &&
              out.numel() == in.numel() * size());
  const int64_t bytes = in.bytes() * (size() - 1);
  if (op.planning()) return Plan(bytes);
  Tell(what, in, bytes, ctx);
  const std::vector<Tensor> parts = EqualParts(out, size());
  const Tensor own = in.View({in.numel()});
  const auto copy_to = [&](const Tensor& part) {
    if (part.raw() != own.raw()) Copy(part, own, ctx);
  };
  if (alone()) {
    for (const Tensor& part : parts) copy_to(part);
    return;
  }
  if (Reads(in, ctx)) {
    const bool in_place = parts[static_cast<size_t>(rank_)].raw() == own.raw();
    const auto read = [&] {
      // Each rank begins with its neighbour, so that no two read from the same one.
      for (int k = 1; k < size(); ++k) {
        const auto r = static_cast<size_t>((rank_ + k) % size());
        peers().ReadSame(parts[r], ranks_[r], in_place ? parts[r] : own, ctx);
      }
    };
    BetweenMeetings(what, ShapeOf(bytes, bytes), read, ctx);
    copy_to(parts[static_cast<size_t>(rank_)]);
    return;
  }
  if (ctx.device == Device::kCuda && size() > 1) {
    CollectiveScope scope(what, ShapeOf(bytes, bytes));
    links_.nccl->AllGather(out.raw(), in.raw(), in.bytes(), ctx.stream);
    scope.Enqueued(ctx.stream);
    return;
  }
  copy_to(parts[static_cast<size_t>(rank_)]);
  std::vector<Message> sends, receives;
  for (int r = 0; r < size(); ++r) {
    if (r == rank_) continue;
    sends.push_back({r, in.raw(), in.bytes()});
    receives.push_back({r, parts[static_cast<size_t>(r)].raw(), in.bytes()});
  }
  Exchange(what, sends, receives, ctx);
}

void Communicator::AllReduceSum(const char* what, Tensor x, const Context& ctx) const {
  const ArenaScope scope(ctx.scratch);
  const Tensor all = ctx.scratch->Alloc(x.dtype(), {size() * x.numel()});
  AllGather(what, all, x, ctx);
  SumParts(x.View({x.numel()}), EqualParts(all, size()), ctx);
}

void Communicator::AllReduceMax(const char* what, Tensor x, const Context& ctx) const {
  const ArenaScope scope(ctx.scratch);
  const Tensor all = ctx.scratch->Alloc(x.dtype(), {size() * x.numel()});
  AllGather(what, all, x, ctx);
  MaxParts(x.View({x.numel()}), EqualParts(all, size()), ctx);
}

void Communicator::ReduceScatterSum(const char* what, Tensor out, Tensor in, const Context& ctx,
                                    Tensor received) const {
  const OpScope op(ctx, OpFamily::kCommunication, what, {{"out", out}, {"in", in}});
  const int64_t n = out.numel();
  KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype() &&
              in.numel() == n * size());
  const ArenaScope scope(ctx.scratch);
  const int others = size() - 1;
  const std::vector<Tensor> from = EqualParts(in, size());
  std::vector<Tensor> parts;
  if (others > 0) {
    if (!received.defined()) received = ctx.scratch->Alloc(in.dtype(), {others * n});
    KRAIT_CHECK(received.dtype() == in.dtype() && received.numel() == others * n);
    parts = EqualParts(received, others);
  }
  parts.insert(parts.begin() + rank_, from[static_cast<size_t>(rank_)]);
  if (!op.planning()) Tell(what, in, out.bytes() * others, ctx);
  if (op.planning()) {
    Plan(out.bytes() * others);
  } else if (alone()) {
    for (const Tensor& part : parts) {
      if (part.raw() != from[static_cast<size_t>(rank_)].raw()) {
        Copy(part, from[static_cast<size_t>(rank_)], ctx);
      }
    }
  } else if (Reads(in, ctx)) {
    const Tensor& own = from[static_cast<size_t>(rank_)];
    const int64_t bytes = out.bytes() * others;
    const auto read = [&] {
      for (int k = 1; k < size(); ++k) {
        const auto r = static_cast<size_t>((rank_ + k) % size());
        // On a pass's own stream the sum reads them where they are; see ReadSame.
        if (ctx.side == 0) {
          parts[r] = peers().Same(ranks_[r], own);
        } else {
          peers().ReadSame(parts[r], ranks_[r], own, ctx);
        }
      }
      if (ctx.side == 0) SumParts(out.View({n}), parts, ctx);
    };
    BetweenMeetings(what, ShapeOf(bytes, bytes), read, ctx);
    if (ctx.side == 0) return;
  } else {
    std::vector<Message> sends, receives;
    for (int r = 0; r < size(); ++r) {
      if (r == rank_) continue;
      sends.push_back({r, from[static_cast<size_t>(r)].raw(), out.bytes()});
      receives.push_back({r, parts[static_cast<size_t>(r)].raw(), out.bytes()});
    }
    Exchange(what, sends, receives, ctx);
  }
  SumParts(out.View({n}), parts, ctx);
}

void Communicator::ExchangeRows(const char* what, const std::vector<RowTensors>& tensors,
                                const std::vector<RowMessage>& receives,
                                const std::vector<RowMessage>& sends, const Context& ctx) const {
  const OpScope op(ctx, OpFamily::kCommunication, what,
                   {{"out", tensors.front().out}, {"in", tensors.front().in}});
  bool reads = true;
  for (const auto& [out, in] : tensors) reads = reads && Reads(in, ctx);
  for (const auto* messages : {&sends, &receives}) {
    for (const RowMessage& message : *messages) reads = reads && message.there >= 0;
  }
  struct Reading {
    Tensor to;
    int rank;  // place in the set
    Tensor at;
  };
  std::vector<Reading> readings;
  std::vector<Message> to, from;
  for (const auto& [out, in] : tensors) {
    KRAIT_CHECK(out.contiguous() && in.contiguous() && out.dtype() == in.dtype());
    const int64_t row_bytes = in.stride(0) * SizeOf(in.dtype());
    KRAIT_CHECK(out.stride(0) * SizeOf(out.dtype()) == row_bytes);
    if (op.planning()) {
      int64_t bytes = 0;
      for (const RowMessage& send : sends) bytes += send.rank == rank_ ? 0 : send.rows * row_bytes;
      // Messages that depend on data: all rows, evenly over the ranks.
      if (sends.empty()) bytes = std::min(in.bytes(), out.bytes()) / size() * (size() - 1);
      Plan(bytes);
      continue;
    }
    std::vector<RowMessage> own;
    for (const RowMessage& send : sends) {
      if (send.rows == 0) continue;
      KRAIT_CHECK(send.row >= 0 && send.row + send.rows <= in.dim(0));
      if (send.rank == rank_) {
        own.push_back(send);
      } else {
        to.push_back({send.rank, RowAddress(in, send.row), send.rows * row_bytes});
      }
    }
    size_t next = 0;
    for (const RowMessage& receive : receives) {
      if (receive.rows == 0) continue;
      KRAIT_CHECK(receive.row >= 0 && receive.row + receive.rows <= out.dim(0));
      if (receive.rank == rank_) {
        KRAIT_CHECK(next < own.size() && own[next].rows == receive.rows);
        CopyRows(out, receive.row, in, own[next++].row, receive.rows, ctx);
      } else if (alone()) {
        const int64_t rows = std::min(receive.rows, in.dim(0));
        CopyRows(out, receive.row, in, std::min(receive.row, in.dim(0) - rows), rows, ctx);
      } else if (reads) {
        readings.push_back({FlatRows(out, receive.row, receive.rows), receive.rank,
                            FlatRows(in, receive.there, receive.rows)});
      } else {
        from.push_back({receive.rank, RowAddress(out, receive.row), receive.rows * row_bytes});
      }
    }
    KRAIT_CHECK(next == own.size());
  }
  if (op.planning() || alone()) return;
  int64_t sent = 0, received = 0;
  for (const Message& message : to) sent += message.bytes;
  for (const Message& message : from) received += message.bytes;
  for (const Reading& reading : readings) received += reading.to.bytes();
  if (ctx.order != nullptr) {
    int64_t begin = tensors.front().in.dim(0), end = 0;
    for (const RowMessage& send : sends) {
      if (send.rows > 0 && send.rank != rank_) begin = std::min(begin, send.row);
      if (send.rank != rank_) end = std::max(end, send.row + send.rows);
    }
    Tell(what, tensors.front().in.Slice(0, begin, std::max<int64_t>(0, end - begin)), received,
         ctx);
  }
  if (!reads) return Exchange(what, to, from, ctx);
  // Each rank begins with its neighbour: if all began with the first rank's rows, they would share
  // its link.
  const auto distance = [this](const Reading& reading) {
    return (reading.rank - rank_ + size()) % size();
  };
  std::stable_sort(readings.begin(), readings.end(),
                   [&](const Reading& a, const Reading& b) { return distance(a) < distance(b); });
  const auto read = [&] {
    for (const auto& [own, rank, at] : readings) {
      peers().ReadSame(own, ranks_[static_cast<size_t>(rank)], at, ctx);
    }
  };
  BetweenMeetings(what, ShapeOf(sent, received), read, ctx);
}

}  // namespace krait
