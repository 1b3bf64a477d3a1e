// krait data build, krait data inspect
#include <algorithm>

#include "absl/strings/str_format.h"
#include "data/inspect.h"
#include "data/token_file.h"
#include "kernels/base/number.h"
#include "kernels/base/stop_signals.h"
#include "nlohmann/json.hpp"
#include "trainer/cli/commands.h"
#include "trainer/report/progress_line.h"

namespace krait {
namespace {

std::string ReportJson(const BuildOptions& options, const BuildReport& report) {
  const nlohmann::ordered_json json = {{"path", options.out},
                                       {"tokens", report.tokens},
                                       {"documents", report.documents},
                                       {"files", report.files},
                                       {"linked_files", report.linked_files},
                                       {"plain_json_files", report.plain_json_files},
                                       {"skipped_files", report.skipped_files},
                                       {"repeated_files", report.repeated_files},
                                       {"repeated_folders", report.repeated_folders},
                                       {"hidden", report.hidden},
                                       {"skipped_documents", report.skipped_documents},
                                       {"bad_records", report.bad_records},
                                       {"bad", report.bad},
                                       {"text_bytes", report.text_bytes},
                                       {"resumed_documents", report.resumed_documents}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string ReportText(const BuildOptions& options, const BuildReport& report) {
  std::string text = absl::StrFormat("%s: %s tokens in %s documents from %s files", options.out,
                                     PrintGrouped(report.tokens), PrintGrouped(report.documents),
                                     PrintGrouped(report.files));
  const auto add = [&text](int64_t count, const char* what) {
    if (count > 0) absl::StrAppendFormat(&text, "; %s %s", PrintGrouped(count), what);
  };
  add(report.linked_files, "of them by symbolic links");
  add(report.plain_json_files, "of them .json without records, taken as texts");
  add(report.skipped_files, "files skipped: empty or not text");
  add(report.repeated_files, "links to files skipped that are read already");
  add(report.repeated_folders, "links to folders skipped that are read already");
  add(report.hidden, "names passed over that begin with a dot");
  add(report.skipped_documents, "empty texts skipped");
  add(report.bad_records, "bad records passed over");
  add(report.resumed_documents, "documents taken over from a build that was cut short");
  return text + "\n";
}

absl::StatusOr<ExitCode> Build(BuildOptions options, bool as_json) {
  BuildReport report;
  const StopSignals signals("stopping; once more to end at once");
  ProgressLine line("building " + options.out, ProgressLine::OnStandardError());
  options.progress = [&line](int64_t done, int64_t total) {
    line.Update(done, total);
    return absl::OkStatus();
  };
  const auto built = BuildTokenFile(options);
  ProgressLine::ClearStandardError();
  KRAIT_ASSIGN_OR_RETURN(report, built);
  for (const std::string& bad : report.bad) PrintNotice("passed over: " + bad);
  KRAIT_RETURN_IF_ERROR(Print(as_json ? ReportJson(options, report) : ReportText(options, report)));
  return ExitCode::kOk;
}

absl::StatusOr<ExitCode> Inspect(const std::string& path, bool verify, bool as_json) {
  TokenFileSummary summary;
  KRAIT_ASSIGN_OR_RETURN(summary, InspectTokenFile(path, verify));
  std::string text = as_json ? summary.ToJson() : summary.ToText();
  if (!text.ends_with('\n')) text += '\n';
  KRAIT_RETURN_IF_ERROR(Print(text));
  KRAIT_RETURN_IF_ERROR(summary.damage);
  return ExitCode::kOk;
}

}  // namespace

void AddDataCommands(CLI::App* app, CommandLine* line) {
  CLI::App* data = app->add_subcommand("data", "Token files.")->require_subcommand(0, 1);

  struct BuildArguments {
    BuildOptions options;
    int64_t threads = 0;
    bool json = false;
  };
  auto build = std::make_shared<BuildArguments>();
  BuildOptions& options = build->options;
  CLI::App* build_command = data->add_subcommand("build",
                                                 "Make a token file of texts: .txt and other text "
                                                 "files, .jsonl and .json(.gz|.zst), folders.");
  build_command
      ->add_option("--tokenizer", options.tokenizer,
                   "bytes, a Hugging Face tokenizer.json, a SentencePiece model, or a folder with "
                   "one of them")
      ->type_name("bytes|FILE")
      ->capture_default_str();
  AddPath(build_command, "--out", &options.out, "the token file to write", "X.h5")->required();
  AddForce(build_command, &options.force);
  AddSeed(build_command, &options.seed, "of the document shuffle");
  AddCount(build_command, "--max-bad", &options.max_bad,
           "pass over up to N bad records, each named (default 0: the first one ends the build)");
  AddCount(build_command, "--threads", &build->threads, "that encode (default: one per core)");
  AddPaths(build_command, "paths", &options.paths, "files and folders", "PATH")->required();
  build_command->add_flag("--json", build->json, "one JSON object");
  build_command->callback([line, build] {
    line->stops = true;
    build->options.threads = static_cast<int>(std::min<int64_t>(build->threads, 1024));
    line->run = [build] { return Build(build->options, build->json); };
  });

  struct InspectArguments {
    std::string path;
    bool verify = false, json = false;
  };
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* inspect = data->add_subcommand("inspect", "What is in a token file.");
  AddPath(inspect, "path", &arguments->path, "the token file", "X.h5")->required();
  inspect->add_flag("--verify", arguments->verify, "read everything and compare its hash");
  inspect->add_flag("--json", arguments->json, "one JSON object");
  inspect->callback([line, arguments] {
    line->run = [arguments] {
      return Inspect(arguments->path, arguments->verify, arguments->json);
    };
  });
}

}  // namespace krait
