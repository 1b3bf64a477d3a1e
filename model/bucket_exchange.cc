#include "model/bucket_exchange.h"

#include <algorithm>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/cuda/runtime.h"
#include "kernels/parts.h"

namespace krait {

BucketExchange::BucketExchange(const Layout* layout, const Groups* groups, DType wide, DType reduce,
                               Arena* arena)
    : layout_(layout), groups_(groups), gathered_(layout->buckets().size()) {
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
    parts = std::max(parts, (size - 1) * (own.end - own.begin));
  }
  if (send > 0 && reduce != wide) send_ = arena->Alloc(reduce, {send});
  if (send > 0) parts_ = arena->Alloc(reduce, {std::max<int64_t>(1, parts)});
}

BucketExchange::~BucketExchange() {
  if (stream_ != nullptr) cuda::DestroyStream(stream_);
}

const Communicator& BucketExchange::Ranks(int bucket) const {
  const int flat = layout_->buckets()[static_cast<size_t>(bucket)].flat;
  return sets_[static_cast<size_t>(layout_->flats()[static_cast<size_t>(flat)].replicas)];
}

Context BucketExchange::Behind(const Context& ctx) {
  Context traffic = ctx;
  if (ctx.device != Device::kCuda || ctx.planning) return traffic;
  if (stream_ == nullptr) stream_ = cuda::CreateStream(/*urgent=*/true);
  traffic.stream = stream_;
  // Its time is not a part of the step's: it runs beside what is.
  traffic.profile = nullptr;
  enqueued_.Record(ctx);
  enqueued_.Wait(traffic);
  return traffic;
}

void BucketExchange::Reduce(int b, Tensor grad, const Context& ctx) {
  const Communicator& ranks = Ranks(b);
  if (ranks.size() == 1 || groups_->alone()) return;
  const Context traffic = Behind(ctx);
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const ElementRange own = layout_->Own(b);
  const int64_t n = own.end - own.begin;
  Tensor pieces = grad.Slice(0, bucket.begin, bucket.end - bucket.begin);
  if (send_.defined()) {
    const Tensor rounded = send_.Slice(0, 0, pieces.numel());
    Copy(rounded, pieces, traffic);
    pieces = rounded;
  }
  std::vector<RowMessage> sends, receives;
  std::vector<Tensor> parts;
  for (int r = 0; r < ranks.size(); ++r) {
    const int64_t begin = bucket.cuts[static_cast<size_t>(r)] - bucket.begin;
    const int64_t end = bucket.cuts[static_cast<size_t>(r) + 1] - bucket.begin;
    if (r == ranks.rank()) {  // read where it is
      if (n > 0) parts.push_back(pieces.Slice(0, begin, n));
      continue;
    }
    const auto place = static_cast<int64_t>(receives.size()) * n;
    sends.push_back({r, begin, end - begin});
    receives.push_back({r, place, n});
    if (n > 0) parts.push_back(parts_.Slice(0, place, n));
  }
  ranks.ExchangeRows("gradients", parts_, receives, pieces, sends, traffic);
  if (n > 0) SumParts(grad.Slice(0, own.begin, n), parts, traffic);
  reduced_.Record(traffic);
  reducing_ = true;
}

void BucketExchange::WaitForGradients(const Context& ctx) {
  if (std::exchange(reducing_, false)) reduced_.Wait(ctx);
}

void BucketExchange::Gather(int b, Tensor weight, const Context& ctx) {
  const Communicator& ranks = Ranks(b);
  if (ranks.size() == 1 || groups_->alone()) return;
  const Context traffic = Behind(ctx);
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const ElementRange own = layout_->Own(b);
  std::vector<RowMessage> sends, receives;
  for (int r = 0; r < ranks.size(); ++r) {
    if (r == ranks.rank()) continue;
    const int64_t begin = bucket.cuts[static_cast<size_t>(r)];
    sends.push_back({r, own.begin, own.end - own.begin});
    receives.push_back({r, begin, bucket.cuts[static_cast<size_t>(r) + 1] - begin});
  }
  ranks.ExchangeRows("weights", weight, receives, weight, sends, traffic);
  Gathered& gathered = gathered_[static_cast<size_t>(b)];
  gathered.event.Record(traffic);
  gathered.ctx = &ctx;
}

void BucketExchange::WaitForWeights(int bucket) {
  Gathered& gathered = gathered_[static_cast<size_t>(bucket)];
  if (gathered.ctx != nullptr) gathered.event.Wait(*std::exchange(gathered.ctx, nullptr));
}

}  // namespace krait
