#include "trainer/tools/probe.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <system_error>

#include "absl/strings/str_format.h"
#include "kernels/base/output.h"
#include "kernels/base/safetensors.h"
#include "kernels/transfer.h"
#include "trainer/checkpoint/checkpoint_ranks.h"
#include "trainer/tools/gathered.h"
#include "trainer/tools/hf_folder.h"
#include "trainer/train/trainer.h"

namespace krait {
namespace {

// The batches of the file, each [B,T].
struct ProbeBatches {
  int64_t count = 0;   // S of `batches`; 1 when there is only `input_ids`
  TokenBatch forward;  // of the forward values and gradients
  std::vector<TokenBatch> steps;
};

absl::StatusOr<TokenBatch> ReadBatch(const SafetensorsReader& reader, const std::string& name,
                                     int64_t index, int64_t b, int64_t t, int64_t vocab) {
  TokenBatch batch;
  batch.sequences = b;
  batch.seq_len = t;
  batch.tokens.resize(static_cast<size_t>(b * t));
  batch.targets.assign(batch.tokens.size(), -1);
  batch.doc_start.assign(batch.tokens.size(), 0);
  KRAIT_RETURN_IF_ERROR(reader.ReadI32(name, index * b * t, b * t, batch.tokens.data()));
  for (int64_t i = 0; i < b * t; ++i) {
    const int32_t id = batch.tokens[static_cast<size_t>(i)];
    if (id < 0 || id >= vocab) {
      return Error(ExitCode::kData,
                   absl::StrFormat("%s: %s: element %d is %d, outside the "
                                   "vocabulary of %d",
                                   reader.path(), name, index * b * t + i, id, vocab));
    }
    if (i % t > 0) batch.targets[static_cast<size_t>(i - 1)] = id;
  }
  batch.target_count = b * (t - 1);
  return batch;
}

absl::StatusOr<ProbeBatches> TryReadBatches(const ProbeOptions& options, int64_t vocab) {
  SafetensorsReader reader;
  KRAIT_ASSIGN_OR_RETURN(reader, SafetensorsReader::OpenFile(options.batches));
  const auto batches = reader.entries().find("batches");
  const auto input_ids = reader.entries().find("input_ids");
  const auto end = reader.entries().end();
  const bool stacked = batches != end && batches->second.shape.size() == 3;
  const bool single = input_ids != end && input_ids->second.shape.size() == 2;
  if (!stacked && !single) {
    return Error(ExitCode::kData,
                 options.batches + ": needs int32 `batches` [S,B,T] or `input_ids` [B,T]");
  }
  const auto size = [](const auto& entry, size_t from_back) {
    return entry->second.shape[entry->second.shape.size() - from_back];
  };
  const auto& first = single ? input_ids : batches;
  const int64_t b = size(first, 2), t = size(first, 1);
  const int64_t available = stacked ? batches->second.shape[0] : 1;
  if (b < 1 || t < 2 || available < 1) {
    return Error(ExitCode::kData,
                 options.batches + ": a batch needs at least one sequence of two tokens");
  }
  if (options.steps > available) {
    return Error(ExitCode::kConfig, absl::StrFormat("--steps %d: %s holds %d batches",
                                                    options.steps, options.batches, available));
  }
  if (stacked && single && options.steps > 0 && (size(batches, 2) != b || size(batches, 1) != t)) {
    return Error(ExitCode::kData,
                 options.batches + ": `input_ids` and `batches` differ in their [B,T]");
  }
  ProbeBatches read;
  KRAIT_ASSIGN_OR_RETURN(read.forward,
                         ReadBatch(reader, single ? "input_ids" : "batches", 0, b, t, vocab));
  for (int64_t s = 0; s < options.steps; ++s) {
    read.steps.emplace_back();
    KRAIT_ASSIGN_OR_RETURN(read.steps.back(),
                           ReadBatch(reader, stacked ? "batches" : "input_ids", s, b, t, vocab));
  }
  return read;
}

absl::StatusOr<ProbeBatches> ReadBatches(const ProbeOptions& options, int64_t vocab) {
  auto batches = TryReadBatches(options, vocab);
  // The reader takes its files for weights; these are data.
  if (ExitCodeOf(batches.status()) != ExitCode::kNoCheckpoint) return batches;
  return Error(ExitCode::kData, MessageOf(batches.status()));
}

// The rows of a data rank: the consecutive B / data from data_index * B / data on.
TokenBatch RowsOf(const TokenBatch& batch, const Mesh& mesh) {
  TokenBatch rows;
  rows.sequences = batch.sequences / mesh.data;
  rows.seq_len = batch.seq_len;
  const int64_t n = rows.sequences * rows.seq_len, first = mesh.data_index() * n;
  const auto cut = [&](const std::vector<int32_t>& all) {
    return std::vector<int32_t>(all.begin() + first, all.begin() + first + n);
  };
  rows.tokens = cut(batch.tokens);
  rows.targets = cut(batch.targets);
  rows.doc_start = cut(batch.doc_start);
  rows.target_count = rows.sequences * (rows.seq_len - 1);
  return rows;
}

// The contract's defaults with the batch of the file: one pass of B sequences per step, over all
// data ranks.
absl::StatusOr<RunConfig> ProbeConfig(const ModelSpec& spec, const TokenBatch& batch,
                                      const ProbeOptions& options, int ranks) {
  RunConfig config;
  config.model = spec;
  config.run_dir = "probe";
  config.checkpoint.dir = "probe/checkpoints";
  config.data.seq_len = batch.seq_len;
  config.train.batch_tokens = batch.sequences * batch.seq_len;
  config.train.micro_batch = batch.sequences;
  config.train.steps = std::max<int64_t>(1, options.steps);
  config.schedule.kind = ScheduleKind::kConstant;
  config.schedule.warmup_steps = 0;
  if (ranks > 1) {
    // What the words make of the mesh, before the rows of a rank are known.
    RunConfig asked;
    KRAIT_ASSIGN_OR_RETURN(
        asked, ParseConfig(config.ToYaml(), "probe", options.overrides, ConfigUse::kStored, ranks));
    const int64_t data = std::max<int64_t>(1, ranks / asked.parallel.tensor);
    if (batch.sequences % data != 0) {
      return Error(ExitCode::kConfig,
                   absl::StrFormat("the %d sequences of a batch do not divide among %d data ranks",
                                   batch.sequences, data));
    }
    config.train.micro_batch = batch.sequences / data;
  }
  const std::string text = config.ToYaml();
  KRAIT_ASSIGN_OR_RETURN(config,
                         ParseConfig(text, "probe", options.overrides, ConfigUse::kPlan, ranks));
  if (config.data.seq_len != batch.seq_len ||
      config.train.batch_tokens != batch.sequences * batch.seq_len) {
    return Error(ExitCode::kConfig,
                 "data.seq_len and train.batch_tokens are those of the batches: they cannot be "
                 "set for probe");
  }
  return config;
}

struct NamedValues {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// Collects the probe's tensors of one pass; chunks of rows follow one another.
class ForwardValues {
 public:
  ForwardValues(const ModelSpec& spec, const TokenBatch& batch, const Mesh& mesh,
                const Gathered& gathered, const Context& ctx)
      : spec_(spec), batch_(batch), mesh_(mesh), gathered_(gathered), ctx_(ctx) {}

