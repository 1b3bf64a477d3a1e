#include "model/mamba_sublayer.h"

#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/causal_conv1d.h"
#include "kernels/gemm.h"
#include "model/names.h"
#include "model/sequence_parallel.h"

namespace krait {

// The scan's output is not kept: its backward yields it again.
struct MambaSublayer::MambaSaved : Saved {
  Tensor xz;           // [M,2I]
  Tensor u;            // [M,I] output of conv and SiLU
  Tensor projected;    // [own rows,R+2N] dt | B | C before their norms, Wide
  Tensor rstd;         // [3,own rows] of the norms of dt, B, C
  Tensor normed;       // [M,R+2N]; undefined: recomputed from `projected`
  Tensor dt_raw;       // [M,I] dt_proj's output without bias
  Tensor kept_states;  // [B,ScanStates,I,N]
  // The state that a piece begins with (KeepState); undefined: its sequences begin here.
  Tensor conv, scan;
};

// Two buffers where an op reads one and writes the other.
struct MambaSublayer::MambaState : MixerState {
  Tensor conv, conv_next;  // [B,K-1,I]
  Tensor scan, scan_next;  // [B,I,N]
  // The gradients of what the next piece reads; with gradients only.
  Tensor d_conv, d_conv_next, d_scan;
  void Reset(const Context& ctx) override {
    for (const Tensor& t : {conv, scan, d_conv, d_scan}) {
      if (t.defined()) Fill(t, 0, ctx);
    }
  }
};

namespace {

// A column range of rows [M,C] as [B,T,count].
Tensor Columns(Tensor rows, const PassShape& shape, int64_t begin, int64_t count) {
  return rows.View({shape.batch, shape.seq_len, rows.dim(1)}).Slice(2, begin, count);
}

// Of storages that a spec may lack.
Tensor GetIf(const Weights& weights, int storage) {
  return storage < 0 ? Tensor() : weights.Get(storage);
}
void ReleaseIf(const Weights& weights, int storage) {
  if (storage >= 0) weights.Release(storage);
}
Tensor GradIf(const Weights& weights, int storage) {
  return storage < 0 ? Tensor() : weights.Grad(storage);
}
void ReadyIf(const Weights& weights, int storage) {
  if (storage >= 0) weights.GradReady(storage);
}

}  // namespace

MambaSublayer::MambaSublayer(const ModelSpec& spec, const LocalSizes& sizes,
                             const ParamTable& table, int layer)
    : d_inner_(sizes.d_inner),
      d_state_(spec.mamba.d_state),
      d_conv_(spec.mamba.d_conv),
      dt_rank_(spec.mamba.dt_rank),
      inner_norms_(spec.mamba.inner_norms),
      norm_eps_(spec.norm_eps) {
  const auto storage = [&](const char* name, bool present = true) {
    const std::string prefix = SublayerPrefix(SublayerKind::kMamba, layer);
    return present ? table.FindStorage(prefix + name) : -1;
  };
  in_proj_ = storage("in_proj.weight");
  in_proj_bias_ = storage("in_proj.bias", spec.mamba.proj_bias);
  conv_ = storage("conv1d.weight");
  conv_bias_ = storage("conv1d.bias", spec.mamba.conv_bias);
  x_proj_ = storage("x_proj.weight");
  dt_norm_ = storage("dt_layernorm.weight", inner_norms_);
  b_norm_ = storage("b_layernorm.weight", inner_norms_);
  c_norm_ = storage("c_layernorm.weight", inner_norms_);
  dt_proj_ = storage("dt_proj.weight");
  dt_bias_ = storage("dt_proj.bias");
  a_log_ = storage("A_log");
  d_ = storage("D");
  out_proj_ = storage("out_proj.weight");
  out_proj_bias_ = storage("out_proj.bias", spec.mamba.proj_bias);
}

InnerNormWeights MambaSublayer::NormWeights(const Weights& weights) const {
  return {GetIf(weights, dt_norm_), GetIf(weights, b_norm_), GetIf(weights, c_norm_)};
}

Tensor MambaSublayer::NormMemory(const MambaSaved& saved, DType compute, Arena* arena,
                                 const PassShape& shape) const {
  if (shape.ranks == 1 && !Norms(compute)) return saved.projected;
  return arena->Alloc(compute, {shape.tokens(), saved.projected.dim(1)});
}

void MambaSublayer::NormForward(Tensor normed, const MambaSaved& saved, const Weights& weights,
                                const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  Tensor own = saved.projected;
  if (Norms(normed.dtype())) {
    own = pass.shape.ranks == 1 ? normed
                                : ctx.scratch->Alloc(normed.dtype(), {own.dim(0), own.dim(1)});
    InnerNormsForward(own, saved.rstd, saved.projected, NormWeights(weights), norm_eps_, ctx);
    for (const int norm : {dt_norm_, b_norm_, c_norm_}) ReleaseIf(weights, norm);
  }
  GatherRows("mamba: dt, B, C", normed, own, pass);
}

Tensor MambaSublayer::NormBackward(Tensor d_normed, const MambaSaved& saved, DType compute,
                                   const Weights& weights, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t columns = d_normed.dim(1);
  // Each rank has the parts of its channels.
  Tensor own = d_normed;
  if (pass.shape.ranks > 1) {
    own = ctx.scratch->Alloc(d_normed.dtype(), {saved.projected.dim(0), columns});
    SumRows("mamba: gradient of dt, B, C", own, d_normed, pass);
  }
  if (Norms(compute)) {
    const Tensor d_projected = ctx.scratch->Alloc(compute, {own.dim(0), columns});
    const InnerNormWeights gradients = {GradIf(weights, dt_norm_), GradIf(weights, b_norm_),
                                        GradIf(weights, c_norm_)};
    InnerNormsBackward(d_projected, gradients, own, saved.projected, saved.rstd,
                       NormWeights(weights), ctx);
    own = d_projected;
    for (const int norm : {dt_norm_, b_norm_, c_norm_}) {
      ReleaseIf(weights, norm);
      ReadyIf(weights, norm);
    }
  }
  return GatherRows("mamba: gradient of x_proj", own, pass);
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
  in.initial_state = saved.scan;
  in.documents = pass.documents;
  return in;
}

void MambaSublayer::ReleaseScan(const Weights& weights) const {
  for (const int storage : {a_log_, d_, dt_bias_}) weights.Release(storage);
}

std::unique_ptr<Saved> MambaSublayer::NewSaved() const { return std::make_unique<MambaSaved>(); }

std::unique_ptr<MixerState> MambaSublayer::NewState(int64_t batch, int64_t /*max_tokens*/,
                                                    DType compute, bool with_grad, Arena* arena,
                                                    const Context& ctx) const {
  auto state = std::make_unique<MambaState>();
  const auto conv = [&] { return arena->Alloc(compute, {batch, d_conv_ - 1, d_inner_}); };
  const auto scan = [&] { return arena->Alloc(Wide(compute), {batch, d_inner_, d_state_}); };
  state->conv = conv(), state->conv_next = conv();
  state->scan = scan(), state->scan_next = scan();
  if (with_grad) {
    state->d_conv = conv(), state->d_conv_next = conv();
    state->d_scan = scan();
  }
  state->Reset(ctx);
  return state;
}

void MambaSublayer::KeepState(const MixerState& state, Saved* saved, Arena* keep,
                              const Context& ctx) const {
  const MambaState& own = static_cast<const MambaState&>(state);
  MambaSaved& s = *static_cast<MambaSaved*>(saved);
  const int64_t batch = own.conv.dim(0);
  s.conv = keep->Alloc(own.conv.dtype(), {batch, d_conv_ - 1, d_inner_});
  s.scan = keep->Alloc(own.scan.dtype(), {batch, d_inner_, d_state_});
  Copy(s.conv, own.conv, ctx);
  Copy(s.scan, own.scan, ctx);
}

void MambaSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                            MixerState* state, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const PassShape& shape = pass.shape;
  const int64_t m = shape.tokens();
  const int64_t projected = dt_rank_ + 2 * d_state_;
  const DType compute = x.dtype(), wide = Wide(compute);

