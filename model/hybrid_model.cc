#include "model/hybrid_model.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/optimizer.h"
#include "kernels/rms_norm.h"

namespace krait {
namespace {

// Size of the logits that exist at once. Large enough for matrix products at full speed, small
// beside the logits of a whole pass (1 GiB for 4096 tokens of a vocabulary of 65536).
constexpr int64_t kLogitBytes = int64_t{32} << 20;

bool IsMixer(SublayerKind kind) {
  return kind == SublayerKind::kAttention || kind == SublayerKind::kMamba;
}

int64_t CountTargets(const Batch& batch) {
  const int32_t* targets = batch.targets.data<int32_t>();
  return std::count_if(targets, targets + batch.targets.numel(), [](int32_t t) { return t >= 0; });
}

// Element i of statistics in f32 or f64.
double Stat(Tensor t, int64_t i) {
  return t.dtype() == DType::kF64 ? t.data<double>()[i] : static_cast<double>(t.data<float>()[i]);
}

void SetStat(Tensor t, int64_t i, double value) {
  if (t.dtype() == DType::kF64) {
    t.data<double>()[i] = value;
  } else {
    t.data<float>()[i] = static_cast<float>(value);
  }
}

}  // namespace

HybridModel::HybridModel(const ModelSpec& spec, const Weights* weights, Recompute recompute)
    : spec_(spec),
      weights_(weights),
      recompute_(recompute),
      moe_count_(spec.Count(SublayerKind::kMoe)) {
  const ParamTable& table = weights->table();
  embedding_ = table.FindStorage("model.embed_tokens.weight");
  final_norm_ = table.FindStorage("model.final_layernorm.weight");
  head_ = spec.tie_embeddings ? embedding_ : table.FindStorage("lm_head.weight");
  int moe_index = 0;
  for (size_t s = 0; s < spec.sublayers.size(); ++s) {
    const Sublayer& sublayer = spec.sublayers[s];
    sublayers_.push_back(MakeSublayer(spec, table, static_cast<int>(s), moe_index));
    moe_index += sublayer.kind == SublayerKind::kMoe ? 1 : 0;
    norms_.push_back(table.FindStorage(
        "model.layers." + std::to_string(sublayer.layer) +
        (IsMixer(sublayer.kind) ? ".input_layernorm.weight" : ".pre_ff_layernorm.weight")));
  }
  KRAIT_CHECK(!sublayers_.empty());
}

HybridModel::~HybridModel() = default;

bool HybridModel::FirstOfLayer(size_t s) const {
  return s == 0 || spec_.sublayers[s].layer != spec_.sublayers[s - 1].layer;
}

HybridModel::Keep HybridModel::KeepOf(size_t s) const {
  switch (recompute_) {
    case Recompute::kNone:
      return {.h = true, .x = true, .saved = true};
    case Recompute::kNorms:
      return {.h = true, .x = false, .saved = true};
    case Recompute::kMixers: {
      const bool whole = !IsMixer(spec_.sublayers[s].kind);
      return {.h = true, .x = whole, .saved = whole};
    }
    case Recompute::kLayer:
      return {.h = FirstOfLayer(s), .x = false, .saved = false};
  }
  KRAIT_FATAL("unknown recompute mode");
}

PassContext HybridModel::MakePass(const PassShape& shape, Tensor doc_start,
                                  const Context& ctx) const {
  PassContext pass;
  pass.shape = shape;
  pass.doc_start = doc_start;
  pass.ctx = &ctx;
  return pass;
}

RouterStats HybridModel::NewRouterStats(Arena* arena, const Context& ctx) const {
  RouterStats stats;
  if (moe_count_ == 0) return stats;
  const DType wide = WideDType(weights_->dtype());
  stats.prob_sum = arena->Alloc(wide, {moe_count_, spec_.moe.experts});
  stats.choice_count = arena->Alloc(DType::kI64, {moe_count_, spec_.moe.experts});
  stats.z_sum = arena->Alloc(wide, {moe_count_});
  if (spec_.moe.aux_loss != 0) {
    stats.d_prob = arena->Alloc(wide, {moe_count_, spec_.moe.experts});
  }
  for (const Tensor& sum : {stats.prob_sum, stats.choice_count, stats.z_sum}) Fill(sum, 0, ctx);
  return stats;
}

std::unique_ptr<ActivationSet> HybridModel::NewActivations(PassShape shape, Arena* arena) const {
  auto set = std::make_unique<ActivationSet>();
  set->max_shape_ = shape;
  set->arena_ = arena;
  set->mark_ = arena->mark();
  set->sublayers_.resize(sublayers_.size());
  for (size_t s = 0; s < sublayers_.size(); ++s) {
    set->sublayers_[s].saved = sublayers_[s]->NewSaved();
  }
  return set;
}

void HybridModel::RunSublayers(Tensor final_x, const Batch& batch, ActivationSet* set,
                               RouterStats* router, const Context& ctx,
                               const ProbeSink* probe) const {
  ArenaScope scope(ctx.scratch);
  const int64_t m = batch.shape.tokens();
  const int64_t d = spec_.d_model;
  const DType dtype = weights_->dtype();
  // Where activations go that are not kept.
  Tensor passing_h = ctx.scratch->Alloc(dtype, {m, d});
  Tensor passing_x = ctx.scratch->Alloc(dtype, {m, d});
  Tensor passing_rstd = ctx.scratch->Alloc(WideDType(dtype), {m});
  Tensor delta = ctx.scratch->Alloc(dtype, {m, d});

  PassContext pass = MakePass(batch.shape, batch.doc_start, ctx);
  pass.router = router;
  pass.add_router_stats = true;
  pass.keep_norms = recompute_ != Recompute::kNorms;
  Tensor router_logits;
  if (probe != nullptr) pass.router_logits = &router_logits;
  int64_t moe_index = 0;

  Tensor residual;  // the stream before `delta`
  for (size_t s = 0; s < sublayers_.size(); ++s) {
    const Keep keep = set != nullptr ? KeepOf(s) : Keep{};
    Tensor h = keep.h ? set->arena_->Alloc(dtype, {m, d}) : passing_h;
    Tensor x = keep.x ? set->arena_->Alloc(dtype, {m, d}) : passing_x;
    Tensor rstd = keep.x ? set->arena_->Alloc(WideDType(dtype), {m}) : passing_rstd;
    if (s == 0) {
      EmbeddingForward(h, batch.tokens.View({m}), Embedding(), ctx);
      weights_->Release(embedding_);
      residual = h;
    }
    ResidualRmsNormForward(h, x, rstd, residual, s == 0 ? Tensor() : delta,
                           weights_->Get(norms_[s]), spec_.norm_eps, ctx);
    weights_->Release(norms_[s]);
    residual = h;
    if (set != nullptr) {
      auto& kept = set->sublayers_[s];
      kept.h = keep.h ? h : Tensor();
      kept.x = keep.x ? x : Tensor();
      kept.rstd = keep.x ? rstd : Tensor();
    }
    if (probe != nullptr && FirstOfLayer(s)) {
      probe->on_tensor("hidden_states." + std::to_string(spec_.sublayers[s].layer), h);
    }
    ArenaScope sublayer_scope(ctx.scratch);
    sublayers_[s]->Forward(delta, x, *weights_, keep.saved ? set->arena_ : ctx.scratch,
                           keep.saved ? set->sublayers_[s].saved.get() : nullptr, pass);
    if (probe != nullptr && router_logits.defined()) {
      probe->on_tensor("router_logits." + std::to_string(moe_index++), router_logits);
      router_logits = Tensor();
    }
  }
  Tensor h = passing_h;
  Tensor rstd = passing_rstd;
  if (set != nullptr) {
    h = set->final_h_ = set->arena_->Alloc(dtype, {m, d});
    rstd = set->final_rstd_ = set->arena_->Alloc(WideDType(dtype), {m});
  }
  ResidualRmsNormForward(h, final_x, rstd, residual, delta, weights_->Get(final_norm_),
                         spec_.norm_eps, ctx);
  weights_->Release(final_norm_);
  if (probe != nullptr) {
    probe->on_tensor("hidden_states." + std::to_string(spec_.n_layers), final_x);
  }
}

double HybridModel::RunHead(Tensor x, const Batch& batch, double loss_scale, bool with_grad,
                            const Context& ctx, const ProbeSink* probe) const {
  ArenaScope scope(ctx.scratch);
  const int64_t m = x.dim(0);
  const DType wide = WideDType(x.dtype());
  const int64_t chunk = std::clamp<int64_t>(kLogitBytes / (spec_.vocab_size * SizeOf(wide)), 1, m);
  const Tensor w = weights_->Get(head_);
  const Tensor targets = batch.targets.View({m});
  Tensor losses = ctx.scratch->Alloc(wide, {m});
  Tensor logits_chunk = ctx.scratch->Alloc(wide, {chunk, spec_.vocab_size});
  for (int64_t begin = 0; begin < m; begin += chunk) {
    const int64_t rows = std::min(chunk, m - begin);
    const Tensor logits = logits_chunk.Slice(0, 0, rows);
    const Tensor x_rows = x.Slice(0, begin, rows);
    LinearForward(logits, x_rows, w, Tensor(), ctx);
    if (probe != nullptr) probe->on_tensor("logits", logits);
    const Tensor d_logits = with_grad ? logits : Tensor();
    CrossEntropy(losses.Slice(0, begin, rows), d_logits, logits, targets.Slice(0, begin, rows),
                 loss_scale, ctx);
    if (with_grad) {
      LinearBackwardWeight(weights_->Grad(head_), d_logits, x_rows, ctx);
      LinearBackwardInput(x_rows, d_logits, w, /*accumulate=*/false, ctx);
    }
  }
  weights_->Release(head_);
  // A tied head's gradient is ready when the embedding has added its part.
  if (with_grad && head_ != embedding_) weights_->GradReady(head_);
  return ctx.planning ? 0 : Sum(losses, ctx);
}

// Mixtral's load-balancing loss as Hugging Face computes it: with means over n tokens,
//   aux = E * sum over e of P_e * sum over j of f_je,   P_e = mean p_e, f_je = share of tokens
//   whose
// j-th choice is e. aux_pool model: n are the tokens of all MoE layers together; layer: those of
// one, and aux is the mean over layers.
void HybridModel::SumRouterStats(const RouterStats& stats, int64_t tokens, PassSums* sums) const {
  const int64_t experts = spec_.moe.experts;
  const int64_t pools = spec_.moe.aux_pool == AuxPool::kModel ? 1 : moe_count_;
  const int64_t layers = moe_count_ / pools;  // per pool
  const int64_t* counts = stats.choice_count.data<int64_t>();
  for (int64_t pool = 0; pool < pools; ++pool) {
    const auto n = static_cast<double>(tokens * layers);
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e) {
      double prob = 0;
      int64_t count = 0;
      for (int64_t j = pool * layers; j < (pool + 1) * layers; ++j) {
        prob += Stat(stats.prob_sum, j * experts + e);
        count += counts[j * experts + e];
      }
      sum += prob / n * (static_cast<double>(count) / n);
    }
    sums->aux_loss += static_cast<double>(experts) * sum / static_cast<double>(pools);
  }
  for (int64_t j = 0; j < moe_count_; ++j) {
    sums->z_loss += Stat(stats.z_sum, j) / static_cast<double>(tokens * moe_count_);
    const int64_t most = *std::max_element(counts + j * experts, counts + (j + 1) * experts);
    sums->imbalance.push_back(static_cast<double>(most * experts) /
                              static_cast<double>(tokens * spec_.moe.top_k));
  }
}

