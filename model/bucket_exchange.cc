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
  for (const Communicator& ranks : sets_) levels_.push_back(LevelsOf(ranks));
  int64_t send = 0, parts = 0;
  for (size_t b = 0; b < layout->buckets().size(); ++b) {
    const Bucket& bucket = layout->buckets()[b];
    const Flat& flat = layout->flats()[static_cast<size_t>(bucket.flat)];
    // Pieces go to the owners, which are the ranks that hold the elements.
    KRAIT_CHECK(flat.sum == flat.replicas);
    const int size = Ranks(static_cast<int>(b)).size();
    if (!flat.trainable || size == 1) continue;
    // Enough for any machines: a rank receives at most the other ranks' parts of the largest range,
    // or within a machine of as many ranges as there are machines.
    int64_t range = 1;
    for (int r = 0; r < size; ++r) {
      const ElementRange owned = RangeOf(static_cast<int>(b), r);
      range = std::max(range, owned.end - owned.begin);
    }
    send = std::max(send, bucket.end - bucket.begin);
    parts = std::max(parts, (size - 1) * range);
  }
  if (send > 0 && reduce != wide) send_ = arena->Alloc(reduce, {send});
  if (send > 0) parts_ = arena->Alloc(reduce, {parts});
}

BucketExchange::Levels BucketExchange::LevelsOf(const Communicator& ranks) const {
  Levels levels;
  std::vector<int> first;  // ranks of the machines
  for (int r = 0; r < ranks.size(); ++r) {
    const int machine =
        groups_->machines()[static_cast<size_t>(ranks.ranks()[static_cast<size_t>(r)])];
    const auto at =
        static_cast<size_t>(std::find(first.begin(), first.end(), machine) - first.begin());
    if (at == first.size()) {
      first.push_back(machine);
      levels.machines.emplace_back();
    }
    levels.machines[at].push_back(r);
  }
  const size_t each = levels.machines.front().size();
  bool equal = each > 1;
  for (const std::vector<int>& machine : levels.machines) equal = equal && machine.size() == each;
  if (!equal) {
    levels.machines.assign(1, {});
    for (int r = 0; r < ranks.size(); ++r) levels.machines.front().push_back(r);
  }
  for (size_t m = 0; m < levels.machines.size(); ++m) {
    for (size_t k = 0; k < levels.machines[m].size(); ++k) {
      if (levels.machines[m][k] != ranks.rank()) continue;
      levels.machine = static_cast<int>(m);
      levels.place = static_cast<int>(k);
    }
  }
  return levels;
}

int BucketExchange::Set(int bucket) const {
  const int flat = layout_->buckets()[static_cast<size_t>(bucket)].flat;
  return layout_->flats()[static_cast<size_t>(flat)].replicas;
}

ElementRange BucketExchange::RangeOf(int bucket, int rank_of_set) const {
  const std::vector<int64_t>& cuts = layout_->buckets()[static_cast<size_t>(bucket)].cuts;
  const auto r = static_cast<size_t>(rank_of_set);
  return {cuts[r], cuts[r + 1]};
}

std::vector<ElementRange> BucketExchange::Column(int bucket, int place) const {
  std::vector<ElementRange> column;
  for (const std::vector<int>& machine : LevelsOf(bucket).machines) {
    column.push_back(RangeOf(bucket, machine[static_cast<size_t>(place)]));
  }
  return column;
}

std::vector<Tensor> BucketExchange::Regions(const Weights& weights) {
  std::vector<Tensor> regions;
  for (size_t f = 0; f < weights.layout().flats().size(); ++f) {
    regions.push_back(weights.FlatWeight(static_cast<int>(f)));
    regions.push_back(weights.FlatGrad(static_cast<int>(f)));
  }
  return regions;
}

