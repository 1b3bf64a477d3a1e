#include "model/hybrid_model.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/optimizer.h"
#include "kernels/rms_norm.h"
#include "kernels/transfer.h"
#include "model/names.h"
#include "model/sequence_parallel.h"

namespace krait {

PassSums PassSumsOf(const std::vector<double>& sums) {
  return {.cross_entropy = sums.at(kSumCrossEntropy),
          .aux_loss = sums.at(kSumAuxLoss),
          .z_loss = sums.at(kSumZLoss),
          .squares = sums.at(kSumSquares),
          .imbalance = {sums.begin() + kSumImbalance, sums.end()}};
}

HybridModel::HybridModel(const ModelSpec& spec, const Weights* weights, Recompute recompute,
                         SublayerRange range, const Groups* groups)
    : spec_(spec),
      weights_(weights),
      recompute_(recompute),
      range_(range.end == 0 ? SublayerRange{0, spec.sublayers.size()} : range),
      groups_(groups),
      sublayers_(spec.sublayers.size()),
      norms_(spec.sublayers.size()),
      moe_count_(0) {
  const ParamTable& table = weights->table();
  const Mesh mesh = groups != nullptr ? groups->mesh() : Mesh();
  const LocalSizes sizes = LocalSizesOf(spec, mesh);
  vocabulary_ = {sizes.first_vocab_row, sizes.vocab_rows, spec.vocab_size};
  embedding_ = table.FindStorage(kEmbeddingName);
  final_norm_ = table.FindStorage(kFinalNormName);
  head_ = spec.tie_embeddings ? embedding_ : table.FindStorage(kHeadName);
  KRAIT_CHECK(range_.begin < range_.end && range_.end <= spec.sublayers.size());
  for (size_t s = range_.begin; s < range_.end; ++s) {
    const Sublayer& sublayer = spec.sublayers[s];
    sublayers_[s] =
        MakeSublayer(spec, sizes, table, static_cast<int>(s), static_cast<int>(moe_count_));
    moe_count_ += sublayer.kind == SublayerKind::kMoe ? 1 : 0;
    norms_[s] = table.FindStorage(NormName(sublayer.kind, sublayer.layer));
  }
  for (size_t i = 0; i < table.storages().size(); ++i) {
    const int storage = static_cast<int>(i), sublayer = table.storages()[i].sublayer;
    const bool in_range = sublayer >= 0 && static_cast<size_t>(sublayer) >= range_.begin &&
                          static_cast<size_t>(sublayer) < range_.end;
    const bool at_end = (first() && storage == embedding_) ||
                        (last() && (storage == final_norm_ || storage == head_));
    if (in_range || at_end) storages_.push_back(storage);
  }
}

HybridModel::~HybridModel() = default;

bool HybridModel::FirstOfLayer(size_t s) const {
  return s == range_.begin || spec_.sublayers[s].layer != spec_.sublayers[s - 1].layer;
}

HybridModel::Keep HybridModel::KeepOf(size_t s) const {
  const bool attention = spec_.sublayers[s].kind == SublayerKind::kAttention;
  switch (recompute_) {
    case Recompute::kNone:
      return {.h = true, .x = true, .saved = true};
    case Recompute::kNorms:
      return {.h = true, .x = false, .saved = true};
    case Recompute::kMixers: {
      const bool whole = !IsMixer(spec_.sublayers[s].kind);
      return {.h = true, .x = whole, .saved = whole, .attention = attention};
    }
    case Recompute::kLayer:
      return {.h = FirstOfLayer(s), .x = false, .saved = false, .attention = attention};
  }
  KRAIT_FATAL("unknown recompute mode");
}

PassContext HybridModel::MakePass(const Batch& batch, const SequenceState* sequence,
                                  const Context& ctx) const {
  // Pieces of sequences are one rank's: their states hold whole sequences.
  const int ranks = groups_ != nullptr ? groups_->tensor().size() : 1;
  KRAIT_CHECK(batch.shape.ranks == ranks && batch.shape.tokens() % ranks == 0);
  KRAIT_CHECK(ranks == 1 || sequence == nullptr);
  PassContext pass;
  pass.shape = batch.shape;
  pass.documents.doc_start = batch.documents.doc_start;
  pass.documents.first_position = sequence != nullptr ? sequence->position_ : 0;
  pass.keep_norms = recompute_ != Recompute::kNorms;
  pass.groups = groups_;
  pass.ctx = &ctx;
  return pass;
}

RouterStats HybridModel::NewRouterStats(int64_t batch, Arena* arena) const {
  RouterStats stats;
  if (moe_count_ == 0) return stats;
  const int64_t of_group = spec_.moe.aux_sequences;
  if (of_group > 0 && batch % of_group == 0) stats.groups = batch / of_group;
  const DType wide = Wide(weights_->dtype());
  const int64_t rows = moe_count_ * stats.groups;
  stats.prob_sum = arena->Alloc(wide, {rows, spec_.moe.experts});
  stats.choice_count = arena->Alloc(DType::kI64, {rows, spec_.moe.experts});
  stats.z_sum = arena->Alloc(wide, {moe_count_});
  if (spec_.moe.aux_loss != 0) stats.d_prob = arena->Alloc(wide, {rows, spec_.moe.experts});
  return stats;
}

void HybridModel::ResetRouterStats(const RouterStats& stats, const Context& ctx) const {
  for (const Tensor& sum : {stats.prob_sum, stats.choice_count, stats.z_sum}) {
    if (sum.defined()) Fill(sum, 0, ctx);
  }
}

MoeLossShape HybridModel::LossShape(const RouterStats& stats, int64_t tokens) const {
  return {.tokens = tokens,
          .top_k = spec_.moe.top_k,
          .pools = spec_.moe.aux_pool == AuxPool::kModel ? 1 : moe_count_,
          .groups = stats.groups};
}

std::unique_ptr<ActivationSet> HybridModel::NewActivations(PassShape shape, Arena* arena) const {
  auto set = std::make_unique<ActivationSet>();
  set->max_shape_ = shape;
  set->arena_ = arena;
  set->mark_ = arena->mark();
  set->sublayers_.resize(sublayers_.size());
  for (size_t s = range_.begin; s < range_.end; ++s) {
    set->sublayers_[s].saved = sublayers_[s]->NewSaved();
  }
  return set;
}

void HybridModel::RunSublayers(Tensor final_x, const Batch& batch, ActivationSet* set,
                               SequenceState* sequence, const PassContext& forward_pass,
                               const ProbeSink* probe) const {
  const Context& ctx = *forward_pass.ctx;
  const ArenaScope scope(ctx.scratch);
  const int64_t m = batch.shape.own_tokens();
  const int64_t d = spec_.d_model;
  const DType dtype = weights_->dtype();
  // Where activations go that are not kept.
  const Tensor passing_h = ctx.scratch->Alloc(dtype, {m, d});
  const Tensor passing_x = ctx.scratch->Alloc(dtype, {m, d});
  const Tensor passing_rstd = ctx.scratch->Alloc(Wide(dtype), {m});
  const bool keeps_outputs = set != nullptr && spec_.activation_loss != 0;
  Tensor delta = keeps_outputs ? Tensor() : ctx.scratch->Alloc(dtype, {m, d});

  PassContext pass = forward_pass;
  Tensor router_logits, dt_raw;
  if (probe != nullptr) pass.router_logits = &router_logits;
  if (probe != nullptr && probe->sublayers) pass.dt_raw = &dt_raw;
  int64_t moe_index = 0;

  Tensor residual;  // the stream before `delta`
  for (size_t s = range_.begin; s < range_.end; ++s) {
    const Keep keep = set != nullptr ? KeepOf(s) : Keep{};
    const Tensor h = keep.h ? set->arena_->Alloc(dtype, {m, d}) : passing_h;
    const Tensor x = keep.x ? set->arena_->Alloc(dtype, {m, d}) : passing_x;
    const Tensor rstd = keep.x ? set->arena_->Alloc(Wide(dtype), {m}) : passing_rstd;
    const bool start = s == range_.begin;
    if (start) {
      if (first()) {
        const ArenaScope partial_scope(ctx.scratch);
        const Tensor partial = PartialRows(h, pass);
        EmbeddingForward(partial, batch.tokens.View({batch.tokens.numel()}),
                         weights_->Get(embedding_), vocabulary_, ctx);
        weights_->Release(embedding_);
        SumRows("embedding", h, partial, pass);
      } else {
        Copy(h, batch.h_in, ctx);
      }
      residual = h;
    }
    ResidualRmsNormForward(h, x, rstd, residual, start ? Tensor() : delta, weights_->Get(norms_[s]),
                           spec_.norm_eps, ctx);
    weights_->Release(norms_[s]);
    residual = h;
    if (keeps_outputs) delta = set->arena_->Alloc(dtype, {m, d});
    if (set != nullptr) {
      auto& kept = set->sublayers_[s];
      kept.y = keeps_outputs ? delta : Tensor();
      kept.h = keep.h ? h : Tensor();
      kept.x = keep.x ? x : Tensor();
      kept.rstd = keep.x ? rstd : Tensor();
    }
    if (probe != nullptr && FirstOfLayer(s)) {
      probe->on_tensor("hidden_states." + std::to_string(spec_.sublayers[s].layer), h);
    }
    MixerState* const state = sequence != nullptr ? sequence->sublayers_[s].get() : nullptr;
    pass.keep_attention = keep.attention ? set->arena_ : nullptr;
    Saved* const saved = keep.saved || keep.attention || (set != nullptr && state != nullptr)
                             ? set->sublayers_[s].saved.get()
                             : nullptr;
    if (state != nullptr && saved != nullptr) {
      sublayers_[s]->KeepState(*state, saved, set->arena_, ctx);
    }
    const ArenaScope sublayer_scope(ctx.scratch);
    sublayers_[s]->Forward(delta, x, *weights_, keep.saved ? set->arena_ : ctx.scratch, saved,
                           state, pass);
    if (probe != nullptr && router_logits.defined()) {
      probe->on_tensor("router_logits." + std::to_string(moe_index++), router_logits);
      router_logits = Tensor();
    }
    if (probe == nullptr || !probe->sublayers) continue;
    if (dt_raw.defined()) probe->on_tensor("dt_raw." + std::to_string(s), dt_raw);
    dt_raw = Tensor();
    probe->on_tensor("output." + std::to_string(s), delta);
  }
  if (!last()) {
    Copy(batch.h_out, residual, ctx);
    AddInPlace(batch.h_out, delta, ctx);
    return;
  }
  Tensor h = passing_h;
  Tensor rstd = passing_rstd;
  if (set != nullptr) {
    h = set->final_h_ = set->arena_->Alloc(dtype, {m, d});
    rstd = set->final_rstd_ = set->arena_->Alloc(Wide(dtype), {m});
  }
  ResidualRmsNormForward(h, final_x, rstd, residual, delta, weights_->Get(final_norm_),
                         spec_.norm_eps, ctx);
  weights_->Release(final_norm_);
  if (probe != nullptr) {
    probe->on_tensor("hidden_states." + std::to_string(spec_.n_layers), final_x);
  }
}

void HybridModel::RunHead(Tensor x, Tensor targets, Tensor loss_scale, Tensor sums, bool with_grad,
                          const PassContext& pass, const ProbeSink* probe, int64_t* correct) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  const int64_t m = targets.numel(), own = pass.shape.own_tokens();
  const Tensor losses = ctx.scratch->Alloc(Wide(x.dtype()), {m});
  const LogitsSink sink = [&](Tensor logits) { probe->on_tensor("logits", logits); };
  const VocabularyReductions reductions = {
      [&](Tensor max) { pass.groups->tensor().AllReduceMax("head: maximum", max, ctx); },
      [&](Tensor sum) { pass.groups->tensor().AllReduceSum("head: sum", sum, ctx); }};
  // Every rank has the losses of all rows, and counts its own.
  const int64_t first = pass.shape.ranks > 1 ? own * pass.groups->tensor().rank() : 0;
  std::vector<int32_t> target;
  if (correct != nullptr) {
    target.resize(static_cast<size_t>(m));
    Download(target.data(), targets, ctx);
  }
  int64_t row = 0;
  const ChoiceSink choices = [&](Tensor max, Tensor picked) {
    const std::vector<float> most = DownloadFloats(max, ctx),
                             own_logit = DownloadFloats(picked, ctx);
    for (size_t i = 0; i < most.size(); ++i, ++row) {
      if (row < first || row >= first + own || target[static_cast<size_t>(row)] < 0) continue;
      *correct += own_logit[i] == most[i] ? 1 : 0;
    }
  };
  const Tensor rows = GatherRows("head: input", x, pass);
  LinearCrossEntropy(losses, rows, with_grad ? weights_->Grad(head_) : Tensor(),
                     with_grad && weights_->Accumulate(head_), weights_->Get(head_),
                     targets.View({m}), vocabulary_, loss_scale, probe != nullptr ? &sink : nullptr,
                     ctx, pass.shape.ranks > 1 ? &reductions : nullptr,
                     correct != nullptr ? &choices : nullptr);
  weights_->Release(head_);
  if (with_grad) SumRows("head: gradient of the input", x, rows, pass);
  AddSum(sums.Slice(0, kSumCrossEntropy, 1), losses.Slice(0, first, own), ctx);
}

