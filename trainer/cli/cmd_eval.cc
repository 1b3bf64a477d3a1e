// krait eval
#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "nlohmann/json.hpp"
#include "parallel/watchdog.h"
#include "trainer/cli/commands.h"
#include "trainer/report/progress_line.h"
#include "trainer/tools/choice_task.h"
#include "trainer/tools/inference.h"
#include "trainer/train/evaluate.h"

namespace krait {
namespace {

struct Arguments {
  World* world = nullptr;  // the ranks that run it
  std::string checkpoint;
  std::vector<std::string> data;                     // none: the run's validation files
  int64_t tokens = 0, seq_len = 0, micro_batch = 0;  // 0: all; the checkpoint's
  std::string by;                                    // "", "context" or "document"
  std::string task, tokenizer;                       // multiple choice instead
  bool json = false;
};

// Of one file, or of several together.
struct Figures {
  std::string data;
  double loss = 0;
  int64_t targets = 0, sequences = 0;
  std::optional<double> tokens_per_byte;
  double perplexity() const { return std::exp(loss); }
  std::optional<double> bits_per_byte() const { return BitsPerByte(loss, tokens_per_byte); }

  // Of a part of the targets: a range of context lengths, or a document.
  struct Part {
    int64_t begin = 0, end = 0;  // tokens of context; of a document in the file
    double loss = 0;
    int64_t targets = 0;
  };
  std::vector<Part> parts;
};

// The parts of the targets of `sequences` sequences: context lengths by powers of two, or
// documents.
absl::StatusOr<std::vector<Figures::Part>> PartsOf(const std::string& by, const Dataset& data,
                                                   int64_t sequences) {
  std::vector<Figures::Part> parts;
  const int64_t seq_len = data.seq_len();
  if (by == "context") {
    for (int64_t begin = 1; begin < seq_len; begin *= 2) {
      parts.push_back({.begin = begin, .end = std::min(2 * begin, seq_len)});
    }
  } else if (by == "document") {
    int64_t begin = 0;
    KRAIT_RETURN_IF_ERROR(data.files().front()->document_table().ForEachPiece(
        [&](const std::vector<uint64_t>& entries) {
          for (const uint64_t entry : entries) {
            if (entry == 0) continue;
            if (begin >= sequences * seq_len) return false;
            parts.push_back({.begin = begin, .end = static_cast<int64_t>(entry)});
            begin = parts.back().end;
          }
          return true;
        }));
  }
  return parts;
}

// Evaluates the parts one after another: by context all sequences for each part, by document those
// that hold some of it.
absl::Status EvaluateParts(const std::string& by, const Evaluator& evaluator, Dataset* data,
                           int64_t sequences, int64_t micro_batch, ProgressLine* line,
                           std::vector<Figures::Part>* parts) {
  const int64_t seq_len = data->seq_len();
  int64_t done = 0;
  for (Figures::Part& part : *parts) {
    int64_t first = 0, count = sequences;
    if (by == "context") {
      data->Only({.context_begin = part.begin, .context_end = part.end});
    } else {
      data->Only({.token_begin = part.begin, .token_end = part.end});
      first = part.begin / seq_len;
      count = std::min(sequences, (part.end - 1) / seq_len + 1) - first;
    }
    EvalResult result;
    KRAIT_ASSIGN_OR_RETURN(result, EvaluateStored(evaluator, *data, first, count, micro_batch));
    part.loss = result.loss;
    part.targets = result.targets;
    line->Update(++done, static_cast<int64_t>(parts->size()));
  }
  data->Only(TargetRange());
  return absl::OkStatus();
}

// The file, and the parts to evaluate of so many of its sequences.
struct EvalData {
  std::unique_ptr<Dataset> data;
  int64_t sequences = 0;
  std::vector<Figures::Part> parts;
};
absl::StatusOr<EvalData> OpenData(const Arguments& arguments, const SourceSpec& source,
                                  int64_t seq_len, const InferenceModel& model) {
  const RunConfig& config = model.config();
  EvalData opened;
  KRAIT_ASSIGN_OR_RETURN(
      opened.data, Dataset::Open({source}, seq_len, config.model.vocab_size, config.train.seed,
                                 config.data.reset_at_documents));
  const Dataset& data = *opened.data;
  const std::string& tokenizer = model.checkpoint().meta.tokenizer;  // "": not known
  if (!tokenizer.empty()) {
    KRAIT_RETURN_IF_ERROR(
        CheckSameTokenizer(*data.files().front(), model.checkpoint().path, tokenizer));
  }
  opened.sequences = data.sequences();
  if (arguments.tokens > 0) {
    opened.sequences = std::min(arguments.tokens / seq_len, opened.sequences);
  }
  KRAIT_ASSIGN_OR_RETURN(opened.parts, PartsOf(arguments.by, data, opened.sequences));
  return opened;
}

// The tensor ranks share the tokens of a pass.
absl::Status CheckPass(int64_t micro_batch, int64_t seq_len, int tensor) {
  if (micro_batch * seq_len % tensor == 0) return absl::OkStatus();
  return Error(ExitCode::kConfig,
               absl::StrFormat("parallel.tensor %d of the checkpoint's run does not divide the "
                               "tokens of a pass, %d x %d: give another --micro-batch or "
                               "--seq-len, or start a single rank",
                               tensor, micro_batch, seq_len));
}

absl::StatusOr<Figures> EvaluateFile(const Arguments& arguments, const SourceSpec& source,
                                     int64_t seq_len, InferenceModel* model) {
  World* const world = arguments.world;
  const RunConfig& config = model->config();
  auto opened = OpenData(arguments, source, seq_len, *model);
  KRAIT_RETURN_IF_ERROR(Agree(world, opened.status()));
  const std::unique_ptr<Dataset>& data = opened->data;
  const int64_t sequences = opened->sequences;
  const int64_t data_ranks = model->mesh().data;
  // No rank computes filling alone.
  const int64_t asked =
      std::min(arguments.micro_batch > 0 ? arguments.micro_batch : config.train.micro_batch,
               (sequences + data_ranks - 1) / data_ranks);
  const int64_t micro_batch = model->EvaluationBatch(asked, seq_len);
  KRAIT_RETURN_IF_ERROR(Agree(world, CheckPass(micro_batch, seq_len, model->mesh().tensor)));
  if (micro_batch < asked && world->first()) {
    PrintNotice(absl::StrFormat("passes of %s sequences do not fit the free memory: %s each",
                                PrintGrouped(asked), PrintGrouped(micro_batch)));
  }
  ProgressLine line(
      "evaluating", world->first() ? ProgressLine::OnStandardError() : [](const std::string&) {});
  EvalResult result;
  const Evaluator evaluator = model->ForEvaluate({.batch = micro_batch, .seq_len = seq_len});
  KRAIT_ASSIGN_OR_RETURN(result, EvaluateStored(evaluator, *data, /*first=*/0, sequences,
                                                micro_batch, [&](int64_t done, int64_t total) {
                                                  line.Update(done, total);
                                                  return absl::OkStatus();
                                                }));
  std::vector<Figures::Part> parts = std::move(opened->parts);
  KRAIT_RETURN_IF_ERROR(
      EvaluateParts(arguments.by, evaluator, data.get(), sequences, micro_batch, &line, &parts));
  if (world->first()) ProgressLine::ClearStandardError();
  if (result.targets == 0) {
    return Agree(world, Error(ExitCode::kData, source.path + ": nothing to evaluate: every token "
                                                             "starts a document"));
  }
  if (!std::isfinite(result.loss)) {
    return Agree(world, Error(ExitCode::kNumerics, model->checkpoint().path + " on " + source.path +
                                                       ": the loss is not finite"));
  }
  return Figures{source.path,
                 result.loss,
                 result.targets,
                 result.sequences,
                 data->files().front()->tokens_per_byte(),
                 std::move(parts)};
}

// By their targets.
Figures Together(const std::vector<Figures>& files) {
  Figures all;
  double bytes = 0;
  for (const Figures& file : files) {
    all.data += (all.data.empty() ? "" : ", ") + file.data;
    all.loss += file.loss * static_cast<double>(file.targets);
    all.targets += file.targets;
    all.sequences += file.sequences;
    bytes += static_cast<double>(file.targets) / file.tokens_per_byte.value_or(std::nan(""));
  }
  const auto targets = static_cast<double>(all.targets);
  all.loss /= targets;
  if (std::isfinite(bytes)) all.tokens_per_byte = targets / bytes;
  return all;
}

void AddJson(const Figures& figures, nlohmann::ordered_json* json) {
  (*json)["data"] = figures.data;
  (*json)["loss"] = figures.loss;
  (*json)["perplexity"] = figures.perplexity();
  (*json)["bits_per_byte"] = figures.bits_per_byte().value_or(std::nan(""));
  (*json)["targets"] = figures.targets;
  (*json)["sequences"] = figures.sequences;
  for (const Figures::Part& part : figures.parts) {
    (*json)["parts"].push_back(
        {{"begin", part.begin}, {"end", part.end}, {"targets", part.targets}, {"loss", part.loss}});
  }
}

// A line for each part that has targets.
std::string PartsText(const std::string& by, const Figures& figures) {
  std::string text;
  for (size_t i = 0; i < figures.parts.size(); ++i) {
    const Figures::Part& part = figures.parts[i];
    if (part.targets == 0) continue;
    const std::string name =
        by == "context"
            ? absl::StrFormat("after %s to %s tokens", PrintGrouped(part.begin),
                              PrintGrouped(part.end - 1))
            : absl::StrFormat("document %s (%s tokens)", PrintGrouped(static_cast<int64_t>(i)),
                              PrintGrouped(part.end - part.begin));
    absl::StrAppendFormat(&text, "  %-34s %.4f (over %s targets)\n", name, part.loss,
                          PrintGrouped(part.targets));
  }
  return text;
}

std::string Text(const std::string& checkpoint, const Figures& figures, int64_t seq_len) {
  std::string text = absl::StrFormat(
      "%s on %s\n"
      "  loss           %.4f (over %s targets in %s sequences of %s tokens)\n"
      "  perplexity     %.3f\n",
      checkpoint, figures.data, figures.loss, PrintGrouped(figures.targets),
      PrintGrouped(figures.sequences), PrintGrouped(seq_len), figures.perplexity());
  if (figures.bits_per_byte().has_value()) {
    absl::StrAppendFormat(&text, "  bits per byte  %.4f\n", *figures.bits_per_byte());
  }
  return text;
}

absl::StatusOr<ExitCode> EvaluateTask(const Arguments& arguments) {
  const std::string& task = arguments.task;
  World* const world = arguments.world;
  const LongPhase phase;
  const auto items = ReadChoiceTask(task);
  KRAIT_RETURN_IF_ERROR(Agree(world, items.status()));
  // Each rank has the whole model, and takes items of its own.
  const Notice notice = [&](const std::string& line) {
    if (world->first()) PrintNotice(line);
  };
  auto loaded = InferenceModel::Load(arguments.checkpoint, notice);
  KRAIT_RETURN_IF_ERROR(Agree(world, loaded.status()));
  InferenceModel* const model = loaded->get();
  const auto own = TokenizerOf(model->checkpoint(), arguments.tokenizer);
  KRAIT_RETURN_IF_ERROR(Agree(world, own.status()));
  ProgressLine line(
      "scoring", world->first() ? ProgressLine::OnStandardError() : [](const std::string&) {});
  const auto result = ScoreChoices(
      *items, own->tokenizer.get(), model,
      [&](int64_t done, int64_t total) {
        line.Update(done, total);
        return absl::OkStatus();
      },
      world);
  if (world->first()) ProgressLine::ClearStandardError();
  KRAIT_RETURN_IF_ERROR(result.status());
  if (!world->first()) return ExitCode::kOk;
  const auto count = static_cast<double>(result->items);
  const double accuracy = static_cast<double>(result->correct) / count;
  const double by_byte = static_cast<double>(result->correct_by_byte) / count;
  // Of a share that is counted over so many items.
  const double error = std::sqrt(accuracy * (1 - accuracy) / count);
  if (arguments.json) {
    const nlohmann::ordered_json figures = {{"checkpoint", model->checkpoint().path},
                                            {"task", task},
                                            {"items", result->items},
                                            {"accuracy", accuracy},
                                            {"standard_error", error},
                                            {"accuracy_by_byte", by_byte},
                                            {"chance", result->chance},
                                            {"loss", result->loss}};
    KRAIT_RETURN_IF_ERROR(
        Print(figures.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n"));
    return ExitCode::kOk;
  }
  KRAIT_RETURN_IF_ERROR(Print(absl::StrFormat(
      "%s on %s\n"
      "  accuracy       %.4f \u00b1 %.4f (%s of %s items; a guess has %.4f)\n"
      "  by byte        %.4f (the likeliest choice per byte of it)\n"
      "  loss           %.4f per token of the right choices\n",
      model->checkpoint().path, task, accuracy, error, PrintGrouped(result->correct),
      PrintGrouped(result->items), result->chance, by_byte, result->loss)));
  return ExitCode::kOk;
}

absl::StatusOr<ExitCode> Evaluate(const Arguments& arguments) {
  World* const world = arguments.world;
  const LongPhase phase;
  std::unique_ptr<InferenceModel> model;
  KRAIT_ASSIGN_OR_RETURN(
      model, InferenceModel::Load(arguments.checkpoint, PrintNotice, std::nullopt, world));
  const std::string& checkpoint = model->checkpoint().path;
  const int64_t seq_len = arguments.seq_len > 0 ? arguments.seq_len : model->config().data.seq_len;
  if (arguments.tokens > 0 && arguments.tokens < seq_len) {
    return Agree(
        world, Error(ExitCode::kConfig,
                     absl::StrFormat("--tokens %d is less than one sequence of %d tokens; give as "
                                     "many, or a shorter --seq-len",
                                     arguments.tokens, seq_len)));
  }
  std::vector<SourceSpec> sources;
  for (const std::string& path : arguments.data) sources.push_back({.path = path});
  if (sources.empty()) sources = model->config().data.validation;
  if (sources.empty()) {
    return Agree(world,
                 Error(ExitCode::kConfig,
                       checkpoint + " is of a run without validation files: add --data X.h5"));
  }
  std::vector<Figures> files;
  for (const SourceSpec& source : sources) {
    files.emplace_back();
    KRAIT_ASSIGN_OR_RETURN(files.back(), EvaluateFile(arguments, source, seq_len, model.get()));
  }
  const Figures all = files.size() == 1 ? files.front() : Together(files);
  const auto print = [&](const std::string& text) -> absl::StatusOr<ExitCode> {
    KRAIT_RETURN_IF_ERROR(StatusOfFirst(world, world->first() ? Print(text) : absl::OkStatus()));
    return ExitCode::kOk;
  };
  if (arguments.json) {
    nlohmann::ordered_json json = {{"checkpoint", checkpoint}};
    AddJson(all, &json);
    json["seq_len"] = seq_len;
    for (const Figures& file : files) {
      if (files.size() == 1) break;
      nlohmann::ordered_json one;
      AddJson(file, &one);
      json["files"].push_back(one);
    }
    return print(json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  }
  std::string text;
  for (const Figures& file : files) {
    text += Text(checkpoint, file, seq_len) + PartsText(arguments.by, file);
  }
  if (files.size() > 1) text += Text(checkpoint, all, seq_len);
  return print(text);
}

}  // namespace

void AddEvalCommand(CLI::App* app, CommandLine* line) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* eval =
      app->add_subcommand("eval", "Loss, perplexity and bits per byte over token files.");
  AddPath(eval, "checkpoint", &arguments->checkpoint, "a checkpoint, or a run folder", "CHECKPOINT")
      ->required();
  AddPaths(eval, "--data", &arguments->data,
           "a token file; once per file (default: the run's validation files)", "X.h5")
      ->allow_extra_args(false);
  AddCount(eval, "--tokens", &arguments->tokens,
           "only whole sequences within the first N tokens of each file (default: all)");
  AddCount(eval, "--seq-len", &arguments->seq_len, "tokens per sequence (default: as trained)");
  AddCount(eval, "--micro-batch", &arguments->micro_batch,
           "sequences per pass (default: as trained)");
  eval->add_option(
          "--by", arguments->by,
          "the loss by tokens of context before the target (as many passes as lines), or of "
          "each document")
      ->check(CLI::IsMember({"context", "document"}))
      ->type_name("context|document");
  AddPath(eval, "--task", &arguments->task,
          "multiple choice instead: JSON lines of {\"context\", \"choices\", \"answer\"}",
          "TASK.jsonl")
      ->excludes(eval->get_option("--data"))
      ->excludes(eval->get_option("--tokens"))
      ->excludes(eval->get_option("--seq-len"))
      ->excludes(eval->get_option("--micro-batch"))
      ->excludes(eval->get_option("--by"));
  AddPath(eval, "--tokenizer", &arguments->tokenizer,
          "of a task's texts (default: the checkpoint's)", "bytes|FILE")
      ->needs(eval->get_option("--task"));
  eval->add_flag("--json", arguments->json, "one JSON object");
  eval->callback([line, arguments] {
    line->on_several_ranks = true;
    line->run = [line, arguments] {
      arguments->world = line->world;
      if (arguments->task.empty()) return Evaluate(*arguments);
      return EvaluateTask(*arguments);
    };
  });
}

}  // namespace krait
