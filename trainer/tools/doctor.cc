#include "trainer/tools/doctor.h"

#include <dlfcn.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/file.h"
#include "kernels/base/number.h"
#include "kernels/base/parallel_for.h"
#include "kernels/base/shell.h"
#include "kernels/cuda/runtime.h"
#include "kernels/hardware.h"
#include "nlohmann/json.hpp"
#include "parallel/world.h"
#include "trainer/report/environment.h"

namespace krait {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30, kMiB = int64_t{1} << 20;
constexpr int64_t kTrialBytes = 32 * kMiB;
constexpr double kSlowDisk = 20e6;             // bytes per second
constexpr double kSkewSeconds = 5;             // between this machine's clock and that of the disk
constexpr double kSomeDayIn2025 = 1735689600;  // a clock before it was never set
constexpr rlim_t kFewFiles = 1024;

using Findings = std::vector<Finding>;

bool Exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

std::string FirstLine(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// The output of a command's first line; "" when it cannot be run.
std::string FirstLineOf(const std::string& command) {
  std::FILE* const pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return "";
  std::string text;
  char part[256];
  while (std::fgets(part, sizeof part, pipe) != nullptr) text += part;
  (void)pclose(pipe);  // its output says enough
  return text.substr(0, text.find('\n'));
}

std::string InPath(const std::string& program) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string file = (folder.empty() ? "." : folder) + "/" + program;
    if (access(file.c_str(), X_OK) == 0) return file;
  }
  return "";
}

// ---- what computes

#ifdef KRAIT_CUDA_VERSION
// A function of a library that the program is linked to, without its header; null: not linked.
template <typename F>
F* Linked(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
}

std::string Dotted(int64_t version, int64_t major, int64_t minor) {
  return absl::StrCat(version / major, ".", version % major / minor, ".", version % minor);
}

// The newest CUDA that the driver can run, as 1000 * major + 10 * minor; 0: there is no driver.
int DriverCuda() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (driver == nullptr) return 0;
  int version = 0;
  using Get = int(int*);
  if (auto* const get = reinterpret_cast<Get*>(dlsym(driver, "cuDriverGetVersion"));
      get == nullptr || get(&version) != 0) {
    version = 0;
  }
  dlclose(driver);
  return version;
}

#endif

// By their device files: nvidia0, nvidia1, ...; a container may have any of them.
int GpuCount() {
  int count = 0;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator("/dev", ignored)) {
    const std::string name = entry.path().filename();
    count += name.starts_with("nvidia") && name.size() > 6 &&
             name.find_first_not_of("0123456789", 6) == std::string::npos;
  }
  return count;
}