const Communicator* HybridModel::RouterRanks() const {
  if (groups_ == nullptr) return nullptr;
  return spec_.moe.aux_sequences == 0 ? &groups_->stage() : &groups_->tensor();
}

int64_t HybridModel::RouterTokens(int64_t tokens) const {
  return tokens * (RouterRanks() == nullptr ? 1 : RouterRanks()->size() / groups_->mesh().tensor);
}

void HybridModel::AddRouterLosses(const RouterStats& stats, int64_t tokens, Tensor sums,
                                  const Context& ctx) const {
  if (moe_count_ == 0) return;
  if (const Communicator* ranks = RouterRanks(); ranks != nullptr && ranks->size() > 1) {
    for (const Tensor& sum : {stats.prob_sum, stats.choice_count, stats.z_sum}) {
      ranks->AllReduceSum("router statistics", sum, ctx);
    }
  }
  MoeLossesForward(sums.Slice(0, kSumAuxLoss, 1), sums.Slice(0, kSumZLoss, 1),
                   sums.Slice(0, kSumImbalance, moe_count_), stats.prob_sum, stats.choice_count,
                   stats.z_sum, LossShape(stats, RouterTokens(tokens)), ctx);
}

void HybridModel::SetRouterGradients(RouterStats* stats, int64_t tokens, double aux_scale,
                                     const Context& ctx) const {
  tokens = RouterTokens(tokens);
  // Statistics that are a data rank's own give losses of which the mean over data ranks is taken.
  if (groups_ != nullptr && spec_.moe.aux_sequences > 0) {
    const Mesh& mesh = groups_->mesh();
    aux_scale /= static_cast<double>(mesh.stage() / mesh.tensor);
  }
  stats->z_scale =
      aux_scale * spec_.moe.z_loss / static_cast<double>(tokens * std::max<int64_t>(1, moe_count_));
  if (!stats->d_prob.defined()) return;
  MoeLossesBackward(stats->d_prob, stats->choice_count, aux_scale * spec_.moe.aux_loss,
                    LossShape(*stats, tokens), ctx);
}

