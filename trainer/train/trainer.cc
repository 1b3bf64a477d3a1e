#include "trainer/train/trainer.h"

#include <algorithm>
#include <cmath>

#include "trainer/train/evaluate.h"
#include "trainer/train/schedule.h"

namespace krait {

Trainer::Trainer(const RunConfig& config)
    : config_(config),
      memory_(PlanTraining(config)),
      table_(config.model),
      weight_arena_("weights", Device::kCpu, memory_.weights),
      grad_arena_("gradients", Device::kCpu, memory_.gradients),
      optimizer_arena_("optimizer", Device::kCpu, memory_.optimizer),
      activation_arena_("activations", Device::kCpu, memory_.activations),
      scratch_arena_("scratch", Device::kCpu, memory_.scratch),
      weights_(&table_, DType::kF32, Device::kCpu, /*with_grad=*/true, &weight_arena_,
               &grad_arena_),
      optimizer_(&weights_, config.optimizer, &optimizer_arena_),
      model_(config.model, &weights_, config.train.recompute),
      activations_(
          model_.NewActivations({.batch = config.train.micro_batch, .seq_len = config.data.seq_len},
                                &activation_arena_)) {
  ctx_.scratch = &scratch_arena_;
  ctx_.deterministic = config.train.deterministic;
}

StepReport Trainer::Step(const TokenBatch& batch) {
  StepReport report = Gradients(batch);
  report.grad_norm = optimizer_.GradNorm(ctx_);
  report.step = ++state_.step;
  report.lr =
      LearningRate(config_.schedule, config_.optimizer.lr, state_.step, config_.train.steps);

  report.was_skipped = !std::isfinite(report.total_loss) || !std::isfinite(report.grad_norm);
  if (report.was_skipped) {
    ++state_.skipped;
    ++state_.skipped_in_row;
  } else {
    state_.skipped_in_row = 0;
    const double clip = ClipFactor(config_.optimizer.clip, report.grad_norm);
    optimizer_.Update(report.lr, clip, ++state_.adam_steps, ctx_);
  }
  state_.sequences += batch.sequences;
  state_.tokens += batch.sequences * batch.seq_len;

  report.skipped = state_.skipped;
  report.skipped_in_row = state_.skipped_in_row;
  report.tokens = state_.tokens;
  return report;
}

StepReport Trainer::Gradients(const TokenBatch& batch, const ProbeSink* probe) {
  const int64_t micro_batch = config_.train.micro_batch;
  KRAIT_CHECK(batch.sequences > 0 && batch.sequences % micro_batch == 0);
  const auto passes = static_cast<double>(batch.sequences / micro_batch);
  const auto targets = static_cast<double>(std::max<int64_t>(batch.target_count, 1));

  weights_.ZeroGrad();
  PassSums step;
  for (int64_t first = 0; first < batch.sequences; first += micro_batch) {
    const Batch pass = PassOf(batch, first, micro_batch);
    const PassSums sums = model_.Forward(pass, 1 / targets, activations_.get(), ctx_, probe);
    model_.Backward(pass, 1 / passes, activations_.get(), ctx_);
    step.cross_entropy += sums.cross_entropy;
    step.aux_loss += sums.aux_loss;
    step.z_loss += sums.z_loss;
    step.imbalance.resize(sums.imbalance.size());
    for (size_t j = 0; j < sums.imbalance.size(); ++j) step.imbalance[j] += sums.imbalance[j];
  }

  StepReport report;
  report.steps = config_.train.steps;
  report.has_moe = config_.model.Has(SublayerKind::kMoe);
  report.loss = step.cross_entropy / targets;
  report.aux_loss = step.aux_loss / passes;
  report.total_loss = report.loss + config_.model.moe.aux_loss * report.aux_loss +
                      config_.model.moe.z_loss * step.z_loss / passes;
  size_t j = 0;
  for (const Sublayer& sublayer : config_.model.sublayers) {
    if (sublayer.kind != SublayerKind::kMoe) continue;
    report.imbalance.emplace_back(sublayer.layer, step.imbalance.at(j++) / passes);
  }
  return report;
}

}  // namespace krait
