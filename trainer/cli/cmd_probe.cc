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
  probe->add_option("--hf", options->hf, "folder with config.json and safetensors weights")
      ->required()
      ->type_name("DIR");
  probe
      ->add_option("--batches", options->batches,
                   "safetensors with int32 batches [S,B,T] or input_ids [B,T]")
      ->required()
      ->type_name("FILE");
  probe->add_option("--out", options->out, "safetensors to write")
      ->required()
      ->type_name("OUT.safetensors");
  AddCount(probe, "--steps", &options->steps, "optimizer steps to take, one per batch");
  AddOverrides(probe, &options->overrides);
  probe->callback([line, options] {
    line->run = [options]() -> absl::StatusOr<ExitCode> {
      KRAIT_RETURN_IF_ERROR(RunProbe(*options));
      return ExitCode::kOk;
    };
  });
}

}  // namespace krait