void HybridModel::Forward(const Batch& batch, Tensor loss_scale, Tensor sums,
                          ActivationSet* activations, const Context& ctx, const ProbeSink* probe,
                          SequenceState* sequence) {
  KRAIT_CHECK(weights_->has_grad());
  KRAIT_CHECK(batch.shape.batch <= activations->max_shape_.batch &&
              batch.shape.seq_len <= activations->max_shape_.seq_len);
  ActivationSet& set = *activations;
  set.arena_->Release(set.mark_);
  PassContext pass = MakePass(batch, sequence, ctx);
  int64_t seen = batch.shape.seq_len;
  if (sequence != nullptr) {
    KRAIT_CHECK(sequence->batch_ == batch.shape.batch &&
                sequence->position_ + seen <= sequence->max_tokens_);
    pass.router = &sequence->router_;
  } else {
    set.router_ = NewRouterStats(batch.shape.batch, set.arena_);
    ResetRouterStats(set.router_, ctx);
    pass.router = &set.router_;
  }
  // The final norm's output turns into its gradient inside RunHead.
  set.d_final_ =
      last() ? set.arena_->Alloc(weights_->dtype(), {batch.shape.own_tokens(), spec_.d_model})
             : Tensor();
  RunSublayers(set.d_final_, batch, &set, sequence, pass, probe);
  for (size_t s = range_.begin; spec_.activation_loss != 0 && s < range_.end; ++s) {
    AddSumOfSquares(sums.Slice(0, kSumSquares, 1), set.sublayers_[s].y, ctx);
  }
  if (last())
    RunHead(set.d_final_, batch.targets, loss_scale, sums, /*with_grad=*/true, pass, probe);
  bool whole = true;
  if (sequence != nullptr) {
    seen = sequence->position_ += seen;
    whole = seen == sequence->max_tokens_;
  }
  if (whole) AddRouterLosses(*pass.router, batch.shape.batch * seen, sums, ctx);
  overflow_rounds_ += std::exchange(pass.router->overflow_rounds, 0);
  weights_->EndForward();
}

