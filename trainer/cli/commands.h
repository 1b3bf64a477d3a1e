// The subcommands of krait: each Add function declares one command's options and what runs when it
// is chosen. Only main.cc and cmd_*.cc know the command line library.
#ifndef KRAIT_TRAINER_CLI_COMMANDS_H_
#define KRAIT_TRAINER_CLI_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"
#include "parallel/world.h"
#include "trainer/config/config.h"

namespace krait {

struct CommandLine {
  World* world = nullptr;           // all ranks that were started
  std::string program;              // argv[0]
  std::string text;                 // the whole line, quoted for a shell
  std::string text_without_resume;  // --resume and its value left out
  // Set by the command that was parsed. An error that run() returns and that is not Agree's ends
  // all ranks.
  std::function<absl::StatusOr<ExitCode>()> run;
  bool on_several_ranks = false;  // run() is called on all ranks; else several are refused
  bool stops = false;             // run() makes a StopSignals object
};

// CONFIG.yaml [key.path=value ...]
struct ConfigArguments {
  std::string path;
  std::vector<std::string> overrides;
};
void AddConfigArguments(CLI::App* app, ConfigArguments* arguments);
void AddOverrides(CLI::App* app, std::vector<std::string>* overrides);
// LoadConfig of them; the config's notes go to standard error. The second for all ranks, which
// agree about errors.
absl::StatusOr<RunConfig> LoadNamedConfig(const ConfigArguments& arguments, ConfigUse use,
                                          int64_t ranks);
absl::StatusOr<RunConfig> LoadNamedConfig(const ConfigArguments& arguments, ConfigUse use,
                                          World* world);

// Options whose value is a count (4096, 256k, 2Mi), a seed, or a number of at least 0.
void AddCount(CLI::App* app, const std::string& name, int64_t* value, const std::string& help);
void AddSeed(CLI::App* app, uint64_t* seed, const std::string& help);
void AddNumber(CLI::App* app, const std::string& name, double* value, const std::string& help);
// Paths, taken by UserPath (kernels/base/shell.h).
CLI::Option* AddPath(CLI::App* app, const std::string& name, std::string* path,
                     const std::string& help, const std::string& type);
CLI::Option* AddPaths(CLI::App* app, const std::string& name, std::vector<std::string>* paths,
                      const std::string& help, const std::string& type);
// --force: replace an output that exists.
void AddForce(CLI::App* app, bool* force);

// Writes to standard output at once. kCannotSave when that fails; a pipe that its reader closed is
// no failure.
absl::Status Print(std::string_view text);
// "krait: LINE" on standard error.
void PrintNotice(const std::string& line);

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
void AddDoctorCommand(CLI::App* app, CommandLine* line);
void AddAblateCommands(CLI::App* app, CommandLine* line);

}  // namespace krait

#endif  // KRAIT_TRAINER_CLI_COMMANDS_H_