void ExamineGpus(Findings* findings) {
  const int gpus = GpuCount();
  const std::string there = gpus == 1 ? "1 GPU" : absl::StrCat(gpus, " GPUs");
#ifdef KRAIT_CUDA_VERSION
  std::string driver = VersionIn(FirstLine("/proc/driver/nvidia/version"));
  const int newest = DriverCuda();
  if (driver.empty()) driver = newest > 0 ? "of unknown version" : "missing";
  std::string libraries = "CUDA " KRAIT_CUDA_VERSION;
  if (auto* const get = Linked<size_t()>("cudnnGetVersion"); get != nullptr) {
    libraries += ", cuDNN " + Dotted(static_cast<int64_t>(get()), 10000, 100);
  } else {
    libraries += ", no cuDNN (attention is several times slower)";
  }
  int nccl = 0;
  if (auto* const get = Linked<int(int*)>("ncclGetVersion"); get != nullptr && get(&nccl) == 0) {
    libraries += ", NCCL " + Dotted(nccl, 10000, 100);
  }
  std::string reason;
  if (cuda::Available(&reason)) {
    const cuda::DeviceInfo info = cuda::Info();
    Finding finding = {"gpu", Health::kOk,
                       absl::StrFormat("%s, the first one %s, %s free of %s; driver %s; %s", there,
                                       info.name, PrintBytes(info.free_bytes),
                                       PrintBytes(info.total_bytes), driver, libraries),
                       ""};
    if (info.free_bytes < info.total_bytes / 10 * 9) {
      finding.health = Health::kWarning;
      finding.cure = "another process holds the rest: nvidia-smi names it";
    }
    findings->push_back(finding);
    return;
  }
  const std::string text = absl::StrCat(
      "cannot be used: ", reason, "; driver ", driver,
      newest > 0 ? absl::StrFormat(" (up to CUDA %d.%d)", newest / 1000, newest % 1000 / 10) : "",
      "; this build has ", libraries);
  if (gpus == 0 && newest == 0) {
    findings->push_back({"gpu", Health::kWarning, text,
                         "runs compute on the CPU. In a container: start it with --gpus all; else "
                         "install NVIDIA's driver (nvidia-smi then shows the GPU)"});
  } else {
    findings->push_back({"gpu", Health::kFailure, text,
                         "a driver of 580 or newer (CUDA 13), the GPU's device files in the "
                         "container (--gpus all), and CUDA_VISIBLE_DEVICES unset or right"});
  }
#else
  if (gpus == 0) {
    findings->push_back({"gpu", Health::kOk, "none; this build computes on the CPU", ""});
  } else {
    findings->push_back({"gpu", Health::kWarning,
                         there + ", but this build computes on the CPU only",
                         "launch/setup build cuda && cmake --preset cuda && cmake --build "
                         "build/cuda, then build/cuda/krait"});
  }
#endif
}

void ExamineCpu(Findings* findings) {
  if (const absl::Status ready = PrepareDevice(Device::kCpu); ready.ok()) {
    Finding finding = {"processor", Health::kOk, HardwareName(Device::kCpu), ""};
    // What OpenBLAS takes for a processor that is newer than it knows.
    const bool oldest = finding.text.find("Prescott") != std::string::npos;
    const bool v4 = finding.text.find("x86-64-v4") != std::string::npos;
    if (oldest && (v4 || finding.text.find("x86-64-v3") != std::string::npos)) {
      finding.health = Health::kWarning;
      finding.text += ": OpenBLAS does not know this processor and takes its slowest kernels";
      finding.cure = absl::StrCat("export OPENBLAS_CORETYPE=", v4 ? "SkylakeX" : "Haswell",
                                  " (other kernels give other bits), or a newer OpenBLAS");
    }
    findings->push_back(finding);
  } else {
    findings->push_back({"processor", Health::kFailure, MessageOf(ready),
                         "apt-get install libopenblas0-openmp, or raise the limit that it names"});
  }
  cpu_set_t mask;
  CPU_ZERO(&mask);
  const int64_t online = sysconf(_SC_NPROCESSORS_ONLN);
  const int64_t usable = sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : online;
  Finding finding = {
      "affinity", Health::kOk,
      absl::StrFormat("%d of %d cores may be used, by %d threads", usable, online, MaxThreads()),
      ""};
  const char* threads = std::getenv("OMP_NUM_THREADS");
  if (usable == 1 && online > 1) {
    finding.health = Health::kWarning;
    finding.cure =
        "one core is what mpirun binds a rank to: mpirun --bind-to none (launch/run does it), or "
        "taskset -c 0-" +
        std::to_string(online - 1);
  } else if (MaxThreads() > usable) {
    finding.health = Health::kWarning;
    finding.cure =
        "more threads than cores wait for one another: OMP_NUM_THREADS=" + std::to_string(usable);
  } else if (MaxThreads() == 1 && usable > 1 && threads != nullptr) {
    finding.text += absl::StrCat(" (OMP_NUM_THREADS=", threads, ")");
  }
  findings->push_back(finding);
  // "200000 100000": so many microseconds of computing in each period.
  std::istringstream quota(FirstLine("/sys/fs/cgroup/cpu.max"));
  double share = 0, period = 0;
  if (quota >> share >> period && period > 0 &&
      share / period < static_cast<double>(MaxThreads())) {
    findings->push_back(
        {"quota", Health::kWarning,
         absl::StrFormat("the control group may use %.3g cores, and %d threads compute",
                         share / period, MaxThreads()),
         absl::StrFormat("OMP_NUM_THREADS=%d, or a container with more (--cpus)",
                         std::max(1, static_cast<int>(share / period)))});
  }
}

