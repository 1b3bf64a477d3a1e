// krait generate
#include <cstdio>

#include "absl/strings/str_format.h"
#include "data/tokenizer.h"
#include "trainer/cli/commands.h"
#include "trainer/tools/generate.h"

namespace krait {
namespace {

struct Arguments {
  std::string checkpoint, prompt, tokenizer;
  int64_t tokens = 256;
  SamplingOptions sampling;
};

absl::StatusOr<ExitCode> Run(const Arguments& arguments) {
  KRAIT_RETURN_IF_ERROR(CheckSampling(arguments.sampling));
  std::unique_ptr<InferenceModel> model;
  KRAIT_ASSIGN_OR_RETURN(model,
                         InferenceModel::Load(arguments.checkpoint, [](const std::string& line) {
                           std::fprintf(stderr, "krait: %s\n", line.c_str());
                         }));
  const std::string name =
      arguments.tokenizer.empty() ? model->checkpoint().meta.tokenizer : arguments.tokenizer;
  if (name.empty()) {
    return Error(ExitCode::kConfig,
                 model->checkpoint().path + " names no tokenizer: add --tokenizer NAME");
  }
  std::unique_ptr<Tokenizer> tokenizer;
  KRAIT_ASSIGN_OR_RETURN(tokenizer, MakeTokenizer(name));
  std::vector<int32_t> prompt;
  tokenizer->Encode(arguments.prompt, &prompt);
  if (prompt.empty()) {
    return Error(ExitCode::kConfig, "--prompt is empty: generation starts from at least one token");
  }
  const int64_t vocab = std::min(tokenizer->vocab_size(), model->config().model.vocab_size);
  for (int32_t id : prompt) {
    if (id >= vocab) {
      return Error(ExitCode::kConfig,
                   absl::StrFormat("--prompt holds token %d, but the model's vocabulary ends at %d",
                                   id, vocab - 1));
    }
  }
  std::fputs(arguments.prompt.c_str(), stdout);
  std::fflush(stdout);
  GenerateStats stats;
  KRAIT_ASSIGN_OR_RETURN(stats, Generate(model.get(), prompt, arguments.tokens, vocab,
                                         arguments.sampling, [&](int32_t id) {
                                           const std::string bytes = tokenizer->Decode(id);
                                           std::fwrite(bytes.data(), 1, bytes.size(), stdout);
                                           std::fflush(stdout);
                                         }));
  std::fputs("\n", stdout);
  absl::FPrintF(stderr, "krait: %d prompt tokens in %.2f s, %d tokens at %.1f tok/s\n",
                prompt.size(), stats.prompt_seconds, arguments.tokens,
                static_cast<double>(arguments.tokens) / std::max(stats.decode_seconds, 1e-9));
  return ExitCode::kOk;
}

}  // namespace

void AddGenerateCommand(CLI::App* app, CommandLine* line) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* generate = app->add_subcommand(
      "generate", "Continue a text. Prints the prompt and the sampled text as it appears.");
  generate->add_option("checkpoint", arguments->checkpoint, "a checkpoint, or a run folder")
      ->required()
      ->type_name("CHECKPOINT");
  generate->add_option("--prompt", arguments->prompt, "the text to continue")
      ->required()
      ->type_name("TEXT");
  AddCount(generate, "--tokens", &arguments->tokens, "how many tokens to add (default 256)");
  generate->add_option("--tokenizer", arguments->tokenizer, "instead of the checkpoint's: bytes")
      ->type_name("NAME");
  SamplingOptions& sampling = arguments->sampling;
  generate->add_option("--temperature", sampling.temperature, "0: always the most likely token")
      ->capture_default_str();
  AddCount(generate, "--top-k", &sampling.top_k,
           "draw from the N most likely tokens only (default 0: all)");
  generate
      ->add_option("--top-p", sampling.top_p,
                   "draw from the most likely tokens that together reach this share")
      ->capture_default_str();
  generate->add_option("--seed", sampling.seed, "of the draws: the same seed, the same text")
      ->capture_default_str();
  generate->callback([line, arguments] { line->run = [arguments] { return Run(*arguments); }; });
}

}  // namespace krait
