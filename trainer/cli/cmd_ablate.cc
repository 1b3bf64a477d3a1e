// krait ablate plan | run | report
#include "trainer/ablate/report.h"
#include "trainer/ablate/sweep_plan.h"
#include "trainer/ablate/sweep_run.h"
#include "trainer/cli/commands.h"

namespace krait {
namespace {

struct Arguments {
  ConfigArguments sweep;
  SweepRunOptions run;
  bool json = false;
};

void AddSweepArguments(CLI::App* app, ConfigArguments* arguments) {
  AddPath(app, "sweep", &arguments->path, "the sweep's YAML file (configs/ablations has some)",
          "SWEEP.yaml")
      ->required();
  AddOverrides(app, &arguments->overrides);
}

void AddRanks(CLI::App* app, int64_t* ranks) {
  AddCount(app, "--ranks", ranks, "ranks of each run, started by mpirun (default 1)");
}

absl::Status CheckCounts(const SweepRunOptions& options) {
  if (options.ranks < 1) return Error(ExitCode::kConfig, "--ranks 0: a run has at least 1 rank");
  return absl::OkStatus();
}

absl::StatusOr<SweepPlan> Plan(const Arguments& arguments) {
  KRAIT_RETURN_IF_ERROR(CheckCounts(arguments.run));
  KRAIT_ASSIGN_OR_RETURN(const Sweep sweep,
                         LoadSweep(arguments.sweep.path, arguments.sweep.overrides));
  return PlanSweep(sweep, arguments.run.ranks, ReadStepSeconds(sweep.out));
}

}  // namespace

void AddAblateCommands(CLI::App* app, CommandLine* line) {
  CLI::App* ablate =
      app->add_subcommand("ablate", "Architecture ablations: many runs of one config, compared.")
          ->require_subcommand(0, 1);
  auto arguments = std::make_shared<Arguments>();

  CLI::App* plan_command = ablate->add_subcommand(
      "plan", "The runs of a sweep: parameters, FLOPs, steps, caches, memory; starts nothing.");
  AddSweepArguments(plan_command, &arguments->sweep);
  AddRanks(plan_command, &arguments->run.ranks);
  plan_command->add_flag("--json", arguments->json, "one JSON object");
  plan_command->callback([line, arguments] {
    line->run = [arguments]() -> absl::StatusOr<ExitCode> {
      KRAIT_ASSIGN_OR_RETURN(const SweepPlan plan, Plan(*arguments));
      for (const std::string& note : plan.notes) PrintNotice("note: " + note);
      KRAIT_RETURN_IF_ERROR(
          Print(arguments->json ? SweepPlanJson(plan) + "\n" : SweepPlanText(plan)));
      return ExitCode::kOk;
    };
  });

  CLI::App* run = ablate->add_subcommand(
      "run",
      "Train what is not finished yet, several at once; then the report. A second call goes on.");
  AddSweepArguments(run, &arguments->sweep);
  AddCount(run, "--jobs", &arguments->run.jobs,
           "runs at once, each with its share of the cores, or a GPU per rank (default: one per "
           "core or GPU, as far as memory goes)");
  AddRanks(run, &arguments->run.ranks);
  run->add_flag("--keep-moments", arguments->run.keep_moments,
                "keep the optimizer's moments of finished runs, so that they can be trained on");
  run->callback([line, arguments] {
    line->run = [arguments]() -> absl::StatusOr<ExitCode> {
      KRAIT_RETURN_IF_ERROR(CheckCounts(arguments->run));
      KRAIT_ASSIGN_OR_RETURN(const Sweep sweep,
                             LoadSweep(arguments->sweep.path, arguments->sweep.overrides));
      arguments->run.say = [](const std::string& text) { return Print(text + "\n"); };
      KRAIT_ASSIGN_OR_RETURN(const ExitCode ended, RunSweep(sweep, arguments->run));
      KRAIT_ASSIGN_OR_RETURN(const SweepPlan plan, Plan(*arguments));
      KRAIT_ASSIGN_OR_RETURN(const std::string text, WriteSweepReport(plan));
      KRAIT_RETURN_IF_ERROR(Print(text));
      return ended;
    };
  });

  CLI::App* report = ablate->add_subcommand(
      "report", "Compare what is there so far: tables (CSV, Markdown) and a page with plots.");
  AddSweepArguments(report, &arguments->sweep);
  AddRanks(report, &arguments->run.ranks);
  report->callback([line, arguments] {
    line->run = [arguments]() -> absl::StatusOr<ExitCode> {
      KRAIT_ASSIGN_OR_RETURN(const SweepPlan plan, Plan(*arguments));
      KRAIT_ASSIGN_OR_RETURN(const std::string text, WriteSweepReport(plan));
      KRAIT_RETURN_IF_ERROR(Print(text));
      return ExitCode::kOk;
    };
  });
}

}  // namespace krait