void HybridModel::Evaluate(const Batch& batch, Tensor sums, const Context& ctx, int64_t* correct,
                           const ProbeSink* probe) {
  const ArenaScope scope(ctx.scratch);
  RouterStats router = NewRouterStats(batch.shape.batch, ctx.scratch);
  ResetRouterStats(router, ctx);
  PassContext pass = MakePass(batch, nullptr, ctx);
  pass.router = &router;
  const Tensor final_x =
      ctx.scratch->Alloc(weights_->dtype(), {batch.shape.own_tokens(), spec_.d_model});
  RunSublayers(final_x, batch, nullptr, nullptr, pass, probe);
  RunHead(final_x, batch.targets, Tensor(), sums, /*with_grad=*/false, pass, nullptr, correct);
  AddRouterLosses(router, batch.shape.tokens(), sums, ctx);
  weights_->EndForward();
}

void HybridModel::Refill(size_t begin, size_t end, ActivationSet* set, SequenceState* sequence,
                         const PassContext& backward_pass) const {
  PassContext pass = backward_pass;
  const Context& ctx = *pass.ctx;
  const DType dtype = weights_->dtype();
  const int64_t m = pass.shape.own_tokens();
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
      kept.rstd = ctx.scratch->Alloc(Wide(dtype), {m});
      ResidualRmsNormForward(kept.h, kept.x, kept.rstd, residual, keep.h ? Tensor() : delta,
                             weights_->Get(norms_[s]), spec_.norm_eps, ctx);
      weights_->Release(norms_[s]);
    }
    if (!keep.saved) {
      const bool needed = s + 1 < end;  // the next sublayer's stream starts from this output
      pass.keep_attention = keep.attention ? set->arena_ : nullptr;
      delta = needed ? ctx.scratch->Alloc(dtype, {m, d}) : Tensor();
      sublayers_[s]->Forward(delta, kept.x, *weights_, ctx.scratch, kept.saved.get(),
                             sequence != nullptr ? sequence->sublayers_[s].get() : nullptr, pass);
    }
  }
}

