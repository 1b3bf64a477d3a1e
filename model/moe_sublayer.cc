#include "model/moe_sublayer.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/base/check.h"
#include "kernels/gemm.h"
#include "kernels/moe.h"
#include "kernels/swiglu.h"
#include "kernels/transfer.h"
#include "model/expert_routes.h"
#include "model/names.h"

namespace krait {

// The permuted inputs, the products silu(gate) * up and the experts' outputs are not kept: the
// first are a copy of x, the others come out of the backward or are not needed there. What came
// from other ranks is kept.
struct MoeSublayer::MoeSaved : Saved {
  Tensor logits, probs;            // [M,E]
  Tensor choice, weight;           // [M,k]
  Tensor row_of, source, offsets;  // [M,k], [R], [E+1]
  Tensor gate_up;                  // [R,2F], of shared experts [C,2F]
  // Of shared experts: the first round's rows and their offsets, and where rows travel.
  Tensor inputs;          // [C,D]
  Tensor expert_offsets;  // [E/ranks+1]
  std::optional<ExpertRoutes> routes;
};

namespace {

// Tokens of a pass [row, row + rows) that lie in `groups` whole groups of the router statistics, or
// in a part of one.
struct GroupRows {
  int64_t group = 0, groups = 1, row = 0, rows = 0;
};
std::vector<GroupRows> GroupsOfRows(const PassContext& pass, int64_t rows) {
  const int64_t groups = pass.router->groups;
  if (groups == 1 || pass.shape.ranks == 1) return {{0, groups, 0, rows}};
  // This rank's rows begin and end anywhere in the groups of the pass.
  const int64_t size = pass.shape.tokens() / groups;
  const int64_t begin = rows * pass.groups->tensor().rank();
  std::vector<GroupRows> parts;
  for (int64_t row = 0; row < rows;) {
    const int64_t at = begin + row, left = size - at % size;
    const int64_t whole = at % size == 0 ? (rows - row) / size : 0;
    const int64_t taken = whole > 0 ? whole * size : std::min(left, rows - row);
    parts.push_back({at / size, std::max<int64_t>(1, whole), row, taken});
    row += taken;
  }
  return parts;
}

}  // namespace

MoeSublayer::MoeSublayer(const ModelSpec& spec, const LocalSizes& sizes, const ParamTable& table,
                         int layer, int moe_index)
    : experts_(spec.moe.experts),
      own_experts_(sizes.experts),
      top_k_(spec.moe.top_k),
      renormalize_(spec.moe.renormalize),
      moe_index_(moe_index) {
  const std::string prefix = SublayerPrefix(SublayerKind::kMoe, layer);
  router_ = table.FindStorage(prefix + "router.weight");
  gate_up_ = table.FindStorage(prefix + "experts.gate_up");
  down_ = table.FindStorage(prefix + "experts.down");
}

std::unique_ptr<Saved> MoeSublayer::NewSaved() const { return std::make_unique<MoeSaved>(); }

int64_t MoeSublayer::Capacity(int64_t rows, const PassContext& pass) const {
  const int64_t unit = ExpertRowAlignment(pass.ctx->device);
  const auto wanted =
      static_cast<int64_t>(std::ceil(static_cast<double>(rows) * pass.groups->expert_slack()));
  return std::max<int64_t>(1, (wanted + unit - 1) / unit) * unit;
}

void MoeSublayer::AddStatistics(const MoeSaved& s, const PassContext& pass) const {
  RouterStats& stats = *pass.router;
  const Tensor z_sum = stats.z_sum.Slice(0, moe_index_, 1);
  for (const GroupRows& part : GroupsOfRows(pass, s.probs.dim(0))) {
    const int64_t first = moe_index_ * stats.groups + part.group;
    const auto own = [&](Tensor t) { return t.Slice(0, part.row, part.rows); };
    MoeStatistics(stats.prob_sum.Slice(0, first, part.groups),
                  stats.choice_count.Slice(0, first, part.groups), z_sum, own(s.probs),
                  own(s.choice), own(s.logits), *pass.ctx);
  }
}

void MoeSublayer::Forward(Tensor y, Tensor x, const Weights& weights, Arena* keep, Saved* saved,
                          MixerState* /*state*/, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t m = x.dim(0);
  const int64_t rows = ExpertRows(m, top_k_, experts_, ctx.device);
  const DType wide = Wide(x.dtype());
  const int64_t width = weights.Get(gate_up_).dim(1);

  MoeSaved unsaved;
  MoeSaved& s = saved != nullptr ? *static_cast<MoeSaved*>(saved) : unsaved;
  s.logits = keep->Alloc(wide, {m, experts_});
  s.probs = keep->Alloc(wide, {m, experts_});
  s.choice = keep->Alloc(DType::kI32, {m, top_k_});
  s.weight = keep->Alloc(wide, {m, top_k_});
  s.row_of = keep->Alloc(DType::kI32, {m, top_k_});
  s.source = keep->Alloc(DType::kI32, {rows});
  s.offsets = keep->Alloc(DType::kI64, {experts_ + 1});
  s.gate_up = keep->Alloc(x.dtype(), {shared() ? Capacity(rows, pass) : rows, width});
  if (shared()) {
    s.inputs = keep->Alloc(x.dtype(), {s.gate_up.dim(0), x.dim(1)});
    s.expert_offsets = keep->Alloc(DType::kI64, {own_experts_ + 1});
  }

  RouterForward(s.logits, x, weights.Get(router_), ctx);
  weights.Release(router_);
  MoeRouteForward(s.probs, s.choice, s.weight, s.logits, renormalize_, ctx);
  if (pass.router_logits != nullptr) *pass.router_logits = s.logits;
  if (pass.router != nullptr && !pass.recomputing) AddStatistics(s, pass);
  MoeSort(s.row_of, s.source, s.offsets, s.choice, ctx);

  const ArenaScope scope(ctx.scratch);
  shared() ? SharedExpertsForward(y, x, weights, &s, pass)
           : OwnExpertsForward(y, x, weights, s, pass);
  weights.Release(gate_up_);
}

void MoeSublayer::Backward(Tensor dx, Tensor dy, Tensor x, const Weights& weights, Saved* saved,
                           MixerState* /*state*/, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const ArenaScope scope(ctx.scratch);
  const MoeSaved& s = *static_cast<MoeSaved*>(saved);
  const Tensor d_rows = ctx.scratch->Alloc(x.dtype(), {s.source.dim(0), x.dim(1)});
  const Tensor d_weight = ctx.scratch->Alloc(s.weight.dtype(), {x.dim(0), top_k_});
  shared() ? SharedExpertsBackward(d_rows, d_weight, dy, x, weights, s, pass)
           : OwnExpertsBackward(d_rows, d_weight, dy, x, weights, s, pass);
  weights.GradReady(down_);
  weights.GradReady(gate_up_);
  RouterBackward(dx, d_weight, x, weights, s, pass);
  MoePermuteBackward(dx, d_rows, s.row_of, /*accumulate=*/true, ctx);
}

void MoeSublayer::OwnExpertsForward(Tensor y, Tensor x, const Weights& weights, const MoeSaved& s,
                                    const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const int64_t rows = s.source.dim(0), width = s.gate_up.dim(1);
  const Tensor inputs = ctx.scratch->Alloc(x.dtype(), {rows, x.dim(1)});
  MoePermute(inputs, x, s.source, top_k_, ctx);
  const Tensor product = y.defined() ? ctx.scratch->Alloc(x.dtype(), {rows, width / 2}) : Tensor();
  GroupedLinearSwiGluForward(product, s.gate_up, inputs, weights.Get(gate_up_), s.offsets, ctx);
  weights.Release(gate_up_);
  if (!y.defined()) return;
  const Tensor outputs = inputs;  // in place: the inputs have served
  GroupedLinearForward(outputs, product, weights.Get(down_), s.offsets, ctx);
  weights.Release(down_);
  MoeCombine(y, outputs, s.weight, s.row_of, ctx);
}

void MoeSublayer::OwnExpertsBackward(Tensor d_rows, Tensor d_weight, Tensor dy, Tensor x,
                                     const Weights& weights, const MoeSaved& s,
                                     const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  // dy of each row, not yet times its routing weight.
  const Tensor d_outputs = d_rows;
  MoePermute(d_outputs, dy, s.source, top_k_, ctx);
  const Tensor product = ctx.scratch->Alloc(x.dtype(), {d_rows.dim(0), s.gate_up.dim(1) / 2});
  const Tensor d_gate_up = s.gate_up;  // in place
  GroupedSwiGluLinearBackward(d_gate_up, product, {s.weight, d_weight, s.source}, d_outputs,
                              weights.Get(down_), s.gate_up, s.offsets, ctx);
  weights.Release(down_);
  GroupedWgrad(weights, down_, d_outputs, product, s.offsets, ctx);
  const Tensor inputs = d_rows;  // in place: dy of the rows has served
  MoePermute(inputs, x, s.source, top_k_, ctx);
  GroupedWgrad(weights, gate_up_, d_gate_up, inputs, s.offsets, ctx);
  GroupedLinearBackwardInput(d_rows, d_gate_up, weights.Get(gate_up_), s.offsets, ctx);
  weights.Release(gate_up_);
}

namespace {

// The rows of a round's buffer that are in use: ops then count, and look at, no others.
int64_t RowsInUse(const ExpertRoutes::Round& round, int64_t capacity, const Context& ctx) {
  return ctx.planning ? capacity : std::max(ExpertRowAlignment(ctx.device), round.offsets.back());
}

}  // namespace

void MoeSublayer::SharedExpertsForward(Tensor y, Tensor x, const Weights& weights, MoeSaved* s,
                                       const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const Communicator& group = pass.groups->expert();
  const int64_t capacity = s->inputs.dim(0), width = s->gate_up.dim(1);
  const Tensor all_offsets = ctx.scratch->Alloc(DType::kI64, {group.size(), experts_ + 1});
  group.AllGather("moe: counts", all_offsets, s->offsets, ctx);
  // The one read of a sublayer and pass: what to send where is known on the host.
  std::vector<int64_t> offsets(static_cast<size_t>(all_offsets.numel()));
  Download(offsets.data(), all_offsets, ctx);
  s->routes.emplace(offsets, group.size(), group.rank(), capacity);
  if (pass.router != nullptr && !pass.recomputing) {
    pass.router->overflow_rounds += s->routes->rounds() - 1;
  }

  const Tensor rows = ctx.scratch->Alloc(x.dtype(), {s->source.dim(0), x.dim(1)});
  MoePermute(rows, x, s->source, top_k_, ctx);
  const Tensor w_gate_up = weights.Get(gate_up_);
  const Tensor w_down = y.defined() ? weights.Get(down_) : Tensor();
  // All rounds use the memory of the first, which comes last: its activations are what backward
  // finds. Without an output it is all that is needed.
  for (int64_t k = y.defined() ? s->routes->rounds() : 1; k-- > 0;) {
    const ArenaScope scope(ctx.scratch);
    const ExpertRoutes::Round round = s->routes->round(k);
    UploadNumbers(s->expert_offsets, round.offsets, ctx);
    group.ExchangeRows("moe: rows to their experts", s->inputs, round.receives, rows, round.sends,
                       ctx);
    const int64_t used = RowsInUse(round, capacity, ctx);
    const auto in_use = [used](Tensor t) { return t.Slice(0, 0, used); };
    const Tensor product =
        y.defined() ? in_use(ctx.scratch->Alloc(x.dtype(), {capacity, width / 2})) : Tensor();
    GroupedLinearSwiGluForward(product, in_use(s->gate_up), in_use(s->inputs), w_gate_up,
                               s->expert_offsets, ctx);
    if (!y.defined()) continue;
    const Tensor outputs = ctx.scratch->Alloc(x.dtype(), {capacity, x.dim(1)});
    GroupedLinearForward(in_use(outputs), product, w_down, s->expert_offsets, ctx);
    // Each row back to where it came from.
    group.ExchangeRows("moe: rows from their experts", rows, round.sends, outputs, round.receives,
                       ctx);
  }
  weights.Release(gate_up_);
  if (!y.defined()) return;
  weights.Release(down_);
  MoeCombine(y, rows, s->weight, s->row_of, ctx);
}

void MoeSublayer::SharedExpertsBackward(Tensor d_rows, Tensor d_weight, Tensor dy, Tensor x,
                                        const Weights& weights, const MoeSaved& s,
                                        const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const Communicator& group = pass.groups->expert();
  const int64_t capacity = s.inputs.dim(0), rows = d_rows.dim(0), d = x.dim(1);
  const DType wide = s.weight.dtype();
  const auto column = [](Tensor t) { return t.View({t.numel(), 1}); };
  MoePermute(d_rows, dy, s.source, top_k_, ctx);
  const Tensor row_weights = ctx.scratch->Alloc(wide, {rows, 1});
  MoePermute(row_weights, column(s.weight), s.source, /*top_k=*/1, ctx);
  const Tensor d_row_weights = ctx.scratch->Alloc(wide, {rows, 1});
  Fill(d_row_weights, 0, ctx);
  const Tensor x_rows = ctx.scratch->Alloc(x.dtype(), {rows, d});
  if (s.routes->rounds() > 1) MoePermute(x_rows, x, s.source, top_k_, ctx);

  const Tensor w_gate_up = weights.Get(gate_up_), w_down = weights.Get(down_);
  for (int64_t k = 0; k < s.routes->rounds(); ++k) {
    const ArenaScope scope(ctx.scratch);
    const ExpertRoutes::Round round = s.routes->round(k);
    const int64_t used = RowsInUse(round, capacity, ctx);
    const auto in_use = [used](Tensor t) { return t.Slice(0, 0, used); };
    const Tensor inputs = s.inputs, gate_up = in_use(s.gate_up), own_offsets = s.expert_offsets;
    if (k > 0) {  // in the memory of the first round, which is done
      UploadNumbers(own_offsets, round.offsets, ctx);
      group.ExchangeRows("moe: rows to their experts again", inputs, round.receives, x_rows,
                         round.sends, ctx);
      GroupedLinearSwiGluForward(Tensor(), gate_up, in_use(inputs), w_gate_up, own_offsets, ctx);
    }
    const Tensor d_outputs = ctx.scratch->Alloc(x.dtype(), {capacity, d});
    const Tensor weight = ctx.scratch->Alloc(wide, {capacity, 1});
    const Tensor d_own_weight = ctx.scratch->Alloc(wide, {capacity, 1});
    group.ExchangeRows("moe: gradients to the experts",
                       {{d_outputs, d_rows}, {weight, row_weights}}, round.receives, round.sends,
                       ctx);
    // Each row in use is as a token of its own.
    const Tensor numbers = ctx.scratch->Alloc(DType::kI32, {capacity});
    MoeRowNumbers(numbers, round.offsets.back(), ctx);
    const Tensor product = in_use(ctx.scratch->Alloc(x.dtype(), {capacity, gate_up.dim(1) / 2}));
    const Tensor d_gate_up = gate_up;  // in place
    GroupedSwiGluLinearBackward(d_gate_up, product, {weight, d_own_weight, in_use(numbers)},
                                in_use(d_outputs), w_down, gate_up, own_offsets, ctx);
    GroupedWgrad(weights, down_, in_use(d_outputs), product, own_offsets, ctx);
    GroupedWgrad(weights, gate_up_, d_gate_up, in_use(inputs), own_offsets, ctx);
    const Tensor d_inputs = d_outputs;  // in place: dy of the rows has served
    GroupedLinearBackwardInput(in_use(d_inputs), d_gate_up, w_gate_up, own_offsets, ctx);
    group.ExchangeRows("moe: gradients from the experts",
                       {{d_rows, d_inputs}, {d_row_weights, d_own_weight}}, round.sends,
                       round.receives, ctx);
  }
  weights.Release(gate_up_);
  weights.Release(down_);
  MoePermute(column(d_weight), d_row_weights, s.row_of.View({s.row_of.numel()}), /*top_k=*/1, ctx);
}

// Through the combine weights, the aux loss and the z-loss. Overwrites dx.
void MoeSublayer::RouterBackward(Tensor dx, Tensor d_weight, Tensor x, const Weights& weights,
                                 const MoeSaved& s, const PassContext& pass) const {
  const Context& ctx = *pass.ctx;
  const RouterStats& stats = *pass.router;
  const Tensor d_logits = ctx.scratch->Alloc(s.logits.dtype(), {x.dim(0), experts_});
  for (const GroupRows& part : GroupsOfRows(pass, x.dim(0))) {
    const auto own = [&](Tensor t) { return t.Slice(0, part.row, part.rows); };
    Tensor d_prob = stats.d_prob;
    if (d_prob.defined()) {
      d_prob = d_prob.Slice(0, moe_index_ * stats.groups + part.group, part.groups);
    }
    MoeRouteBackward(own(d_logits), own(d_weight), d_prob, stats.z_scale, own(s.probs),
                     own(s.choice), own(s.weight), own(s.logits), renormalize_, ctx);
  }
  RouterBackwardInput(dx, d_logits, weights.Get(router_), /*accumulate=*/false, ctx);
  weights.Release(router_);
  RouterBackwardWeight(weights.Grad(router_), d_logits, x, weights.Accumulate(router_), ctx);
  weights.GradReady(router_);
}

}  // namespace krait
