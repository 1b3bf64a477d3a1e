#include "model/mamba_sublayer.h"

#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/causal_conv1d.h"
#include "kernels/gemm.h"
#include "kernels/rms_norm.h"

namespace krait {

// The scan's output is not kept: its backward yields it again.
struct MambaSublayer::MambaSaved : Saved {
  Tensor xz;            // [M,2I]
  Tensor u;             // [M,I] output of conv and SiLU
  Tensor projected;     // [M,R+2N] dt | B | C before their norms
  Tensor rstd;          // [3,M] of the norms of dt, B, C
  Tensor normed;        // [M,R+2N]; undefined: recomputed from `projected`
  Tensor dt_raw;        // [M,I] dt_proj's output without bias
  Tensor chunk_states;  // [B,chunks,I,N]
};

// Two buffers each: an op reads one and writes the other.
struct MambaSublayer::MambaState : MixerState {
  Tensor conv, conv_next;  // [B,K-1,I]
  Tensor scan, scan_next;  // [B,I,N]
};

namespace {

// A column range of rows [M,C] as [B,T,count].
Tensor Columns(Tensor rows, const PassShape& shape, int64_t begin, int64_t count) {
  return rows.View({shape.batch, shape.seq_len, rows.dim(1)}).Slice(2, begin, count);
}

}  // namespace

MambaSublayer::MambaSublayer(const ModelSpec& spec, const ParamTable& table, int layer)
    : d_inner_(spec.mamba.d_inner),
      d_state_(spec.mamba.d_state),
      d_conv_(spec.mamba.d_conv),
      dt_rank_(spec.mamba.dt_rank),
      inner_norms_(spec.mamba.inner_norms),
      conv_bias_(spec.mamba.conv_bias),
      proj_bias_(spec.mamba.proj_bias),
      norm_eps_(spec.norm_eps) {
  const auto storage = [&](const char* name, bool present = true) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".mamba.";
    return present ? table.FindStorage(prefix + name) : -1;
  };
  in_proj_ = storage("in_proj.weight");
  in_proj_bias_ = storage("in_proj.bias", proj_bias_);
  conv_ = storage("conv1d.weight");
  conv_bias_weight_ = storage("conv1d.bias", conv_bias_);
  x_proj_ = storage("x_proj.weight");
  dt_norm_ = storage("dt_layernorm.weight", inner_norms_);
  b_norm_ = storage("b_layernorm.weight", inner_norms_);
  c_norm_ = storage("c_layernorm.weight", inner_norms_);
  dt_proj_ = storage("dt_proj.weight");
  dt_bias_ = storage("dt_proj.bias");
  a_log_ = storage("A_log");
  d_ = storage("D");
  out_proj_ = storage("out_proj.weight");
  out_proj_bias_ = storage("out_proj.bias", proj_bias_);
}

Tensor MambaSublayer::NormForward(const MambaSaved& saved, Arena* arena, const Weights& weights,
                                  const Context& ctx) const {
  const Tensor projected = saved.projected;
  if (!inner_norms_) return projected;
  const int64_t m = projected.dim(0);
  Tensor normed = arena->Alloc(projected.dtype(), {m, projected.dim(1)});
  int64_t begin = 0;
  int64_t row = 0;
  for (const int norm : {dt_norm_, b_norm_, c_norm_}) {
    const Tensor w = weights.Get(norm);
    RmsNormForward(normed.Slice(1, begin, w.dim(0)), saved.rstd.Slice(0, row, 1).View({m}),
                   projected.Slice(1, begin, w.dim(0)), w, norm_eps_, ctx);
    weights.Release(norm);
    begin += w.dim(0);
    ++row;
  }
  return normed;
}

void MambaSublayer::NormBackward(Tensor d_projected, Tensor d_normed, const MambaSaved& saved,
                                 const Weights& weights, const Context& ctx) const {
  const int64_t m = d_normed.dim(0);
  int64_t begin = 0;
  int64_t row = 0;
  for (const int norm : {dt_norm_, b_norm_, c_norm_}) {
    const Tensor w = weights.Get(norm);
    RmsNormBackward(d_projected.Slice(1, begin, w.dim(0)), weights.Grad(norm),
                    d_normed.Slice(1, begin, w.dim(0)), saved.projected.Slice(1, begin, w.dim(0)),
                    saved.rstd.Slice(0, row, 1).View({m}), w, /*accumulate=*/false, ctx);
    weights.Release(norm);
    weights.GradReady(norm);
    begin += w.dim(0);
    ++row;
  }
}

