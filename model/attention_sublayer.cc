#include "model/attention_sublayer.h"

#include <string>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "model/names.h"
#include "model/sequence_parallel.h"

namespace krait {
namespace {

struct AttentionSaved : Saved {
  Tensor qkv;  // [M, (H+2G)*P], q and k rotated
  Tensor y;    // [B,T,H,P]
  Tensor lse;  // [B,H,T]
};

// The keys and values of all positions so far; a piece's own follow those of the pieces before it.
struct AttentionState : MixerState {
  Tensor k, v;    // [B, max_tokens, G, P]
  Tensor dk, dv;  // the same shape, Wide: sums over the queries of the pieces gone through
  void Reset(const Context& ctx) override {
    for (const Tensor& sum : {dk, dv}) {
      if (sum.defined()) Fill(sum, 0, ctx);
    }
  }
};

}  // namespace

AttentionSublayer::AttentionSublayer(const ModelSpec& spec, const LocalSizes& sizes,
                                     const ParamTable& table, int layer)
    : heads_(sizes.heads),
      kv_heads_(sizes.kv_heads),
      head_dim_(spec.attention.head_dim),
      rope_theta_(spec.attention.rope_theta) {
  const std::string prefix = SublayerPrefix(SublayerKind::kAttention, layer);
  const int64_t q = heads_ * head_dim_;
  if (table.HasStorage(prefix + "qkv")) {
    parts_ = {{table.FindStorage(prefix + "qkv"), 0, width()}};
  } else {
    parts_ = {{table.FindStorage(prefix + "q_proj.weight"), 0, q},
              {table.FindStorage(prefix + "kv"), q, width() - q}};
  }
  o_proj_ = table.FindStorage(prefix + "o_proj.weight");
}

AttentionSublayer::Heads AttentionSublayer::Split(Tensor qkv, const PassShape& shape) const {
  const Tensor all = qkv.View({shape.batch, shape.seq_len, heads_ + 2 * kv_heads_, head_dim_});
  return {all.Slice(2, 0, heads_), all.Slice(2, heads_, kv_heads_),
          all.Slice(2, heads_ + kv_heads_, kv_heads_)};
}

void AttentionSublayer::Rotate(const Heads& heads, bool inverse, const PassContext& pass) const {
  if (rope_theta_ == 0) return;
  Rope(heads.q, pass.documents, rope_theta_, inverse, *pass.ctx);
  Rope(heads.k, pass.documents, rope_theta_, inverse, *pass.ctx);
}

std::unique_ptr<Saved> AttentionSublayer::NewSaved() const {
  return std::make_unique<AttentionSaved>();
}

std::unique_ptr<MixerState> AttentionSublayer::NewState(int64_t batch, int64_t max_tokens,
                                                        DType compute, bool with_grad, Arena* arena,
                                                        const Context& ctx) const {
  auto state = std::make_unique<AttentionState>();
  const auto cache = [&](DType dtype) {
    return arena->Alloc(dtype, {batch, max_tokens, kv_heads_, head_dim_});
  };
  state->k = cache(compute);
  state->v = cache(compute);
  if (with_grad) {
    state->dk = cache(Wide(compute));
    state->dv = cache(Wide(compute));
  }
  state->Reset(ctx);
  return state;
}

void AttentionSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep,
                                Saved* saved, MixerState* state, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const PassShape& shape = pass.shape;
  const int64_t m = shape.tokens();

  AttentionSaved unsaved;
  AttentionSaved& s = saved != nullptr ? *static_cast<AttentionSaved*>(saved) : unsaved;
  s.qkv = keep->Alloc(x.dtype(), {m, width()});
  const bool have_output = pass.recomputing && pass.keep_attention != nullptr;
  if (!have_output) {
    Arena* const output = pass.keep_attention != nullptr ? pass.keep_attention : keep;
    s.y = output->Alloc(x.dtype(), {shape.batch, shape.seq_len, heads_, head_dim_});
    s.lse = output->Alloc(Wide(x.dtype()), {shape.batch, heads_, shape.seq_len});
  }