// ---- MPI

void ExamineMpi(Findings* findings) {
  const std::string library = MpiLibrary();
  const char* ranks = std::getenv("OMPI_COMM_WORLD_SIZE");
  findings->push_back({"mpi", Health::kOk,
                       library + (ranks == nullptr ? "; not started by mpirun"
                                                   : "; started by mpirun as a single rank"),
                       ""});
  const std::string mpirun = InPath("mpirun");
  if (mpirun.empty()) {
    findings->push_back({"mpirun", Health::kWarning, "there is none in PATH",
                         "needed for several ranks only: apt-get install openmpi-bin"});
    return;
  }
  const std::string said = FirstLineOf(ShellQuoted(mpirun) + " --version");
  const std::string of = mpirun + ": " + (said.empty() ? "says nothing" : said);
  const bool ours =
      said.find("Open MPI") != std::string::npos || said.find("OpenRTE") != std::string::npos;
  if (library.starts_with("Open MPI") && !ours) {
    findings->push_back({"mpirun", Health::kFailure, of,
                         "each of its processes would be a rank 0 of its own: put the mpirun of " +
                             library + " first in PATH"});
  } else if (ours && VersionIn(said) != VersionIn(library)) {
    findings->push_back({"mpirun", Health::kFailure, of + ", but krait uses " + library,
                         "put the mpirun of that version first in PATH, and the same version on "
                         "all machines and in all containers"});
  } else {
    findings->push_back({"mpirun", Health::kOk, of, ""});
  }
}

// ---- limits

std::string LimitText(rlim_t limit, bool bytes) {
  if (limit == RLIM_INFINITY) return "unlimited";
  return bytes ? PrintBytes(static_cast<int64_t>(limit)) : std::to_string(limit);
}

void ExamineLimits(Findings* findings) {
  const auto get = [](__rlimit_resource resource) {
    rlimit limit = {};
    return getrlimit(resource, &limit) == 0 ? limit.rlim_cur : RLIM_INFINITY;
  };
  const rlim_t locked = get(RLIMIT_MEMLOCK), files = get(RLIMIT_NOFILE), core = get(RLIMIT_CORE);
  const rlim_t space = std::min(get(RLIMIT_AS), get(RLIMIT_DATA)), size = get(RLIMIT_FSIZE);
  const bool registers_memory = Exists("/dev/infiniband");
  const auto add = [&](const std::string& what, Health health, const std::string& cure) {
    findings->push_back({"limits", health, what, cure});
  };
  if (registers_memory && locked != RLIM_INFINITY) {
    add("memory that may be locked: " + LimitText(locked, true), Health::kWarning,
        "InfiniBand needs it: ulimit -l unlimited (docker run --ulimit memlock=-1)");
  }
  if (files < kFewFiles) {
    add("open files: " + LimitText(files, false), Health::kWarning,
        "ranks and shards of checkpoints need more: ulimit -n 65536");
  }
  if (space != RLIM_INFINITY) {
    const bool cuda = cuda::Available();
    add("address space: " + LimitText(space, true), cuda ? Health::kFailure : Health::kWarning,
        std::string(cuda ? "CUDA reserves more than the memory that there is"
                         : "libraries and threads reserve more than they use") +
            ": ulimit -v unlimited, ulimit -d unlimited");
  }
  if (size != RLIM_INFINITY) {
    add("size of a file: " + LimitText(size, true), Health::kWarning,
        "a checkpoint's file may be larger: ulimit -f unlimited");
  }
  add(absl::StrCat("locked memory ", LimitText(locked, true), ", open files ",
                   LimitText(files, false), ", core files ",
                   core == 0 ? "off" : LimitText(core, true)),
      Health::kOk, "");
}

// ---- memory

int64_t AvailableMemory() {
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    int64_t kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %ld kB", &kib) == 1) return kib * 1024;
  }
  return 0;
}

