#include "model/attention_sublayer.h"

#include <string>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"

namespace krait {
namespace {

struct AttentionSaved : Saved {
  Tensor qkv;  // [M, (H+2G)*P], q and k rotated
  Tensor y;    // [B,T,H,P]
  Tensor lse;  // [B,H,T]
};

struct AttentionState : MixerState {
  Tensor k, v;           // [B, max_tokens, G, P]
  int64_t position = 0;  // tokens held
};

}  // namespace

AttentionSublayer::AttentionSublayer(const ModelSpec& spec, const ParamTable& table, int layer)
    : heads_(spec.attention.heads),
      kv_heads_(spec.attention.kv_heads),
      head_dim_(spec.attention.head_dim),
      rope_theta_(spec.attention.rope_theta) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
  qkv_ = table.FindStorage(prefix + "qkv");
  o_proj_ = table.FindStorage(prefix + "o_proj.weight");
}

AttentionSublayer::Heads AttentionSublayer::Split(Tensor qkv, const PassShape& shape) const {
  const Tensor all = qkv.View({shape.batch, shape.seq_len, heads_ + 2 * kv_heads_, head_dim_});
  return {all.Slice(2, 0, heads_), all.Slice(2, heads_, kv_heads_),
          all.Slice(2, heads_ + kv_heads_, kv_heads_)};
}

void AttentionSublayer::Rotate(const Heads& heads, int64_t first_position, bool inverse,
                               const PassContext& pass) const {
  if (rope_theta_ == 0) return;
  Rope(heads.q, pass.doc_start, first_position, rope_theta_, inverse, *pass.ctx);
  Rope(heads.k, pass.doc_start, first_position, rope_theta_, inverse, *pass.ctx);
}

std::unique_ptr<Saved> AttentionSublayer::NewSaved() const {
  return std::make_unique<AttentionSaved>();
}

void AttentionSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep,
                                Saved* saved, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t m = x.dim(0);
  const PassShape& shape = pass.shape;
  const Tensor w_qkv = weights.Get(qkv_);

  AttentionSaved unsaved;
  AttentionSaved& s = saved != nullptr ? *static_cast<AttentionSaved*>(saved) : unsaved;
  s.qkv = keep->Alloc(x.dtype(), {m, w_qkv.dim(0)});
  s.y = keep->Alloc(x.dtype(), {shape.batch, shape.seq_len, heads_, head_dim_});
  s.lse = keep->Alloc(WideDType(x.dtype()), {shape.batch, heads_, shape.seq_len});

  LinearForward(s.qkv, x, w_qkv, Tensor(), ctx);
  const Heads heads = Split(s.qkv, shape);
  Rotate(heads, /*first_position=*/0, /*inverse=*/false, pass);
  AttentionForward(s.y, s.lse, heads.q, heads.k, heads.v, pass.doc_start, ctx);
  weights.Release(qkv_);
  if (y.defined()) {
    LinearForward(y, s.y.View({m, heads_ * head_dim_}), weights.Get(o_proj_), Tensor(), ctx);
    weights.Release(o_proj_);
  }
}

void AttentionSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights,
                                 Saved* saved, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  ArenaScope scope(ctx.scratch);
  const int64_t m = x.dim(0);
  const PassShape& shape = pass.shape;
  const AttentionSaved& s = *static_cast<AttentionSaved*>(saved);
  const Tensor w_qkv = weights.Get(qkv_);

  Tensor d_y = ctx.scratch->Alloc(x.dtype(), {shape.batch, shape.seq_len, heads_, head_dim_});
  const Tensor d_y_rows = d_y.View({m, heads_ * head_dim_});
  LinearBackwardInput(d_y_rows, dy, weights.Get(o_proj_), /*accumulate=*/false, ctx);
  weights.Release(o_proj_);
  LinearBackwardWeight(weights.Grad(o_proj_), dy, s.y.View({m, heads_ * head_dim_}), ctx);
  weights.GradReady(o_proj_);

  Tensor d_qkv = ctx.scratch->Alloc(x.dtype(), {m, w_qkv.dim(0)});
  const Heads heads = Split(s.qkv, shape);
  const Heads d_heads = Split(d_qkv, shape);
  AttentionBackward(d_heads.q, d_heads.k, d_heads.v, d_y, s.y, s.lse, heads.q, heads.k, heads.v,
                    pass.doc_start, ctx);
  Rotate(d_heads, /*first_position=*/0, /*inverse=*/true, pass);
  LinearBackwardInput(dx, d_qkv, w_qkv, /*accumulate=*/false, ctx);
  weights.Release(qkv_);
  LinearBackwardWeight(weights.Grad(qkv_), d_qkv, x, ctx);
  weights.GradReady(qkv_);
}

std::unique_ptr<MixerState> AttentionSublayer::NewState(int64_t batch, int64_t max_tokens,
                                                        DType dtype, Arena* arena,
                                                        const Context& /*ctx*/) const {
  auto state = std::make_unique<AttentionState>();
  state->k = arena->Alloc(dtype, {batch, max_tokens, kv_heads_, head_dim_});
  state->v = arena->Alloc(dtype, {batch, max_tokens, kv_heads_, head_dim_});
  return state;
}

void AttentionSublayer::Decode(Tensor y, Tensor x, const Weights& weights, MixerState* state,
                               const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  ArenaScope scope(ctx.scratch);
  const int64_t m = x.dim(0);
  const int64_t batch = pass.shape.batch, t = pass.shape.seq_len;
  AttentionState& cache = *static_cast<AttentionState*>(state);
  KRAIT_CHECK(cache.k.dim(0) == batch && cache.position + t <= cache.k.dim(1));
  const Tensor w_qkv = weights.Get(qkv_);

  Tensor qkv = ctx.scratch->Alloc(x.dtype(), {m, w_qkv.dim(0)});
  LinearForward(qkv, x, w_qkv, Tensor(), ctx);
  weights.Release(qkv_);
  const Heads heads = Split(qkv, pass.shape);
  Rotate(heads, cache.position, /*inverse=*/false, pass);
  const int64_t kv = kv_heads_ * head_dim_;
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor rows = qkv.Slice(0, b * t, t);
    const auto place = [&](Tensor all) {
      return all.Slice(0, b, 1).Slice(1, cache.position, t).View({t, kv});
    };
    Copy(place(cache.k), rows.Slice(1, heads_ * head_dim_, kv), ctx);
    Copy(place(cache.v), rows.Slice(1, heads_ * head_dim_ + kv, kv), ctx);
  }
  cache.position += t;

  Tensor out = ctx.scratch->Alloc(x.dtype(), {batch, t, heads_, head_dim_});
  Tensor lse = ctx.scratch->Alloc(WideDType(x.dtype()), {batch, heads_, t});
  AttentionForward(out, lse, heads.q, cache.k.Slice(1, 0, cache.position),
                   cache.v.Slice(1, 0, cache.position), Tensor(), ctx);
  LinearForward(y, out.View({m, heads_ * head_dim_}), weights.Get(o_proj_), Tensor(), ctx);
  weights.Release(o_proj_);
}

}  // namespace krait
