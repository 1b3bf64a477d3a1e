// ZeRO-1's traffic (Rajbhandari et al., 1910.02054) over the buckets of a layout (model/layout.h):
// the gradients of a bucket to the ranks that own its elements, and their weights back to all.
//
// A bucket's sum is an exchange of pieces and an addition in rank order in Wide, so that the same
// layout gives the same bits. All ranks of a stage call these for the same buckets in the same
// order. On CUDA the traffic has a stream of its own, beside the passes: Reduce and Gather enqueue
// it behind the work at hand, WaitForGradients and WaitForWeights let later work wait for it; the
// host waits nowhere. On the CPU all is done on return.
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

class BucketExchange {
 public:
  // Memory for the pieces of the largest bucket from `arena`. Pieces travel as `reduce`: Wide
  // (`wide`), or bf16, to which each rank's part is rounded once. `layout` and `groups` outlive it.
  BucketExchange(const Layout* layout, const Groups* groups, DType wide, DType reduce,
                 Arena* arena);
  ~BucketExchange();
  BucketExchange(const BucketExchange&) = delete;
  BucketExchange& operator=(const BucketExchange&) = delete;

  // The elements of `grad`, the bucket's flat, that this rank owns become the sums over their sum
  // set; those that others own are left as they are.
  void Reduce(int bucket, Tensor grad, const Context& ctx);
  // Work enqueued on `ctx` from here on waits for all sums.
  void WaitForGradients(const Context& ctx);

  // The elements of `weight`, the bucket's flat, that other ranks own become theirs.
  void Gather(int bucket, Tensor weight, const Context& ctx);
  // Work enqueued on the context of the bucket's last Gather waits for it from here on.
  void WaitForWeights(int bucket);

 private:
  const Communicator& Ranks(int bucket) const;
  // `ctx` on the stream of the traffic, behind what is enqueued on `ctx`.
  Context Behind(const Context& ctx);

  const Layout* layout_;
  const Groups* groups_;
  std::vector<Communicator> sets_;  // as Layout::sets()
  Tensor send_, parts_;     // [elements]; send_ is undefined where pieces travel as they are
  void* stream_ = nullptr;  // cudaStream_t, made by the first traffic on CUDA
  Event enqueued_, reduced_;
  bool reducing_ = false;
  struct Gathered {
    Event event;
    const Context* ctx = nullptr;  // not null: nothing has waited for it yet
  };
  std::deque<Gathered> gathered_;  // of each bucket
};

}  // namespace krait

#endif  // KRAIT_MODEL_BUCKET_EXCHANGE_H_
