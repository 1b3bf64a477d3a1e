// krait data build, krait data inspect
#include <cstdio>

#include "absl/strings/str_format.h"
#include "data/inspect.h"
#include "data/token_file.h"
#include "kernels/base/number.h"
#include "kernels/base/stop_signals.h"
#include "trainer/cli/commands.h"

namespace krait {
namespace {

absl::StatusOr<ExitCode> Build(const BuildOptions& options) {
  const StopSignals signals("stopping, nothing is written; once more to end at once");
  BuildReport report;
  KRAIT_ASSIGN_OR_RETURN(report, BuildTokenFile(options));
  absl::PrintF("%s: %s tokens in %s documents from %s files", options.out,
               PrintGrouped(report.tokens), PrintGrouped(report.documents),
               PrintGrouped(report.files));
  if (report.skipped_files > 0) {
    absl::PrintF("; %s files skipped: empty or not text", PrintGrouped(report.skipped_files));
  }
  if (report.skipped_documents > 0) {
    absl::PrintF("; %s empty texts skipped", PrintGrouped(report.skipped_documents));
  }
  absl::PrintF("\n");
  return ExitCode::kOk;
}

absl::StatusOr<ExitCode> Inspect(const std::string& path, bool verify, bool as_json) {
  TokenFileSummary summary;
  KRAIT_ASSIGN_OR_RETURN(summary, InspectTokenFile(path, verify));
  const std::string text = as_json ? summary.ToJson() : summary.ToText();
  std::fputs(text.c_str(), stdout);
  if (!text.ends_with('\n')) std::fputs("\n", stdout);
  KRAIT_RETURN_IF_ERROR(summary.damage);
  return ExitCode::kOk;
}

}  // namespace

void AddDataCommands(CLI::App* app, CommandLine* line) {
  CLI::App* data = app->add_subcommand("data", "Token files.")->require_subcommand(0, 1);

  auto options = std::make_shared<BuildOptions>();
  CLI::App* build = data->add_subcommand(
      "build", "Make a token file of texts: .txt and other text files, .jsonl(.gz|.zst), folders.");
  build->add_option("--tokenizer", options->tokenizer, "the tokenizer: bytes")
      ->type_name("bytes|FILE")
      ->capture_default_str();
  build->add_option("--out", options->out, "the token file to write")
      ->required()
      ->type_name("X.h5");
  build->add_option("--seed", options->seed, "of the document shuffle")->capture_default_str();
  build->add_option("paths", options->paths, "files and folders")->required()->type_name("PATH");
  build->callback([line, options] { line->run = [options] { return Build(*options); }; });

  struct InspectArguments {
    std::string path;
    bool verify = false, json = false;
  };
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* inspect = data->add_subcommand("inspect", "What is in a token file.");
  inspect->add_option("path", arguments->path, "the token file")->required()->type_name("X.h5");
  inspect->add_flag("--verify", arguments->verify, "read everything and compare its hash");
  inspect->add_flag("--json", arguments->json, "one JSON object");
  inspect->callback([line, arguments] {
    line->run = [arguments] {
      return Inspect(arguments->path, arguments->verify, arguments->json);
    };
  });
}

}  // namespace krait