void ExamineMemory(Findings* findings) {
  const int64_t usable = MachineMemory(), available = AvailableMemory();
  const int64_t all = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  Finding memory = {
      "memory", Health::kOk,
      absl::StrFormat("%s, of which %s are available", PrintBytes(all), PrintBytes(available)), ""};
  if (usable < all) {
    memory.text += absl::StrFormat("; a limit leaves %s to this process", PrintBytes(usable));
  }
  if (std::min(usable, available) < kGiB) {
    memory.health = Health::kWarning;
    memory.cure = "`krait plan CONFIG` shows what a run takes; other processes hold memory";
  }
  findings->push_back(memory);
  struct statvfs shared = {};
  if (statvfs("/dev/shm", &shared) != 0) {
    findings->push_back({"shm", Health::kWarning, "there is no /dev/shm",
                         "ranks of one machine exchange data there: mount a tmpfs (docker run "
                         "--ipc=host)"});
    return;
  }
  const auto block = static_cast<int64_t>(shared.f_frsize);
  const int64_t size = static_cast<int64_t>(shared.f_blocks) * block;
  const int64_t left = static_cast<int64_t>(shared.f_bavail) * block;
  Finding shm = {"shm", Health::kOk,
                 absl::StrFormat("/dev/shm has %s, %s free", PrintBytes(size), PrintBytes(left)),
                 ""};
  if (left < 512 * kMiB) {
    shm.health = Health::kWarning;
    shm.cure =
        "several ranks of one machine may need more: docker run --ipc=host (or --shm-size=1g); "
        "files left by killed programs can be removed";
  }
  findings->push_back(shm);
}

// ---- disk and clock

// Writes, locks and removes a file; its rate and the clock of the disk.
absl::Status TryDisk(double* bytes_per_second, double* skew) {
  const std::string path = absl::StrFormat("krait-doctor-%d.tmp", getpid());
  struct Remover {
    const std::string& path;
    ~Remover() { (void)unlink(path.c_str()); }
  };
  File file;
  KRAIT_ASSIGN_OR_RETURN(file, File::Create(path, /*exclusive=*/true, ExitCode::kCannotSave));
  const Remover remover{path};
  const std::vector<char> part(static_cast<size_t>(kMiB), 'x');
  const double begin = MonotonicSeconds();
  for (int64_t at = 0; at < kTrialBytes; at += kMiB) {
    KRAIT_RETURN_IF_ERROR(file.WriteAt(part.data(), part.size(), at));
  }
  const double written = UnixSeconds();
  KRAIT_RETURN_IF_ERROR(file.Sync());
  *bytes_per_second = static_cast<double>(kTrialBytes) / (MonotonicSeconds() - begin);
  struct stat info = {};
  if (fstat(file.fd(), &info) == 0) {
    *skew = static_cast<double>(info.st_mtim.tv_sec) +
            1e-9 * static_cast<double>(info.st_mtim.tv_nsec) - written;
  }
  if (flock(file.fd(), LOCK_EX | LOCK_NB) != 0) {
    return Error(ExitCode::kCannotSave,
                 std::string("flock does not work here: ") + std::strerror(errno));
  }
  return file.Close();
}