  MambaSaved unsaved;
  MambaSaved& s = saved != nullptr ? *static_cast<MambaSaved*>(saved) : unsaved;
  MambaState* const own = pass.recomputing ? nullptr : static_cast<MambaState*>(state);
  if (state == nullptr) s.conv = s.scan = Tensor();
  if (own != nullptr && saved == nullptr) s.conv = own->conv, s.scan = own->scan;
  s.xz = keep->Alloc(compute, {m, 2 * d_inner_});
  s.u = keep->Alloc(compute, {m, d_inner_});
  s.projected = keep->Alloc(wide, {shape.own_tokens(), projected});
  s.rstd = keep->Alloc(wide, {3, shape.own_tokens()});
  s.normed = pass.keep_norms ? NormMemory(s, compute, keep, shape) : Tensor();
  s.dt_raw = keep->Alloc(compute, {m, d_inner_});
  if (saved != nullptr) {
    s.kept_states =
        keep->Alloc(wide, {shape.batch, ScanStates(ctx.device, shape.seq_len), d_inner_, d_state_});
  }

  const ArenaScope scope(ctx.scratch);
  const Tensor rows = GatherRows("mamba: input", x, pass);
  LinearForward(s.xz, rows, weights.Get(in_proj_), GetIf(weights, in_proj_bias_), ctx);
  weights.Release(in_proj_);
  ReleaseIf(weights, in_proj_bias_);
  CausalConv1dSiluForward(Columns(s.u, shape, 0, d_inner_),
                          own != nullptr ? own->conv_next : Tensor(),
                          Columns(s.xz, shape, 0, d_inner_), weights.Get(conv_),
                          GetIf(weights, conv_bias_), s.conv, pass.documents, ctx);
  weights.Release(conv_);
  ReleaseIf(weights, conv_bias_);
  {
    const ArenaScope projected_scope(ctx.scratch);
    const Tensor partial = PartialRows(s.projected, pass);
    LinearForward(partial, s.u, weights.Get(x_proj_), Tensor(), ctx);
    weights.Release(x_proj_);
    SumRows("mamba: x_proj", s.projected, partial, pass);
  }
  const Tensor normed = s.normed.defined() ? s.normed : NormMemory(s, compute, ctx.scratch, shape);
  NormForward(normed, s, weights, pass);
  LinearForward(s.dt_raw, normed.Slice(1, 0, dt_rank_), weights.Get(dt_proj_), Tensor(), ctx);
  if (pass.dt_raw != nullptr) *pass.dt_raw = s.dt_raw;
  weights.Release(dt_proj_);

