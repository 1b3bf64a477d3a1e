#include "trainer/config/config_keys.h"

#include <sstream>

namespace krait {
namespace {

constexpr double kNoMax = std::numeric_limits<double>::max();
constexpr Range kPositive = {0, kNoMax, /*min_open=*/true};
constexpr Range kNotNegative = {0, kNoMax};
constexpr Range kShare = {0, 1};
constexpr WholeRange kWidth = {1, kMaxWidth};
constexpr WholeRange kFfWidth = {1, 16 * kMaxWidth};
constexpr WholeRange kOffset = {0, kMaxPeriod};
constexpr WholeRange kFromOne = {1};
constexpr char kRequired[] = "required";

void VisitModel(ModelSpec* model, ConfigDraft* draft, ConfigVisitor* v) {
  v->Whole({"model.vocab_size", "token ids", "tokens", kRequired}, &model->vocab_size,
           {2, 1 << 24});
  v->Whole({"model.d_model", "width of the residual stream", "", kRequired}, &model->d_model,
           kWidth);
  v->Whole({"model.n_layers", "a mixer and a feed-forward each", "layers", kRequired},
           &model->n_layers, {1, kMaxLayers});
  v->Bool({"model.tie_embeddings", "the output head is the embedding matrix"},
          &model->tie_embeddings);
  v->Whole({"model.pad_token", "id whose embedding row gets no gradient from the lookup"},
           &model->pad_token, {0, 1 << 24, "none", -1});
  v->Number({"model.norm_eps", "added to the mean square inside every RMSNorm"}, &model->norm_eps,
            kPositive);
  v->String({"model.pattern", "mixer (m, a) and E for experts of each layer, repeated", "",
             "by mixer and moe"},
            &draft->pattern);
  v->String({.path = "model.mixer.ratio",
             .meaning = "attention layers : Mamba layers in one period",
             .shown = false},
            &draft->ratio);
  v->Whole({"model.mixer.offset", "first attention layer of a period", "layers",
            "floor(period / (2 * attention))", false},
           &draft->mixer_offset, kOffset);

  AttentionSpec* attention = &model->attention;
  const bool attends = model->Has(SublayerKind::kAttention);
  v->Whole({"model.attention.heads", "query heads", "heads", "required where there is attention",
            attends},
           &attention->heads, kWidth);
  v->Whole({"model.attention.kv_heads", "key and value heads", "heads", "heads", attends},
           &attention->kv_heads, kWidth);
  v->Whole({"model.attention.head_dim", "width of a head", "", "d_model / heads", attends},
           &attention->head_dim, kWidth);
  v->Number({"model.attention.rope_theta", "base of the rotary positions; none: no positions", "",
             nullptr, attends && attention->rope_theta > 0},
            &attention->rope_theta, {.min = 0, .max = kNoMax, .word = "none"});

  MambaSpec* mamba = &model->mamba;
  const bool scans = model->Has(SublayerKind::kMamba);
  v->Whole({"model.mamba.d_state", "states of a channel", "", nullptr, scans}, &mamba->d_state,
           {1, 256});
  v->Whole({"model.mamba.d_conv", "taps of the causal convolution", "tokens", nullptr, scans},
           &mamba->d_conv, {1, 8});
  v->Whole({"model.mamba.expand", "channels: this times d_model", "", nullptr, scans},
           &mamba->expand, {1, 64});
  v->Whole({"model.mamba.dt_rank", "rank of the step size; auto: d_model / 16, rounded up", "",
            nullptr, scans},
           &mamba->dt_rank, {1, kMaxWidth, "auto", 0});
  v->Bool({"model.mamba.inner_norms", "RMSNorm on dt, B and C", "", nullptr, scans},
          &mamba->inner_norms);
  v->Bool({"model.mamba.conv_bias", "a bias in the convolution", "", nullptr, scans},
          &mamba->conv_bias);
  v->Bool({"model.mamba.proj_bias", "biases in in_proj and out_proj", "", nullptr, scans},
          &mamba->proj_bias);
  v->Whole({"model.mlp.d_ff", "inner width of the dense feed-forward", "", kRequired},
           &model->mlp_d_ff, kFfWidth);

  MoeSpec* moe = &model->moe;
  const bool routes = model->Has(SublayerKind::kMoe);
  v->Whole({.path = "model.moe.every",
            .meaning = "every so many layers have experts",
            .unit = "layers",
            .shown = false},
           &draft->moe_every, {1, kMaxPeriod, "none", 0});
  v->Whole({"model.moe.offset", "first layer with experts", "layers", "every - 1", false},
           &draft->moe_offset, kOffset);
  v->Whole({"model.moe.experts", "experts of a layer", "experts", nullptr, routes}, &moe->experts,
           {1, 4096});
  v->Whole({"model.moe.top_k", "experts that a token goes to", "experts", nullptr, routes},
           &moe->top_k, {1, 4096});
  v->Whole({"model.moe.d_ff", "inner width of an expert", "", "mlp.d_ff", routes}, &moe->d_ff,
           kFfWidth);
  v->Bool({"model.moe.renormalize", "the chosen experts' weights are scaled to sum to 1", "",
           nullptr, routes},
          &moe->renormalize);
  v->Number({"model.moe.aux_loss", "coefficient of the load-balancing loss", "", nullptr, routes},
            &moe->aux_loss, kNotNegative);
  v->Number({"model.moe.z_loss", "coefficient of the router's z-loss", "", nullptr, routes},
            &moe->z_loss, kNotNegative);
  v->Enum({"model.moe.aux_pool", "layers over which the load-balancing statistics are pooled", "",
           nullptr, routes},
          &moe->aux_pool, {"model", "layer"});
  v->Whole({"model.moe.aux_sequences",
            "sequences over which they are pooled; pass: all of a forward pass", "sequences",
            nullptr, routes},
           &moe->aux_sequences, {1, 1 << 20, "pass", 0});
  v->Number({"model.activation_loss",
             "coefficient of the mean square of the sublayers' outputs, added over sublayers", "",
             nullptr, model->activation_loss > 0},
            &model->activation_loss, kNotNegative);
  v->Number({"model.init.std", "of the normal initial weights"}, &model->init_std, kPositive);
  v->Enum({"model.init.scheme", "mamba: scaled by depth, dt by range; hf: as transformers"},
          &model->init_scheme, {"mamba", "hf"});
}

void VisitTrain(TrainConfig* train, ConfigVisitor* v) {
  v->Enum({"train.device", "where the run computes"}, &train->device, {"auto", "cpu", "cuda"});
  v->Enum({"train.precision", "auto: bf16 on cuda, fp32 on cpu"}, &train->precision,
          {"auto", "fp32", "bf16"});
  v->Bool({"train.deterministic", "the same layout gives the same bits"}, &train->deterministic);
  v->Whole({"train.steps", "optimizer steps of the run", "steps", "required, or train.tokens",
            train->steps > 0 && train->tokens == 0},
           &train->steps, {1, kMaxSteps});
  v->Whole({"train.tokens", "length of the run, instead of steps", "tokens", "by train.steps",
            train->tokens > 0},
           &train->tokens, {1, kMaxTokens});
  v->Ramp(
      {"train.batch_tokens",
       "input tokens of an optimizer step; a ramp: each size with the tokens seen from which it "
       "holds",
       "tokens"},
      &train->batch_tokens);
  v->Whole({"train.micro_batch", "sequences of a forward pass", "sequences"}, &train->micro_batch,
           {1, 1 << 20});
  auto seed = static_cast<int64_t>(train->seed);
  v->Whole({"train.seed", "of weights and sample order"}, &seed, {0});
  train->seed = static_cast<uint64_t>(seed);
  v->Enum({"train.recompute", "what the backward pass computes again to save memory"},
          &train->recompute, {"none", "norms", "mixers", "layer"});
  v->Number({"train.hang_timeout",
             "a rank of several that makes no progress for so long ends the job (ten times as long "
             "while it "
             "loads, saves or evaluates)",
             "seconds"},
            &train->hang_timeout, kPositive);
  SpikeGuardConfig* guard = &train->spike_guard;
  v->Whole(
      {"train.spike_guard.window",
       "a step whose loss or gradient norm is far above those of so many steps before is skipped",
       "steps", nullptr, guard->window > 0},
      &guard->window, {8, 4096, "none", 0});
  v->Number({"train.spike_guard.z", "how far: standard deviations above their mean", "", nullptr,
             guard->window > 0},
            &guard->z, kPositive);
}

void VisitOptimizer(OptimizerConfig* optimizer, ModelSpec* model, ConfigVisitor* v) {
  int only = 0;
  v->Enum({"optimizer.name", "the update rule"}, &only, {"adamw"});
  v->Number({"optimizer.lr", "peak learning rate"}, &optimizer->lr, kPositive);
  v->Numbers({"optimizer.betas", "decay of the first and second moment"},
             {&optimizer->beta1, &optimizer->beta2}, {0, 1, /*min_open=*/false, /*max_open=*/true});
  v->Number({"optimizer.eps", "added to the root of the second moment"}, &optimizer->eps,
            kPositive);
  v->Number({"optimizer.weight_decay", "decoupled, on all but norms, biases, A_log and D"},
            &optimizer->weight_decay, kNotNegative);
  v->Number({"optimizer.clip", "largest norm of the gradient; 0: off"}, &optimizer->clip,
            kNotNegative);
  v->Enum({"optimizer.moments", "dtype of both moments"}, &optimizer->moments, {"fp32", "bf16"});
  v->Whole({"optimizer.mup.base_d_model",
            "muP: d_model of the model that lr and init.std were chosen for", "", nullptr,
            model->mup_base_d_model > 0},
           &model->mup_base_d_model, {1, kMaxWidth, "none", 0});
}

void VisitSchedule(ScheduleConfig* schedule, ConfigDraft* draft, ConfigVisitor* v) {
  v->Enum({"schedule.name", "course of the learning rate"}, &schedule->kind,
          {"cosine", "wsd", "linear", "constant"});
  v->Whole({"schedule.warmup_steps", "linear rise at the start", "steps"}, &schedule->warmup_steps,
           {0, kMaxSteps});
  v->Number({"schedule.min_lr_ratio", "last learning rate over the peak", "", nullptr,
             schedule->kind != ScheduleKind::kConstant},
            &schedule->min_lr_ratio, kShare);
  const bool decays = schedule->kind == ScheduleKind::kWsd;
  v->Number(
      {"schedule.decay_steps", "final fall of wsd: a count, or up to 1.0 a share of the steps",
       "steps", nullptr, decays},
      &draft->decay_steps, {.min = 0, .max = static_cast<double>(kMaxSteps), .count = true});
  int only = 0;
  v->Enum({"schedule.decay", "shape of that fall", "", nullptr, decays}, &only, {"linear"});
}

}  // namespace

int64_t PatternWords(const std::string& pattern) {
  std::istringstream words(pattern);
  int64_t count = 0;
  for (std::string word; words >> word;) ++count;
  return count;
}

void VisitKeys(RunConfig* config, ConfigDraft* draft, ConfigVisitor* v) {
  v->String(
      {"run_dir", "folder of the run", "", "runs/NAME of the config", !config->run_dir.empty()},
      &config->run_dir);
  VisitModel(&config->model, draft, v);

  ParallelConfig* parallel = &config->parallel;
  v->Whole({"parallel.tensor", "ranks that share each matrix", "ranks"}, &parallel->tensor,
           {1, 1 << 20});
  v->Whole({"parallel.expert", "ranks that share the experts", "ranks"}, &parallel->expert,
           {1, 1 << 20});
  v->Whole({"parallel.data", "ranks with sequences of their own; auto: all there are", "ranks"},
           &parallel->data, {1, 1 << 20, "auto", 0});
  v->Number({"parallel.expert_slack", "planned rows of the experts over the balanced number"},
            &parallel->expert_slack, {1, 1e6});
  v->Enum({"parallel.reduce", "dtype in which gradients travel"}, &parallel->reduce,
          {"fp32", "bf16"});

  DataConfig* data = &config->data;
  v->Sources({"data.train", "token files and their weights", "", "required to train",
              !data->train.empty()},
             &data->train);
  v->Sources({"data.validation", "token files to evaluate on"}, &data->validation);
  v->Whole({"data.seq_len", "length of a sequence", "tokens"}, &data->seq_len, {2, 1 << 24});
  v->Bool({"data.reset_at_documents", "attention, conv, scan and positions start anew at each"},
          &data->reset_at_documents);

  VisitTrain(&config->train, v);
  VisitOptimizer(&config->optimizer, &config->model, v);
  VisitSchedule(&config->schedule, draft, v);

  CheckpointConfig* checkpoint = &config->checkpoint;
  v->Whole({"checkpoint.every", "between two saves", "steps"}, &checkpoint->every, kFromOne);
  v->Whole({"checkpoint.keep", "newest checkpoints that are kept", "checkpoints"},
           &checkpoint->keep, {2});
  v->Whole({"checkpoint.keep_every", "every so many steps one is kept for good", "steps"},
           &checkpoint->keep_every, {1, kMaxSteps, "none", 0});
  v->Bool({"checkpoint.async", "a thread writes while training goes on"}, &checkpoint->async);
  // The default follows run_dir, so that a moved run keeps its checkpoints inside.
  v->String({"checkpoint.dir", "folder of the checkpoints", "", "run_dir/checkpoints",
             !checkpoint->dir.empty() && checkpoint->dir != config->run_dir + "/checkpoints"},
            &checkpoint->dir);
  v->Whole({"log.every", "between two log lines", "steps"}, &config->log.every, kFromOne);
  v->Bool({"log.tensorboard", "write TensorBoard files too"}, &config->log.tensorboard);
  v->Bool({"log.layer_statistics",
           "with a log line: activations, dt, A and routers by layer (a forward pass more)", "",
           nullptr, config->log.layer_statistics},
          &config->log.layer_statistics);
  const bool evaluates = !data->validation.empty();
  v->Whole({"evaluation.every", "between two evaluations", "steps", nullptr, evaluates},
           &config->evaluation.every, kFromOne);
  v->Whole({"evaluation.tokens", "held-out tokens of an evaluation", "tokens", nullptr, evaluates},
           &config->evaluation.tokens, {1, kMaxTokens});
}

}  // namespace krait
