// krait eval
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "nlohmann/json.hpp"
#include "trainer/cli/commands.h"
#include "trainer/report/progress_line.h"
#include "trainer/tools/inference.h"
#include "trainer/train/evaluate.h"

namespace krait {
namespace {

struct Arguments {
  std::string checkpoint, data;
  int64_t tokens = 0, seq_len = 0, micro_batch = 0;  // 0: all; the checkpoint's
  bool json = false;
};

absl::StatusOr<ExitCode> Evaluate(const Arguments& arguments) {
  std::unique_ptr<InferenceModel> model;
  KRAIT_ASSIGN_OR_RETURN(model,
                         InferenceModel::Load(arguments.checkpoint, [](const std::string& line) {
                           std::fprintf(stderr, "krait: %s\n", line.c_str());
                         }));
  const RunConfig& config = model->config();
  const int64_t seq_len = arguments.seq_len > 0 ? arguments.seq_len : config.data.seq_len;
  std::unique_ptr<Dataset> data;
  KRAIT_ASSIGN_OR_RETURN(data,
                         Dataset::Open({{.path = arguments.data}}, seq_len, config.model.vocab_size,
                                       config.train.seed, config.data.reset_at_documents));
  const std::string& tokenizer = model->checkpoint().meta.tokenizer;  // "": not known
  if (!tokenizer.empty()) {
    KRAIT_RETURN_IF_ERROR(
        CheckSameTokenizer(*data->files().front(), model->checkpoint().path, tokenizer));
  }
  int64_t sequences = data->sequences();
  if (arguments.tokens > 0) {
    sequences = std::clamp<int64_t>(arguments.tokens / seq_len, 1, sequences);
  }
  const int64_t asked = std::min(
      arguments.micro_batch > 0 ? arguments.micro_batch : config.train.micro_batch, sequences);
  const int64_t micro_batch = model->EvaluationBatch(asked, seq_len);
  if (micro_batch < asked) {
    std::fprintf(stderr, "krait: passes of %s sequences do not fit the free memory: %s each\n",
                 PrintGrouped(asked).c_str(), PrintGrouped(micro_batch).c_str());
  }
  ProgressLine line("evaluating", ProgressLine::OnStandardError());
  EvalResult result;
  KRAIT_ASSIGN_OR_RETURN(
      result, EvaluateStored(model->ForEvaluate({.batch = micro_batch, .seq_len = seq_len}), *data,
                             /*first=*/0, sequences, micro_batch, [&](int64_t done, int64_t total) {
                               line.Update(done, total);
                               return absl::OkStatus();
                             }));
  ProgressLine::ClearStandardError();
  if (result.targets == 0) {
    return Error(ExitCode::kData,
                 arguments.data + ": nothing to evaluate: every token starts a document");
  }
  if (!std::isfinite(result.loss)) {
    return Error(ExitCode::kNumerics,
                 model->checkpoint().path + " on " + arguments.data + ": the loss is not finite");
  }
  const double perplexity = std::exp(result.loss);
  const auto bpb = BitsPerByte(result.loss, data->files().front()->tokenizer());
  if (arguments.json) {
    nlohmann::ordered_json json = {{"checkpoint", model->checkpoint().path},
                                   {"data", arguments.data},
                                   {"loss", result.loss},
                                   {"perplexity", perplexity},
                                   {"bits_per_byte", bpb.value_or(std::nan(""))},
                                   {"targets", result.targets},
                                   {"sequences", result.sequences},
                                   {"seq_len", seq_len}};
    absl::PrintF("%s\n", json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
    return ExitCode::kOk;
  }
  absl::PrintF("%s on %s\n", model->checkpoint().path, arguments.data);
  absl::PrintF("  loss           %.4f (over %s targets in %s sequences of %d tokens)\n",
               result.loss, PrintGrouped(result.targets), PrintGrouped(result.sequences), seq_len);
  absl::PrintF("  perplexity     %.3f\n", perplexity);
  if (bpb.has_value()) absl::PrintF("  bits per byte  %.4f\n", *bpb);
  return ExitCode::kOk;
}

}  // namespace

void AddEvalCommand(CLI::App* app, CommandLine* line) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* eval =
      app->add_subcommand("eval", "Loss, perplexity and bits per byte over a token file.");
  eval->add_option("checkpoint", arguments->checkpoint, "a checkpoint, or a run folder")
      ->required()
      ->type_name("CHECKPOINT");
  eval->add_option("--data", arguments->data, "the token file")->required()->type_name("X.h5");
  AddCount(eval, "--tokens", &arguments->tokens,
           "only whole sequences within the first N tokens (default: all)");
  AddCount(eval, "--seq-len", &arguments->seq_len, "tokens per sequence (default: as trained)");
  AddCount(eval, "--micro-batch", &arguments->micro_batch,
           "sequences per pass (default: as trained)");
  eval->add_flag("--json", arguments->json, "one JSON object");
  eval->callback([line, arguments] { line->run = [arguments] { return Evaluate(*arguments); }; });
}

}  // namespace krait