namespace {

// The ranks of the world at these places of a set.
std::vector<int> RanksAt(const Communicator& ranks, const std::vector<int>& places) {
  std::vector<int> of_world;
  for (const int place : places) of_world.push_back(ranks.ranks()[static_cast<size_t>(place)]);
  return of_world;
}

Tensor Elements(Tensor flat, ElementRange range) {
  return flat.Slice(0, range.begin, range.end - range.begin);
}

}  // namespace

bool BucketExchange::Reads(int bucket, const Context& ctx) const {
  // What is rounded before it travels lies in one buffer for all buckets: it cannot stay.
  return groups_->peers() != nullptr && ctx.device == Device::kCuda && !send_.defined() &&
         groups_->peers()->Reaches(RanksAt(Ranks(bucket), LevelsOf(bucket).own()));
}

void BucketExchange::Read(const char* what, int bucket, int region, Tensor out,
                          const std::vector<Reading>& readings, const Tensor& sent,
                          const Context& traffic) {
  const Communicator& set = Ranks(bucket);
  const std::vector<int> ranks = RanksAt(set, LevelsOf(bucket).own());
  const int64_t size = SizeOf(out.dtype());
  CollectiveShape shape = {.first_rank = ranks.front(),
                           .last_rank = ranks.back(),
                           .ranks = static_cast<int>(ranks.size())};
  for (const Reading& reading : readings) shape.bytes_received += reading.count * size;
  if (traffic.order != nullptr) {
    traffic.order->AddTraffic(what, traffic.side, sent, shape.bytes_received);
  }
  CollectiveScope scope(what, shape);
  groups_->peers()->Meet(ranks, traffic);
  for (const Reading& reading : readings) {
    groups_->peers()->Read(static_cast<char*>(out.raw()) + reading.to * size,
                           set.ranks()[static_cast<size_t>(reading.rank)], region,
                           reading.from * size, reading.count * size, traffic.stream);
  }
  scope.Enqueued(traffic.stream);
}

Tensor BucketExchange::Pieces(int bucket, Tensor grad, ElementRange range, const Context& traffic) {
  const Tensor elements = Elements(grad, range);
  if (!send_.defined()) return elements;
  const int64_t begin = layout_->buckets()[static_cast<size_t>(bucket)].begin;
  const Tensor rounded = send_.Slice(0, range.begin - begin, elements.numel());
  Copy(rounded, elements, traffic);
  return rounded;
}

// The sums over this machine of what the ranks at this one's place own, on all machines.
void BucketExchange::ReduceWithin(int b, Tensor grad, const Context& traffic) {
  const Levels& levels = LevelsOf(b);
  const auto size = static_cast<int>(levels.own().size());
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const Tensor pieces = Pieces(b, grad, {bucket.begin, bucket.end}, traffic);
  const std::vector<ElementRange> column = Column(b, levels.place);
  std::vector<RowMessage> sends, receives;
  std::vector<Reading> readings;
  std::vector<std::vector<Tensor>> parts(column.size());  // of each range, in rank order
  for (size_t i = 0; i < column.size(); ++i) {
    const ElementRange own = {column[i].begin - bucket.begin, column[i].end - bucket.begin};
    parts[i].resize(static_cast<size_t>(size));
    parts[i][static_cast<size_t>(levels.place)] = Elements(pieces, own);
  }
  int64_t to = 0;
  // Each rank begins with its neighbour, so that no two read from the same one.
  for (int n = 1; n < size; ++n) {
    const int k = (levels.place + n) % size;
    const int rank = levels.own()[static_cast<size_t>(k)];
    for (const ElementRange& range : Column(b, k)) {
      sends.push_back({rank, range.begin - bucket.begin, range.end - range.begin});
    }
    for (size_t i = 0; i < column.size(); ++i) {
      const int64_t count = column[i].end - column[i].begin;
      receives.push_back({rank, to, count});
      readings.push_back({rank, column[i].begin, to, count});
      parts[i][static_cast<size_t>(k)] = parts_.Slice(0, to, count);
      to += count;
    }
  }
  if (Reads(b, traffic)) {
    Read("gradients", b, 2 * bucket.flat + 1, parts_, readings, pieces, traffic);
  } else {
    Ranks(b).ExchangeRows("gradients", parts_, receives, pieces, sends, traffic);
  }
  // In place: others read what they own, which is elsewhere.
  for (size_t i = 0; i < column.size(); ++i) {
    if (column[i].end > column[i].begin) SumParts(Elements(grad, column[i]), parts[i], traffic);
  }
}