void ExamineDisk(Findings* findings) {
  double rate = 0, skew = 0;
  struct statvfs disk = {};
  std::string space = "free space unknown";
  bool full = false;
  if (statvfs(".", &disk) == 0) {
    const int64_t left = static_cast<int64_t>(disk.f_bavail) * static_cast<int64_t>(disk.f_frsize);
    space = PrintBytes(left) + " free";
    full = left < 2 * kGiB || (disk.f_files > 0 && disk.f_favail < 1000);
    if (disk.f_files > 0 && disk.f_favail < 1000) {
      space += absl::StrCat(" for ", disk.f_favail, " files");
    }
  }
  const absl::Status tried = TryDisk(&rate, &skew);
  if (!tried.ok()) {
    findings->push_back({"disk", Health::kFailure,
                         "the working folder (" + space + "): " + MessageOf(tried),
                         "runs need a folder that can be written, with locks: another one, or, on "
                         "NFS or Lustre, a mount with locks (flock)"});
  } else {
    Finding finding = {"disk", Health::kOk,
                       absl::StrFormat("the working folder has %s, and takes %s/s; locks work",
                                       space, PrintBytes(static_cast<int64_t>(rate))),
                       ""};
    if (full || rate < kSlowDisk) {
      finding.health = Health::kWarning;
      finding.cure = "checkpoints need room and speed: put run_dir on another disk";
    }
    findings->push_back(finding);
  }
  const double now = UnixSeconds();
  if (now < kSomeDayIn2025) {
    findings->push_back({"clock", Health::kWarning, "the machine's clock was never set",
                         "times in logs and checkpoints will be wrong: set it (NTP)"});
  } else if (skew > kSkewSeconds || skew < -kSkewSeconds) {
    findings->push_back({"clock", Health::kWarning,
                         absl::StrFormat("the disk's clock is %.0f s %s", skew < 0 ? -skew : skew,
                                         skew < 0 ? "behind" : "ahead"),
                         "set the clocks of this machine and of the file server by NTP"});
  } else {
    findings->push_back({"clock", Health::kOk, "set, and that of the disk agrees", ""});
  }
}

const char* Name(Health health) {
  switch (health) {
    case Health::kOk:
      return "ok";
    case Health::kWarning:
      return "warning";
    case Health::kFailure:
      return "failure";
  }
  return "";
}

int64_t Count(const Findings& findings, Health health) {
  return std::count_if(findings.begin(), findings.end(),
                       [&](const Finding& finding) { return finding.health == health; });
}

}  // namespace

std::vector<Finding> ExamineMachine() {
  Findings findings = {{"krait", Health::kOk, VersionString(), ""}};
  ExamineGpus(&findings);
  ExamineCpu(&findings);
  ExamineMpi(&findings);
  ExamineLimits(&findings);
  ExamineMemory(&findings);
  ExamineDisk(&findings);
  return findings;
}

bool AnyFailure(const std::vector<Finding>& findings) {
  return Count(findings, Health::kFailure) > 0;
}

std::string DoctorText(const std::vector<Finding>& findings) {
  std::string text;
  for (const Finding& finding : findings) {
    absl::StrAppendFormat(&text, "%-8s %-10s %s\n", Name(finding.health), finding.subject,
                          finding.text);
    if (!finding.cure.empty()) absl::StrAppendFormat(&text, "%19s cure: %s\n", "", finding.cure);
  }
  const int64_t warnings = Count(findings, Health::kWarning),
                failures = Count(findings, Health::kFailure);
  absl::StrAppendFormat(&text, "%d failure%s, %d warning%s\n", failures, failures == 1 ? "" : "s",
                        warnings, warnings == 1 ? "" : "s");
  return text;
}

std::string DoctorJson(const std::vector<Finding>& findings) {
  nlohmann::ordered_json json = {{"failures", Count(findings, Health::kFailure)},
                                 {"warnings", Count(findings, Health::kWarning)}};
  for (const Finding& finding : findings) {
    nlohmann::ordered_json one = {
        {"subject", finding.subject}, {"health", Name(finding.health)}, {"text", finding.text}};
    if (!finding.cure.empty()) one["cure"] = finding.cure;
    json["findings"].push_back(one);
  }
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string VersionIn(const std::string& text) {
  // The first number with a dot after it and a digit after that.
  for (size_t i = 0; i < text.size(); ++i) {
    const auto digit = [&](size_t at) {
      return at < text.size() && text[at] >= '0' && text[at] <= '9';
    };
    if (!digit(i) || (i > 0 && digit(i - 1))) continue;
    size_t end = i;
    while (digit(end) || (end > i && text[end] == '.' && digit(end + 1))) ++end;
    if (const std::string version = text.substr(i, end - i);
        version.find('.') != std::string::npos) {
      return version;
    }
  }
  return "";
}

}  // namespace krait
