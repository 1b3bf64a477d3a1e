// The krait command: krait COMMAND [CONFIG.yaml] [options] [key.path=value ...]
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <iostream>
#include <new>
#include <sstream>
#include <system_error>
#include <thread>

#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/parallel_for.h"
#include "kernels/base/shell.h"
#include "kernels/base/stop_signals.h"
#include "parallel/world.h"
#include "trainer/cli/commands.h"
#include "trainer/report/environment.h"

namespace krait {
namespace {

constexpr char kFooter[] =
    "exit codes: 0 done; 1 the answer is no; 10 saved and stopped on request; 20 configuration or\n"
    "misuse; 21 data; 30 no usable checkpoint; 31 cannot save; 40 numerics; 50 hang or collective\n"
    "failure; 70 internal; 71 out of memory; 128+n a rank died of signal n";

// One line per sentence, all of a user's mistakes at once.
void PrintError(const std::string& message, const std::string& who = "") {
  std::istringstream lines(message);
  for (std::string line; std::getline(lines, line);) {
    std::fprintf(stderr, "krait: %s%s\n", who.c_str(), line.c_str());
  }
}

// The last of the subcommands that were recognised; `above`: the words before its own, as in
// "krait data".
const CLI::App* ParsedCommand(const CLI::App& app, std::string* above) {
  const CLI::App* command = &app;
  above->clear();
  while (!command->get_subcommands().empty()) {
    *above += (above->empty() ? "" : " ") + command->get_name();
    command = command->get_subcommands().front();
  }
  return command;
}

// "krait data build".
std::string ParsedName(const CLI::App& app) {
  std::string above;
  const std::string last = ParsedCommand(app, &above)->get_name();
  return above + (above.empty() ? "" : " ") + last;
}

absl::Status Misuse(const CLI::App& app, const CLI::ParseError& error) {
  const std::string name = ParsedName(app);
  std::string reason = error.what();
  std::replace(reason.begin(), reason.end(), '\n', ' ');
  return Error(ExitCode::kConfig,
               name + ": " + reason + " (" + name + " --help says what it takes)");
}

absl::StatusOr<ExitCode> Help(const CLI::App& app, const CLI::Success& wish) {
  std::ostringstream text;
  app.exit(wish, text, text);
  KRAIT_RETURN_IF_ERROR(Print(text.str()));
  return ExitCode::kOk;
}

// The OpenMP runtime ends the process where it cannot make its threads.
absl::Status CheckThreads() {
  constexpr int kMost = 4096;
  if (MaxThreads() <= kMost) return absl::OkStatus();
  return Error(ExitCode::kConfig,
               absl::StrFormat("OMP_NUM_THREADS asks for %d threads, more than the %d that krait "
                               "takes; here are %d cores",
                               MaxThreads(), kMost, std::thread::hardware_concurrency()));
}

absl::StatusOr<ExitCode> Run(int argc, char** argv, World* world) {
  CommandLine line;
  line.world = world;
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
  AddDoctorCommand(&app, &line);
  AddAblateCommands(&app, &line);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& wish) {  // --help, --version
    return world->first() ? Help(app, wish) : ExitCode::kOk;
  } catch (const CLI::ParseError& error) {
    return Agree(world, Misuse(app, error));
  }
  // What follows is agreed upon, as the other two are: an option that looks at files may be wrong
  // on one machine and right on another.
  KRAIT_RETURN_IF_ERROR(Agree(world, CheckThreads()));
  if (!line.run) {
    std::string above;
    const CLI::App* command = ParsedCommand(app, &above);
    if (world->first()) std::cerr << command->help(above);
    return ExitCode::kConfig;
  }
  if (world->size() > 1 && !line.on_several_ranks) {
    const std::string launcher = LaunchOfThisProcess().launcher;
    return Agree(world,
                 Error(ExitCode::kConfig,
                       ParsedName(app) + " runs as one process, but " + launcher + " started " +
                           std::to_string(world->size()) + ": start it without " + launcher +
                           (launcher == "torchrun" ? " (unset RANK and WORLD_SIZE)" : "")));
  }
  if (!line.stops) LetStopSignalThrough();
  return line.run();
}

// Runs the command and says what went wrong. What not all ranks know of ends all of them.
ExitCode RunAndReport(int argc, char** argv, World* world) {
  const std::string who =
      world->size() > 1 ? "rank " + std::to_string(world->rank()) + ": " : std::string();
  ExitCode code = ExitCode::kInternal;
  try {
    const absl::StatusOr<ExitCode> result = Run(argc, argv, world);
    if (result.ok()) return *result;
    code = ExitCodeOf(result.status());
    const bool agreed = IsAgreed(result.status());
    PrintError(MessageOf(result.status()), agreed ? "" : who);
    if (agreed) return code;
  } catch (const std::bad_alloc&) {
    code = ExitCode::kOutOfMemory;
    PrintError("out of memory", who);
  } catch (const std::exception& error) {
    PrintError(std::string("internal error: ") + error.what(), who);
  } catch (...) {
    PrintError("internal error", who);
  }
  if (world->size() > 1) world->Abort(code);
  return code;
}

// Of threads whose exceptions nobody catches, too.
void OutOfMemory() { Fatal(ExitCode::kOutOfMemory, __FILE__, __LINE__, "out of memory"); }

// OpenMP's threads wait for the next loop by spinning unless told otherwise: two runs on the same
// cores then wait for each other, a hundred times slower than one after the other. The OpenMP
// runtime reads the variable that tells it when it is loaded, before main: so krait sets it and
// starts itself once more in the same process. A user's own setting stays.
void LetThreadsSleep(char** argv) {
  for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}) {
    if (std::getenv(name) != nullptr) return;
  }
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error || setenv("OMP_WAIT_POLICY", "passive", /*overwrite=*/1) != 0) return;
  execv(self.c_str(), argv);  // returns where it cannot be done: then the threads spin
}

}  // namespace

}  // namespace krait

int main(int argc, char** argv) {
  krait::HoldStopSignal();
  krait::LetThreadsSleep(argv);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::signal(SIGPIPE, SIG_IGN);  // a write then fails, and Print sees why
  const auto world = krait::StartWorld(&argc, &argv);
  if (!world.ok()) {
    krait::PrintError(krait::MessageOf(world.status()));
    return static_cast<int>(krait::ExitCodeOf(world.status()));
  }
  if ((*world)->size() > 1) std::set_new_handler(krait::OutOfMemory);
  return static_cast<int>(krait::RunAndReport(argc, argv, world->get()));
}
