// krait plan
#include "kernels/base/number.h"
#include "trainer/cli/commands.h"
#include "trainer/tools/plan.h"

namespace krait {

void AddPlanCommand(CLI::App* app, CommandLine* line) {
  struct Arguments {
    ConfigArguments config;
    PlanOptions options = {.ranks = 0};
    const CLI::Option* ranks_given = nullptr;
    bool json = false;
  };
  auto arguments = std::make_shared<Arguments>();
  CLI::App* plan = app->add_subcommand(
      "plan",
      "What a config means: parameters, FLOPs, memory per rank, caches. Exit 1 when it does not "
      "fit.");
  AddConfigArguments(plan, &arguments->config);
  AddCount(plan, "--ranks", &arguments->options.ranks,
           "plan for so many ranks (default: as few as the config's layout has)");
  arguments->ranks_given = plan->get_option("--ranks");
  AddCount(plan, "--context", &arguments->options.context,
           "context length of caches and states (default: seq_len and 262,144)");
  plan->add_option_function<std::string>(
          "--memory",
          [arguments](const std::string& text) {
            std::string why;
            const std::optional<int64_t> bytes = ParseBytes(text, &why);
            if (!bytes.has_value()) throw CLI::ValidationError("--memory", text + " " + why);
            arguments->options.memory = *bytes;
          },
          "memory of one rank, e.g. 80GiB (default: of this machine)")
      ->type_name("SIZE");
  plan->add_flag("--json", arguments->json, "one JSON object");
  plan->callback([line, arguments] {
    line->run = [arguments]() -> absl::StatusOr<ExitCode> {
      int64_t& ranks = arguments->options.ranks;
      if (ranks < 1 && arguments->ranks_given->count() > 0) {
        return Error(ExitCode::kConfig, "--ranks 0: a plan is for at least 1 rank");
      }
      RunConfig config;
      if (ranks == 0) {
        KRAIT_ASSIGN_OR_RETURN(config,
                               LoadConfig(arguments->config.path, arguments->config.overrides,
                                          ConfigUse::kPlan, /*ranks=*/0));
        ranks = LeastRanks(config.parallel);
      }
      KRAIT_ASSIGN_OR_RETURN(config, LoadNamedConfig(arguments->config, ConfigUse::kPlan, ranks));
      PlanReport report;
      KRAIT_ASSIGN_OR_RETURN(report, MakePlan(config, arguments->options));
      KRAIT_RETURN_IF_ERROR(Print(arguments->json ? PlanJson(report) + "\n" : PlanText(report)));
      return report.fits ? ExitCode::kOk : ExitCode::kNo;
    };
  });
}

}  // namespace krait
