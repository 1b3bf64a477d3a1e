#include "trainer/train/optimizer_state.h"

#include "kernels/activation.h"
#include "kernels/optimizer.h"
#include "kernels/transfer.h"

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
  const DType wide = Wide(weights->dtype());
  const DType moment = config.moments == MomentDType::kBf16 ? DType::kBF16 : wide;
  for (size_t s = 0; s < table.storages().size(); ++s) {
    const Tensor values = weights->Values(static_cast<int>(s));
    const int64_t n = values.numel();
    const bool trainable = SharedAttributes(table, table.storages()[s]).trainable;
    const bool rounded = values.dtype() != wide;
    master_.push_back(rounded ? arena->Alloc(wide, {n}) : Tensor());
    exp_avg_.push_back(trainable ? arena->Alloc(moment, {n}) : Tensor());
    exp_avg_sq_.push_back(trainable ? arena->Alloc(moment, {n}) : Tensor());
    decay_ranges_.push_back(SharedAttributes(table, table.storages()[s]).decay
                                ? arena->Alloc(DType::kI64, {1, 2})
                                : Tensor());
  }
}

Tensor OptimizerState::MasterOf(size_t storage) const {
  if (master_[storage].defined()) return master_[storage];
  const Tensor values = weights_->Values(static_cast<int>(storage));
  return values.View({values.numel()});
}

void OptimizerState::Init(const ModelSpec& spec, uint64_t seed, const Context& ctx) {
  const ParamTable& table = weights_->table();
  for (size_t p = 0; p < table.params().size(); ++p) {
    InitParam(Master(static_cast<int>(p)), table.params()[p], spec, seed, ctx);
  }
  MastersToWeights(ctx);
}

void OptimizerState::MastersToWeights(const Context& ctx) {
  for (size_t s = 0; s < master_.size(); ++s) {
    const Tensor values = weights_->Values(static_cast<int>(s));
    if (master_[s].defined()) Copy(values.View({values.numel()}), master_[s], ctx);
  }
}

void OptimizerState::Update(double lr, Tensor losses, Tensor sum_of_squares, Tensor control,
                            const Context& ctx) {
  Fill(sum_of_squares, 0, ctx);
  for (size_t s = 0; s < exp_avg_.size(); ++s) {
    if (!exp_avg_[s].defined()) continue;
    const Tensor grad = weights_->Grad(static_cast<int>(s));
    AddSumOfSquares(sum_of_squares, grad.View({grad.numel()}), ctx);
  }
  const AdamWSettings settings = {.lr = lr,
                                  .beta1 = config_.beta1,
                                  .beta2 = config_.beta2,
                                  .eps = config_.eps,
                                  .weight_decay = config_.weight_decay,
                                  .clip = config_.clip};
  AdamWPrepare(control, sum_of_squares, losses, settings, ctx);
  for (size_t s = 0; s < exp_avg_.size(); ++s) {
    if (!exp_avg_[s].defined()) continue;
    const Tensor values = weights_->Values(static_cast<int>(s));
    const Tensor grad = weights_->Grad(static_cast<int>(s));
    const int64_t n = values.numel();
    if (decay_ranges_[s].defined()) {
      const int64_t range[] = {0, n};
      Upload(decay_ranges_[s], range, ctx);
    }
    AdamW(values.View({n}), MasterOf(s), exp_avg_[s], exp_avg_sq_[s], grad.View({n}),
          decay_ranges_[s], control, settings, ctx);
  }
}

Tensor OptimizerState::Piece(const std::vector<Tensor>& of_storages, int param) const {
  const Param& p = weights_->table().params()[param];
  const Tensor& storage = of_storages[p.storage];
  return storage.defined() ? storage.Slice(0, p.offset, p.numel()) : Tensor();
}

Tensor OptimizerState::Master(int param) const {
  const Tensor master = Piece(master_, param);
  return master.defined() ? master : weights_->Param(param);
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
    const int i = static_cast<int>(p);
    add("weight", params[p], optimizer != nullptr ? optimizer->Master(i) : weights.Param(i));
  }
  for (size_t p = 0; optimizer != nullptr && p < params.size(); ++p) {
    add("exp_avg", params[p], optimizer->ExpAvg(static_cast<int>(p)));
    add("exp_avg_sq", params[p], optimizer->ExpAvgSq(static_cast<int>(p)));
  }
  return boxes;
}

}  // namespace krait