// The derivative of the losses of SumRouterStats; the shares f are piecewise constant.
void HybridModel::SetRouterGradients(RouterStats* stats, int64_t tokens, double aux_scale,
                                     const Context& ctx) const {
  stats->z_scale =
      aux_scale * spec_.moe.z_loss / static_cast<double>(tokens * std::max<int64_t>(1, moe_count_));
  if (!stats->d_prob.defined() || ctx.planning) return;
  const int64_t experts = spec_.moe.experts;
  const int64_t pools = spec_.moe.aux_pool == AuxPool::kModel ? 1 : moe_count_;
  const int64_t layers = moe_count_ / pools;
  const auto n = static_cast<double>(tokens * layers);
  const int64_t* counts = stats->choice_count.data<int64_t>();
  for (int64_t pool = 0; pool < pools; ++pool) {
    for (int64_t e = 0; e < experts; ++e) {
      int64_t count = 0;
      for (int64_t j = pool * layers; j < (pool + 1) * layers; ++j)
        count += counts[j * experts + e];
      const double d_prob = aux_scale * spec_.moe.aux_loss * static_cast<double>(experts) *
                            (static_cast<double>(count) / n) / (n * static_cast<double>(pools));
      for (int64_t j = pool * layers; j < (pool + 1) * layers; ++j) {
        SetStat(stats->d_prob, j * experts + e, d_prob);
      }
    }
  }
}

