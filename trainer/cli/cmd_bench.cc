// krait bench step, krait bench kernels
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "kernels/base/file.h"
#include "kernels/base/output.h"
#include "kernels/cuda/runtime.h"
#include "trainer/cli/commands.h"
#include "trainer/tools/bench.h"

namespace krait {
namespace {

// What may be no regular file: a device, or the pipe of >(...).
bool IsStream(const std::string& path) {
  std::error_code ignored;
  const auto status = std::filesystem::status(path, ignored);
  return std::filesystem::exists(status) && !std::filesystem::is_regular_file(status) &&
         !std::filesystem::is_directory(status);
}

// Where the figures go as JSON: "": nowhere; "-": to standard output.
struct JsonOutput {
  std::string path;
  bool force = false;
};

absl::Status CheckJson(const JsonOutput& json, const std::vector<std::string>& inputs) {
  if (json.path.empty() || json.path == "-" || IsStream(json.path)) return absl::OkStatus();
  return CheckOutput(json.path, FileKind::kJson, inputs, json.force);
}

absl::Status PrintFigures(const std::string& text, const std::string& json,
                          const std::string& path) {
  KRAIT_RETURN_IF_ERROR(Print(path == "-" ? json : text));
  if (path.empty() || path == "-") return absl::OkStatus();
  if (!IsStream(path)) return WriteFileAtomic(path, json, ExitCode::kCannotSave);
  std::FILE* stream = std::fopen(path.c_str(), "w");
  bool written = stream != nullptr && std::fputs(json.c_str(), stream) >= 0;
  if (stream != nullptr) written = std::fclose(stream) == 0 && written;
  if (written) return absl::OkStatus();
  return Error(ExitCode::kCannotSave, "cannot write " + path + ": " + std::strerror(errno));
}

void AddJson(CLI::App* app, JsonOutput* json) {
  AddPath(app, "--json", &json->path, "write the figures as JSON (-: to standard output)", "FILE");
  AddForce(app, &json->force);
}

}  // namespace

void AddBenchCommands(CLI::App* app, CommandLine* line) {
  CLI::App* bench = app->add_subcommand("bench", "Measure speed.")->require_subcommand(0, 1);

  struct StepArguments {
    ConfigArguments config;
    int64_t steps = 20, documents = 0;
    JsonOutput json;
    std::string trace;
  };
  auto step = std::make_shared<StepArguments>();
  CLI::App* step_command = bench->add_subcommand(
      "step", "Median training step on synthetic tokens, against the 2048^3 matrix product.");
  AddConfigArguments(step_command, &step->config);
  AddCount(step_command, "--steps", &step->steps, "steps to measure (default 20)");
  AddCount(step_command, "--documents", &step->documents,
           "tokens of a document (default: as long as a sequence)");
  AddJson(step_command, &step->json);
  AddPath(step_command, "--trace", &step->trace,
          "write one step's ops as a Chrome trace (chrome://tracing, ui.perfetto.dev)", "FILE");
  step_command->callback([line, step] {
    line->on_several_ranks = true;
    line->run = [line, step]() -> absl::StatusOr<ExitCode> {
      World* const world = line->world;
      KRAIT_RETURN_IF_ERROR(Agree(
          world, step->steps < 1 ? Error(ExitCode::kConfig, "--steps 0: at least 1 is measured")
                                 : CheckJson(step->json, {step->config.path})));
      const JsonOutput trace = {step->trace, step->json.force};
      KRAIT_RETURN_IF_ERROR(Agree(
          world, trace.path == "-"
                     ? Error(ExitCode::kConfig, "--trace -: give a file; the figures are printed")
                 : !trace.path.empty() && trace.path == step->json.path
                     ? Error(ExitCode::kConfig, "--trace and --json are one file")
                     : CheckJson(trace, {step->config.path})));
      RunConfig config;
      KRAIT_ASSIGN_OR_RETURN(config, LoadNamedConfig(step->config, ConfigUse::kPlan, line->world));
      StepBench result;
      KRAIT_ASSIGN_OR_RETURN(
          result, RunStepBench(config, step->steps, step->documents, world, !trace.path.empty()));
      if (world->first()) {
        KRAIT_RETURN_IF_ERROR(
            PrintFigures(StepBenchText(result), StepBenchJson(result), step->json.path));
        if (!trace.path.empty()) {
          KRAIT_RETURN_IF_ERROR(PrintFigures("", StepTraceJson(result), trace.path));
        }
      }
      return ExitCode::kOk;
    };
  });

  struct KernelArguments {
    std::string only, device = "auto";
    JsonOutput json;
  };
  auto kernels = std::make_shared<KernelArguments>();
  CLI::App* kernel_command = bench->add_subcommand(
      "kernels", "Every op family forward and backward, against matrix product or copy rate.");
  kernel_command->add_option("--only", kernels->only, "names that begin with NAME")
      ->type_name("NAME");
  kernel_command->add_option("--device", kernels->device, "auto: the GPU where there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->type_name("auto|cpu|cuda");
  AddJson(kernel_command, &kernels->json);
  kernel_command->callback([line, kernels] {
    line->run = [kernels]() -> absl::StatusOr<ExitCode> {
      KRAIT_RETURN_IF_ERROR(CheckJson(kernels->json, {}));
      std::string reason;
      const bool available = cuda::Available(&reason);
      if (kernels->device == "cuda" && !available) {
        return Error(ExitCode::kConfig, "--device cuda cannot be used: " + reason);
      }
      const Device device = available && kernels->device != "cpu" ? Device::kCuda : Device::kCpu;
      KernelBenches result;
      KRAIT_ASSIGN_OR_RETURN(result, RunKernelBench(kernels->only, device));
      KRAIT_RETURN_IF_ERROR(
          PrintFigures(KernelBenchText(result), KernelBenchJson(result), kernels->json.path));
      return ExitCode::kOk;
    };
  });
}

}  // namespace krait
