#include "trainer/tools/inference.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "absl/strings/str_format.h"
#include "kernels/cuda/runtime.h"
#include "kernels/hardware.h"
#include "trainer/report/progress_line.h"
#include "trainer/train/memory_plan.h"
#include "trainer/train/optimizer_state.h"

namespace krait {

namespace {

// The mesh of so many ranks for a run's model.
absl::StatusOr<Mesh> EvaluationMesh(const RunConfig& config, const World& world) {
  if (world.size() == 1) return Mesh();
  if (world.size() % config.parallel.tensor != 0) {
    return Error(ExitCode::kConfig,
                 absl::StrFormat("parallel.tensor %d of the checkpoint's run needs %d ranks or a "
                                 "multiple of that, or a single one, but there are %d",
                                 config.parallel.tensor, config.parallel.tensor, world.size()));
  }
  const Mesh mesh = MeshOf(config.parallel, world.size(), world.rank());
  KRAIT_RETURN_IF_ERROR(CheckMesh(config.model, mesh));
  return mesh;
}

}  // namespace

std::unique_ptr<Weights> NewWeights(const ParamTable* table, Placement placement,
                                    std::unique_ptr<Arena>* arena, const Mesh& mesh) {
  Arena measure("weights", placement.device);
  const Weights sizes(table, placement, /*with_grad=*/false, &measure, nullptr, mesh);
  *arena = std::make_unique<Arena>("weights", placement.device, measure.high_water());
  return std::make_unique<Weights>(table, placement, /*with_grad=*/false, arena->get(), nullptr,
                                   mesh);
}

absl::StatusOr<std::unique_ptr<InferenceModel>> InferenceModel::Load(
    const std::string& path, const Notice& notice, std::optional<Placement> placement,
    World* given) {
  World* const world = OrAlone(given);
  absl::StatusOr<std::vector<std::string>> found = std::vector<std::string>();
  if (world->first()) found = FindCheckpoints(path);
  KRAIT_RETURN_IF_ERROR(StatusOfFirst(world, found.status()));
  const std::vector<std::string>& candidates = *found;
  ProgressLine line(
      "loading", world->first() ? ProgressLine::OnStandardError() : [](const std::string&) {});
  const Progress progress = [&line](int64_t done, int64_t total) {
    line.Update(done, total);
    return absl::OkStatus();
  };
  std::unique_ptr<InferenceModel> loaded(new InferenceModel());
  loaded->world_ = world;
  const auto load = [&](const Checkpoint& checkpoint) -> absl::Status {
    KRAIT_ASSIGN_OR_RETURN(loaded->config_, ParseConfig(checkpoint.meta.config_yaml,
                                                        checkpoint.path + "/manifest.json: config",
                                                        {}, ConfigUse::kStored, /*ranks=*/1));
    KRAIT_ASSIGN_OR_RETURN(const Mesh mesh, EvaluationMesh(loaded->config_, *world));
    loaded->table_ = std::make_unique<ParamTable>(loaded->config_.model, mesh.tensor);
    Placement place = placement.value_or(PlacementOf(loaded->config_));
    // A run of a GPU can be looked at without one.
    if (place.device == Device::kCuda && !cuda::Available()) place = Placement();
    KRAIT_RETURN_IF_ERROR(PrepareDevice(place.device));
    loaded->weights_ = NewWeights(loaded->table_.get(), place, &loaded->weight_arena_, mesh);
    Context ctx;
    ctx.device = place.device;
    return LoadBoxes(checkpoint, StateBoxes(*loaded->weights_, nullptr), ctx, progress);
  };
  KRAIT_ASSIGN_OR_RETURN(loaded->checkpoint_,
                         LoadNewest(candidates, load, notice, /*passed_over=*/nullptr, world));
  if (world->first()) ProgressLine::ClearStandardError();
  if (world->size() > 1) {
    const Device device = loaded->weights_->placement().device;
    RunConfig here = loaded->config_;
    here.train.device = device == Device::kCuda ? DevicePreference::kCuda : DevicePreference::kCpu;
    KRAIT_RETURN_IF_ERROR(CheckDevice(here, world));
    loaded->groups_ = std::make_unique<Groups>(world, loaded->mesh(),
                                               loaded->config_.parallel.expert_slack, device);
  }
  loaded->model_ =
      std::make_unique<HybridModel>(loaded->config_.model, loaded->weights_.get(), Recompute::kNone,
                                    SublayerRange(), loaded->groups_.get());
  return loaded;
}

InferenceModel::EvaluationMemory InferenceModel::ToEvaluate(PassShape shape) const {
  const Device device = weights_->placement().device;
  Arena scratch("scratch", device), batches("batch", device), planned_batch("batch", device);
  Context ctx;
  ctx.device = device;
  ctx.planning = true;
  ctx.scratch = &scratch;
  PassBatch(device, shape.batch, shape.seq_len, &batches);
  const Tensor sums = batches.Alloc(DType::kF64, {model_->SumsSize()});
  // Groups that plan have no world.
  std::optional<Groups> several;
  if (groups_ != nullptr) several.emplace(nullptr, mesh(), config_.parallel.expert_slack);
  HybridModel model(config_.model, weights_.get(), Recompute::kNone, SublayerRange(),
                    several.has_value() ? &*several : nullptr);
  const int ranks = mesh().tensor;
  model.Evaluate(PassBatch::Planned(shape.batch, shape.seq_len, &planned_batch, ranks), sums, ctx);
  return {scratch.high_water(), batches.high_water()};
}

int64_t InferenceModel::EvaluationBatch(int64_t batch, int64_t seq_len) const {
  const Device device = weights_->placement().device;
  const MemoryUse memory = MemoryOf(device);
  // Ranks of one machine share its memory.
  const int64_t there = memory.total / (device == Device::kCpu ? world_->local_size() : 1);
  const auto fits = [&](int64_t sequences) {
    const EvaluationMemory need = ToEvaluate({.batch = sequences, .seq_len = seq_len});
    return need.scratch + need.batches <= there - memory.used;
  };
  while (batch > 1 && !fits(batch)) batch /= 2;
  const std::vector<int64_t> all = world_->AllGather(batch);
  return *std::min_element(all.begin(), all.end());
}

Evaluator InferenceModel::ForEvaluate(PassShape shape) {
  const Device device = weights_->placement().device;
  const EvaluationMemory need = ToEvaluate(shape);
  scratch_ = std::make_unique<Arena>("scratch", device, need.scratch);
  batch_arena_ = std::make_unique<Arena>("batch", device, need.batches);
  Context ctx;
  ctx.device = device;
  ctx.scratch = scratch_.get();
  const PassBatch batch(device, shape.batch, shape.seq_len, batch_arena_.get(), mesh().tensor);
  return {model_.get(), batch, batch_arena_->Alloc(DType::kF64, {model_->SumsSize()}), ctx,
          groups_.get()};
}

InferenceModel::DecodingMemory InferenceModel::ToDecode(PassShape shape, int64_t max_tokens) const {
  const Placement placement = weights_->placement();
  Arena scratch("scratch", placement.device), memory("decoding state", placement.device);
  Arena batch("batch", placement.device);
  Context ctx;
  ctx.device = placement.device;
  ctx.planning = true;
  ctx.scratch = &scratch;
  const Tensor logits =
      batch.Alloc(Wide(placement.compute), {shape.batch, config_.model.vocab_size});
  const auto state =
      model_->NewSequence(shape.batch, max_tokens, /*with_grad=*/false, &memory, ctx);
  // The first pass, and the largest ones: those behind a full cache.
  for (const int64_t tokens : {shape.seq_len, int64_t{1}}) {
    for (const int64_t before : {int64_t{0}, max_tokens - tokens}) {
      model_->SkipTo(before, state.get());
      model_->Decode(logits, batch.Alloc(DType::kI32, {shape.batch, tokens}), state.get(), ctx);
    }
  }
  return {scratch.high_water(), memory.high_water()};
}

int64_t InferenceModel::DecodeTokens(int64_t prompt, int64_t tokens) const {
  constexpr int64_t kMost = int64_t{1} << 40;  // of which the sizes still fit 64 bits
  const MemoryUse memory = MemoryOf(weights_->placement().device);
  const PassShape shape = {.batch = 1, .seq_len = std::min(kPromptChunk, prompt)};
  const auto fits = [&](int64_t more) {
    const DecodingMemory need = ToDecode(shape, prompt + more);
    return need.scratch + need.state <= memory.total - memory.used;
  };
  tokens = std::min(tokens, kMost);
  if (fits(tokens)) return tokens;
  if (!fits(0)) return -1;
  int64_t most = 0;  // fits
  for (int64_t step = kMost; step > 0; step /= 2) {
    if (most + step < tokens && fits(most + step)) most += step;
  }
  return most;
}

Context InferenceModel::ForDecode(PassShape shape, int64_t max_tokens,
                                  std::unique_ptr<SequenceState>* state) {
  const Device device = weights_->placement().device;
  const DecodingMemory need = ToDecode(shape, max_tokens);
  scratch_ = std::make_unique<Arena>("scratch", device, need.scratch);
  state_arena_ = std::make_unique<Arena>("decoding state", device, need.state);
  Context ctx;
  ctx.device = device;
  ctx.scratch = scratch_.get();
  *state =
      model_->NewSequence(shape.batch, max_tokens, /*with_grad=*/false, state_arena_.get(), ctx);
  return ctx;
}

}  // namespace krait
