#include "model/bucket_exchange.h"

#include <algorithm>

#include "kernels/activation.h"
#include "kernels/base/check.h"

namespace krait {

BucketExchange::BucketExchange(const Layout* layout, const Groups* groups, DType wide, DType reduce,
                               Arena* arena)
    : layout_(layout) {
  for (const std::vector<int>& ranks : layout->sets()) sets_.push_back(groups->Of(ranks));
  int64_t send = 0, parts = 0;
  for (size_t b = 0; b < layout->buckets().size(); ++b) {
    const Bucket& bucket = layout->buckets()[b];
    const Flat& flat = layout->flats()[static_cast<size_t>(bucket.flat)];
    // Pieces go to the owners, which are the ranks that hold the elements.
    KRAIT_CHECK(flat.sum == flat.replicas);
    const int size = Ranks(static_cast<int>(b)).size();
    if (!flat.trainable || size == 1) continue;
    const ElementRange own = layout->Own(static_cast<int>(b));
    send = std::max(send, bucket.end - bucket.begin);
    parts = std::max(parts, size * (own.end - own.begin));
  }
  if (send > 0 && reduce != wide) send_ = arena->Alloc(reduce, {send});
  if (send > 0) parts_ = arena->Alloc(reduce, {std::max<int64_t>(1, parts)});
}

const Communicator& BucketExchange::Ranks(int bucket) const {
  const int flat = layout_->buckets()[static_cast<size_t>(bucket)].flat;
  return sets_[static_cast<size_t>(layout_->flats()[static_cast<size_t>(flat)].replicas)];
}

void BucketExchange::Reduce(int b, Tensor grad, const Context& ctx) const {
  const Communicator& ranks = Ranks(b);
  if (ranks.size() == 1) return;
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const ElementRange own = layout_->Own(b);
  const int64_t n = own.end - own.begin;
  Tensor pieces = grad.Slice(0, bucket.begin, bucket.end - bucket.begin);
  if (send_.defined()) {
    const Tensor rounded = send_.Slice(0, 0, pieces.numel());
    Copy(rounded, pieces, ctx);
    pieces = rounded;
  }
  std::vector<RowMessage> sends, receives;
  for (int r = 0; r < ranks.size(); ++r) {
    const int64_t begin = bucket.cuts[static_cast<size_t>(r)];
    sends.push_back({r, begin - bucket.begin, bucket.cuts[static_cast<size_t>(r) + 1] - begin});
    receives.push_back({r, r * n, n});
  }
  ranks.ExchangeRows("gradients", parts_, receives, pieces, sends, ctx);
  if (n > 0) AddInRankOrder(grad.Slice(0, own.begin, n), parts_.Slice(0, 0, ranks.size() * n), ctx);
}

void BucketExchange::Gather(int b, Tensor weight, const Context& ctx) const {
  const Communicator& ranks = Ranks(b);
  if (ranks.size() == 1) return;
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const ElementRange own = layout_->Own(b);
  std::vector<RowMessage> sends, receives;
  for (int r = 0; r < ranks.size(); ++r) {
    if (r == ranks.rank()) continue;
    const int64_t begin = bucket.cuts[static_cast<size_t>(r)];
    sends.push_back({r, own.begin, own.end - own.begin});
    receives.push_back({r, begin, bucket.cuts[static_cast<size_t>(r) + 1] - begin});
  }
  ranks.ExchangeRows("weights", weight, receives, weight, sends, ctx);
}

}  // namespace krait