PassSums HybridModel::Forward(const Batch& batch, double loss_scale, ActivationSet* activations,
                              const Context& ctx, const ProbeSink* probe) {
  KRAIT_CHECK(weights_->has_grad());
  KRAIT_CHECK(batch.shape.batch <= activations->max_shape_.batch &&
              batch.shape.seq_len <= activations->max_shape_.seq_len);
  const int64_t m = batch.shape.tokens();
  ActivationSet& set = *activations;
  set.arena_->Release(set.mark_);
  set.router_ = NewRouterStats(set.arena_, ctx);
  // The final norm's output turns into its gradient inside RunHead.
  set.d_final_ = set.arena_->Alloc(weights_->dtype(), {m, spec_.d_model});
  RunSublayers(set.d_final_, batch, &set, &set.router_, ctx, probe);
  PassSums sums;
  sums.cross_entropy = RunHead(set.d_final_, batch, loss_scale, /*with_grad=*/true, ctx, probe);
  if (ctx.planning) return sums;
  sums.targets = CountTargets(batch);
  if (moe_count_ > 0) SumRouterStats(set.router_, m, &sums);
  return sums;
}

PassSums HybridModel::Evaluate(const Batch& batch, const Context& ctx) {
  ArenaScope scope(ctx.scratch);
  const int64_t m = batch.shape.tokens();
  RouterStats router = NewRouterStats(ctx.scratch, ctx);
  Tensor final_x = ctx.scratch->Alloc(weights_->dtype(), {m, spec_.d_model});
  RunSublayers(final_x, batch, nullptr, &router, ctx, nullptr);
  PassSums sums;
  sums.cross_entropy = RunHead(final_x, batch, 0, /*with_grad=*/false, ctx, nullptr);
  if (ctx.planning) return sums;
  sums.targets = CountTargets(batch);
  if (moe_count_ > 0) SumRouterStats(router, m, &sums);
  return sums;
}

