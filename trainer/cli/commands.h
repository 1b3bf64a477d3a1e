// The subcommands of krait: each Add function declares one command's options and what runs when it
// is chosen. Only main.cc and cmd_*.cc know the command line library.
#ifndef KRAIT_TRAINER_CLI_COMMANDS_H_
#define KRAIT_TRAINER_CLI_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "trainer/config/config.h"

namespace krait {

struct CommandLine {
  std::string program;              // argv[0]
  std::string text;                 // the whole line, quoted for a shell
  std::string text_without_resume;  // --resume and its value left out
  // Set by the command that was parsed.
  std::function<absl::StatusOr<ExitCode>()> run;
};

// CONFIG.yaml [key.path=value ...]
struct ConfigArguments {
  std::string path;
  std::vector<std::string> overrides;
};
void AddConfigArguments(CLI::App* app, ConfigArguments* arguments);
void AddOverrides(CLI::App* app, std::vector<std::string>* overrides);

// An option whose value is a count (4096, 256k, 2Mi).
void AddCount(CLI::App* app, const std::string& name, int64_t* value, const std::string& help);

void AddConfigCommands(CLI::App* app, CommandLine* line);
void AddDataCommands(CLI::App* app, CommandLine* line);
void AddPlanCommand(CLI::App* app, CommandLine* line);
void AddTrainCommand(CLI::App* app, CommandLine* line);
void AddEvalCommand(CLI::App* app, CommandLine* line);
void AddGenerateCommand(CLI::App* app, CommandLine* line);
void AddInteropCommands(CLI::App* app, CommandLine* line);  // import, export
void AddCheckpointCommands(CLI::App* app, CommandLine* line);
void AddProbeCommand(CLI::App* app, CommandLine* line);
void AddBenchCommands(CLI::App* app, CommandLine* line);
void AddLaterCommands(CLI::App* app, CommandLine* line);  // ablate, doctor

}  // namespace krait

#endif  // KRAIT_TRAINER_CLI_COMMANDS_H_
