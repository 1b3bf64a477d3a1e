// ZeRO-1's traffic (Rajbhandari et al., 1910.02054) over the buckets of a layout (model/layout.h):
// the gradients of a bucket to the ranks that own its elements, and their weights back to all.
//
// A bucket's sum is an exchange of pieces and an addition in rank order in Wide, so that the same
// layout gives the same bits. All ranks of a stage call these for the same buckets in the same
// order. On CUDA the traffic has a stream of its own, beside the passes: Reduce and Gather enqueue
// it behind the work at hand, WaitForGradients and WaitForWeights let later work wait for it; the
// host waits nowhere. Ranks of one machine read each other's flats where they are
// (parallel/peer_memory.h); others send by NCCL. On the CPU all is done on return.
#ifndef KRAIT_MODEL_BUCKET_EXCHANGE_H_
#define KRAIT_MODEL_BUCKET_EXCHANGE_H_

#include <deque>
#include <vector>

#include "kernels/arena.h"
#include "kernels/context.h"
#include "kernels/event.h"
#include "model/layout.h"
#include "parallel/groups.h"

namespace krait {

class Weights;

class BucketExchange {
 public:
  // Memory for the pieces of the largest bucket from `arena`. Pieces travel as `reduce`: Wide
  // (`wide`), or bf16, to which each rank's part is rounded once. `layout` and `groups` outlive it.
  BucketExchange(const Layout* layout, const Groups* groups, DType wide, DType reduce,
                 Arena* arena);
  // The regions of PeerMemory that this reads where it can: of each flat the weights and gradients.
  static std::vector<Tensor> Regions(const Weights& weights);
  BucketExchange(const BucketExchange&) = delete;
  BucketExchange& operator=(const BucketExchange&) = delete;

  // The elements of `grad`, the bucket's flat, that this rank owns become the sums over their sum
  // set; those that others own are left as they are, until all ranks have their sums: a sum over
  // the stage behind WaitForGradients says so.
  void Reduce(int bucket, Tensor grad, const Context& ctx);
  // Work enqueued on `ctx` from here on waits for all sums.
  void WaitForGradients(const Context& ctx);

  // The elements of `weight`, the bucket's flat, that other ranks own become theirs.
  void Gather(int bucket, Tensor weight, const Context& ctx);
  // Work enqueued on the context of the bucket's last Gather waits for it from here on.
  void WaitForWeights(int bucket);

 private:
  const Communicator& Ranks(int bucket) const;
  // Whether the set's ranks read each other's memory.
  bool Reads(const Communicator& ranks, const Context& ctx) const;
  // Elements [from, from + count) of a rank's region to elements of `out` from `to` on, for a rank
  // of the set; `sent`: what others read here.
  struct Reading {
    int rank = 0;
    int64_t from = 0, to = 0, count = 0;
  };
  void Read(const char* what, const Communicator& ranks, int region, Tensor out,
            const std::vector<Reading>& readings, const Tensor& sent, const Context& traffic);

  const Layout* layout_;
  const Groups* groups_;
  std::vector<Communicator> sets_;  // as Layout::sets()
  Tensor send_, parts_;  // [elements]; send_ is undefined where pieces travel as they are
  SideStream stream_{2};
  Event reduced_;
  bool reducing_ = false;
  struct Gathered {
    Event event;
    const Context* ctx = nullptr;  // not null: nothing has waited for it yet
  };
  std::deque<Gathered> gathered_;  // of each bucket
};

}  // namespace krait

#endif  // KRAIT_MODEL_BUCKET_EXCHANGE_H_