  const Tensor scanned = ctx.scratch->Alloc(compute, {m, d_inner_});
  SelectiveScanForward(Columns(scanned, shape, 0, d_inner_),
                       own != nullptr ? own->scan_next : Tensor(), s.kept_states,
                       ScanInputs(s, normed, weights, pass), ctx);
  ReleaseScan(weights);
  if (own != nullptr) {
    std::swap(own->conv, own->conv_next);
    std::swap(own->scan, own->scan_next);
  }
  if (!y.defined()) return;
  const Tensor partial = PartialRows(y, pass);
  LinearForward(partial, scanned, weights.Get(out_proj_), Tensor(), ctx);
  weights.Release(out_proj_);
  SumRows("mamba: output", y, partial, pass);
  if (out_proj_bias_ >= 0) {
    AddBias(y, weights.Get(out_proj_bias_), ctx);
    weights.Release(out_proj_bias_);
  }
}

void MambaSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                             MixerState* state, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  Arena* const scratch = ctx.scratch;
  const PassShape& shape = pass.shape;
  const int64_t m = shape.tokens();
  const DType compute = x.dtype();
  const MambaSaved& s = *static_cast<MambaSaved*>(saved);
  MambaState* const own = static_cast<MambaState*>(state);
  Tensor normed = s.normed;
  if (!normed.defined()) {
    normed = NormMemory(s, compute, scratch, shape);
    NormForward(normed, s, weights, pass);
  }
  const Tensor dy_rows = GatherRows("mamba: gradient of the output", dy, pass);

  // out_proj and the scan with its gate. dz goes straight to its half of d_xz, dB and dC to their
  // columns of d_normed.
  const Tensor d_scanned = scratch->Alloc(compute, {m, d_inner_});
  LinearBackwardInput(d_scanned, dy_rows, weights.Get(out_proj_), /*accumulate=*/false, ctx);
  weights.Release(out_proj_);
  const Tensor scanned = scratch->Alloc(compute, {m, d_inner_});
  const Tensor d_xz = scratch->Alloc(compute, {m, 2 * d_inner_});
  const Tensor d_u = scratch->Alloc(compute, {m, d_inner_});
  const Tensor d_dt_raw = scratch->Alloc(compute, {m, d_inner_});
  const Tensor d_normed = scratch->Alloc(Wide(compute), {m, normed.dim(1)});
  SelectiveScanGradients grad;
  grad.dx = Columns(d_u, shape, 0, d_inner_);
  grad.d_dt_raw = Columns(d_dt_raw, shape, 0, d_inner_);
  grad.db = Columns(d_normed, shape, dt_rank_, d_state_);
  grad.dc = Columns(d_normed, shape, dt_rank_ + d_state_, d_state_);
  grad.dz = Columns(d_xz, shape, d_inner_, d_inner_);
  grad.d_a_log = weights.Grad(a_log_);
  grad.dd = weights.Grad(d_);
  grad.d_dt_bias = weights.Grad(dt_bias_);
  if (own != nullptr) grad.d_initial_state = own->d_scan;  // over the gradient of the final state
  SelectiveScanBackward(grad, Columns(scanned, shape, 0, d_inner_),
                        Columns(d_scanned, shape, 0, d_inner_),
                        own != nullptr ? own->d_scan : Tensor(), s.kept_states,
                        ScanInputs(s, normed, weights, pass), ctx);
  ReleaseScan(weights);
  for (const int storage : {d_, a_log_, dt_bias_}) weights.GradReady(storage);
  Wgrad(weights, out_proj_, dy_rows, scanned, ctx);
  weights.GradReady(out_proj_);
  if (out_proj_bias_ >= 0) {
    LinearBackwardBias(weights.Grad(out_proj_bias_), dy, ctx);
    weights.GradReady(out_proj_bias_);
  }

  // dt_proj, the norms, x_proj.
  LinearBackwardInput(d_normed.Slice(1, 0, dt_rank_), d_dt_raw, weights.Get(dt_proj_),
                      /*accumulate=*/false, ctx);
  weights.Release(dt_proj_);
  Wgrad(weights, dt_proj_, d_dt_raw, normed.Slice(1, 0, dt_rank_), ctx);
  weights.GradReady(dt_proj_);
  const Tensor d_projected = NormBackward(d_normed, s, compute, weights, pass);
  LinearBackwardInput(d_u, d_projected, weights.Get(x_proj_), /*accumulate=*/true, ctx);
  weights.Release(x_proj_);
  Wgrad(weights, x_proj_, d_projected, s.u, ctx);
  weights.GradReady(x_proj_);

  // conv and in_proj.
  const Tensor rows = GatherRowsBeside("mamba: input again", x, pass);
  CausalConv1dSiluBackward(
      Columns(d_xz, shape, 0, d_inner_), weights.Grad(conv_), GradIf(weights, conv_bias_),
      own != nullptr ? own->d_conv_next : Tensor(), Columns(d_u, shape, 0, d_inner_),
      own != nullptr ? own->d_conv : Tensor(), Columns(s.xz, shape, 0, d_inner_),
      weights.Get(conv_), GetIf(weights, conv_bias_), s.conv, pass.documents, ctx);
  if (own != nullptr) std::swap(own->d_conv, own->d_conv_next);
  weights.Release(conv_);
  ReleaseIf(weights, conv_bias_);
  weights.GradReady(conv_);
  ReadyIf(weights, conv_bias_);
  const Tensor partial = PartialRows(dx, pass);
  LinearBackwardInput(partial, d_xz, weights.Get(in_proj_), /*accumulate=*/false, ctx);
  weights.Release(in_proj_);
  JoinTraffic(pass);
  SumRowsBeside("mamba: gradient of the input", dx, partial, pass);
  Wgrad(weights, in_proj_, d_xz, rows, ctx);
  weights.GradReady(in_proj_);
  if (in_proj_bias_ >= 0) {
    LinearBackwardBias(weights.Grad(in_proj_bias_), d_xz, ctx);
    weights.GradReady(in_proj_bias_);
  }
  JoinTraffic(pass);
}

}  // namespace krait