  ProbeSink Sink() {
    return {[this](const std::string& name, Tensor value) {
      if (!values_.contains(name)) order_.push_back(name);
      std::vector<float>& out = values_[name];
      const std::vector<float> values = DownloadFloats(value, ctx_);
      out.insert(out.end(), values.begin(), values.end());
    }};
  }

  const std::vector<std::string>& names() const { return order_; }
  // Those of all ranks, on the first one. All ranks call it alike.
  std::vector<float> Whole(const std::string& name) const {
    const std::vector<std::vector<float>> parts = gathered_.OfRanks(values_.at(name));
    std::vector<float> whole;
    if (name != "logits") {
      // Ranks own consecutive rows, tensor ranks those of one pass.
      for (const auto& part : parts) whole.insert(whole.end(), part.begin(), part.end());
      return whole;
    }
    // Each tensor rank has all rows of its pass, for its part of the vocabulary.
    const auto tensor = static_cast<size_t>(mesh_.tensor);
    const auto rows = static_cast<size_t>(batch_.sequences * batch_.seq_len / mesh_.data);
    for (size_t first = 0; first < parts.size(); first += tensor) {
      for (size_t row = 0; row < rows; ++row) {
        for (size_t r = first; r < first + tensor; ++r) {
          const auto columns = static_cast<int64_t>(parts[r].size() / rows);
          const auto begin = parts[r].begin() + static_cast<int64_t>(row) * columns;
          whole.insert(whole.end(), begin, begin + columns);
        }
      }
    }
    return whole;
  }
  std::vector<int64_t> Shape(const std::string& name) const {
    const int64_t b = batch_.sequences, t = batch_.seq_len;
    if (name == "logits") return {b, t, spec_.vocab_size};
    if (name.starts_with("router_logits.")) return {b * t, spec_.moe.experts};
    return {b, t, spec_.d_model};
  }

