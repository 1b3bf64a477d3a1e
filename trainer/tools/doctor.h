// `krait doctor`: what this machine and this shell have for a run, and what they lack.
#ifndef KRAIT_TRAINER_TOOLS_DOCTOR_H_
#define KRAIT_TRAINER_TOOLS_DOCTOR_H_

#include <cstdint>
#include <string>
#include <vector>

namespace krait {

enum class Health : uint8_t { kOk, kWarning, kFailure };  // kFailure: a run would fail or crawl

struct Finding {
  std::string subject;  // "gpu", "mpirun", ...
  Health health = Health::kOk;
  std::string text;
  std::string cure;  // "" where nothing is wrong
};

// Examines everything that can be seen from one process; writes 32 MiB into the working folder and
// removes them. Takes a second or two.
std::vector<Finding> ExamineMachine();

bool AnyFailure(const std::vector<Finding>& findings);
std::string DoctorText(const std::vector<Finding>& findings);
std::string DoctorJson(const std::vector<Finding>& findings);

// "4.1.4" of "mpirun (Open MPI) 4.1.4" or "Open MPI v4.1.4"; "" where there is no version.
std::string VersionIn(const std::string& text);

}  // namespace krait

#endif  // KRAIT_TRAINER_TOOLS_DOCTOR_H_
