#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/random_fill.h"
#include "kernels/transfer.h"

namespace krait {
namespace {

Tensor Alloc(Arena* arena, DType dtype, const std::vector<int64_t>& shape) {
  switch (shape.size()) {
    case 1:
      return arena->Alloc(dtype, {shape[0]});
    case 2:
      return arena->Alloc(dtype, {shape[0], shape[1]});
    case 3:
      return arena->Alloc(dtype, {shape[0], shape[1], shape[2]});
    default:
      KRAIT_FATAL("a storage has 1 to 3 dimensions");
  }
}

// The bias b with softplus(b) = dt, where dt is log-uniform in [1e-3, 1e-1] with floor 1e-4
// (state-spaces/mamba; Gu & Dao, 2312.00752, section 3.6).
double DtBias(double uniform) {
  const double low = std::log(1e-3);
  const double high = std::log(1e-1);
  const double dt = std::max(std::exp(low + uniform * (high - low)), 1e-4);
  return dt + std::log(-std::expm1(-dt));
}

}  // namespace

void InitParam(Tensor values, const Param& param, const ModelSpec& spec, uint64_t seed,
               const Context& ctx) {
  const RandomStream stream(seed, RandomPurpose::kInit, HashName(param.name));
  const bool mamba = spec.init_scheme == InitScheme::kMamba;
  const int64_t n = values.numel();
  const auto normal = [&](double std) {
    FillNormal(values.View({1, n}), stream, /*first=*/0, /*row_step=*/n, std, ctx);
  };
  // A small tensor whose values the host computes.
  const auto from_host = [&](const auto& value) {
    const ArenaScope scope(ctx.scratch);
    std::vector<double> host(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) host[static_cast<size_t>(i)] = value(i);
    const Tensor wide = ctx.scratch->Alloc(DType::kF64, {n});
    Upload(wide, host.data(), ctx);
    Copy(values, wide, ctx);
  };
  switch (param.init) {
    case ParamInit::kNormal:
      return normal(spec.init_std);
    case ParamInit::kNormalResidual:
      return normal(mamba ? spec.init_std / std::sqrt(2.0 * static_cast<double>(spec.n_layers))
                          : spec.init_std);
    case ParamInit::kZero:
      return Fill(values, 0, ctx);
    case ParamInit::kOne:
      return Fill(values, 1, ctx);
    case ParamInit::kALog:
      return from_host(
          [&](int64_t i) { return std::log(static_cast<double>(i % param.shape.back() + 1)); });
    case ParamInit::kDtWeight:
      if (!mamba) return normal(spec.init_std);
      return FillUniform(values.View({1, n}), stream, /*first=*/0, /*row_step=*/n,
                         1.0 / std::sqrt(static_cast<double>(spec.mamba.dt_rank)), ctx);
    case ParamInit::kDtBias:
      if (!mamba) return Fill(values, 0, ctx);
      return from_host([&](int64_t i) { return DtBias(stream.Uniform(static_cast<uint64_t>(i))); });
  }
  KRAIT_FATAL("unknown initialiser");
}

Weights::Weights(const ParamTable* table, Placement placement, bool with_grad, Arena* weight_arena,
                 Arena* grad_arena)
    : table_(table), placement_(placement), uses_(table->storages().size()) {
  const DType wide = Wide(placement.compute);
  for (const Storage& storage : table->storages()) {
    const krait::Param& first = table->params()[static_cast<size_t>(storage.params.front())];
    const DType own = first.dtype_class == DTypeClass::kFp32 ? wide : placement.compute;
    values_.push_back(Alloc(weight_arena, own, storage.shape));
    if (with_grad) grads_.push_back(Alloc(grad_arena, wide, storage.shape));
  }
}

void Weights::BeginPass(const Context& ctx, bool first, bool /*last*/) {
  if (!first) return;
  for (size_t s = 0; s < uses_.size(); ++s) {
    const krait::Param& piece =
        table_->params()[static_cast<size_t>(table_->storages()[s].params.front())];
    uses_[s].written = piece.grad_write == GradWrite::kZeroed;
    if (uses_[s].written && has_grad()) Fill(grads_[s], 0, ctx);
  }
}

Tensor Weights::Get(int storage) const {
  ++uses_[static_cast<size_t>(storage)].held;
  return values_[static_cast<size_t>(storage)];
}

void Weights::Release(int storage) const { --uses_[static_cast<size_t>(storage)].held; }

bool Weights::Accumulate(int storage) const {
  return std::exchange(uses_[static_cast<size_t>(storage)].written, true);
}

void Weights::GradReady(int storage) const { ++uses_[static_cast<size_t>(storage)].ready; }

void Weights::EndForward() const {
  for (size_t s = 0; s < uses_.size(); ++s) {
    if (uses_[s].held == 0 && uses_[s].ready == 0) continue;
    KRAIT_FATAL(table_->storages()[s].name + ": after a forward " + std::to_string(uses_[s].held) +
                " more taken than released, " + std::to_string(uses_[s].ready) +
                " times its gradient was ready");
  }
}

void Weights::EndBackward(const std::vector<int>& storages) const {
  for (const int s : storages) --uses_[static_cast<size_t>(s)].ready;
  for (size_t s = 0; s < uses_.size(); ++s) {
    if (uses_[s].held == 0 && uses_[s].ready == 0) continue;
    KRAIT_FATAL(table_->storages()[s].name + ": after a backward " + std::to_string(uses_[s].held) +
                " more taken than released, " + std::to_string(uses_[s].ready) +
                " times too often its gradient was ready");
  }
}

Tensor Weights::Piece(Tensor storage, const krait::Param& param) const {
  return storage.View({storage.numel()}).Slice(0, param.offset, param.numel());
}

Tensor Weights::Param(int param) const {
  const krait::Param& p = table_->params()[static_cast<size_t>(param)];
  return Piece(values_[static_cast<size_t>(p.storage)], p);
}

Tensor Weights::ParamGrad(int param) const {
  const krait::Param& p = table_->params()[static_cast<size_t>(param)];
  return Piece(Grad(p.storage), p);
}

void Weights::Init(const ModelSpec& spec, uint64_t seed, const Context& ctx) {
  for (size_t p = 0; p < table_->params().size(); ++p) {
    InitParam(Param(static_cast<int>(p)), table_->params()[p], spec, seed, ctx);
  }
}

}  // namespace krait
