#include "trainer/tools/plan.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "kernels/cuda/runtime.h"
#include "model/params.h"
#include "trainer/report/environment.h"

namespace krait {
namespace {

constexpr int64_t kUsualContext = 262144;  // at which the Jamba papers compare caches
constexpr int64_t kUnknownMemory = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxContext = int64_t{1} << 40;

DecodeMemory DecodeMemoryAt(const ModelSpec& model, int64_t context) {
  constexpr int64_t kHalf = 2;  // bytes of a 16-bit number
  DecodeMemory memory;
  memory.context = context;
  const AttentionSpec& attention = model.attention;
  const MambaSpec& mamba = model.mamba;
  memory.kv_cache_bytes = model.Count(SublayerKind::kAttention) * 2 * attention.kv_heads *
                          attention.head_dim * kHalf * context;
  const int64_t mamba_layers = model.Count(SublayerKind::kMamba);
  memory.conv_state_bytes = mamba_layers * mamba.d_inner * (mamba.d_conv - 1) * kHalf;
  memory.ssm_state_bytes = mamba_layers * mamba.d_inner * mamba.d_state * SizeOf(DType::kF32);
  return memory;
}

// What one kind of sublayer adds to FlopsPerToken.
double FlopsOf(ModelSpec model, SublayerKind kind, int64_t seq_len) {
  std::erase_if(model.sublayers, [kind](const Sublayer& s) { return s.kind != kind; });
  const double with = FlopsPerToken(model, seq_len);
  model.sublayers.clear();
  return with - FlopsPerToken(model, seq_len);
}

std::vector<PlanPart> Parts(const ModelSpec& model, const ParamTable& table, int64_t seq_len) {
  constexpr SublayerKind kKinds[] = {SublayerKind::kAttention, SublayerKind::kMamba,
                                     SublayerKind::kMlp, SublayerKind::kMoe};
  std::vector<PlanPart> parts;
  for (const SublayerKind kind : kKinds) {
    PlanPart part;
    part.name = Name(kind);
    part.sublayers = model.Count(kind);
    part.flops_per_token = FlopsOf(model, kind, seq_len);
    parts.push_back(part);
  }
  PlanPart rest;
  rest.name = "embedding, head";
  ModelSpec bare = model;
  bare.sublayers.clear();
  rest.flops_per_token = FlopsPerToken(bare, seq_len);
  for (const Storage& storage : table.storages()) {
    PlanPart* part = &rest;
    if (storage.sublayer >= 0) {
      const SublayerKind kind = model.sublayers[static_cast<size_t>(storage.sublayer)].kind;
      part = &parts[static_cast<size_t>(std::find(std::begin(kKinds), std::end(kKinds), kind) -
                                        std::begin(kKinds))];
    }
    part->parameters += storage.numel();
  }
  std::erase_if(parts, [](const PlanPart& part) { return part.sublayers == 0; });
  parts.push_back(rest);
  return parts;
}

// Bytes of the tensors of one checkpoint.
int64_t CheckpointBytes(const ParamTable& table, const OptimizerConfig& optimizer) {
  const int64_t moment =
      SizeOf(optimizer.moments == MomentDType::kFp32 ? DType::kF32 : DType::kBF16);
  int64_t bytes = 0;
  for (const Param& param : table.params()) {
    bytes += param.numel() * (SizeOf(DType::kF32) + (param.trainable ? 2 * moment : 0));
  }
  return bytes;
}

}  // namespace

absl::StatusOr<PlanReport> MakePlan(const RunConfig& config, const PlanOptions& options) {
  if (options.context < 0 || options.context > kMaxContext) {
    return Error(ExitCode::kConfig, absl::StrCat("--context ", options.context,
                                                 " is out of range; expected 1 to ", kMaxContext));
  }
  const ModelSpec& model = config.model;
  const ParamTable table(model);
  PlanReport report;
  report.config = config.path;
  report.pattern = LayoutPattern(model);
  report.n_layers = model.n_layers;
  report.seq_len = config.data.seq_len;
  report.parts = Parts(model, table, report.seq_len);
  report.params_total = table.total();
  report.params_active = table.active(model);
  report.flops_per_token = FlopsPerToken(model, report.seq_len);
  if (options.context > 0) {
    report.decode.push_back(DecodeMemoryAt(model, options.context));
  } else {
    report.decode.push_back(DecodeMemoryAt(model, report.seq_len));
    if (report.seq_len != kUsualContext) {
      report.decode.push_back(DecodeMemoryAt(model, kUsualContext));
    }
  }

  report.micro_batch = config.train.micro_batch;
  report.mesh = MeshOf(config.parallel, static_cast<int>(options.ranks), /*rank=*/0);
  report.data_ranks = report.mesh.data;
  report.accumulation = config.accumulation(report.data_ranks);
  report.batch_tokens = config.train.batch_tokens;
  report.steps = config.train.steps;

  report.placement = PlacementOf(config);
  // Ranks differ by a few rows of their shares, and by the padding of a vocabulary: those at the
  // ends of their tensor and expert groups are looked at.
  Mesh mesh = report.mesh;
  const int group = std::max(mesh.tensor, mesh.expert);
  for (const int rank : std::set<int>{0, mesh.tensor - 1, group - 1, mesh.world() - 1}) {
    mesh.rank = rank;
    const MemoryPlan memory = PlanTraining(config, mesh);
    if (rank == 0 || memory.total() > report.memory.total()) report.memory = memory;
  }
  const bool elsewhere = report.placement.device == Device::kCuda && !cuda::Available();
  report.memory_limit = options.memory > 0 ? options.memory
                        : elsewhere        ? kUnknownMemory
                                           : MemoryOf(report.placement.device).total;
  report.fits = report.memory.total() <= report.memory_limit;
  report.checkpoint_bytes = CheckpointBytes(table, config.optimizer);
  report.checkpoints_kept = config.checkpoint.keep;
  return report;
}

namespace {

// "4 x [m mE m mE a mE m mE]".
std::string LayerMap(const PlanReport& report) {
  const auto words =
      static_cast<int64_t>(std::count(report.pattern.begin(), report.pattern.end(), ' ')) + 1;
  if (words == report.n_layers) return report.pattern;
  return absl::StrCat(report.n_layers / words, " x [", report.pattern, "]");
}

// Four digits, as the reference figures are given.
std::string Flops(double flops) {
  constexpr const char* kUnits[] = {"", "k", "M", "G", "T", "P", "E", "Z", "Y"};
  size_t unit = 0;
  while (flops >= 999.95 && unit + 1 < std::size(kUnits)) {
    flops /= 1000;
    ++unit;
  }
  return absl::StrFormat("%.4g %sFLOP", flops, kUnits[unit]);
}

void AddMemory(const PlanReport& report, std::string* out) {
  const MemoryPlan& memory = report.memory;
  absl::StrAppendFormat(out, "\nmemory per rank, %s on %s\n",
                        report.placement.compute == DType::kBF16 ? "bf16" : "fp32",
                        report.placement.device == Device::kCuda ? "CUDA" : "the CPU");
  for (const auto& [name, bytes] :
       {std::pair{"weights", memory.weights},
        {"gradients", memory.gradients},
        {"optimizer", memory.optimizer},
        {"activations", memory.activations},
        {"scratch", memory.scratch},
        {"batches", memory.batches},
        {memory.device == Device::kCuda ? "rows (on the host)" : "rows", memory.rows},
        {"scalars", memory.scalars},
        {"communication", memory.communication},
        {"NCCL", memory.nccl},
        {memory.device == Device::kCuda ? "staging (on the host)" : "staging", memory.staging},
        {"total", memory.total()}}) {
    absl::StrAppendFormat(out, "  %-24s %12s\n", name, PrintBytes(bytes));
  }
  if (report.memory_limit == kUnknownMemory) {
    absl::StrAppend(out, "  no GPU here to compare with: name one's memory with --memory SIZE\n");
  } else {
    absl::StrAppendFormat(out, "  %-24s %12s   %s\n", "available", PrintBytes(report.memory_limit),
                          report.fits ? "fits" : "DOES NOT FIT");
  }
}

}  // namespace

std::string PlanText(const PlanReport& report) {
  std::string out =
      absl::StrCat(report.config, "\n\nlayers        ", report.n_layers, " = ", LayerMap(report),
                   "\n              a attention, m Mamba, E mixture of experts\n");
  absl::StrAppendFormat(&out, "parameters    %s, active per token %s\n",
                        PrintGrouped(report.params_total), PrintGrouped(report.params_active));
  absl::StrAppendFormat(&out, "FLOP/token    %s, forward and backward, at %s tokens\n",
                        Flops(report.flops_per_token), PrintGrouped(report.seq_len));
  absl::StrAppendFormat(&out, "\n  %-24s %6s %20s %23s\n", "part", "count", "parameters",
                        "FLOP/token");
  for (const PlanPart& part : report.parts) {
    absl::StrAppendFormat(
        &out, "  %-24s %6s %20s %7.1f%% %14s %7.1f%%\n", part.name,
        part.sublayers > 0 ? std::to_string(part.sublayers) : "", PrintGrouped(part.parameters),
        100.0 * static_cast<double>(part.parameters) / static_cast<double>(report.params_total),
        Flops(part.flops_per_token), 100.0 * part.flops_per_token / report.flops_per_token);
  }
  absl::StrAppendFormat(&out, "\n  %-24s %14s %14s %14s\n", "one sequence, decoding", "KV cache",
                        "SSM state", "conv state");
  for (const DecodeMemory& decode : report.decode) {
    absl::StrAppendFormat(&out, "  at %-21s %14s %14s %14s\n",
                          absl::StrCat(PrintGrouped(decode.context), " tokens"),
                          PrintBytes(decode.kv_cache_bytes), PrintBytes(decode.ssm_state_bytes),
                          PrintBytes(decode.conv_state_bytes));
  }
  absl::StrAppend(&out, "  (KV cache and conv state in 16 bit, SSM state in 32)\n");

  absl::StrAppendFormat(
      &out, "\nbatch         %s tokens = %d sequences of %s x %d data rank%s x %d pass%s\n",
      PrintGrouped(report.batch_tokens.largest()), report.micro_batch, PrintGrouped(report.seq_len),
      report.data_ranks, report.data_ranks == 1 ? "" : "s", report.accumulation,
      report.accumulation == 1 ? "" : "es");
  for (const BatchStage& stage : report.batch_tokens.stages()) {
    if (report.batch_tokens.constant()) break;
    absl::StrAppendFormat(&out, "  ramp        %s tokens from %s on\n", PrintGrouped(stage.tokens),
                          PrintShort(static_cast<double>(stage.from)));
  }
  if (report.steps > 0) {
    const auto tokens = static_cast<double>(report.batch_tokens.After(0, report.steps));
    absl::StrAppendFormat(&out, "steps         %s = %s tokens, %s\n", PrintGrouped(report.steps),
                          PrintShort(tokens), Flops(tokens * report.flops_per_token));
  }
  AddMemory(report, &out);
  absl::StrAppendFormat(&out, "\ncheckpoint    %s each, %d kept and one being written\n",
                        PrintBytes(report.checkpoint_bytes), report.checkpoints_kept);
  if (report.mesh.world() > 1) {
    const Groups::Traffic& sent = report.memory.sent;
    absl::StrAppendFormat(
        &out,
        "ranks         %d = data %d x tensor %d, experts over %d\n"
        "wire          %s sent per rank and step: tensor %s, experts %s (balanced "
        "routing), gradients and weights %s\n",
        report.mesh.world(), report.mesh.data, report.mesh.tensor, report.mesh.expert,
        PrintBytes(report.wire_bytes_per_step()), PrintBytes(sent.tensor), PrintBytes(sent.expert),
        PrintBytes(sent.data));
  }
  return out;
}

std::string PlanJson(const PlanReport& report) {
  using nlohmann::ordered_json;
  ordered_json parts = ordered_json::array();
  for (const PlanPart& part : report.parts) {
    parts.push_back({{"name", part.name},
                     {"sublayers", part.sublayers},
                     {"parameters", part.parameters},
                     {"flops_per_token", part.flops_per_token}});
  }
  ordered_json decode = ordered_json::array();
  for (const DecodeMemory& memory : report.decode) {
    decode.push_back({{"context", memory.context},
                      {"kv_cache_bytes", memory.kv_cache_bytes},
                      {"ssm_state_bytes", memory.ssm_state_bytes},
                      {"conv_state_bytes", memory.conv_state_bytes}});
  }
  ordered_json ramp = ordered_json::array();
  for (const BatchStage& stage : report.batch_tokens.stages()) {
    ramp.push_back({{"tokens", stage.tokens}, {"from", stage.from}});
  }
  const MemoryPlan& memory = report.memory;
  const ordered_json json = {
      {"config", report.config},
      {"n_layers", report.n_layers},
      {"pattern", report.pattern},
      {"params_total", report.params_total},
      {"params_active", report.params_active},
      {"seq_len", report.seq_len},
      {"flops_per_token", report.flops_per_token},
      {"parts", parts},
      {"decode", decode},
      {"batch",
       {{"tokens", report.batch_tokens.largest()},
        {"ramp", ramp},
        {"micro_batch", report.micro_batch},
        {"data_ranks", report.data_ranks},
        {"accumulation", report.accumulation}}},
      {"steps", report.steps},
      {"memory_bytes",
       {{"weights", memory.weights},
        {"gradients", memory.gradients},
        {"optimizer", memory.optimizer},
        {"activations", memory.activations},
        {"scratch", memory.scratch},
        {"batches", memory.batches},
        {"rows", memory.rows},
        {"communication", memory.communication},
        {"nccl", memory.nccl},
        {"staging", memory.staging},
        {"total", memory.total()}}},
      {"ranks",
       {{"world", report.mesh.world()},
        {"data", report.mesh.data},
        {"tensor", report.mesh.tensor},
        {"expert", report.mesh.expert}}},
      {"wire_bytes",
       {{"tensor", memory.sent.tensor},
        {"expert", memory.sent.expert},
        {"data", memory.sent.data}}},
      {"memory_limit_bytes",
       report.memory_limit == kUnknownMemory ? ordered_json() : ordered_json(report.memory_limit)},
      {"fits", report.fits},
      {"checkpoint_bytes", report.checkpoint_bytes},
      {"checkpoints_kept", report.checkpoints_kept},
      {"wire_bytes_per_step", report.wire_bytes_per_step()}};
  // A path need not be UTF-8.
  return json.dump(2, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace krait
