// krait checkpoint inspect, verify, diff
#include "trainer/checkpoint/checkpoint_tools.h"
#include "trainer/cli/commands.h"

namespace krait {
namespace {

struct Arguments {
  std::vector<std::string> paths;
  std::string slot;
  bool json = false;
};

CLI::App* AddTool(CLI::App* group, CommandLine* line, const char* name, const char* help,
                  const std::function<absl::StatusOr<ToolReport>(const Arguments&)>& run) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* tool = group->add_subcommand(name, help);
  AddPaths(tool, "paths", &arguments->paths, "a checkpoint, a folder of them, or a run folder",
           "PATH")
      ->required();
  tool->add_flag("--json", arguments->json, "JSON instead of text");
  if (std::string_view(name) == "diff") {
    tool->add_option("--slot", arguments->slot,
                     "compare this slot only: weight, exp_avg or exp_avg_sq")
        ->type_name("NAME");
  }
  tool->callback([line, arguments, run] {
    line->run = [arguments, run]() -> absl::StatusOr<ExitCode> {
      ToolReport report;
      KRAIT_ASSIGN_OR_RETURN(report, run(*arguments));
      KRAIT_RETURN_IF_ERROR(Print(report.text));
      return report.code;
    };
  });
  return tool;
}

}  // namespace

void AddCheckpointCommands(CLI::App* app, CommandLine* line) {
  CLI::App* group =
      app->add_subcommand("checkpoint", "Look into checkpoints.")->require_subcommand(0, 1);
  AddTool(group, line, "inspect", "What is inside: step, files, tensors.",
          [](const Arguments& a) { return InspectCheckpoints(a.paths, a.json); });
  AddTool(group, line, "verify", "Is every byte of every checkpoint whole? Exit 1 when not.",
          [](const Arguments& a) { return VerifyCheckpoints(a.paths, a.json); });
  AddTool(
      group, line, "diff", "Do two checkpoints hold the same values? Exit 1 when not.",
      [](const Arguments& a) { return DiffCheckpoints(a.paths[0], a.paths[1], a.slot, a.json); })
      ->get_option("paths")
      ->expected(2);
}

}  // namespace krait
