// krait doctor
#include "trainer/cli/commands.h"
#include "trainer/tools/doctor.h"

namespace krait {

void AddDoctorCommand(CLI::App* app, CommandLine* line) {
  auto as_json = std::make_shared<bool>(false);
  CLI::App* doctor = app->add_subcommand(
      "doctor",
      "What this machine and this shell have for a run and what they lack, with cures. Exit 1 when "
      "something would make runs fail.");
  doctor->add_flag("--json", *as_json, "one JSON object");
  doctor->callback([line, as_json] {
    line->run = [as_json]() -> absl::StatusOr<ExitCode> {
      const std::vector<Finding> findings = ExamineMachine();
      KRAIT_RETURN_IF_ERROR(Print(*as_json ? DoctorJson(findings) : DoctorText(findings)));
      return AnyFailure(findings) ? ExitCode::kNo : ExitCode::kOk;
    };
  });
}

}  // namespace krait