// Those sums over all machines, of what this rank owns.
void BucketExchange::ReduceBetween(int b, Tensor grad, const Context& traffic) {
  const Levels& levels = LevelsOf(b);
  const Bucket& bucket = layout_->buckets()[static_cast<size_t>(b)];
  const ElementRange own = layout_->Own(b);
  const int64_t n = own.end - own.begin;
  Tensor pieces = Elements(grad, {bucket.begin, bucket.end});
  std::vector<RowMessage> sends, receives;
  std::vector<Tensor> parts;
  const std::vector<ElementRange> column = Column(b, levels.place);
  for (size_t m = 0; m < column.size(); ++m) {
    if (send_.defined()) Pieces(b, grad, column[m], traffic);
    if (static_cast<int>(m) == levels.machine) {
      parts.emplace_back();
      continue;
    }
    const int rank = levels.machines[m][static_cast<size_t>(levels.place)];
    const auto place = static_cast<int64_t>(receives.size()) * n;
    sends.push_back({rank, column[m].begin - bucket.begin, column[m].end - column[m].begin});
    receives.push_back({rank, place, n});
    parts.push_back(parts_.Slice(0, place, n));
  }
  if (send_.defined()) pieces = send_.Slice(0, 0, pieces.numel());
  parts[static_cast<size_t>(levels.machine)] = pieces.Slice(0, own.begin - bucket.begin, n);
  Ranks(b).ExchangeRows("gradients between machines", parts_, receives, pieces, sends, traffic);
  if (n > 0) SumParts(Elements(grad, own), parts, traffic);
}

void BucketExchange::Reduce(int b, Tensor grad, const Context& ctx) {
  if (Ranks(b).size() == 1 || groups_->alone()) return;
  const Context traffic = stream_.Behind(ctx);
  ReduceWithin(b, grad, traffic);
  if (LevelsOf(b).machines.size() > 1) ReduceBetween(b, grad, traffic);
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
  const Levels& levels = LevelsOf(b);
  const std::vector<ElementRange> column = Column(b, levels.place);
  std::vector<RowMessage> sends, receives;
  if (column.size() > 1) {
    const ElementRange own = layout_->Own(b);
    for (size_t m = 0; m < column.size(); ++m) {
      if (static_cast<int>(m) == levels.machine) continue;
      const int rank = levels.machines[m][static_cast<size_t>(levels.place)];
      sends.push_back({rank, own.begin, own.end - own.begin});
      receives.push_back({rank, column[m].begin, column[m].end - column[m].begin});
    }
    ranks.ExchangeRows("weights between machines", weight, receives, weight, sends, traffic);
    sends.clear();
    receives.clear();
  }
  std::vector<Reading> readings;
  const auto size = static_cast<int>(levels.own().size());
  for (int n = 1; n < size; ++n) {
    const int k = (levels.place + n) % size;
    const int rank = levels.own()[static_cast<size_t>(k)];
    for (const ElementRange& range : column) {
      sends.push_back({rank, range.begin, range.end - range.begin});
    }
    for (const ElementRange& range : Column(b, k)) {
      receives.push_back({rank, range.begin, range.end - range.begin});
      readings.push_back({rank, range.begin, range.begin, range.end - range.begin});
    }
  }
  if (Reads(b, ctx)) {
    const int flat = layout_->buckets()[static_cast<size_t>(b)].flat;
    Read("weights", b, 2 * flat, weight, readings, Elements(weight, layout_->Own(b)), traffic);
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
