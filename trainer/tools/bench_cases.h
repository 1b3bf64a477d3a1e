// The cases of `krait bench kernels`: ops with operands at the shapes of a model's step.
#ifndef KRAIT_TRAINER_TOOLS_BENCH_CASES_H_
#define KRAIT_TRAINER_TOOLS_BENCH_CASES_H_

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/context.h"
#include "kernels/tensor.h"
#include "kernels/transfer.h"
#include "trainer/tools/bench.h"

namespace krait {

// The shapes of the cases: those of a model's step.
struct Shapes {
  const char* model;
  int64_t batch, t, d, i, r, f;  // r: dt_rank
  int64_t heads, kv_heads, head_dim, experts, vocabulary, params;
  int64_t n = 16, k = 4, top_k = 2;
  DType dtype = DType::kF32;  // of activations and weights
  Device device = Device::kCpu;
  int64_t m() const { return batch * t; }
  DType wide() const { return Wide(dtype); }
};
// Operands of one case.
class Operands {
 public:
  Operands(Arena* arena, const Shapes& shapes, const Context& ctx)
      : arena_(arena), shapes_(shapes), ctx_(ctx) {}
  // Normal deviates and zeros, of the compute dtype or wide.
  Tensor Normal(std::initializer_list<int64_t> shape) { return Random(shape, shapes_.dtype); }
  Tensor WideNormal(std::initializer_list<int64_t> shape) { return Random(shape, shapes_.wide()); }
  Tensor Out(std::initializer_list<int64_t> shape) { return Zeros(shape, shapes_.dtype); }
  Tensor WideOut(std::initializer_list<int64_t> shape) { return Zeros(shape, shapes_.wide()); }
  // Ids that run through [0, limit) in a scattered order.
  Tensor Ids(std::initializer_list<int64_t> shape, int64_t limit) {
    const Tensor x = arena_->Alloc(DType::kI32, shape);
    std::vector<int32_t> ids(static_cast<size_t>(x.numel()));
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<int32_t>(static_cast<int64_t>(i) * 7919 % limit);
    }
    Upload(x, ids.data(), ctx_);
    return x;
  }
  Tensor I32(std::initializer_list<int64_t> shape) { return arena_->Alloc(DType::kI32, shape); }
  Tensor I64(const std::vector<int64_t>& values) {
    const Tensor x = arena_->Alloc(DType::kI64, {static_cast<int64_t>(values.size())});
    Upload(x, values.data(), ctx_);
    return x;
  }
  Tensor F64(const std::vector<double>& values) {
    const Tensor x = arena_->Alloc(DType::kF64, {static_cast<int64_t>(values.size())});
    Upload(x, values.data(), ctx_);
    return x;
  }

 private:
  Tensor Random(std::initializer_list<int64_t> shape, DType dtype) {
    const Tensor x = arena_->Alloc(dtype, shape);
    FillNormal(x, stream_++, ctx_);
    return x;
  }
  Tensor Zeros(std::initializer_list<int64_t> shape, DType dtype) {
    const Tensor x = arena_->Alloc(dtype, shape);
    Fill(x, 0, ctx_);
    return x;
  }

  Arena* arena_;
  const Shapes& shapes_;
  const Context& ctx_;
  uint64_t stream_ = 0;
};

using Op = std::function<void(const Context&)>;
struct Case {
  const char* name;
  OpFamily family;
  const char* direction;
  std::string shape;
  std::function<Op(Operands*)> make;
};

std::vector<Case> AllCases(const Shapes& shapes);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_BENCH_CASES_H_
