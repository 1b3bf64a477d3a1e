// ZeRO-1's traffic (Rajbhandari et al., 1910.02054) over the buckets of a layout (model/layout.h):
// the gradients of a bucket to the ranks that own its elements, and their weights back to all.
//
// A bucket's sum is an exchange of pieces and an addition in rank order in Wide, so that the same
// layout gives the same bits. Where a set lies on several machines with as many ranks of it each,
// more than one, sums are made within the machines first, so that between them each piece travels
// once per machine and not once per rank: then the ranks per machine are a part of the layout, and
// `reduce` rounds once within and once between machines. All ranks of a stage call these for the
// same buckets in the same order. On CUDA the traffic has a stream of its own, beside the passes:
// Reduce and Gather enqueue it behind the work at hand, WaitForGradients and WaitForWeights let
// later work wait for it; the host waits nowhere. Ranks of one machine read each other's flats
// where they are (parallel/peer_memory.h); others send by NCCL. On the CPU all is done on return.
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
  // How a set's sums are made: by machine, in rank order, the places of its ranks in the set; one
  // "machine" of all where there are no two levels. Ranks at the same `place` of their machines
  // sum up what they own together: within their machines first, then with each other.
  struct Levels {
    std::vector<std::vector<int>> machines;
    int machine = 0, place = 0;  // of this rank

    const std::vector<int>& own() const { return machines[static_cast<size_t>(machine)]; }
  };
  Levels LevelsOf(const Communicator& ranks) const;
  int Set(int bucket) const;
  const Communicator& Ranks(int bucket) const { return sets_[static_cast<size_t>(Set(bucket))]; }
  const Levels& LevelsOf(int bucket) const { return levels_[static_cast<size_t>(Set(bucket))]; }
  ElementRange RangeOf(int bucket, int rank_of_set) const;
  // What the ranks at a place of their machines own, machine by machine.
  std::vector<ElementRange> Column(int bucket, int place) const;

  // Elements [from, from + count) of the flat of a rank of the set to elements of `out` from `to`
  // on.
  struct Reading {
    int rank = 0;
    int64_t from = 0, to = 0, count = 0;
  };
  // Within a machine, by its ranks' memory; `sent`: what others read here.
  void Read(const char* what, int bucket, int region, Tensor out,
            const std::vector<Reading>& readings, const Tensor& sent, const Context& traffic);
  // Whether the ranks of this machine read each other's memory.
  bool Reads(int bucket, const Context& ctx) const;
  void ReduceWithin(int bucket, Tensor grad, const Context& traffic);
  void ReduceBetween(int bucket, Tensor grad, const Context& traffic);
  // A bucket's gradients as they travel.
  Tensor Pieces(int bucket, Tensor grad, ElementRange range, const Context& traffic);

  const Layout* layout_;
  const Groups* groups_;
  std::vector<Communicator> sets_;  // as Layout::sets()
  std::vector<Levels> levels_;      // of each
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
