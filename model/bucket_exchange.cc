#include "model/bucket_exchange.h"

#include <algorithm>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/parts.h"
#include "model/weights.h"
#include "parallel/collective_log.h"

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

const Communicator& BucketExchange::Ranks(int bucket) const {
  const int flat = layout_->buckets()[static_cast<size_t>(bucket)].flat;
  return sets_[static_cast<size_t>(layout_->flats()[static_cast<size_t>(flat)].replicas)];
}

std::vector<Tensor> BucketExchange::Regions(const Weights& weights) {
  std::vector<Tensor> regions;
  for (size_t f = 0; f < weights.layout().flats().size(); ++f) {
    regions.push_back(weights.FlatWeight(static_cast<int>(f)));
    regions.push_back(weights.FlatGrad(static_cast<int>(f)));
  }
  return regions;
}

bool BucketExchange::Reads(const Communicator& ranks, const Context& ctx) const {
  // What is rounded before it travels lies in one buffer for all buckets: it cannot stay.
  return groups_->peers() != nullptr && ctx.device == Device::kCuda && !send_.defined() &&
         groups_->peers()->Reaches(ranks.ranks());
}

void BucketExchange::Read(const char* what, const Communicator& ranks, int region, Tensor out,
                          const std::vector<Reading>& readings, const Tensor& sent,
                          const Context& traffic) {
  const int64_t size = SizeOf(out.dtype());
  CollectiveShape shape = {.first_rank = ranks.ranks().front(),
                           .last_rank = ranks.ranks().back(),
                           .ranks = ranks.size()};
  for (const Reading& reading : readings) shape.bytes_received += reading.count * size;
  if (traffic.order != nullptr) {
    traffic.order->AddTraffic(what, traffic.side, sent, shape.bytes_received);
  }
  CollectiveScope scope(what, shape);
  groups_->peers()->Meet(ranks.ranks(), traffic);
  // Each rank begins with its neighbour, so that no two read from the same one.
  for (size_t k = 0; k < readings.size(); ++k) {
    const Reading& reading = readings[(k + static_cast<size_t>(ranks.rank())) % readings.size()];
    groups_->peers()->Read(static_cast<char*>(out.raw()) + reading.to * size,
                           ranks.ranks()[static_cast<size_t>(reading.rank)], region,
                           reading.from * size, reading.count * size, traffic.stream);
  }
  scope.Enqueued(traffic.stream);
}

void BucketExchange::Reduce(int b, Tensor grad, const Context& ctx) {
  const Communicator& ranks = Ranks(b);
  if (ranks.size() == 1 || groups_->alone()) return;
  const Context traffic = stream_.Behind(ctx);
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
  std::vector<Reading> readings;
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
    readings.push_back({r, own.begin, place, n});
    if (n > 0) parts.push_back(parts_.Slice(0, place, n));
  }
  if (Reads(ranks, ctx)) {
    Read("gradients", ranks, 2 * bucket.flat + 1, parts_, readings, pieces, traffic);
  } else {
    ranks.ExchangeRows("gradients", parts_, receives, pieces, sends, traffic);
  }
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
  const Context traffic = stream_.Behind(ctx);
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const ElementRange own = layout_->Own(b);
  std::vector<RowMessage> sends, receives;
  std::vector<Reading> readings;
  for (int r = 0; r < ranks.size(); ++r) {
    if (r == ranks.rank()) continue;
    const int64_t begin = bucket.cuts[static_cast<size_t>(r)];
    const int64_t count = bucket.cuts[static_cast<size_t>(r) + 1] - begin;
    sends.push_back({r, own.begin, own.end - own.begin});
    receives.push_back({r, begin, count});
    readings.push_back({r, begin, begin, count});
  }
  if (Reads(ranks, ctx)) {
    const Tensor sent = weight.Slice(0, own.begin, own.end - own.begin);
    Read("weights", ranks, 2 * bucket.flat, weight, readings, sent, traffic);
  } else {
    ranks.ExchangeRows("weights", weight, receives, weight, sends, traffic);
  }
  Gathered& gathered = gathered_[static_cast<size_t>(b)];
  gathered.event.Record(traffic);
  gathered.ctx = &ctx;
}

void BucketExchange::WaitForWeights(int bucket) {
  Gathered& gathered = gathered_[static_cast<size_t>(bucket)];
  if (gathered.ctx != nullptr) gathered.event.Wait(*std::exchange(gathered.ctx, nullptr));
}

}  // namespace krait
