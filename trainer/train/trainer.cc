#include "trainer/train/trainer.h"

#include <algorithm>
#include <cmath>

#include "kernels/activation.h"
#include "kernels/cuda/runtime.h"
#include "kernels/optimizer.h"
#include "kernels/transfer.h"
#include "trainer/train/schedule.h"
#include "trainer/train/spike_guard.h"

namespace krait {

StepScalars::StepScalars(const HybridModel& model, Arena* arena) {
  const int64_t n = model.SumsSize();
  all = arena->Alloc(DType::kF64, {n + 2 + kAdamWControlSize});
  sums = all.Slice(0, 0, n);
  overflow = all.Slice(0, n, 1);
  sum_of_squares = all.Slice(0, n + 1, 1);
  shared = all.Slice(0, 0, n + 2);
  control = all.Slice(0, n + 2, kAdamWControlSize);
  loss_scale = arena->Alloc(DType::kF64, {1});
}

Trainer::Trainer(const RunConfig& config, World* world)
    : config_(config),
      placement_(PlacementOf(config)),
      mesh_(world != nullptr ? MeshOf(config.parallel, world->size(), world->rank()) : Mesh()),
      groups_(mesh_.world() == 1
                  ? std::nullopt
                  : std::optional<Groups>(std::in_place, world, mesh_, config.parallel.expert_slack,
                                          placement_.device)),
      memory_(PlanTraining(config, mesh_)),
      table_(config.model, mesh_.tensor),
      weight_arena_("weights", placement_.device, memory_.weights),
      grad_arena_("gradients", placement_.device, memory_.gradients),
      optimizer_arena_("optimizer", placement_.device, memory_.optimizer),
      activation_arena_("activations", placement_.device, memory_.activations),
      scratch_arena_("scratch", placement_.device, memory_.scratch),
      scalar_arena_("scalars", placement_.device, memory_.scalars),
      batch_arena_("batches", placement_.device, memory_.batches),
      communication_arena_("communication", placement_.device, memory_.communication),
      ctx_{.device = placement_.device,
           .scratch = &scratch_arena_,
           .deterministic = config.train.deterministic},
      weights_(&table_, placement_, /*with_grad=*/true, &weight_arena_, &grad_arena_, mesh_),
      exchange_(groups() == nullptr
                    ? std::nullopt
                    : std::optional<BucketExchange>(std::in_place, &weights_.layout(), groups(),
                                                    Wide(placement_.compute), ReduceDType(config),
                                                    &communication_arena_)),
      optimizer_(&weights_, config.optimizer, &optimizer_arena_, ctx_,
                 exchange_.has_value() ? &*exchange_ : nullptr),
      model_(config.model, &weights_, config.train.recompute, {}, groups()),
      activations_(model_.NewActivations({.batch = config.train.micro_batch,
                                          .seq_len = config.data.seq_len,
                                          .ranks = mesh_.tensor},
                                         &activation_arena_)),
      scalars_(model_, &scalar_arena_),
      pass_batch_(placement_.device, config.train.micro_batch, config.data.seq_len, &batch_arena_,
                  mesh_.tensor) {
  const bool on_cuda = placement_.device == Device::kCuda;
  if (on_cuda && placement_.compute == DType::kBF16) peak_flops_ = cuda::Info().peak_flops;
  if (!exchange_.has_value()) return;
  weights_.SetExchange(&*exchange_);
  if (!on_cuda) return;
  peers_.emplace(world,
                 std::vector<const Arena*>{&weight_arena_, &grad_arena_, &activation_arena_,
                                           &scratch_arena_, &scalar_arena_},
                 BucketExchange::Regions(weights_), memory_.signature);
  groups_->ReadPeers(&*peers_);
}

int64_t Trainer::last_step() const {
  const TrainConfig& train = config_.train;
  if (train.tokens == 0) return train.steps;
  return state_.step + train.batch_tokens.Steps(state_.tokens, train.tokens);
}

double Trainer::learning_rate() const {
  const TrainConfig& train = config_.train;
  const BatchRamp& batch = train.batch_tokens;
  const bool same_batch = state_.tokens == batch.After(0, state_.step);
  if (train.tokens > 0 && !same_batch) {
    return LearningRateByTokens(config_.schedule, config_.optimizer.lr,
                                state_.tokens + batch.At(state_.tokens), train.tokens, batch);
  }
  return LearningRate(config_.schedule, config_.optimizer.lr, state_.step + 1, train.steps);
}

StepReport Trainer::Step(const TokenBatch& batch, int64_t targets) {
  const double lr = learning_rate();
  const auto applied = static_cast<double>(state_.adam_steps);
  Upload(scalars_.control.Slice(0, kAdamWSteps, 1), &applied, ctx_);
  RunPasses(batch, targets, nullptr);
  optimizer_.SumOfSquares(scalars_.sum_of_squares, ctx_);
  ShareScalars();
  const SpikeLimits limits = LimitsOf(config_.train.spike_guard, state_);
  // The first of the sums is that of the token losses.
  static_assert(kSumCrossEntropy == 0);
  optimizer_.Update(lr, scalars_.sums.Slice(0, 0, kSumImbalance), scalars_.sum_of_squares,
                    scalars_.control, ctx_, limits.norm,
                    limits.loss * static_cast<double>(std::max<int64_t>(targets, 1)));

  // The one read of a step.
  const std::vector<double> scalars = DownloadDoubles(scalars_.all, ctx_);
  const double* control = scalars.data() + scalars.size() - kAdamWControlSize;
  StepReport report = ReportOf(batch, targets, scalars);
  report.grad_norm = control[kAdamWNorm];
  report.step = ++state_.step;
  report.lr = lr;
  report.was_skipped = control[kAdamWApplied] == 0;
  if (report.was_skipped) {
    ++state_.skipped;
    ++state_.skipped_in_row;
    report.was_spike = std::isfinite(report.grad_norm) && std::isfinite(report.total_loss);
  } else {
    Remember(config_.train.spike_guard, report.loss, report.grad_norm, &state_);
    ++state_.adam_steps;
    state_.skipped_in_row = 0;
  }
  state_.sequences += batch.sequences * mesh_.data;
  state_.tokens += batch.sequences * mesh_.data * batch.seq_len;

  report.skipped = state_.skipped;
  report.skipped_in_row = state_.skipped_in_row;
  report.tokens = state_.tokens;
  return report;
}

StepReport Trainer::Gradients(const TokenBatch& batch, const ProbeSink* probe) {
  const int64_t targets = TargetsOf(batch);
  RunPasses(batch, targets, probe);
  if (exchange_.has_value()) exchange_->WaitForGradients(ctx_);
  Fill(scalars_.sum_of_squares, 0, ctx_);
  ShareScalars();
  return ReportOf(batch, targets, DownloadDoubles(scalars_.all, ctx_));
}

int64_t Trainer::TargetsOf(const TokenBatch& batch) const {
  if (groups() == nullptr) return batch.target_count;
  int64_t targets = 0;
  // Tensor ranks have the same rows.
  const std::vector<int64_t> all = groups()->world()->AllGather(batch.target_count);
  for (size_t r = 0; r < all.size(); r += static_cast<size_t>(mesh_.tensor)) targets += all[r];
  return targets;
}

void Trainer::ShareScalars() {
  if (groups() != nullptr) groups()->stage().AllReduceSum("step", scalars_.shared, ctx_);
}

bool Trainer::WeightsFinite() {
  Fill(scalars_.sum_of_squares, 0, ctx_);
  for (const CheckpointBox& box : Boxes()) {
    if (box.slot == "weight") AddSumOfSquares(scalars_.sum_of_squares, box.values(), ctx_);
  }
  if (groups() != nullptr) {
    groups()->stage().AllReduceSum("finite weights", scalars_.sum_of_squares, ctx_);
  }
  return std::isfinite(DownloadDoubles(scalars_.sum_of_squares, ctx_)[0]);
}

void Trainer::RunPasses(const TokenBatch& batch, int64_t targets, const ProbeSink* probe) {
  const int64_t micro_batch = config_.train.micro_batch;
  KRAIT_CHECK(batch.sequences > 0 && batch.sequences % micro_batch == 0);
  const auto passes = static_cast<double>(batch.sequences / micro_batch);
  const double loss_scale = 1 / static_cast<double>(std::max<int64_t>(targets, 1));
  Upload(scalars_.loss_scale, &loss_scale, ctx_);
  Fill(scalars_.sums, 0, ctx_);
  for (int64_t first = 0; first < batch.sequences; first += micro_batch) {
    const Batch pass = pass_batch_.Of(batch, first, micro_batch, ctx_);
    weights_.BeginPass(ctx_, first == 0, first + micro_batch == batch.sequences);
    model_.Forward(pass, scalars_.loss_scale, scalars_.sums, activations_.get(), ctx_, probe);
    model_.Backward(pass, 1 / passes, activations_.get(), ctx_, nullptr, probe);
  }
  Fill(scalars_.overflow, static_cast<double>(model_.TakeOverflowRounds()), ctx_);  // no waiting
}

StepReport Trainer::ReportOf(const TokenBatch& batch, int64_t targets,
                             const std::vector<double>& scalars) const {
  // Every rank has added its own to all sums but that of the token losses.
  const auto passes =
      static_cast<double>(batch.sequences / config_.train.micro_batch * mesh_.stage());
  const PassSums sums = PassSumsOf(scalars);
  StepReport report;
  report.steps = last_step();
  report.has_moe = config_.model.Has(SublayerKind::kMoe);
  // Without a single target there is no mean to report.
  report.loss = targets > 0 ? sums.cross_entropy / static_cast<double>(targets) : std::nan("");
  report.aux_loss = sums.aux_loss / passes;
  report.total_loss = report.loss + config_.model.moe.aux_loss * report.aux_loss +
                      config_.model.moe.z_loss * sums.z_loss / passes;
  if (config_.model.activation_loss > 0) {
    report.activation_loss =
        sums.squares /
        static_cast<double>(batch.sequences * mesh_.data * batch.seq_len * config_.model.d_model);
    report.total_loss += config_.model.activation_loss * *report.activation_loss;
  }
  size_t j = 0;
  for (const Sublayer& sublayer : config_.model.sublayers) {
    if (sublayer.kind != SublayerKind::kMoe) continue;
    report.imbalance.emplace_back(sublayer.layer, sums.imbalance.at(j++) / passes);
  }
  report.overflow_rounds = static_cast<int64_t>(scalars.at(static_cast<size_t>(model_.SumsSize())));
  return report;
}

}  // namespace krait
