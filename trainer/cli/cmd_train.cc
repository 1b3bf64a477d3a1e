// krait train
#include "absl/strings/str_cat.h"
#include "trainer/cli/commands.h"
#include "trainer/train/train_run.h"

namespace krait {

void AddTrainCommand(CLI::App* app, CommandLine* line) {
  struct Arguments {
    ConfigArguments config;
    TrainOptions options;
  };
  auto arguments = std::make_shared<Arguments>();
  CLI::App* train = app->add_subcommand(
      "train", "Train a model; a second start continues the run where its last checkpoint is.");
  AddConfigArguments(train, &arguments->config);
  ResumeOptions& resume = arguments->options.resume;
  AddPath(train, "--resume", &resume.resume,
          "auto (default): the newest whole checkpoint; never: start anew, older checkpoints are "
          "set aside; PATH: that checkpoint",
          "auto|never|PATH");
  AddPath(train, "--init", &resume.init,
          "start at step 0 with the weights of CHECKPOINT (a checkpoint of this run goes first)",
          "CHECKPOINT")
      ->check([](const std::string& path) -> std::string {
        return path.empty() ? "is empty; a checkpoint is needed" : "";
      });
  train
      ->add_option("--allow-change", resume.allow_change,
                   "let a resumed run change seq_len, batch_tokens, data or seed; once per key")
      ->type_name("KEY")
      ->allow_extra_args(false);
  train->add_flag("--force", arguments->options.force,
                  "try it even where the planned memory is more than there is");
  train->callback([line, arguments] {
    line->on_several_ranks = true;
    line->stops = true;
    line->run = [line, arguments]() -> absl::StatusOr<ExitCode> {
      RunConfig config;
      KRAIT_ASSIGN_OR_RETURN(config,
                             LoadNamedConfig(arguments->config, ConfigUse::kTrain, line->world));
      arguments->options.world = line->world;
      arguments->options.program = line->program;
      arguments->options.command_line = line->text;
      arguments->options.continue_line = line->text_without_resume;
      if (line->world->size() > 1) {
        const std::string launcher = LaunchOfThisProcess().launcher;
        arguments->options.continue_line =
            launcher == "torchrun"
                ? line->text_without_resume + "   # on all ranks, started as these were"
                : absl::StrCat(launcher, " -n ", line->world->size(), " ",
                               line->text_without_resume);
      }
      return RunTraining(config, arguments->options);
    };
  });
}

}  // namespace krait
