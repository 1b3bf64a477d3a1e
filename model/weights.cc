#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/parallel_for.h"
#include "kernels/base/random.h"

namespace krait {
namespace {

// Elements of one piece of parallel work.
constexpr int64_t kPiece = 1 << 14;

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

// The value of element `i` of a parameter.
class Initializer {
 public:
  Initializer(const ModelSpec& spec, const Param& param, uint64_t seed)
      : stream_(seed, RandomPurpose::kInit, HashName(param.name)),
        kind_(param.init),
        std_(spec.init_std),
        last_dim_(param.shape.back()) {
    const bool mamba = spec.init_scheme == InitScheme::kMamba;
    if (kind_ == ParamInit::kNormalResidual) {
      if (mamba) std_ /= std::sqrt(2.0 * static_cast<double>(spec.n_layers));
      kind_ = ParamInit::kNormal;
    }
    if (kind_ == ParamInit::kDtWeight && !mamba) kind_ = ParamInit::kNormal;
    if (kind_ == ParamInit::kDtBias && !mamba) kind_ = ParamInit::kZero;
    dt_bound_ = 1.0 / std::sqrt(static_cast<double>(spec.mamba.dt_rank));
  }

  double operator()(int64_t i) const {
    const auto index = static_cast<uint64_t>(i);
    switch (kind_) {
      case ParamInit::kNormal:
      case ParamInit::kNormalResidual:
        return std_ * stream_.Normal(index);
      case ParamInit::kZero:
        return 0;
      case ParamInit::kOne:
        return 1;
      case ParamInit::kALog:
        return std::log(static_cast<double>(i % last_dim_ + 1));
      case ParamInit::kDtWeight:
        return dt_bound_ * (2 * stream_.Uniform(index) - 1);
      case ParamInit::kDtBias:
        return DtBias(stream_.Uniform(index));
    }
    KRAIT_FATAL("unknown initialiser");
  }

 private:
  RandomStream stream_;
  ParamInit kind_;
  double std_;
  int64_t last_dim_;
  double dt_bound_ = 0;
};

template <typename T>
void Fill(Tensor values, const Initializer& value) {
  T* out = values.data<T>();
  ParallelFor(values.numel(), kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = static_cast<T>(value(i));
  });
}

}  // namespace

Weights::Weights(const ParamTable* table, DType dtype, Device device, bool with_grad,
                 Arena* weight_arena, Arena* grad_arena)
    : table_(table), dtype_(dtype), device_(device) {
  // Gradients and tensors of class kFp32 are f32 whatever the compute dtype, except in f64 checks.
  const DType wide = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  for (const Storage& storage : table->storages()) {
    const krait::Param& first = table->params()[static_cast<size_t>(storage.params.front())];
    const DType own = first.dtype_class == DTypeClass::kFp32 ? wide : dtype;
    values_.push_back(Alloc(weight_arena, own, storage.shape));
    if (with_grad) grads_.push_back(Alloc(grad_arena, wide, storage.shape));
  }
}

Tensor Weights::Piece(Tensor storage, const krait::Param& param) const {
  return storage.View({storage.numel()}).Slice(0, param.offset, param.numel());
}

Tensor Weights::Param(int param) const {
  const krait::Param& p = table_->params()[static_cast<size_t>(param)];
  return Piece(Get(p.storage), p);
}

Tensor Weights::ParamGrad(int param) const {
  const krait::Param& p = table_->params()[static_cast<size_t>(param)];
  return Piece(Grad(p.storage), p);
}

void Weights::Init(const ModelSpec& spec, uint64_t seed) {
  if (device_ != Device::kCpu) KRAIT_FATAL("weights are initialised on the CPU only");
  for (size_t p = 0; p < table_->params().size(); ++p) {
    const Initializer value(spec, table_->params()[p], seed);
    const Tensor tensor = Param(static_cast<int>(p));
    switch (tensor.dtype()) {
      case DType::kF32:
        Fill<float>(tensor, value);
        break;
      case DType::kF64:
        Fill<double>(tensor, value);
        break;
      default:
        KRAIT_FATAL(std::string("no initialisation of ") + Name(tensor.dtype()) + " weights");
    }
  }
}

void Weights::ZeroGrad() {
  if (device_ != Device::kCpu) KRAIT_FATAL("gradients are zeroed on the CPU only");
  for (const Tensor& grad : grads_) {
    char* bytes = static_cast<char*>(grad.raw());
    ParallelFor(grad.bytes(), int64_t{1} << 20, [&](int64_t begin, int64_t end) {
      std::memset(bytes + begin, 0, static_cast<size_t>(end - begin));
    });
  }
}

}  // namespace krait