SelectiveScanInputs MambaSublayer::ScanInputs(const MambaSaved& saved, Tensor normed,
                                              const Weights& weights,
                                              const PassContext& pass) const {
  const PassShape& shape = pass.shape;
  SelectiveScanInputs in;
  in.x = Columns(saved.u, shape, 0, d_inner_);
  in.dt_raw = Columns(saved.dt_raw, shape, 0, d_inner_);
  in.b = Columns(normed, shape, dt_rank_, d_state_);
  in.c = Columns(normed, shape, dt_rank_ + d_state_, d_state_);
  in.z = Columns(saved.xz, shape, d_inner_, d_inner_);
  in.a_log = weights.Get(a_log_);
  in.d = weights.Get(d_);
  in.dt_bias = weights.Get(dt_bias_);
  in.doc_start = pass.doc_start;
  return in;
}

std::unique_ptr<Saved> MambaSublayer::NewSaved() const { return std::make_unique<MambaSaved>(); }

void MambaSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                            const PassContext& pass) const {
  Run(y, x, weights, keep, saved, nullptr, pass);
}

void MambaSublayer::Run(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                        MambaState* state, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const PassShape& shape = pass.shape;
  const int64_t m = x.dim(0);
  const int64_t projected = dt_rank_ + 2 * d_state_;
  const DType wide = WideDType(x.dtype());
  const auto optional = [&](int storage) { return storage < 0 ? Tensor() : weights.Get(storage); };

  MambaSaved unsaved;
  MambaSaved& s = saved != nullptr ? *static_cast<MambaSaved*>(saved) : unsaved;
  s.xz = keep->Alloc(x.dtype(), {m, 2 * d_inner_});
  s.u = keep->Alloc(x.dtype(), {m, d_inner_});
  s.projected = keep->Alloc(x.dtype(), {m, projected});
  s.rstd = keep->Alloc(wide, {3, m});
  s.dt_raw = keep->Alloc(x.dtype(), {m, d_inner_});
  if (saved != nullptr) {
    s.chunk_states =
        keep->Alloc(wide, {shape.batch, ScanChunks(shape.seq_len), d_inner_, d_state_});
  }

  LinearForward(s.xz, x, weights.Get(in_proj_), optional(in_proj_bias_), ctx);
  CausalConv1dSiluForward(
      Columns(s.u, shape, 0, d_inner_), state != nullptr ? state->conv_next : Tensor(),
      Columns(s.xz, shape, 0, d_inner_), weights.Get(conv_), optional(conv_bias_weight_),
      state != nullptr ? state->conv : Tensor(), pass.doc_start, ctx);
  LinearForward(s.projected, s.u, weights.Get(x_proj_), Tensor(), ctx);
  s.normed = pass.keep_norms ? NormForward(s, keep, weights, ctx) : Tensor();
  ArenaScope scope(ctx.scratch);
  const Tensor normed = s.normed.defined() ? s.normed : NormForward(s, ctx.scratch, weights, ctx);
  LinearForward(s.dt_raw, normed.Slice(1, 0, dt_rank_), weights.Get(dt_proj_), Tensor(), ctx);

  Tensor scanned = ctx.scratch->Alloc(x.dtype(), {m, d_inner_});
  SelectiveScanInputs in = ScanInputs(s, normed, weights, pass);
  if (state != nullptr) in.initial_state = state->scan;
  SelectiveScanForward(Columns(scanned, shape, 0, d_inner_),
                       state != nullptr ? state->scan_next : Tensor(), s.chunk_states, in, ctx);
  if (y.defined()) {
    LinearForward(y, scanned, weights.Get(out_proj_), optional(out_proj_bias_), ctx);
  }
  for (const int storage : {in_proj_, in_proj_bias_, conv_, conv_bias_weight_, x_proj_, dt_proj_,
                            dt_bias_, a_log_, d_, out_proj_, out_proj_bias_}) {
    if (storage >= 0) weights.Release(storage);
  }
}

void MambaSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                             const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  ArenaScope scope(ctx.scratch);
  Arena* const scratch = ctx.scratch;
  const PassShape& shape = pass.shape;
  const int64_t m = x.dim(0);
  const MambaSaved& s = *static_cast<MambaSaved*>(saved);
  const Tensor normed = s.normed.defined() ? s.normed : NormForward(s, scratch, weights, ctx);
  const auto optional_grad = [&](int storage) {
    return storage < 0 ? Tensor() : weights.Grad(storage);
  };

  // out_proj and the scan with its gate. dz goes straight to its half of d_xz, dB and dC to their
  // columns of d_normed.
  Tensor d_scanned = scratch->Alloc(x.dtype(), {m, d_inner_});
  LinearBackwardInput(d_scanned, dy, weights.Get(out_proj_), /*accumulate=*/false, ctx);
  Tensor scanned = scratch->Alloc(x.dtype(), {m, d_inner_});
  Tensor d_xz = scratch->Alloc(x.dtype(), {m, 2 * d_inner_});
  Tensor d_u = scratch->Alloc(x.dtype(), {m, d_inner_});
  Tensor d_dt_raw = scratch->Alloc(x.dtype(), {m, d_inner_});
  Tensor d_normed = scratch->Alloc(x.dtype(), {m, normed.dim(1)});
  SelectiveScanGradients grad;
  grad.dx = Columns(d_u, shape, 0, d_inner_);
  grad.d_dt_raw = Columns(d_dt_raw, shape, 0, d_inner_);
  grad.db = Columns(d_normed, shape, dt_rank_, d_state_);
  grad.dc = Columns(d_normed, shape, dt_rank_ + d_state_, d_state_);
  grad.dz = Columns(d_xz, shape, d_inner_, d_inner_);
  grad.d_a_log = weights.Grad(a_log_);
  grad.dd = weights.Grad(d_);
  grad.d_dt_bias = weights.Grad(dt_bias_);
  SelectiveScanBackward(grad, Columns(scanned, shape, 0, d_inner_),
                        Columns(d_scanned, shape, 0, d_inner_), Tensor(), s.chunk_states,
                        ScanInputs(s, normed, weights, pass), ctx);
  LinearBackwardWeight(weights.Grad(out_proj_), dy, scanned, ctx);
  if (proj_bias_) LinearBackwardBias(weights.Grad(out_proj_bias_), dy, ctx);

  // dt_proj, the norms, x_proj.
  const Tensor d_dt = d_normed.Slice(1, 0, dt_rank_);
  LinearBackwardInput(d_dt, d_dt_raw, weights.Get(dt_proj_), /*accumulate=*/false, ctx);
  LinearBackwardWeight(weights.Grad(dt_proj_), d_dt_raw, normed.Slice(1, 0, dt_rank_), ctx);
  Tensor d_projected = d_normed;
  if (inner_norms_) {
    d_projected = scratch->Alloc(x.dtype(), {m, normed.dim(1)});
    NormBackward(d_projected, d_normed, s, weights, ctx);
  }
  LinearBackwardInput(d_u, d_projected, weights.Get(x_proj_), /*accumulate=*/true, ctx);
  LinearBackwardWeight(weights.Grad(x_proj_), d_projected, s.u, ctx);

  // conv and in_proj.
  CausalConv1dSiluBackward(
      Columns(d_xz, shape, 0, d_inner_), weights.Grad(conv_), optional_grad(conv_bias_weight_),
      Tensor(), Columns(d_u, shape, 0, d_inner_), Tensor(), Columns(s.xz, shape, 0, d_inner_),
      weights.Get(conv_), conv_bias_ ? weights.Get(conv_bias_weight_) : Tensor(), Tensor(),
      pass.doc_start, ctx);
  LinearBackwardInput(dx, d_xz, weights.Get(in_proj_), /*accumulate=*/false, ctx);
  LinearBackwardWeight(weights.Grad(in_proj_), d_xz, x, ctx);
  if (proj_bias_) LinearBackwardBias(weights.Grad(in_proj_bias_), d_xz, ctx);

  for (const int storage : {out_proj_, out_proj_bias_, d_, a_log_, dt_bias_, dt_proj_, x_proj_,
                            conv_bias_weight_, conv_, in_proj_bias_, in_proj_}) {
    if (storage < 0) continue;
    weights.Release(storage);
    weights.GradReady(storage);
  }
}

std::unique_ptr<MixerState> MambaSublayer::NewState(int64_t batch, int64_t /*max_tokens*/,
                                                    DType dtype, Arena* arena,
                                                    const Context& ctx) const {
  auto state = std::make_unique<MambaState>();
  for (Tensor* conv : {&state->conv, &state->conv_next}) {
    *conv = arena->Alloc(dtype, {batch, d_conv_ - 1, d_inner_});
  }
  for (Tensor* scan : {&state->scan, &state->scan_next}) {
    *scan = arena->Alloc(WideDType(dtype), {batch, d_inner_, d_state_});
  }
  Fill(state->conv, 0, ctx);
  Fill(state->scan, 0, ctx);
  return state;
}

void MambaSublayer::Decode(Tensor y, Tensor x, const Weights& weights, MixerState* state,
                           const PassContext& pass) const {
  ArenaScope scope(pass.ctx->scratch);
  MambaState& own = *static_cast<MambaState*>(state);
  Run(y, x, weights, pass.ctx->scratch, nullptr, &own, pass);
  std::swap(own.conv, own.conv_next);
  std::swap(own.scan, own.scan_next);
}

}  // namespace krait