 private:
  const ModelSpec& spec_;
  const TokenBatch& batch_;  // of all data ranks
  const Mesh& mesh_;
  const Gathered& gathered_;
  const Context& ctx_;
  std::vector<std::string> order_;
  std::map<std::string, std::vector<float>> values_;
};

// Header of the whole file: the writer wants every item before the first value.
std::vector<SafetensorsWriter::Item> Items(const ForwardValues& forward, const ParamTable& table,
                                           int64_t steps) {
  std::vector<SafetensorsWriter::Item> items;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape) {
    items.push_back({.name = name, .dtype = DType::kF32, .shape = shape});
  };
  for (const std::string& name : forward.names()) add(name, forward.Shape(name));
  for (const char* name : {"cross_entropy", "aux_loss", "loss"}) add(name, {1});
  for (const Param& param : table.params()) add("grad." + param.name, param.shape);
  if (steps == 0) return items;
  add("losses", {steps});
  add("grad_norms", {steps});
  for (const Param& param : table.params()) add("weight." + param.name, param.shape);
  return items;
}

absl::Status LoadWeights(const HfFolder& folder, const Gathered& gathered, Trainer* trainer) {
  constexpr int64_t kPiece = int64_t{4} << 20;  // elements
  std::vector<float> values;
  for (const OwnedBox& owned : trainer->weights().layout().Owned()) {
    const Tensor master = gathered.Master(owned);
    const Param& param = trainer->weights().table().params()[static_cast<size_t>(owned.box.param)];
    const auto read = [&](int64_t from, int64_t count, int64_t to) -> absl::Status {
      for (int64_t at = 0; at < count; at += kPiece) {
        const int64_t n = std::min(kPiece, count - at);
        values.resize(static_cast<size_t>(n));
        KRAIT_RETURN_IF_ERROR(folder.Read(owned.box.param, from + at, n, values.data()));
        Upload(master.Slice(0, to + at, n), values.data(), trainer->ctx());
      }
      return absl::OkStatus();
    };
    KRAIT_RETURN_IF_ERROR(ForRuns(param, owned.box, read));
  }
  return absl::OkStatus();
}

// What the first rank writes; on the others nothing.
class ProbeWriter {
 public:
  explicit ProbeWriter(World* world) : world_(world) {}
  absl::Status Open(const std::string& path, const std::vector<SafetensorsWriter::Item>& items) {
    absl::Status status;
    if (world_->first()) {
      auto writer = SafetensorsWriter::Create(path, items, {});
      status = writer.status();
      if (writer.ok()) writer_.emplace(*std::move(writer));
    }
    return StatusOfFirst(world_, status);
  }
  // Its errors are told at the end.
  void Write(const std::vector<float>& values) {
    if (!world_->first() || !status_.ok()) return;
    status_ = writer_->Write(values.data(), static_cast<int64_t>(values.size() * sizeof(float)));
  }
  absl::Status Finish() {
    if (world_->first() && status_.ok()) status_ = writer_->Finish();
    return StatusOfFirst(world_, status_);
  }

 private:
  World* world_;
  std::optional<SafetensorsWriter> writer_;
  absl::Status status_;
};

}  // namespace

absl::Status RunProbe(const ProbeOptions& options, const Notice& notice) {
  World* const world = OrAlone(options.world);
  std::vector<std::string> inputs = {options.batches};
  std::error_code unreadable;  // said when the folder is read
  for (const auto& entry : std::filesystem::directory_iterator(options.hf, unreadable)) {
    inputs.push_back(entry.path().string());
  }
  KRAIT_RETURN_IF_ERROR(
      Agree(world, CheckOutput(options.out, FileKind::kSafetensors, inputs, options.force)));
  auto folder = HfFolder::Open(options.hf);
  KRAIT_RETURN_IF_ERROR(Agree(world, folder.status()));
  for (const std::string& note : folder->notes()) {
    if (notice != nullptr && world->first()) notice(note);
  }
  auto batches = ReadBatches(options, folder->spec().vocab_size);
  KRAIT_RETURN_IF_ERROR(Agree(world, batches.status()));
  auto config = ProbeConfig(folder->spec(), batches->forward, options, world->size());
  KRAIT_RETURN_IF_ERROR(Agree(world, config.status()));
  KRAIT_RETURN_IF_ERROR(CheckDevice(*config, world));
  // The overrides may have changed the model.
  KRAIT_RETURN_IF_ERROR(Agree(world, folder->Locate(config->model, ParamTable(config->model))));

  Trainer trainer(*config, world);
  const ParamTable& table = trainer.weights().table();
  const auto params = static_cast<int>(table.params().size());
  const Gathered gathered(&trainer, world);
  KRAIT_RETURN_IF_ERROR(Agree(world, LoadWeights(*folder, gathered, &trainer)));
  trainer.Loaded();
  ForwardValues forward(trainer.config().model, batches->forward, trainer.mesh(), gathered,
                        trainer.ctx());
  const ProbeSink sink = forward.Sink();
  const StepReport first = trainer.Gradients(RowsOf(batches->forward, trainer.mesh()), &sink);

  ProbeWriter writer(world);
  KRAIT_RETURN_IF_ERROR(writer.Open(options.out, Items(forward, table, options.steps)));
  for (const std::string& name : forward.names()) writer.Write(forward.Whole(name));
  for (double loss : {first.loss, first.aux_loss, first.total_loss}) {
    writer.Write({static_cast<float>(loss)});
  }
  for (int p = 0; p < params; ++p) writer.Write(gathered.WholeGradient(p));
  if (options.steps > 0) {
    std::vector<float> losses, norms;
    for (const TokenBatch& batch : batches->steps) {
      const StepReport report = trainer.Step(RowsOf(batch, trainer.mesh()));
      losses.push_back(static_cast<float>(report.total_loss));
      norms.push_back(static_cast<float>(report.grad_norm));
    }
    writer.Write(losses);
    writer.Write(norms);
    for (int p = 0; p < params; ++p) writer.Write(gathered.WholeMaster(p));
  }
  return writer.Finish();
}

}  // namespace krait