void HybridModel::Refill(size_t begin, size_t end, ActivationSet* set,
                         const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const DType dtype = weights_->dtype();
  const int64_t m = pass.shape.tokens();
  const int64_t d = spec_.d_model;
  Tensor delta;
  for (size_t s = begin; s < end; ++s) {
    auto& kept = set->sublayers_[s];
    const Keep keep = KeepOf(s);
    Tensor residual = kept.h;
    if (!keep.h) {
      kept.h = ctx.scratch->Alloc(dtype, {m, d});
      residual = set->sublayers_[s - 1].h;
    }
    if (!keep.x) {
      kept.x = ctx.scratch->Alloc(dtype, {m, d});
      kept.rstd = ctx.scratch->Alloc(WideDType(dtype), {m});
      ResidualRmsNormForward(kept.h, kept.x, kept.rstd, residual, keep.h ? Tensor() : delta,
                             weights_->Get(norms_[s]), spec_.norm_eps, ctx);
      weights_->Release(norms_[s]);
    }
    if (!keep.saved) {
      const bool needed = s + 1 < end;  // the next sublayer's stream starts from this output
      delta = needed ? ctx.scratch->Alloc(dtype, {m, d}) : Tensor();
      sublayers_[s]->Forward(delta, kept.x, *weights_, ctx.scratch, kept.saved.get(), pass);
    }
  }
}

