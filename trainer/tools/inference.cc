#include "trainer/tools/inference.h"

#include <cstring>

#include "trainer/train/optimizer_state.h"

namespace krait {

std::unique_ptr<Weights> NewWeights(const ParamTable* table, std::unique_ptr<Arena>* arena) {
  Arena measure("weights");
  const Weights sizes(table, DType::kF32, Device::kCpu, /*with_grad=*/false, &measure, nullptr);
  *arena = std::make_unique<Arena>("weights", Device::kCpu, measure.high_water());
  return std::make_unique<Weights>(table, DType::kF32, Device::kCpu, /*with_grad=*/false,
                                   arena->get(), nullptr);
}

absl::StatusOr<std::unique_ptr<InferenceModel>> InferenceModel::Load(const std::string& path,
                                                                     const Notice& notice) {
  std::vector<std::string> candidates;
  KRAIT_ASSIGN_OR_RETURN(candidates, FindCheckpoints(path));
  std::unique_ptr<InferenceModel> loaded(new InferenceModel());
  const auto load = [&](const Checkpoint& checkpoint) -> absl::Status {
    KRAIT_ASSIGN_OR_RETURN(loaded->config_, ParseConfig(checkpoint.meta.config_yaml,
                                                        checkpoint.path + "/manifest.json: config",
                                                        {}, ConfigUse::kPlan, /*ranks=*/1));
    loaded->table_ = std::make_unique<ParamTable>(loaded->config_.model);
    loaded->weights_ = NewWeights(loaded->table_.get(), &loaded->weight_arena_);
    return LoadBoxes(checkpoint, StateBoxes(*loaded->weights_, nullptr));
  };
  KRAIT_ASSIGN_OR_RETURN(loaded->checkpoint_, LoadNewest(candidates, load, notice));
  loaded->model_ = std::make_unique<HybridModel>(loaded->config_.model, loaded->weights_.get(),
                                                 Recompute::kNone);
  return loaded;
}

Context InferenceModel::ForEvaluate(PassShape shape) {
  Arena measure("scratch");
  Arena batch("batch");
  Context ctx;
  ctx.planning = true;
  ctx.scratch = &measure;
  const auto ids = [&] { return batch.Alloc(DType::kI32, {shape.batch, shape.seq_len}); };
  model_->Evaluate({.shape = shape, .tokens = ids(), .targets = ids(), .doc_start = ids()}, ctx);
  scratch_ = std::make_unique<Arena>("scratch", Device::kCpu, measure.high_water());
  ctx.planning = false;
  ctx.scratch = scratch_.get();
  return ctx;
}

Context InferenceModel::ForDecode(PassShape shape, int64_t max_tokens,
                                  std::unique_ptr<DecodeState>* state) {
  Arena measure("scratch"), measured_state("decoding state"), batch("batch");
  Context ctx;
  ctx.planning = true;
  ctx.scratch = &measure;
  const Tensor logits = batch.Alloc(DType::kF32, {shape.batch, config_.model.vocab_size});
  {
    // The largest pass comes last, behind a full cache.
    auto planned = model_->NewDecodeState(shape.batch, max_tokens, &measured_state, ctx);
    for (int64_t done = 0; done < max_tokens;) {
      const int64_t tokens = std::min(shape.seq_len, max_tokens - done);
      model_->Decode(logits, batch.Alloc(DType::kI32, {shape.batch, tokens}), planned.get(), ctx);
      done += tokens;
    }
  }
  scratch_ = std::make_unique<Arena>("scratch", Device::kCpu, measure.high_water());
  state_arena_ =
      std::make_unique<Arena>("decoding state", Device::kCpu, measured_state.high_water());
  ctx.planning = false;
  ctx.scratch = scratch_.get();
  *state = model_->NewDecodeState(shape.batch, max_tokens, state_arena_.get(), ctx);
  return ctx;
}

}  // namespace krait
