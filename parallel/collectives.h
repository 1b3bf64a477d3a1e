// Collective operations over a set of ranks. They take tensor views, never raw counts.
//
// One thread per rank issues all collectives, in the same program order on every rank, over
// whatever sets. Each has a name, `what`, for reports about a job that hangs. On CPU tensors they
// are complete on return; on CUDA tensors they are enqueued on the context's stream, as any op is.
// Scratch memory holds what is received to be summed. Failures end all ranks through
// Fatal(kCollective). Sums are added in rank order, in Wide, and rounded once: the same layout
// gives the same bits.
#ifndef KRAIT_PARALLEL_COLLECTIVES_H_
#define KRAIT_PARALLEL_COLLECTIVES_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/context.h"
#include "kernels/tensor.h"
#include "parallel/collective_log.h"
#include "parallel/nccl.h"
#include "parallel/peer_memory.h"
#include "parallel/world.h"

namespace krait {

// Rows [row, row + rows) for, or from, a rank of the set. `there`: the row of the other rank's
// tensor where they begin, if all ranks know that of all their messages; -1: they do not.
struct RowMessage {
  int rank = 0;
  int64_t row = 0, rows = 0;
  int64_t there = -1;
};

class Communicator {
 public:
  // How the ranks of a set reach each other.
  struct Links {
    World* world = nullptr;           // null: for planning runs alone
    std::shared_ptr<NcclRanks> nccl;  // of the set, in its order; for CUDA tensors
    // Outlive the communicator. Planning runs add the bytes that this rank would send; while
    // `alone` holds, nothing travels: see Groups::SetAlone.
    int64_t* planned = nullptr;
    const bool* alone = nullptr;
    // Where not null: memory of other ranks to read CUDA tensors from, where these are in it.
    PeerMemory* const* peers = nullptr;
  };
  // `ranks` of the world, ascending, `self` among them.
  Communicator(Links links, std::vector<int> ranks, int self);

  int rank() const { return rank_; }  // place in the set
  int size() const { return static_cast<int>(ranks_.size()); }
  const std::vector<int>& ranks() const { return ranks_; }

  // x of any dtype but i32; a bf16 sum is rounded from f32.
  void AllReduceSum(const char* what, Tensor x, const Context& ctx) const;
  // x f32 or f64.
  void AllReduceMax(const char* what, Tensor x, const Context& ctx) const;
  // out = the concatenation of every rank's `in` along dimension 0; `in` may be its part of out.
  void AllGather(const char* what, Tensor out, Tensor in, const Context& ctx) const;
  // out = this rank's part along dimension 0 of the sum of every rank's `in`. `received`: memory
  // for what comes, size() - 1 parts; undefined: scratch memory.
  void ReduceScatterSum(const char* what, Tensor out, Tensor in, const Context& ctx,
                        Tensor received = Tensor()) const;
  // Rows of `in` [R,...] travel to rows of `out` [S,...]: the n-th send of a to b arrives at b's
  // n-th receive from a, of as many rows; those of a rank to itself are copied.
  struct RowTensors {
    Tensor out, in;
  };
  void ExchangeRows(const char* what, Tensor out, const std::vector<RowMessage>& receives,
                    Tensor in, const std::vector<RowMessage>& sends, const Context& ctx) const {
    ExchangeRows(what, {{out, in}}, receives, sends, ctx);
  }
  // The same rows of several pairs of tensors, as one exchange.
  void ExchangeRows(const char* what, const std::vector<RowTensors>& tensors,
                    const std::vector<RowMessage>& receives, const std::vector<RowMessage>& sends,
                    const Context& ctx) const;

 private:
  bool alone() const { return links_.alone != nullptr && *links_.alone; }
  void Plan(int64_t bytes) const {
    if (links_.planned != nullptr) *links_.planned += bytes;
  }
  // Whether the others' tensors, at the place of `t`, are read where they are.
  bool Reads(const Tensor& t, const Context& ctx) const;
  PeerMemory& peers() const { return **links_.peers; }
  // Reads of others' memory, enqueued by `read`, between two meetings: behind the first all have
  // what is read, and none writes there before the second.
  template <typename Read>
  void BetweenMeetings(const char* what, CollectiveShape shape, const Read& read,
                       const Context& ctx) const;
  CollectiveShape ShapeOf(int64_t sent, int64_t received) const;
  // Tells who asks for the order of work that `in` travels, and so many bytes come for it.
  void Tell(const char* what, const Tensor& in, int64_t received, const Context& ctx) const;
  // Messages whose ranks are places in the set, none for the rank itself.
  void Exchange(const char* what, const std::vector<Message>& sends,
                const std::vector<Message>& receives, const Context& ctx) const;

  Links links_;
  std::vector<int> ranks_;
  int rank_ = 0;
};

}  // namespace krait

#endif  // KRAIT_PARALLEL_COLLECTIVES_H_
