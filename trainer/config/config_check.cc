#include "trainer/config/config_check.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "kernels/base/number.h"

namespace krait {
namespace {

// Beyond these the sizes of a plan would no longer fit in 64 bits.
constexpr double kMaxParameters = 1e15;
constexpr double kMaxPassBytes = 1e18;
constexpr double kMaxPassTokens = 1 << 26;
constexpr double kMaxRunTokens = 4e18;
constexpr int64_t kMaxTensors = 1'000'000;

void CheckAttention(const ModelSpec& model, ConfigReader* reader) {
  const AttentionSpec& attention = model.attention;
  if (!model.Has(SublayerKind::kAttention) || !reader->Good({"model.attention.heads"})) return;
  if (reader->Good({"model.attention.kv_heads"}) && attention.heads % attention.kv_heads != 0) {
    reader->Fail("model.attention.kv_heads",
                 absl::StrCat("model.attention.heads ", attention.heads,
                              " must be a multiple of kv_heads ", attention.kv_heads));
  }
  if (!reader->Good({"model.d_model", "model.attention.head_dim"})) return;
  if (!reader->Has("model.attention.head_dim") && model.d_model % attention.heads != 0) {
    reader->Fail("model.attention.heads",
                 absl::StrCat("model.d_model ", model.d_model,
                              " must be a multiple of model.attention.heads ", attention.heads,
                              ", or model.attention.head_dim must be given"));
    return;
  }
  if (attention.rope_theta > 0 && attention.head_dim % 2 != 0) {
    reader->Fail("model.attention.rope_theta",
                 absl::StrCat("model.attention.rope_theta turns pairs of components, so head_dim ",
                              attention.head_dim, " must be even"));
  }
}

void CheckMoe(const ModelSpec& model, ConfigReader* reader) {
  if (!model.Has(SublayerKind::kMoe)) return;
  if (!reader->Good({"model.moe.experts", "model.moe.top_k"})) return;
  if (model.moe.top_k > model.moe.experts) {
    reader->Fail(
        "model.moe.top_k",
        absl::StrCat(reader->Show("model.moe.top_k", std::to_string(model.moe.top_k)),
                     " must not be above ",
                     reader->Show("model.moe.experts", std::to_string(model.moe.experts))));
  }
  if (model.Count(SublayerKind::kMoe) * model.moe.experts * 3 > kMaxTensors) {
    reader->Fail("model.moe.experts",
                 absl::StrCat("model.moe.experts ", model.moe.experts, " in ",
                              model.Count(SublayerKind::kMoe), " MoE layers are more than ",
                              PrintGrouped(kMaxTensors), " weight tensors"));
  }
}

// Per token and sublayer kind: the widths of its activations, and its parameters. Upper bounds.
struct Bounds {
  double parameters = 0;
  double widths = 0;
};
Bounds SizeBounds(const ModelSpec& model) {
  const auto d = static_cast<double>(model.d_model);
  const auto q =
      static_cast<double>(model.attention.heads) * static_cast<double>(model.attention.head_dim);
  const auto inner = static_cast<double>(model.mamba.d_inner);
  const auto state = static_cast<double>(model.mamba.d_state);
  const auto rank = static_cast<double>(model.mamba.dt_rank);
  const auto f = static_cast<double>(model.mlp_d_ff);
  const auto moe_f = static_cast<double>(model.moe.d_ff);
  const auto count = [&model](SublayerKind kind) { return static_cast<double>(model.Count(kind)); };
  Bounds bounds;
  bounds.parameters =
      2 * d * static_cast<double>(model.vocab_size) + count(SublayerKind::kAttention) * 4 * d * q +
      count(SublayerKind::kMamba) * inner * (3 * d + 3 * state + 2 * rank + 12) +
      count(SublayerKind::kMlp) * 3 * d * f +
      count(SublayerKind::kMoe) * static_cast<double>(model.moe.experts) * d * (3 * moe_f + 1);
  bounds.widths =
      count(SublayerKind::kAttention) * 6 * q +
      count(SublayerKind::kMamba) * (8 * inner + rank + inner * state) +
      count(SublayerKind::kMlp) * 4 * f +
      count(SublayerKind::kMoe) * static_cast<double>(model.moe.top_k) * (4 * moe_f + 2 * d) +
      static_cast<double>(model.sublayers.size() + 2) * 4 * d;
  return bounds;
}

void CheckBatch(const RunConfig& config, int64_t data_ranks, ConfigReader* reader) {
  if (!reader->Good({"train.batch_tokens", "train.micro_batch", "data.seq_len"})) return;
  const double unit_size = static_cast<double>(config.data.seq_len) *
                           static_cast<double>(config.train.micro_batch) *
                           static_cast<double>(data_ranks);
  const std::string product =
      absl::StrCat(reader->Show("data.seq_len", std::to_string(config.data.seq_len)), " x ",
                   reader->Show("train.micro_batch", std::to_string(config.train.micro_batch)),
                   " x ", data_ranks, data_ranks == 1 ? " data rank" : " data ranks");
  if (unit_size > 1e15) {
    reader->Fail("train.batch_tokens", absl::StrCat(product, " is too large"));
    return;
  }
  const auto unit = static_cast<int64_t>(unit_size);
  for (const BatchStage& stage : config.train.batch_tokens.stages()) {
    const int64_t batch = stage.tokens;
    if (batch % unit == 0) continue;
    const int64_t below = batch / unit * unit;
    std::string nearest = absl::StrCat(below + unit);
    if (below > 0) nearest = absl::StrCat(below, " and ", nearest);
    reader->Fail("train.batch_tokens",
                 absl::StrCat(reader->Show("train.batch_tokens", std::to_string(batch)),
                              " must be a multiple of ", product, " = ", unit,
                              below > 0 ? "; the nearest valid values are "
                                        : "; the nearest valid value is ",
                              nearest));
  }
}

// The router's statistics of N sequences are taken within a pass.
void CheckAuxSequences(const RunConfig& config, ConfigReader* reader) {
  const int64_t n = config.model.moe.aux_sequences, micro_batch = config.train.micro_batch;
  if (n == 0 || !reader->Good({"model.moe.aux_sequences", "train.micro_batch"})) return;
  if (micro_batch % n == 0) return;
  reader->Fail("model.moe.aux_sequences",
               absl::StrCat("model.moe.aux_sequences ", n, " must divide ",
                            reader->Show("train.micro_batch", std::to_string(micro_batch)),
                            ", or be `pass`"));
}

void CheckSchedule(const RunConfig& config, ConfigReader* reader) {
  const int64_t steps = config.train.steps;
  if (steps == 0 || !reader->Good({"train.steps", "train.tokens", "train.batch_tokens",
                                   "schedule.warmup_steps"})) {
    return;
  }
  const std::string of_steps = reader->Has("train.tokens")
                                   ? absl::StrCat("the ", steps, " steps of train.tokens")
                                   : absl::StrCat("train.steps ", steps);
  const int64_t warmup = config.schedule.warmup_steps;
  if (warmup > steps) {
    reader->Fail("schedule.warmup_steps",
                 absl::StrCat(reader->Show("schedule.warmup_steps", std::to_string(warmup)),
                              " must not be above ", of_steps));
    return;
  }
  if (config.schedule.kind != ScheduleKind::kWsd ||
      !reader->Good({"schedule.name", "schedule.decay_steps"})) {
    return;
  }
  const int64_t decay = config.schedule.decay_steps;
  if (decay < 1 || decay > steps - warmup) {
    reader->Fail("schedule.decay_steps",
                 absl::StrCat("schedule.decay_steps yields ", decay,
                              " steps, but wsd needs at least 1 and at most ", of_steps,
                              " less warmup_steps ", warmup, " = ", steps - warmup));
  }
}

// A second moment v that sees no gradient must reach beta2 * v. In bf16, with 8 significant bits,
// half a unit in the last place is 2^-9 to 2^-8 of v: where 1 - beta2 is less, rounding to nearest
// gives v back.
void CheckMoments(const OptimizerConfig& optimizer, ConfigReader* reader) {
  constexpr double kMaxBeta2 = 0.996;  // 1 - 2^-8, rounded down
  if (optimizer.moments != MomentDType::kBf16 || optimizer.beta2 <= kMaxBeta2 ||
      !reader->Good({"optimizer.moments", "optimizer.betas"})) {
    return;
  }
  reader->Fail("optimizer.moments",
               absl::StrCat("optimizer.moments: bf16 takes a beta2 of at most ",
                            PrintNumber(kMaxBeta2), ", not ", PrintNumber(optimizer.beta2),
                            ": second moments rounded to nearest would stop decaying, since the "
                            "relative step 1 - beta2 is below half a unit in the last place; use "
                            "fp32"));
}

void CheckKeepEvery(const CheckpointConfig& checkpoint, ConfigReader* reader) {
  const int64_t keep = checkpoint.keep_every, every = checkpoint.every;
  if (keep == 0 || !reader->Good({"checkpoint.keep_every", "checkpoint.every"})) return;
  if (keep % every == 0) return;
  reader->Fail("checkpoint.keep_every",
               absl::StrCat("checkpoint.keep_every ", keep, " must be a multiple of ",
                            reader->Show("checkpoint.every", std::to_string(every)),
                            ", since steps between are not saved"));
}

// The mesh of `ranks` ranks; what does not divide is refused with the numbers.
void CheckParallel(const RunConfig& config, int64_t ranks, ConfigReader* reader) {
  const ParallelConfig& parallel = config.parallel;
  const std::string there_are = absl::StrCat(ranks == 1 ? "there is " : "there are ", ranks);
  if (!reader->Good({"parallel.tensor", "parallel.expert", "parallel.data"})) return;
  if (ranks % parallel.tensor != 0) {
    reader->Fail("parallel.tensor",
                 absl::StrCat("parallel.tensor ", parallel.tensor, " needs ", parallel.tensor,
                              " ranks or a multiple of that, but ", there_are));
    return;
  }
  if (parallel.data > 0 && parallel.data * parallel.tensor != ranks) {
    reader->Fail(
        "parallel.data",
        absl::StrCat(
            "parallel.data ", parallel.data,
            parallel.tensor == 1 ? "" : absl::StrCat(" x parallel.tensor ", parallel.tensor),
            " needs ", parallel.data * parallel.tensor, " ranks, but ", there_are, "; use auto or ",
            ranks / parallel.tensor));
    return;
  }
  const Mesh mesh = MeshOf(parallel, static_cast<int>(ranks), /*rank=*/0);
  std::istringstream broken(MessageOf(CheckMesh(config.model, mesh)));
  for (std::string rule; std::getline(broken, rule);) {
    reader->Fail(rule.substr(0, rule.find(' ')), rule);
  }
  const int64_t pass = config.data.seq_len * config.train.micro_batch;
  if (reader->Good({"data.seq_len", "train.micro_batch"}) && pass % parallel.tensor != 0) {
    reader->Fail(
        "parallel.tensor",
        absl::StrCat("parallel.tensor ", parallel.tensor,
                     " does not divide the tokens of a pass, data.seq_len ", config.data.seq_len,
                     " x train.micro_batch ", config.train.micro_batch, " = ", pass));
  }
}

}  // namespace

void CheckModel(const ModelSpec& model, ConfigReader* reader) {
  if (model.pad_token >= model.vocab_size && reader->Good({"model.vocab_size"})) {
    reader->Fail("model.pad_token",
                 absl::StrCat("model.pad_token ", model.pad_token,
                              " is no token of model.vocab_size ", model.vocab_size));
  }
  if (model.mup_base_d_model > 0 && model.tie_embeddings) {
    reader->Fail("optimizer.mup.base_d_model",
                 "optimizer.mup needs model.tie_embeddings: false: embedding and head scale "
                 "differently with the width");
  }
  CheckAttention(model, reader);
  CheckMoe(model, reader);
  if (SizeBounds(model).parameters > kMaxParameters) {
    reader->Fail("model",
                 absl::StrCat("the model has about ", PrintShort(SizeBounds(model).parameters),
                              " parameters; at most 1000T are accepted"));
  }
}

void CheckRun(const RunConfig& config, ConfigUse use, int64_t ranks, ConfigReader* reader) {
  if (use != ConfigUse::kStored) {
    CheckMoments(config.optimizer, reader);
    if (ranks > 0) {
      CheckParallel(config, ranks, reader);
      CheckBatch(config, std::max<int64_t>(1, ranks / config.parallel.tensor), reader);
    }
    CheckAuxSequences(config, reader);
    CheckSchedule(config, reader);
    CheckKeepEvery(config.checkpoint, reader);
  }

  for (const auto& [key, sources] : {std::pair{"data.train", &config.data.train},
                                     std::pair{"data.validation", &config.data.validation}}) {
    for (const SourceSpec& source : *sources) {
      if (!source.synthetic.has_value() ||
          !reader->Good({key, "data.seq_len", "model.vocab_size"})) {
        continue;
      }
      const absl::Status fits =
          CheckSynthetic(*source.synthetic, config.data.seq_len, config.model.vocab_size);
      if (!fits.ok()) reader->Fail(key, absl::StrCat(key, ": ", MessageOf(fits)));
    }
  }

  const auto pass_tokens =
      static_cast<double>(config.data.seq_len) * static_cast<double>(config.train.micro_batch);
  if (pass_tokens > kMaxPassTokens ||
      4 * pass_tokens * SizeBounds(config.model).widths > kMaxPassBytes) {
    reader->Fail("train.micro_batch",
                 absl::StrCat("data.seq_len ", config.data.seq_len, " x train.micro_batch ",
                              config.train.micro_batch, " are too many tokens of one pass"));
  }
  if (static_cast<double>(config.train.steps) *
          static_cast<double>(config.train.batch_tokens.largest()) >
      kMaxRunTokens) {
    reader->Fail("train.steps", "train.steps x train.batch_tokens is too large");
  }
  if (!config.data.validation.empty() && reader->Good({"evaluation.tokens", "data.seq_len"}) &&
      config.evaluation.tokens < config.data.seq_len) {
    reader->Fail("evaluation.tokens",
                 absl::StrCat("evaluation.tokens ", config.evaluation.tokens,
                              " is less than one sequence of data.seq_len ", config.data.seq_len));
  }
}

}  // namespace krait
