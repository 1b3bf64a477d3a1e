#include "trainer/train/memory_plan.h"

#include <optional>

#include "data/read_ahead.h"
#include "kernels/arena.h"
#include "kernels/context.h"
#include "kernels/cuda/runtime.h"
#include "model/bucket_exchange.h"
#include "model/hybrid_model.h"
#include "model/params.h"
#include "model/weights.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/report/environment.h"
#include "trainer/train/optimizer_state.h"
#include "trainer/train/pass_batch.h"
#include "trainer/train/trainer.h"

namespace krait {

namespace {

// Of a communicator, as seen on two H100s.
constexpr int64_t kNcclBytes = int64_t{300} << 20;

}  // namespace

MemoryUse MemoryOf(Device device) {
  if (device == Device::kCpu) return {PeakMemoryBytes(), MachineMemory()};
  const cuda::DeviceInfo info = cuda::Info();
  return {info.total_bytes - info.free_bytes, info.total_bytes};
}

MemoryPlan PlanTraining(const RunConfig& config, const Mesh& mesh) {
  const ParamTable table(config.model, mesh.tensor);
  const Placement placement = PlacementOf(config);
  std::optional<Groups> several;
  if (mesh.world() > 1)
    several.emplace(nullptr, mesh, config.parallel.expert_slack, placement.device);
  const Groups* const groups = several.has_value() ? &*several : nullptr;
  Arena weight_arena("weights", placement.device);
  Arena grad_arena("gradients", placement.device);
  Arena optimizer_arena("optimizer", placement.device);
  Arena activation_arena("activations", placement.device);
  Arena scratch_arena("scratch", placement.device);
  Arena scalar_arena("scalars", placement.device);
  Arena batch_arena("batches", placement.device);
  Arena communication_arena("communication", placement.device);
  Context ctx;
  ctx.device = placement.device;
  ctx.scratch = &scratch_arena;
  ctx.planning = true;

  Weights weights(&table, placement, /*with_grad=*/true, &weight_arena, &grad_arena, mesh);
  std::optional<BucketExchange> exchange;
  if (groups != nullptr) {
    exchange.emplace(&weights.layout(), groups, Wide(placement.compute), ReduceDType(config),
                     &communication_arena);
  }
  BucketExchange* const exchanged = exchange.has_value() ? &*exchange : nullptr;
  weights.SetExchange(exchanged);
  OptimizerState optimizer(&weights, config.optimizer, &optimizer_arena, ctx, exchanged);
  HybridModel model(config.model, &weights, config.train.recompute, {}, groups);
  const StepScalars scalars(model, &scalar_arena);

  // The rows of steps are in host memory, read ahead. On the CPU a pass is a slice of them, and
  // evaluation reads the rows of one pass; on CUDA those of a pass are copied.
  const int64_t pass_rows = config.train.micro_batch;
  const int64_t step_rows = config.accumulation(mesh.data) * pass_rows;
  Arena row_arena("rows", Device::kCpu);
  for (int64_t i = 0; i < ReadAhead::Batches(step_rows * config.data.seq_len); ++i) {
    PassBatch::Planned(step_rows, config.data.seq_len, &row_arena);
  }
  const Batch batch = PassBatch::Planned(pass_rows, config.data.seq_len, &batch_arena, mesh.tensor);

  const std::unique_ptr<ActivationSet> activations =
      model.NewActivations(batch.shape, &activation_arena);
  weights.BeginPass(ctx, /*first=*/true, /*last=*/true);
  model.Forward(batch, scalars.loss_scale, scalars.sums, activations.get(), ctx);
  model.Backward(batch, /*aux_scale=*/1, activations.get(), ctx);
  MemoryPlan plan;
  for (const Arena* arena : {&activation_arena, &scratch_arena, &scalar_arena}) {
    plan.signature = plan.signature * 31 + arena->signature();
  }
  const auto sent = [&] { return groups != nullptr ? groups->planned() : Groups::Traffic(); };
  plan.sent = sent();
  // Of every pass of a step; the gradients of the last one.
  plan.sent.tensor *= config.accumulation(mesh.data);
  plan.sent.expert *= config.accumulation(mesh.data);
  KRAIT_CHECK(optimizer.Init(config.model, config.train.seed, ctx).ok());
  const int64_t before_update = sent().data;
  optimizer.SumOfSquares(scalars.sum_of_squares, ctx);
  if (groups != nullptr) groups->stage().AllReduceSum("step", scalars.shared, ctx);
  optimizer.Update(/*lr=*/0, scalars.sums, scalars.sum_of_squares, scalars.control, ctx);
  plan.sent.data += sent().data - before_update;
  model.Evaluate(batch, scalars.sums, ctx);

  plan.device = placement.device;
  plan.weights = weight_arena.high_water();
  plan.gradients = grad_arena.high_water();
  plan.optimizer = optimizer_arena.high_water();
  plan.activations = activation_arena.high_water();
  plan.scratch = scratch_arena.high_water();
  plan.batches = batch_arena.high_water();
  plan.rows = row_arena.high_water();
  plan.scalars = scalar_arena.high_water();
  plan.communication = communication_arena.high_water();
  if (groups != nullptr) plan.nccl = groups->nccl_communicators() * kNcclBytes;
  // A device's state goes through host memory in every case.
  if (config.checkpoint.async || placement.device == Device::kCuda) {
    plan.staging = AsyncSaver::StagingBytes(StateBoxes(weights, &optimizer));
  }
  return plan;
}

}  // namespace krait