void HybridModel::Backward(const Batch& batch, double aux_scale, ActivationSet* activations,
                           const Context& ctx, SequenceState* sequence, const ProbeSink* probe) {
  const bool probes = probe != nullptr && probe->sublayers;
  const ArenaScope scope(ctx.scratch);
  ActivationSet& set = *activations;
  const int64_t m = batch.shape.own_tokens();
  const DType dtype = weights_->dtype();
  bool whole = true;
  int64_t tokens = batch.shape.tokens();
  if (sequence != nullptr) {
    whole = sequence->position_ == sequence->max_tokens_;
    tokens = batch.shape.batch * sequence->max_tokens_;
    sequence->position_ -= batch.shape.seq_len;
  }
  RouterStats& router = sequence != nullptr ? sequence->router_ : set.router_;
  if (moe_count_ > 0 && whole) SetRouterGradients(&router, tokens, aux_scale, ctx);
  PassContext pass = MakePass(batch, sequence, ctx);
  pass.router = &router;
  pass.recomputing = true;

  // The gradient of the residual stream; an addition hands it on to both of its inputs. A
  // sublayer's dy is not overwritten while the sublayer may still read it: two buffers take turns.
  Tensor dh = ctx.scratch->Alloc(dtype, {m, spec_.d_model});
  Tensor dh_next = ctx.scratch->Alloc(dtype, {m, spec_.d_model});
  // With the activation loss the gradient of a sublayer's output is dh and that of the loss.
  Tensor dy[2];
  double dy_scale = 0;
  if (spec_.activation_loss != 0) {
    for (Tensor& t : dy) t = ctx.scratch->Alloc(dtype, {m, spec_.d_model});
    const int64_t data = groups_ != nullptr ? groups_->mesh().stage() / groups_->mesh().tensor : 1;
    dy_scale =
        2 * aux_scale * spec_.activation_loss / static_cast<double>(tokens * data * spec_.d_model);
  }
  if (last()) {
    if (head_ != embedding_ || !first()) weights_->GradReady(head_);
    RmsNormBackward(dh, weights_->Grad(final_norm_), set.d_final_, set.final_h_, set.final_rstd_,
                    weights_->Get(final_norm_), /*accumulate=*/false, ctx);
    weights_->Release(final_norm_);
    weights_->GradReady(final_norm_);
  } else {
    Copy(dh, batch.d_h_out, ctx);
  }
  if (probes) probe->on_tensor("gradient.head", dh);
  for (size_t end = range_.end; end > range_.begin;) {
    // Sublayers that are recomputed together: a layer, or one by one.
    size_t begin = end - 1;
    while (recompute_ == Recompute::kLayer && !FirstOfLayer(begin)) --begin;
    const ArenaScope group_scope(ctx.scratch);
    Refill(begin, end, &set, sequence, pass);
    for (size_t s = end; s-- > begin;) {
      const ArenaScope sublayer_scope(ctx.scratch);
      const auto& kept = set.sublayers_[s];
      const Tensor dx = ctx.scratch->Alloc(dtype, {m, spec_.d_model});
      Tensor dy_of = dh;
      if (kept.y.defined()) {
        dy_of = dy[s % 2];
        Copy(dy_of, dh, ctx);
        AddScaled(dy_of, kept.y, dy_scale, ctx);
      }
      sublayers_[s]->Backward(dx, dy_of, kept.x, *weights_, kept.saved.get(),
                              sequence != nullptr ? sequence->sublayers_[s].get() : nullptr, pass);
      if (probes) probe->on_tensor("gradient." + std::to_string(s), dx);
      ResidualRmsNormBackward(dh_next, weights_->Grad(norms_[s]), dx, dh, kept.h, kept.rstd,
                              weights_->Get(norms_[s]), ctx);
      weights_->Release(norms_[s]);
      weights_->GradReady(norms_[s]);
      std::swap(dh, dh_next);
    }
    end = begin;
  }
  if (first()) {
    EmbeddingBackward(weights_->Grad(embedding_), GatherRows("embedding: gradient", dh, pass),
                      batch.tokens.View({batch.tokens.numel()}), vocabulary_, spec_.pad_token, ctx);
    weights_->GradReady(embedding_);
  } else {
    Copy(batch.d_h_in, dh, ctx);
  }
  weights_->EndBackward(storages_);
}

