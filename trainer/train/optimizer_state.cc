#include "trainer/train/optimizer_state.h"

#include <algorithm>
#include <cmath>

#include "kernels/optimizer.h"

namespace krait {
namespace {

// The attributes that all pieces of a storage share.
const Param& SharedAttributes(const ParamTable& table, const Storage& storage) {
  const Param& first = table.params()[storage.params.front()];
  for (int piece : storage.params) {
    const Param& param = table.params()[piece];
    KRAIT_CHECK(param.decay == first.decay && param.trainable == first.trainable);
  }
  return first;
}

}  // namespace

OptimizerState::OptimizerState(const Weights* weights, const OptimizerConfig& config, Arena* arena)
    : weights_(weights), config_(config) {
  const ParamTable& table = weights->table();
  const DType dtype = config.moments == MomentDType::kBf16 ? DType::kBF16 : DType::kF32;
  for (const Storage& storage : table.storages()) {
    const bool trainable = SharedAttributes(table, storage).trainable;
    exp_avg_.push_back(trainable ? arena->Alloc(dtype, {storage.numel()}) : Tensor());
    exp_avg_sq_.push_back(trainable ? arena->Alloc(dtype, {storage.numel()}) : Tensor());
  }
}

double OptimizerState::GradNorm(const Context& ctx) const {
  double sum = 0;
  for (size_t s = 0; s < exp_avg_.size(); ++s) {
    if (!exp_avg_[s].defined()) continue;
    const Tensor grad = weights_->Grad(static_cast<int>(s));
    sum += SumOfSquares(grad.View({grad.numel()}), ctx);
  }
  return std::sqrt(sum);
}

void OptimizerState::Update(double lr, double grad_scale, int64_t step, const Context& ctx) {
  const ParamTable& table = weights_->table();
  for (size_t s = 0; s < exp_avg_.size(); ++s) {
    if (!exp_avg_[s].defined()) continue;
    const bool decay = SharedAttributes(table, table.storages()[s]).decay;
    const AdamWStep update = {.lr = lr,
                              .beta1 = config_.beta1,
                              .beta2 = config_.beta2,
                              .eps = config_.eps,
                              .weight_decay = decay ? config_.weight_decay : 0.0,
                              .step = step,
                              .grad_scale = grad_scale};
    const Tensor weight = weights_->Get(static_cast<int>(s));
    const Tensor grad = weights_->Grad(static_cast<int>(s));
    AdamW(weight.View({weight.numel()}), exp_avg_[s], exp_avg_sq_[s], grad.View({grad.numel()}),
          update, ctx);
  }
}

Tensor OptimizerState::Piece(const std::vector<Tensor>& moments, int param) const {
  const Param& p = weights_->table().params()[param];
  const Tensor& storage = moments[p.storage];
  return storage.defined() ? storage.Slice(0, p.offset, p.numel()) : Tensor();
}

double ClipFactor(double clip, double norm) {
  return clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0;
}

std::vector<CheckpointBox> StateBoxes(const Weights& weights, const OptimizerState* optimizer) {
  std::vector<CheckpointBox> boxes;
  const auto add = [&boxes](const char* slot, const Param& param, const Tensor& values) {
    if (!values.defined()) return;
    boxes.push_back({.slot = slot,
                     .name = param.name,
                     .dtype = values.dtype(),
                     .shape = param.shape,
                     .offset = std::vector<int64_t>(param.shape.size(), 0),
                     .extent = param.shape,
                     .data = values.raw()});
  };
  const auto& params = weights.table().params();
  for (size_t p = 0; p < params.size(); ++p) {
    add("weight", params[p], weights.Param(static_cast<int>(p)));
  }
  for (size_t p = 0; optimizer != nullptr && p < params.size(); ++p) {
    add("exp_avg", params[p], optimizer->ExpAvg(static_cast<int>(p)));
    add("exp_avg_sq", params[p], optimizer->ExpAvgSq(static_cast<int>(p)));
  }
  return boxes;
}

}  // namespace krait
