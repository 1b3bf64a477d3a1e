// Errors a user can cause: absl::Status with a sentence, and the process exit code it leads to.
//
// Two kinds of failure exist in Krait. What a user can get wrong (a config key, a file, a world
// size) travels as absl::Status built by Error(). A broken invariant or a failed CUDA / library
// call goes to Fatal() in check.h, which ends the process.
#ifndef KRAIT_KERNELS_BASE_STATUS_H_
#define KRAIT_KERNELS_BASE_STATUS_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/exit_code.h"

namespace krait {

// A status that carries `code`; `message` is one sentence that names the place (file:line, key or
// path), what was found and what would be right.
absl::Status Error(ExitCode code, const std::string& message);

// The exit code of a status: kOk for OK, the code given to Error(), kInternal for any other error.
ExitCode ExitCodeOf(const absl::Status& status);

// The text of a status without Abseil's code prefix.
std::string MessageOf(const absl::Status& status);

// Collects errors so that all of a user's mistakes are reported at once.
class ErrorList {
 public:
  void Add(const absl::Status& status);  // OK is ignored
  void Add(ExitCode code, const std::string& message) { Add(Error(code, message)); }
  bool empty() const { return errors_.empty(); }
  const std::vector<absl::Status>& errors() const { return errors_; }
  // OK when empty, else one status: the messages joined by newlines, the code of the first.
  absl::Status ToStatus() const;

 private:
  std::vector<absl::Status> errors_;
};

}  // namespace krait

#define KRAIT_CONCAT_INNER(a, b) a##b
#define KRAIT_CONCAT(a, b) KRAIT_CONCAT_INNER(a, b)

// Returns from the enclosing function when `expr` (an absl::Status) is not OK.
#define KRAIT_RETURN_IF_ERROR(expr)                               \
  do {                                                            \
    if (absl::Status krait_status = (expr); !krait_status.ok()) { \
      return krait_status;                                        \
    }                                                             \
  } while (false)

// Evaluates an absl::StatusOr expression; returns its status, or assigns its value to `lhs`.
#define KRAIT_ASSIGN_OR_RETURN(lhs, expr) \
  KRAIT_ASSIGN_OR_RETURN_IMPL(KRAIT_CONCAT(krait_or_, __LINE__), lhs, expr)
#define KRAIT_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                \
  if (!tmp.ok()) return tmp.status();               \
  lhs = std::move(tmp).value()

#endif  // KRAIT_KERNELS_BASE_STATUS_H_
