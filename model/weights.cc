#include "model/weights.h"

#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "model/bucket_exchange.h"
#include "model/init.h"

namespace krait {
namespace {

// The storage as it lies in its flat, padding rows of a vocabulary included.
Tensor StorageView(Tensor flat, const LocalStorage& storage) {
  const std::vector<int64_t>& shape = storage.shape;
  const Tensor elements = flat.Slice(0, storage.offset, storage.numel());
  switch (shape.size()) {
    case 1:
      return elements;
    case 2:
      return elements.View({shape[0], shape[1]});
    case 3:
      return elements.View({shape[0], shape[1], shape[2]});
    default:
      KRAIT_FATAL("a storage has 1 to 3 dimensions");
  }
}

}  // namespace

Weights::Weights(const ParamTable* table, Placement placement, bool with_grad, Arena* weight_arena,
                 Arena* grad_arena, const Mesh& mesh, int64_t bucket_elements)
    : layout_(table, mesh, bucket_elements),
      placement_(placement),
      has_grad_(with_grad),
      uses_(table->storages().size()) {
  const DType wide = Wide(placement.compute);
  for (const Flat& flat : layout_.flats()) {
    const DType own = flat.dtype_class == DTypeClass::kFp32 ? wide : placement.compute;
    flat_weights_.push_back(weight_arena->Alloc(own, {flat.numel}));
    const bool grad = with_grad && flat.trainable;
    flat_grads_.push_back(grad ? grad_arena->Alloc(wide, {flat.numel}) : Tensor());
  }
  for (const LocalStorage& storage : layout_.storages()) {
    values_.push_back(StorageView(FlatWeight(storage.flat), storage));
    const Tensor grad = FlatGrad(storage.flat);
    grads_.push_back(grad.defined() ? StorageView(grad, storage) : Tensor());
  }
}

void Weights::BeginPass(const Context& ctx, bool first, bool last) {
  sending_ = last && exchange_ != nullptr ? &ctx : nullptr;
  if (sending_ != nullptr) {
    unready_.assign(layout_.buckets().size(), 0);
    for (const LocalStorage& storage : layout_.storages()) {
      for (const int b : storage.buckets) ++unready_[static_cast<size_t>(b)];
    }
  }
  if (!first) return;
  for (size_t s = 0; s < uses_.size(); ++s) {
    const krait::Param& piece =
        table().params()[static_cast<size_t>(table().storages()[s].params.front())];
    uses_[s].written = piece.grad_write == GradWrite::kZeroed;
  }
  for (size_t f = 0; f < flat_grads_.size(); ++f) {
    if (!flat_grads_[f].defined()) continue;
    for (const ElementRange& range : layout_.flats()[f].zero) {
      Fill(flat_grads_[f].Slice(0, range.begin, range.end - range.begin), 0, ctx);
    }
  }
}

Tensor Weights::Get(int storage) const {
  ++uses_[static_cast<size_t>(storage)].held;
  if (exchange_ != nullptr) {
    for (const int b : layout_.storages()[static_cast<size_t>(storage)].buckets) {
      exchange_->WaitForWeights(b);
    }
  }
  return values_[static_cast<size_t>(storage)];
}

void Weights::Release(int storage) const { --uses_[static_cast<size_t>(storage)].held; }

bool Weights::Accumulate(int storage) const {
  return std::exchange(uses_[static_cast<size_t>(storage)].written, true);
}

void Weights::GradReady(int storage) const {
  ++uses_[static_cast<size_t>(storage)].ready;
  if (sending_ == nullptr) return;
  const LocalStorage& local = layout_.storages()[static_cast<size_t>(storage)];
  for (const int b : local.buckets) {
    if (--unready_[static_cast<size_t>(b)] == 0) {
      exchange_->Reduce(b, FlatGrad(local.flat), *sending_);
    }
  }
}

void Weights::EndForward() const {
  for (size_t s = 0; s < uses_.size(); ++s) {
    if (uses_[s].held == 0 && uses_[s].ready == 0) continue;
    KRAIT_FATAL(table().storages()[s].name + ": after a forward " + std::to_string(uses_[s].held) +
                " more taken than released, " + std::to_string(uses_[s].ready) +
                " times its gradient was ready");
  }
}

void Weights::EndBackward(const std::vector<int>& storages) const {
  for (const int s : storages) --uses_[static_cast<size_t>(s)].ready;
  for (size_t s = 0; s < uses_.size(); ++s) {
    if (uses_[s].held == 0 && uses_[s].ready == 0) continue;
    KRAIT_FATAL(table().storages()[s].name + ": after a backward " + std::to_string(uses_[s].held) +
                " more taken than released, " + std::to_string(uses_[s].ready) +
                " times too often its gradient was ready");
  }
}

Tensor Weights::Whole(const std::vector<Tensor>& flats, int param) const {
  const LocalStorage& storage =
      layout_.storages()[static_cast<size_t>(table().params()[static_cast<size_t>(param)].storage)];
  const ParamBox& box = layout_.WholeBox(param);
  return flats[static_cast<size_t>(storage.flat)].Slice(0, box.begin, box.numel());
}

void Weights::Init(const ModelSpec& spec, uint64_t seed, const Context& ctx) {
  for (const LocalStorage& storage : layout_.storages()) {
    for (const ParamBox& box : storage.boxes) {
      InitParam(FlatWeight(storage.flat).Slice(0, box.begin, box.numel()),
                table().params()[static_cast<size_t>(box.param)], box, spec, seed, ctx);
    }
  }
}

}  // namespace krait
