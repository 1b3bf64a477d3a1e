#include "model/init.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/base/random.h"
#include "kernels/random_fill.h"
#include "kernels/transfer.h"

namespace krait {
namespace {

// Elements of one piece of an f32 copy.
constexpr int64_t kPiece = 1 << 22;

// The bias b with softplus(b) = dt, where dt is log-uniform in [1e-3, 1e-1] with floor 1e-4
// (state-spaces/mamba; Gu & Dao, 2312.00752, section 3.6).
double DtBias(double uniform) {
  const double low = std::log(1e-3);
  const double high = std::log(1e-1);
  const double dt = std::max(std::exp(low + uniform * (high - low)), 1e-4);
  return dt + std::log(-std::expm1(-dt));
}

// Element (r, c) of `rows` is element first + r * row_step + c of the parameter.
void InitRows(Tensor rows, const ModelSpec& spec, const Param& param, int64_t first,
              int64_t row_step, uint64_t seed, const Context& ctx) {
  const RandomStream stream(seed, RandomPurpose::kInit, HashName(param.name));
  const bool mamba = spec.init_scheme == InitScheme::kMamba;
  const auto normal = [&](double std) {
    FillNormal(rows, stream, first, row_step, std * param.init_scale, ctx);
  };
  // A small tensor whose values the host computes.
  const auto from_host = [&](const auto& value) {
    const ArenaScope scope(ctx.scratch);
    const Tensor wide = ctx.scratch->Alloc(Wide(rows.dtype()), {rows.dim(0), rows.dim(1)});
    if (ctx.planning) return;
    const auto fill = [&](auto zero) {
      std::vector<decltype(zero)> host;
      for (int64_t r = 0; r < rows.dim(0); ++r) {
        for (int64_t c = 0; c < rows.dim(1); ++c) {
          host.push_back(static_cast<decltype(zero)>(value(first + r * row_step + c)));
        }
      }
      Upload(wide, host.data(), ctx);
    };
    wide.dtype() == DType::kF64 ? fill(0.0) : fill(0.0f);
    Copy(rows, wide, ctx);
  };
  switch (param.init) {
    case ParamInit::kNormal:
      return normal(spec.init_std);
    case ParamInit::kNormalResidual:
      return normal(mamba ? spec.init_std / std::sqrt(2.0 * static_cast<double>(spec.n_layers))
                          : spec.init_std);
    case ParamInit::kZero:
      return Fill(rows, 0, ctx);
    case ParamInit::kOne:
      return Fill(rows, 1, ctx);
    case ParamInit::kALog:
      return from_host(
          [&](int64_t i) { return std::log(static_cast<double>(i % param.shape.back() + 1)); });
    case ParamInit::kDtWeight:
      if (!mamba) return normal(spec.init_std);
      return FillUniform(rows, stream, first, row_step,
                         1.0 / std::sqrt(static_cast<double>(spec.mamba.dt_rank)), ctx);
    case ParamInit::kDtBias:
      if (!mamba) return Fill(rows, 0, ctx);
      return from_host([&](int64_t i) { return DtBias(stream.Uniform(static_cast<uint64_t>(i))); });
  }
  KRAIT_FATAL("unknown initialiser");
}

}  // namespace

void InitParam(Tensor y, const Param& param, const ParamBox& box, const ModelSpec& spec,
               uint64_t seed, const Context& ctx) {
  // A row of a box has neighbouring elements of the published tensor: cut are rows or, in a matrix,
  // columns.
  const int64_t row_step = param.numel() / param.shape[0];
  KRAIT_CHECK(param.shape.size() == 2 || box.row() == row_step);
  const int64_t first = box.offset[0] * row_step + (param.shape.size() == 2 ? box.offset[1] : 0);
  const Tensor rows = y.View({box.extent[0], box.row()});
  if (y.dtype() != DType::kBF16) return InitRows(rows, spec, param, first, row_step, seed, ctx);
  const int64_t step = std::max<int64_t>(1, kPiece / box.row());
  for (int64_t r = 0; r < box.extent[0]; r += step) {
    const ArenaScope scope(ctx.scratch);
    const int64_t count = std::min(step, box.extent[0] - r);
    const Tensor wide = ctx.scratch->Alloc(DType::kF32, {count, box.row()});
    InitRows(wide, spec, param, first + r * row_step, row_step, seed, ctx);
    Copy(rows.Slice(0, r, count), wide, ctx);
  }
}

}  // namespace krait