void HybridModel::Backward(const Batch& batch, double aux_scale, ActivationSet* activations,
                           const Context& ctx) {
  ArenaScope scope(ctx.scratch);
  ActivationSet& set = *activations;
  const int64_t m = batch.shape.tokens();
  const DType dtype = weights_->dtype();
  if (moe_count_ > 0) SetRouterGradients(&set.router_, m, aux_scale, ctx);
  PassContext pass = MakePass(batch.shape, batch.doc_start, ctx);
  pass.router = &set.router_;

  // The gradient of the residual stream; an addition hands it on to both of its inputs.
  Tensor dh = ctx.scratch->Alloc(dtype, {m, spec_.d_model});
  RmsNormBackward(dh, weights_->Grad(final_norm_), set.d_final_, set.final_h_, set.final_rstd_,
                  weights_->Get(final_norm_), /*accumulate=*/false, ctx);
  weights_->Release(final_norm_);
  weights_->GradReady(final_norm_);
  for (size_t end = sublayers_.size(); end > 0;) {
    // Sublayers that are recomputed together: a layer, or one by one.
    size_t begin = end - 1;
    while (recompute_ == Recompute::kLayer && !FirstOfLayer(begin)) --begin;
    ArenaScope group_scope(ctx.scratch);
    Refill(begin, end, &set, pass);
    for (size_t s = end; s-- > begin;) {
      ArenaScope sublayer_scope(ctx.scratch);
      const auto& kept = set.sublayers_[s];
      Tensor dx = ctx.scratch->Alloc(dtype, {m, spec_.d_model});
      sublayers_[s]->Backward(dx, dh, kept.x, *weights_, kept.saved.get(), pass);
      ResidualRmsNormBackward(dh, weights_->Grad(norms_[s]), dx, kept.h, kept.rstd,
                              weights_->Get(norms_[s]), ctx);
      weights_->Release(norms_[s]);
      weights_->GradReady(norms_[s]);
    }
    end = begin;
  }
  EmbeddingBackward(weights_->Grad(embedding_), dh, batch.tokens.View({m}), ctx);
  weights_->GradReady(embedding_);
}

std::unique_ptr<DecodeState> HybridModel::NewDecodeState(int64_t batch, int64_t max_tokens,
                                                         Arena* arena, const Context& ctx) const {
  auto state = std::make_unique<DecodeState>();
  state->batch_ = batch;
  state->max_tokens_ = max_tokens;
  for (const auto& sublayer : sublayers_) {
    state->sublayers_.push_back(
        sublayer->NewState(batch, max_tokens, weights_->dtype(), arena, ctx));
  }
  return state;
}

void HybridModel::Decode(Tensor logits, Tensor tokens, DecodeState* state, const Context& ctx) {
  ArenaScope scope(ctx.scratch);
  const PassShape shape{tokens.dim(0), tokens.dim(1)};
  KRAIT_CHECK(shape.batch == state->batch_ &&
              state->position_ + shape.seq_len <= state->max_tokens_);
  const int64_t m = shape.tokens();
  const int64_t d = spec_.d_model;
  const DType dtype = weights_->dtype();
  Tensor h = ctx.scratch->Alloc(dtype, {m, d});
  Tensor x = ctx.scratch->Alloc(dtype, {m, d});
  Tensor rstd = ctx.scratch->Alloc(WideDType(dtype), {m});
  Tensor delta = ctx.scratch->Alloc(dtype, {m, d});
  const PassContext pass = MakePass(shape, Tensor(), ctx);

  EmbeddingForward(h, tokens.View({m}), Embedding(), ctx);
  weights_->Release(embedding_);
  for (size_t s = 0; s < sublayers_.size(); ++s) {
    ResidualRmsNormForward(h, x, rstd, h, s == 0 ? Tensor() : delta, weights_->Get(norms_[s]),
                           spec_.norm_eps, ctx);
    weights_->Release(norms_[s]);
    sublayers_[s]->Decode(delta, x, *weights_, state->sublayers_[s].get(), pass);
  }
  ResidualRmsNormForward(h, x, rstd, h, delta, weights_->Get(final_norm_), spec_.norm_eps, ctx);
  weights_->Release(final_norm_);
  // The last position of every sequence.
  const Tensor last = x.View({shape.batch, shape.seq_len * d}).Slice(1, (shape.seq_len - 1) * d, d);
  LinearForward(logits, last, weights_->Get(head_), Tensor(), ctx);
  weights_->Release(head_);
  state->position_ += shape.seq_len;
}

}  // namespace krait
