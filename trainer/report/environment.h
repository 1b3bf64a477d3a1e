// What a run finds around it: machine, build, memory, launcher.
#ifndef KRAIT_TRAINER_REPORT_ENVIRONMENT_H_
#define KRAIT_TRAINER_REPORT_ENVIRONMENT_H_

#include <cstdint>
#include <string>

#include "kernels/base/status.h"

namespace krait {

// "0.1.0 (Release, GCC 12.2.0, CPU)".
std::string VersionString();

// The text of environment.json, a list with a record for each start of the run: `before`, the text
// so far ("" at the first start; what is no list of records is left out), and that of this process:
// version, host, kernel, processor, cores and threads, memory, start time, `step` at which it goes
// on, and the variables of the environment that change how the run computes.
std::string EnvironmentJson(const std::string& before, int64_t step);

// The largest resident set of this process so far.
int64_t PeakMemoryBytes();

// Bytes of memory that this process may use: the machine's, or the lowest limit of the control
// groups around it and of its own (ulimit -v, -d).
int64_t MachineMemory();
// That limit, by a file like /proc/self/cgroup and the folder of control groups (version 1, 2 or
// both); the largest number when there is none.
int64_t ControlGroupMemory(const std::string& groups, const std::string& root);

}  // namespace krait

#endif  // KRAIT_TRAINER_REPORT_ENVIRONMENT_H_
