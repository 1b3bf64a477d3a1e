#include "trainer/report/environment.h"

#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <string_view>
#include <vector>

#include "absl/strings/str_split.h"
#include "kernels/base/clock.h"
#include "kernels/base/number.h"
#include "kernels/base/parallel_for.h"
#include "nlohmann/json.hpp"

namespace krait {
namespace {

// The value of the first "key : value" line of a /proc file, or "".
std::string ProcValue(const char* path, std::string_view key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (!std::string_view(line).starts_with(key)) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t start = line.find_first_not_of(" \t", colon + 1);
    return start == std::string::npos ? "" : line.substr(start);
  }
  return "";
}

// First line of a file as a number, or -1 ("max", or no such file).
int64_t ReadLimit(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  if (!std::getline(file, text)) return -1;
  return ParseInteger(text).value_or(-1);
}

// The variables that are kept, by name: what changes speed, placement or the run's place in a job.
// No prefixes: schedulers put credentials beside them (SLURM_JWT).
constexpr const char* kKeptVariables[] = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "MALLOC_ARENA_MAX",
    "NCCL_ALGO",
    "NCCL_CUMEM_ENABLE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_IB_HCA",
    "NCCL_LAUNCH_ORDER_IMPLICIT",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMP_DYNAMIC",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "OMP_THREAD_LIMIT",
    "OMP_WAIT_POLICY",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "PMI_RANK",
    "PMI_SIZE",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
    "SLURM_LOCALID",
    "SLURM_NNODES",
    "SLURM_NODEID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_NUM_TASKS",
};

}  // namespace

std::string VersionString() {
#if defined(__clang__)
  const std::string compiler = "Clang " __clang_version__;
#else
  const std::string compiler = "GCC " __VERSION__;
#endif
#ifdef KRAIT_WITH_CUDA
  const std::string devices = "CPU and CUDA";
#else
  const std::string devices = "CPU";
#endif
  return KRAIT_VERSION " (" KRAIT_BUILD_TYPE ", " + compiler + ", " + devices + ")";
}

std::string EnvironmentJson(const std::string& before, int64_t step) {
  auto starts = nlohmann::ordered_json::parse(before, nullptr, /*allow_exceptions=*/false);
  // A single record is what a run of an earlier version had.
  if (starts.is_object()) starts = nlohmann::ordered_json::array({starts});
  if (!starts.is_array()) starts = nlohmann::ordered_json::array();
  nlohmann::ordered_json json;
  json["krait"] = VersionString();
  utsname system = {};
  if (uname(&system) == 0) {
    json["host"] = system.nodename;
    json["system"] = std::string(system.sysname) + " " + system.release + " " + system.machine;
  }
  json["pid"] = getpid();
  json["started"] = UnixSeconds();
  json["step"] = step;
  json["processor"] = ProcValue("/proc/cpuinfo", "model name");
  json["processors_online"] = sysconf(_SC_NPROCESSORS_ONLN);
  json["threads"] = MaxThreads();
  json["memory_bytes"] = MachineMemory();
  nlohmann::ordered_json variables = nlohmann::ordered_json::object();
  for (const char* name : kKeptVariables) {
    const char* value = std::getenv(name);
    if (value != nullptr) variables[name] = value;
  }
  json["variables"] = variables;
  starts.push_back(json);
  // A variable may hold any bytes: what is not UTF-8 is replaced, never thrown at.
  return starts.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

int64_t MachineMemory() {
  int64_t limited = std::numeric_limits<int64_t>::max();
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit = {};
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) continue;
    limited = std::min(limited, static_cast<int64_t>(limit.rlim_cur));
  }
  const int64_t pages = sysconf(_SC_PHYS_PAGES);
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t memory = pages > 0 && page > 0 ? std::min(limited, pages * page) : limited;
  return std::min(memory, ControlGroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"));
}

int64_t ControlGroupMemory(const std::string& groups, const std::string& root) {
  int64_t memory = std::numeric_limits<int64_t>::max();
  std::ifstream in(groups);
  // A line is NUMBER:CONTROLLERS:PATH; version 2 has number 0 and no controllers.
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::vector<std::string> controllers =
        absl::StrSplit(line.substr(first + 1, second - first - 1), ',');
    const bool version_2 = controllers.front().empty();
    if (!version_2 &&
        std::find(controllers.begin(), controllers.end(), "memory") == controllers.end()) {
      continue;
    }
    const std::string mounted = root + (version_2 ? "" : "/memory");
    const char* file = version_2 ? "/memory.max" : "/memory.limit_in_bytes";
    // The limit of each group around this process counts. In a container its path may be that of
    // the host, of which only the root is there.
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      const int64_t limit = ReadLimit(mounted + path + file);
      if (limit > 0) memory = std::min(memory, limit);
      if (path.find('/') == std::string::npos) break;
    }
  }
  return memory;
}

int64_t PeakMemoryBytes() {
  rusage usage = {};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? int64_t{usage.ru_maxrss} * 1024 : 0;
}

}  // namespace krait
