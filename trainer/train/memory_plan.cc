#include "trainer/train/memory_plan.h"

#include "kernels/arena.h"
#include "kernels/context.h"
#include "model/hybrid_model.h"
#include "model/params.h"
#include "model/weights.h"
#include "trainer/checkpoint/checkpoint_async.h"
#include "trainer/train/optimizer_state.h"

namespace krait {

MemoryPlan PlanTraining(const RunConfig& config) {
  const ParamTable table(config.model);
  Arena weight_arena("weights");
  Arena grad_arena("gradients");
  Arena optimizer_arena("optimizer");
  Arena activation_arena("activations");
  Arena scratch_arena("scratch");
  Arena batch_arena("batches");
  Context ctx;
  ctx.scratch = &scratch_arena;
  ctx.planning = true;

  const Weights weights(&table, DType::kF32, Device::kCpu, /*with_grad=*/true, &weight_arena,
                        &grad_arena);
  OptimizerState optimizer(&weights, config.optimizer, &optimizer_arena);
  HybridModel model(config.model, &weights, config.train.recompute);

  // The rows of a whole step are read at once; a pass is a slice of them. Evaluation reads the rows
  // of one pass.
  const int64_t columns = config.data.seq_len;
  const int64_t pass_rows = config.train.micro_batch;
  const int64_t step_rows = config.accumulation(/*data_ranks=*/1) * pass_rows;
  const auto take = [&](int64_t rows) {
    Batch batch;
    batch.shape = {rows, columns};
    batch.tokens = batch_arena.Alloc(DType::kI32, {rows, columns});
    batch.targets = batch_arena.Alloc(DType::kI32, {rows, columns});
    batch.doc_start = batch_arena.Alloc(DType::kI32, {rows, columns});
    return batch;
  };
  take(step_rows);
  const Batch batch = take(pass_rows);

  const std::unique_ptr<ActivationSet> activations =
      model.NewActivations(batch.shape, &activation_arena);
  model.Forward(batch, /*loss_scale=*/1, activations.get(), ctx);
  model.Backward(batch, /*aux_scale=*/1, activations.get(), ctx);
  optimizer.Update(/*lr=*/0, /*grad_scale=*/1, /*step=*/1, ctx);
  model.Evaluate(batch, ctx);

  MemoryPlan plan;
  plan.weights = weight_arena.high_water();
  plan.gradients = grad_arena.high_water();
  plan.optimizer = optimizer_arena.high_water();
  plan.activations = activation_arena.high_water();
  plan.scratch = scratch_arena.high_water();
  plan.batches = batch_arena.high_water();
  if (config.checkpoint.async) {
    plan.staging = AsyncSaver::StagingBytes(StateBoxes(weights, &optimizer));
  }
  return plan;
}

}  // namespace krait
