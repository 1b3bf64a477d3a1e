// krait probe
#include "trainer/cli/commands.h"
#include "trainer/tools/probe.h"

namespace krait {

void AddProbeCommand(CLI::App* app, CommandLine* line) {
  auto options = std::make_shared<ProbeOptions>();
  CLI::App* probe = app->add_subcommand(
      "probe",
      "Write a published model's forward values and gradients over given batches, and its weights "
      "after a few optimizer steps, as safetensors.");
  AddPath(probe, "--hf", &options->hf, "folder with config.json and safetensors weights", "DIR")
      ->required();
  AddPath(probe, "--batches", &options->batches,
          "safetensors with int32 batches [S,B,T] or input_ids [B,T]", "FILE")
      ->required();
  AddPath(probe, "--out", &options->out, "safetensors to write", "OUT.safetensors")->required();
  AddForce(probe, &options->force);
  AddCount(probe, "--steps", &options->steps, "optimizer steps to take, one per batch");
  AddOverrides(probe, &options->overrides);
  probe->callback([line, options] {
    line->on_several_ranks = true;
    line->run = [line, options]() -> absl::StatusOr<ExitCode> {
      options->world = line->world;
      KRAIT_RETURN_IF_ERROR(RunProbe(*options, PrintNotice));
      return ExitCode::kOk;
    };
  });
}

}  // namespace krait
