#include "kernels/base/status.h"

#include "absl/strings/cord.h"

namespace krait {
namespace {

constexpr char kExitCodePayload[] = "krait/exit_code";

}  // namespace

absl::Status Error(ExitCode code, const std::string& message) {
  absl::Status status(absl::StatusCode::kFailedPrecondition, message);
  status.SetPayload(kExitCodePayload, absl::Cord(std::to_string(static_cast<int>(code))));
  return status;
}

ExitCode ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return ExitCode::kOk;
  const auto payload = status.GetPayload(kExitCodePayload);
  if (!payload.has_value()) return ExitCode::kInternal;
  return static_cast<ExitCode>(std::stoi(std::string(*payload)));
}

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

void ErrorList::Add(const absl::Status& status) {
  if (!status.ok()) errors_.push_back(status);
}

absl::Status ErrorList::ToStatus() const {
  if (errors_.empty()) return absl::OkStatus();
  std::string joined;
  for (const absl::Status& status : errors_) {
    if (!joined.empty()) joined += '\n';
    joined += MessageOf(status);
  }
  return Error(ExitCodeOf(errors_.front()), joined);
}

}  // namespace krait
