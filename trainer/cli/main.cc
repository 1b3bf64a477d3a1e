// The krait command: krait COMMAND [CONFIG.yaml] [options] [key.path=value ...]
#include <algorithm>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <sstream>

#include "kernels/base/number.h"
#include "trainer/cli/commands.h"
#include "trainer/report/environment.h"

namespace krait {
namespace {

constexpr char kFooter[] =
    "exit codes: 0 done; 1 the answer is no; 10 saved and stopped on request; 20 configuration or\n"
    "misuse; 21 data; 30 no usable checkpoint; 31 cannot save; 40 numerics; 50 hang or collective\n"
    "failure; 70 internal; 71 out of memory; 128+n a rank died of signal n";

// One line per sentence, all of a user's mistakes at once.
void PrintError(const std::string& message) {
  std::istringstream lines(message);
  for (std::string line; std::getline(lines, line);) {
    std::fprintf(stderr, "krait: %s\n", line.c_str());
  }
}

std::string ShellQuoted(const std::string& word) {
  const bool plain = !word.empty() && std::all_of(word.begin(), word.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) ||
           std::string_view("-_=./,:+@%").find(c) != std::string_view::npos;
  });
  if (plain) return word;
  std::string quoted = "'";
  for (char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

// "krait data build": the command and subcommands that were recognised.
const CLI::App* ParsedCommand(const CLI::App& app, std::string* name) {
  const CLI::App* command = &app;
  *name = "krait";
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    *name += " " + command->get_name();
  }
  return command;
}

ExitCode Misuse(const CLI::App& app, const CLI::ParseError& error) {
  std::string name;
  ParsedCommand(app, &name);
  std::string reason = error.what();
  std::replace(reason.begin(), reason.end(), '\n', ' ');
  PrintError(name + ": " + reason + " (" + name + " --help says what it takes)");
  return ExitCode::kConfig;
}

ExitCode Run(int argc, char** argv) {
  CommandLine line;
  for (int i = 0; i < argc; ++i) {
    const std::string word = (i > 0 ? " " : "") + ShellQuoted(argv[i]);
    line.text += word;
    const std::string_view option = argv[i];
    const bool value = i > 0 && std::string_view(argv[i - 1]) == "--resume";
    if (option != "--resume" && !option.starts_with("--resume=") && !value) {
      line.text_without_resume += word;
    }
  }
  line.program = argc > 0 ? ShellQuoted(argv[0]) : "krait";

  CLI::App app("Krait pretrains hybrid Transformer-Mamba-MoE language models.", "krait");
  app.set_version_flag("--version", "krait " + VersionString());
  app.footer(kFooter);
  app.require_subcommand(0, 1);
  AddConfigCommands(&app, &line);
  AddDataCommands(&app, &line);
  AddPlanCommand(&app, &line);
  AddTrainCommand(&app, &line);
  AddEvalCommand(&app, &line);
  AddGenerateCommand(&app, &line);
  AddInteropCommands(&app, &line);
  AddCheckpointCommands(&app, &line);
  AddProbeCommand(&app, &line);
  AddBenchCommands(&app, &line);
  AddLaterCommands(&app, &line);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& wish) {  // --help, --version
    app.exit(wish);
    return ExitCode::kOk;
  } catch (const CLI::ParseError& error) {
    return Misuse(app, error);
  }
  if (!line.run) {
    std::string name;
    std::cerr << ParsedCommand(app, &name)->help(name);
    return ExitCode::kConfig;
  }
  absl::Status status = RefuseSeveralRanks();
  if (status.ok()) {
    const absl::StatusOr<ExitCode> code = line.run();
    if (code.ok()) return *code;
    status = code.status();
  }
  PrintError(MessageOf(status));
  return ExitCodeOf(status);
}

}  // namespace

void AddOverrides(CLI::App* app, std::vector<std::string>* overrides) {
  app->add_option("overrides", *overrides, "key.path=value words that replace settings")
      ->type_name("KEY=VALUE");
}

void AddConfigArguments(CLI::App* app, ConfigArguments* arguments) {
  app->add_option("config", arguments->path, "the run's YAML file")
      ->required()
      ->type_name("CONFIG.yaml");
  AddOverrides(app, &arguments->overrides);
}

void AddCount(CLI::App* app, const std::string& name, int64_t* value, const std::string& help) {
  app->add_option_function<std::string>(
         name,
         [name, value](const std::string& text) {
           std::string why;
           const std::optional<int64_t> count = ParseInteger(text, &why);
           if (!count.has_value()) throw CLI::ValidationError(name, text + " " + why);
           if (*count < 0) throw CLI::ValidationError(name, text + " is negative");
           *value = *count;
         },
         help)
      ->type_name("N");
}

void AddLaterCommands(CLI::App* app, CommandLine* line) {
  struct Later {
    const char* name;
    const char* help;
  };
  for (const Later& later : {Later{"ablate", "architecture ablations (not there yet)"},
                             Later{"doctor", "what this machine lacks (not there yet)"}}) {
    CLI::App* command = app->add_subcommand(later.name, later.help)->allow_extras();
    command->callback([line, name = std::string(later.name)] {
      line->run = [name]() -> absl::StatusOr<ExitCode> {
        return Error(ExitCode::kConfig, "krait " + name + " is not there yet");
      };
    });
  }
}

}  // namespace krait

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    return static_cast<int>(krait::Run(argc, argv));
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "krait: out of memory\n");
    return static_cast<int>(krait::ExitCode::kOutOfMemory);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "krait: internal error: %s\n", error.what());
  } catch (...) {
    std::fprintf(stderr, "krait: internal error\n");
  }
  return static_cast<int>(krait::ExitCode::kInternal);
}
