#include "trainer/train/optimizer_state.h"

#include <algorithm>

#include "kernels/activation.h"
#include "kernels/optimizer.h"
#include "kernels/transfer.h"
#include "model/init.h"

namespace krait {
namespace {

// Ranges of a bucket's elements, as far as they are this rank's, counted from its first.
struct Ranges {
  std::vector<int64_t> bounds;
  std::vector<double> values;  // of each range, where it has one
};
Ranges OwnRanges(const std::vector<ElementRange>& ranges, const std::vector<double>& values,
                 ElementRange own) {
  Ranges mine;
  for (size_t r = 0; r < ranges.size(); ++r) {
    const int64_t begin = std::max(ranges[r].begin, own.begin);
    const int64_t end = std::min(ranges[r].end, own.end);
    if (begin >= end) continue;
    mine.bounds.insert(mine.bounds.end(), {begin - own.begin, end - own.begin});
    if (!values.empty()) mine.values.push_back(values[r]);
  }
  return mine;
}

}  // namespace

OptimizerState::OptimizerState(const Weights* weights, const OptimizerConfig& config, Arena* arena,
                               const Context& ctx, BucketExchange* exchange)
    : weights_(weights),
      exchange_(exchange),
      config_(config),
      buckets_(weights->layout().buckets().size()) {
  const Layout& layout = weights->layout();
  const DType wide = Wide(weights->dtype());
  const DType moment = config.moments == MomentDType::kBf16 ? DType::kBF16 : wide;
  for (size_t f = 0; f < layout.flats().size(); ++f) {
    // The buckets of a flat, one after the other.
    int64_t total = 0;
    for (size_t b = 0; b < buckets_.size(); ++b) {
      const ElementRange own = layout.Own(static_cast<int>(b));
      if (layout.buckets()[b].flat == static_cast<int>(f)) total += own.end - own.begin;
    }
    const Tensor weight = weights->FlatWeight(static_cast<int>(f));
    const Tensor grad = weights->FlatGrad(static_cast<int>(f));
    const bool rounded = weight.dtype() != wide;
    const Tensor master = rounded ? arena->Alloc(wide, {total}) : Tensor();
    const Tensor exp_avg = grad.defined() ? arena->Alloc(moment, {total}) : Tensor();
    const Tensor exp_avg_sq = grad.defined() ? arena->Alloc(moment, {total}) : Tensor();
    masters_.push_back(rounded ? master : weight);
    int64_t done = 0;
    for (size_t b = 0; b < buckets_.size(); ++b) {
      const Bucket& bucket = layout.buckets()[b];
      if (bucket.flat != static_cast<int>(f)) continue;
      const ElementRange own = layout.Own(static_cast<int>(b));
      const int64_t n = own.end - own.begin;
      Owned& owned = buckets_[b];
      owned.weight = weight.Slice(0, own.begin, n);
      owned.master = rounded ? master.Slice(0, done, n) : owned.weight;
      if (grad.defined()) {
        owned.grad = grad.Slice(0, own.begin, n);
        owned.exp_avg = exp_avg.Slice(0, done, n);
        owned.exp_avg_sq = exp_avg_sq.Slice(0, done, n);
      }
      done += n;
    }
  }

  for (size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = layout.buckets()[b];
    const ElementRange own = layout.Own(static_cast<int>(b));
    const Ranges decay = OwnRanges(bucket.decay, {}, own);
    const Ranges scaled = OwnRanges(bucket.scaled, bucket.lr_scales, own);
    const auto upload = [&](const std::vector<int64_t>& bounds) {
      const Tensor t = arena->Alloc(DType::kI64, {static_cast<int64_t>(bounds.size()) / 2, 2});
      Upload(t, bounds.data(), ctx);
      return t;
    };
    if (!decay.bounds.empty()) buckets_[b].decay = upload(decay.bounds);
    if (scaled.bounds.empty()) continue;
    StepScales& scales = buckets_[b].step_scales;
    scales.ranges = upload(scaled.bounds);
    scales.scales = arena->Alloc(DType::kF64, {scales.ranges.dim(0)});
    Upload(scales.scales, scaled.values.data(), ctx);
  }
}

absl::Status OptimizerState::Init(const ModelSpec& spec, uint64_t seed, const Context& ctx,
                                  const Progress& progress) {
  const Layout& layout = weights_->layout();
  int64_t done = 0, total = 0;
  for (const OwnedBox& part : layout.Owned()) total += part.box.numel();
  const auto init = [&](const Tensor& values, int64_t first, const ParamBox& box) -> absl::Status {
    if (progress) KRAIT_RETURN_IF_ERROR(progress(done, total));
    InitParam(values.Slice(0, box.begin - first, box.numel()),
              weights_->table().params()[box.param], box, spec, seed, ctx);
    done += box.numel();
    return absl::OkStatus();
  };
  for (const LocalStorage& storage : layout.storages()) {
    // Weights that are rounded from masters of this rank need none of their own.
    const Tensor weight = weights_->FlatWeight(storage.flat);
    const Tensor& master = masters_[storage.flat];
    if (master.raw() != weight.raw() && master.numel() == weight.numel()) continue;
    for (const ParamBox& box : storage.boxes) KRAIT_RETURN_IF_ERROR(init(weight, 0, box));
  }
  for (const OwnedBox& part : layout.Owned()) {
    const Owned& owned = buckets_[part.bucket];
    if (owned.master.raw() == owned.weight.raw()) continue;
    KRAIT_RETURN_IF_ERROR(init(owned.master, layout.Own(part.bucket).begin, part.box));
  }
  RoundMasters(ctx);  // what other ranks own has the same bits here
  return absl::OkStatus();
}

void OptimizerState::RoundMasters(const Context& ctx) {
  for (const Owned& owned : buckets_) {
    if (owned.master.raw() != owned.weight.raw()) Copy(owned.weight, owned.master, ctx);
  }
}

void OptimizerState::MastersToWeights(const Context& ctx) {
  RoundMasters(ctx);
  for (size_t b = buckets_.size(); b-- > 0;) GatherWeights(static_cast<int>(b), ctx);
}

void OptimizerState::GatherWeights(int bucket, const Context& ctx) const {
  if (exchange_ == nullptr) return;
  const int flat = weights_->layout().buckets()[static_cast<size_t>(bucket)].flat;
  exchange_->Gather(bucket, weights_->FlatWeight(flat), ctx);
}

void OptimizerState::SumOfSquares(Tensor sum, const Context& ctx) const {
  if (exchange_ != nullptr) exchange_->WaitForGradients(ctx);
  Fill(sum, 0, ctx);
  for (const Owned& owned : buckets_) {
    if (owned.grad.defined() && owned.grad.numel() > 0) AddSumOfSquares(sum, owned.grad, ctx);
  }
}

void OptimizerState::Update(double lr, Tensor losses, Tensor sum_of_squares, Tensor control,
                            const Context& ctx, double max_norm, double max_loss) {
  const AdamWSettings settings = {.lr = lr,
                                  .beta1 = config_.beta1,
                                  .beta2 = config_.beta2,
                                  .eps = config_.eps,
                                  .weight_decay = config_.weight_decay,
                                  .clip = config_.clip,
                                  .max_norm = max_norm,
                                  .max_loss = max_loss};
  AdamWPrepare(control, sum_of_squares, losses, settings, ctx);
  for (size_t b = buckets_.size(); b-- > 0;) {
    const Owned& owned = buckets_[b];
    if (!owned.grad.defined()) continue;
    if (owned.grad.numel() > 0) {
      AdamW(owned.weight, owned.master, owned.exp_avg, owned.exp_avg_sq, owned.grad, owned.decay,
            owned.step_scales, control, settings, ctx);
    }
    GatherWeights(static_cast<int>(b), ctx);
  }
}

Tensor OptimizerState::Master(int param) const {
  const Layout& layout = weights_->layout();
  const ParamBox& box = layout.WholeBox(param);
  const int flat = layout.storages()[weights_->table().params()[param].storage].flat;
  // Masters are those of the owned elements, so as many as the flat has only where all are.
  KRAIT_CHECK(masters_[flat].numel() == layout.flats()[flat].numel);
  return masters_[flat].Slice(0, box.begin, box.numel());
}

std::vector<CheckpointBox> StateBoxes(const Weights& weights, const OptimizerState* optimizer) {
  const Layout& layout = weights.layout();
  std::vector<CheckpointBox> boxes;
  // `values` begins with element `first` of the flat.
  const auto add = [&](const char* slot, const ParamBox& box, const Tensor& values, int64_t first) {
    if (!values.defined()) return;
    const Param& param = weights.table().params()[box.param];
    boxes.push_back({.slot = slot,
                     .name = param.name,
                     .dtype = values.dtype(),
                     .shape = param.shape,
                     .offset = box.offset,
                     .extent = box.extent,
                     .data = values.Slice(0, box.begin - first, box.numel()).raw(),
                     .device = values.device()});
  };
  if (optimizer == nullptr) {
    for (const LocalStorage& storage : layout.storages()) {
      for (const ParamBox& box : storage.boxes) {
        add("weight", box, weights.FlatWeight(storage.flat), 0);
      }
    }
    return boxes;
  }
  const std::vector<OwnedBox> parts = layout.Owned();
  for (const OwnedBox& part : parts) {
    add("weight", part.box, optimizer->buckets()[part.bucket].master,
        layout.Own(part.bucket).begin);
  }
  for (const OwnedBox& part : parts) {
    const OptimizerState::Owned& owned = optimizer->buckets()[part.bucket];
    const int64_t first = layout.Own(part.bucket).begin;
    add("exp_avg", part.box, owned.exp_avg, first);
    add("exp_avg_sq", part.box, owned.exp_avg_sq, first);
  }
  return boxes;
}

}  // namespace krait
