// krait generate
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>

#include "absl/strings/str_format.h"
#include "kernels/base/number.h"
#include "trainer/cli/commands.h"
#include "trainer/tools/generate.h"
#include "trainer/tools/model_tokenizer.h"
#include "trainer/tools/terminal_text.h"

namespace krait {
namespace {

struct Arguments {
  std::string checkpoint, tokenizer;
  std::optional<std::string> prompt;  // not given: standard input
  int64_t tokens = 256;
  SamplingOptions sampling;
};

absl::StatusOr<std::string> ReadStandardInput() {
  if (isatty(STDIN_FILENO) == 1) {
    PrintNotice("type the prompt; Ctrl-D on a line of its own ends it (or give --prompt TEXT)");
  }
  std::string text;
  char buffer[1 << 16];
  while (const size_t got = std::fread(buffer, 1, sizeof(buffer), stdin)) text.append(buffer, got);
  if (std::ferror(stdin) != 0) {
    return Error(ExitCode::kData, std::string("cannot read the prompt: ") + std::strerror(errno));
  }
  return text;
}

// What is printed: the bytes as they are, or on a terminal as it may be shown them.
class Output {
 public:
  // kCancelled once the reader of a pipe has closed it.
  absl::Status Add(const std::string& bytes) {
    KRAIT_RETURN_IF_ERROR(Print(terminal_ ? text_.Take(bytes) : bytes));
    return std::ferror(stdout) != 0 ? absl::CancelledError("nobody reads on") : absl::OkStatus();
  }
  absl::Status Finish() { return Print(text_.Rest() + "\n"); }

 private:
  bool terminal_ = isatty(STDOUT_FILENO) == 1;
  TerminalText text_;
};

absl::StatusOr<ExitCode> Run(const Arguments& arguments) {
  KRAIT_RETURN_IF_ERROR(CheckSampling(arguments.sampling));
  std::unique_ptr<InferenceModel> model;
  KRAIT_ASSIGN_OR_RETURN(model, InferenceModel::Load(arguments.checkpoint, PrintNotice));
  ModelTokenizer own;
  KRAIT_ASSIGN_OR_RETURN(own, TokenizerOf(model->checkpoint(), arguments.tokenizer));
  Tokenizer& tokenizer = *own.tokenizer;
  std::string text = arguments.prompt.value_or("");
  if (!arguments.prompt.has_value()) {
    KRAIT_ASSIGN_OR_RETURN(text, ReadStandardInput());
  }
  std::vector<int32_t> prompt = tokenizer.prefix();
  KRAIT_RETURN_IF_ERROR(tokenizer.Encode(text, &prompt));
  if (prompt.empty()) {
    return Error(ExitCode::kConfig,
                 "the prompt is empty: generation starts from at least one token, of --prompt TEXT "
                 "or of standard input");
  }
  const int64_t vocab = std::min(tokenizer.vocab_size(), model->config().model.vocab_size);
  for (int32_t id : prompt) {
    if (id >= vocab) {
      return Error(
          ExitCode::kConfig,
          absl::StrFormat("the prompt holds token %d, but the model's vocabulary ends at %d", id,
                          vocab - 1));
    }
  }
  const auto prompt_size = static_cast<int64_t>(prompt.size());
  const int64_t fits = model->DecodeTokens(prompt_size, arguments.tokens);
  if (fits < 1 && arguments.tokens > 0) {
    return Error(ExitCode::kOutOfMemory,
                 absl::StrFormat("the state of the prompt's %s tokens does not fit the free memory",
                                 PrintGrouped(prompt_size)));
  }
  if (fits < arguments.tokens) {
    PrintNotice(
        absl::StrFormat("the state of %s tokens does not fit the free memory: at most %s "
                        "are generated",
                        PrintGrouped(arguments.tokens), PrintGrouped(fits)));
  }
  Output output;
  if (const absl::Status status = output.Add(text); absl::IsCancelled(status)) {
    return ExitCode::kOk;
  } else if (!status.ok()) {
    return status;
  }
  TextDecoder decoder(tokenizer, /*at_start=*/text.empty());
  const auto generated =
      Generate(model.get(), prompt, fits, vocab, EndTokens(tokenizer, model->checkpoint().meta),
               arguments.sampling, [&](int32_t id) { return output.Add(decoder.Next(id)); });
  if (absl::IsCancelled(generated.status())) return ExitCode::kOk;
  KRAIT_RETURN_IF_ERROR(generated.status());
  const GenerateStats& stats = *generated;
  KRAIT_RETURN_IF_ERROR(output.Finish());
  PrintNotice(absl::StrFormat(
      "%d prompt tokens in %.2f s, %d tokens at %.1f tok/s", prompt_size, stats.prompt_seconds,
      stats.tokens, static_cast<double>(stats.tokens) / std::max(stats.decode_seconds, 1e-9)));
  return ExitCode::kOk;
}

}  // namespace

void AddGenerateCommand(CLI::App* app, CommandLine* line) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* generate = app->add_subcommand(
      "generate", "Continue a text. Prints the prompt and the sampled text as it appears.");
  AddPath(generate, "checkpoint", &arguments->checkpoint, "a checkpoint, or a run folder",
          "CHECKPOINT")
      ->required();
  generate
      ->add_option_function<std::string>(
          "--prompt", [arguments](const std::string& text) { arguments->prompt = text; },
          "the text to continue (default: standard input, to its end)")
      ->type_name("TEXT");
  AddCount(generate, "--tokens", &arguments->tokens,
           "how many tokens to add at most: an end token ends the text (default 256)");
  generate
      ->add_option("--tokenizer", arguments->tokenizer,
                   "instead of the checkpoint's: bytes, a tokenizer.json or a SentencePiece model")
      ->type_name("bytes|FILE");
  SamplingOptions& sampling = arguments->sampling;
  AddNumber(generate, "--temperature", &sampling.temperature, "0: always the most likely token");
  AddCount(generate, "--top-k", &sampling.top_k,
           "draw from the N most likely tokens only (default 0: all)");
  AddNumber(generate, "--top-p", &sampling.top_p,
            "draw from the most likely tokens that together reach this share");
  AddSeed(generate, &sampling.seed, "of the draws: the same seed, the same text");
  generate->callback([line, arguments] { line->run = [arguments] { return Run(*arguments); }; });
}

}  // namespace krait