  const ArenaScope scope(ctx.scratch);
  const Tensor rows = GatherRows("attention: input", x, pass);
  for (const Part& part : parts_) {
    LinearForward(s.qkv.Slice(1, part.begin, part.columns), rows, weights.Get(part.storage),
                  Tensor(), ctx);
    weights.Release(part.storage);
  }
  Heads heads = Split(s.qkv, shape);
  Rotate(heads, /*inverse=*/false, pass);
  if (state != nullptr) {
    AttentionState& cache = *static_cast<AttentionState*>(state);
    const int64_t first = pass.documents.first_position, end = first + shape.seq_len;
    KRAIT_CHECK(cache.k.dim(0) == shape.batch && end <= cache.k.dim(1));
    Copy(cache.k.Slice(1, first, shape.seq_len), heads.k, ctx);
    Copy(cache.v.Slice(1, first, shape.seq_len), heads.v, ctx);
    heads.k = cache.k.Slice(1, 0, end);
    heads.v = cache.v.Slice(1, 0, end);
  }
  if (!have_output) {
    AttentionForward(s.y, s.lse, heads.q, heads.k, heads.v, pass.documents, ctx);
  }
  if (!y.defined()) return;
  const Tensor partial = PartialRows(y, pass);
  LinearForward(partial, s.y.View({m, heads_ * head_dim_}), weights.Get(o_proj_), Tensor(), ctx);
  weights.Release(o_proj_);
  SumRows("attention: output", y, partial, pass);
}

void AttentionSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights,
                                 Saved* saved, MixerState* state, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  const PassShape& shape = pass.shape;
  const int64_t m = shape.tokens();
  const AttentionSaved& s = *static_cast<AttentionSaved*>(saved);

  const Tensor d_y = ctx.scratch->Alloc(x.dtype(), {shape.batch, shape.seq_len, heads_, head_dim_});
  const Tensor dy_rows = GatherRows("attention: gradient of the output", dy, pass);
  LinearBackwardInput(d_y.View({m, heads_ * head_dim_}), dy_rows, weights.Get(o_proj_),
                      /*accumulate=*/false, ctx);
  weights.Release(o_proj_);
  const Tensor rows = GatherRowsBeside("attention: input again", x, pass);
  Wgrad(weights, o_proj_, dy_rows, s.y.View({m, heads_ * head_dim_}), ctx);
  weights.GradReady(o_proj_);

  const Tensor d_qkv = ctx.scratch->Alloc(x.dtype(), {m, width()});
  const Heads heads = Split(s.qkv, shape);
  const Heads d_heads = Split(d_qkv, shape);
  if (state == nullptr) {
    AttentionBackward(d_heads.q, d_heads.k, d_heads.v, d_y, s.y, s.lse, heads.q, heads.k, heads.v,
                      pass.documents, ctx);
  } else {
    // Earlier positions get what these queries ask of them; this piece's own keys and values have
    // then heard from all queries, those of later pieces included.
    AttentionState& cache = *static_cast<AttentionState*>(state);
    const int64_t first = pass.documents.first_position, end = first + shape.seq_len;
    const auto prefix = [&](Tensor t) { return t.Slice(1, 0, end); };
    const auto own = [&](Tensor t) { return t.Slice(1, first, shape.seq_len); };
    const ArenaScope cache_scope(ctx.scratch);
    const Tensor dk = ctx.scratch->Alloc(x.dtype(), {shape.batch, end, kv_heads_, head_dim_});
    const Tensor dv = ctx.scratch->Alloc(x.dtype(), {shape.batch, end, kv_heads_, head_dim_});
    AttentionBackward(d_heads.q, dk, dv, d_y, s.y, s.lse, heads.q, prefix(cache.k), prefix(cache.v),
                      pass.documents, ctx);
    AddInPlace(prefix(cache.dk), dk, ctx);
    AddInPlace(prefix(cache.dv), dv, ctx);
    Copy(d_heads.k, own(cache.dk), ctx);
    Copy(d_heads.v, own(cache.dv), ctx);
  }
  Rotate(d_heads, /*inverse=*/true, pass);
  const Tensor partial = PartialRows(dx, pass);
  for (const Part& part : parts_) {
    LinearBackwardInput(partial, d_qkv.Slice(1, part.begin, part.columns),
                        weights.Get(part.storage), /*accumulate=*/part.begin > 0, ctx);
    weights.Release(part.storage);
  }
  JoinTraffic(pass);
  SumRowsBeside("attention: gradient of the input", dx, partial, pass);
  for (const Part& part : parts_) {
    Wgrad(weights, part.storage, d_qkv.Slice(1, part.begin, part.columns), rows, ctx);
    weights.GradReady(part.storage);
  }
  JoinTraffic(pass);
}

}  // namespace krait