std::unique_ptr<SequenceState> HybridModel::NewSequence(int64_t batch, int64_t max_tokens,
                                                        bool with_grad, Arena* arena,
                                                        const Context& ctx) const {
  auto sequence = std::make_unique<SequenceState>();
  sequence->batch_ = batch;
  sequence->max_tokens_ = max_tokens;
  sequence->sublayers_.resize(sublayers_.size());
  for (size_t s = range_.begin; s < range_.end; ++s) {
    sequence->sublayers_[s] =
        sublayers_[s]->NewState(batch, max_tokens, weights_->dtype(), with_grad, arena, ctx);
  }
  if (with_grad) {
    sequence->router_ = NewRouterStats(batch, arena);
    ResetRouterStats(sequence->router_, ctx);
  }
  return sequence;
}

void HybridModel::Reset(SequenceState* sequence, const Context& ctx) const {
  sequence->position_ = 0;
  for (const auto& state : sequence->sublayers_) {
    if (state != nullptr) state->Reset(ctx);
  }
  ResetRouterStats(sequence->router_, ctx);
}

void HybridModel::SkipTo(int64_t position, SequenceState* sequence) const {
  KRAIT_CHECK(position >= 0 && position <= sequence->max_tokens_);
  sequence->position_ = position;
}

void HybridModel::Decode(Tensor logits, Tensor tokens, SequenceState* sequence,
                         const Context& ctx) {
  const ArenaScope scope(ctx.scratch);
  Batch batch;
  batch.shape = {tokens.dim(0), tokens.dim(1)};
  batch.tokens = tokens;
  const PassShape& shape = batch.shape;
  KRAIT_CHECK(first() && last() && shape.batch == sequence->batch_ &&
              sequence->position_ + shape.seq_len <= sequence->max_tokens_);
  const int64_t d = spec_.d_model;
  const Tensor x = ctx.scratch->Alloc(weights_->dtype(), {shape.tokens(), d});
  RunSublayers(x, batch, nullptr, sequence, MakePass(batch, sequence, ctx), nullptr);
  // The last position of every sequence.
  const Tensor last_x =
      x.View({shape.batch, shape.seq_len * d}).Slice(1, (shape.seq_len - 1) * d, d);
  LinearForward(logits, last_x, weights_->Get(head_).Slice(0, 0, spec_.vocab_size), Tensor(), ctx);
  weights_->Release(head_);
  sequence->position_ += shape.seq_len;
  weights_->EndForward();
}

}  // namespace krait
